"""``launch/train.py --optimizer``: every class trains, alone and on two ranks, and its log says with what."""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread

from ppsf_dist import RECOMMENDED
from ppsf_dist.bootstrap import ProcessInfo
from tests.launch.test_train import PLAIN, SAME_LOSS, TINY, TWO_RANKS, metrics

pytestmark = pytest.mark.launch

NAMES = [
    "ProdigyPlusScheduleFree", "Prodigy", "AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree",
    "AdamWScheduleFreeClosure", "SGDScheduleFreeClosure", "RAdamScheduleFreeClosure", "ScheduleFreeWrapper", "AdamW",
]  # fmt: skip
KINDS = ["Prodigy", "SGDScheduleFreeClosure", "ScheduleFreeWrapper"]
"""One of each way in which a class meets the ranks; ProdigyPlusScheduleFree does so in test_train.py."""
LAUNCH = Path(__file__).resolve().parents[2] / "launch"
EVERY = str(Path(__file__).with_name("every_optimizer.py"))
FIND_D = {"ProdigyPlusScheduleFree", "Prodigy"}
STEPS, EVAL_EVERY = 6, 4


def every(launcher: list[str], folder: Path, names: list[str]) -> dict[str, list[dict[str, float]]]:
    """The metrics of a short run of each class, with a validation at its end."""
    done = subprocess.run(
        [*launcher, EVERY, str(folder), ",".join(names), *TINY, "--steps", str(STEPS), "--eval-every", str(EVAL_EVERY)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    falling = sum(name in ("Prodigy", "AdamW") for name in names)
    assert done.stdout.count("weights of the last step") == falling, done.stdout
    assert done.stdout.count("averaged weights") == len(names) - falling
    return {output.name: metrics(output) for output in folder.iterdir()}


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, float]]]:
    return every(PLAIN, tmp_path_factory.mktemp("single"), NAMES)


def test_every_class_trains_and_its_log_has_d_or_the_learning_rate(single: dict[str, list[dict[str, float]]]) -> None:
    assert single.keys() == set(NAMES)
    for name, rows in single.items():
        assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
        assert all(math.isfinite(row["loss"]) and row["lr"] > 0 for row in rows)
        assert ("d" in rows[0]) == (name in FIND_D), name
        assert "val_loss" in rows[-1]
    closures = {name for name in single if name.endswith("Closure")}
    assert len({single[name][-1]["val_loss"] for name in single.keys() - closures}) == 7, "two classes trained alike"
    for name in closures:
        assert single[name][-1]["val_loss"] == pytest.approx(single[name.removesuffix("Closure")][-1]["val_loss"])


def test_what_averages_nothing_has_a_cosine_the_others_none(
    single: dict[str, list[dict[str, float]]],
) -> None:
    cosine = [(1 + math.cos(math.pi * step / STEPS)) / 2 for step in range(STEPS)]
    for name, rows in single.items():
        factors = [row["lr"] / rows[0]["lr"] for row in rows]
        assert factors == pytest.approx(cosine if name in ("Prodigy", "AdamW") else [1.0] * STEPS), name


@pytest.mark.parametrize("names", [KINDS, NAMES], ids=["kinds", "all"])
def test_two_ranks_have_the_losses_of_one_process(
    names: list[str], single: dict[str, list[dict[str, float]]], tmp_path: Path
) -> None:
    for name, rows in every(TWO_RANKS, tmp_path, names).items():
        for ours, theirs in zip(rows, single[name], strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=SAME_LOSS), name


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the command line."""
    monkeypatch.syspath_prepend(str(Path(EVERY).parents[2] / "launch"))
    return importlib.import_module("options")


def test_a_warm_up_goes_before_the_cosine_and_the_end_of_a_cosine_is_fixed(options: Any) -> None:
    factor = importlib.import_module("optimizers").factor
    settings = options.parse(["--optimizer", "AdamW", "--lr", "0.01", "--warmup", "2", "--steps", "8"])
    factors = [factor(settings, step) for step in range(1, 9)]
    assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1.0]) and factors[2:] == sorted(factors[2:], reverse=True)
    assert settings.fixed()["steps"] == 8 and settings.fixed()["lr"] == 0.01
    assert "steps" not in options.parse(["--steps", "8"]).fixed()


REFUSED = {
    ("--optimizer", "Adam"): "invalid choice: 'Adam'",
    ("--lr", "0"): "0 is out of range: a number > 0 is allowed",
    ("--optimizer", "Prodigy", "--opt", "use_speed=True"): "'use_speed' is no argument of Prodigy",
    ("--opt", "use_cautios=True"): "no argument of ProdigyPlusScheduleFree: did you mean 'use_cautious'? It has betas,",
    ("--opt", "lr=0.5"): "'lr' is no argument of ProdigyPlusScheduleFree: it has an option of its own, --lr",
    ("--optimizer", "AdamW", "--strategy", "deepspeed"): "--optimizer AdamW does not run under --strategy deepspeed",
    ("--optimizer", "AdamW", "--check-every", "2"): "--check-every compares what ppsf_dist's own optimizers keep",
    ("--optimizer", "AdamW", "--dry-run", "--world-size", "4"): "--dry-run knows the memory of ppsf_dist's own",
    ("--optimizer", "Prodigy", "--recommended"): "--recommended is a setting of ProdigyPlusScheduleFree, not of",
    ("--steps", "4", "--warmup", "4"): "--warmup 4 leaves nothing of --steps 4",
}


def test_what_does_not_go_together_is_refused_with_the_way_out(
    options: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, message in REFUSED.items():
        with pytest.raises(SystemExit) as error:
            options.parse(words)
        assert error.value.code == 2 and message in " ".join(capsys.readouterr().err.split()), words


def test_the_recommended_setting_is_the_packages_and_opt_may_say_otherwise(options: Any) -> None:
    assert options.parse(["--recommended"]).opt == dict(RECOMMENDED)
    settings = options.parse(["--opt", "schedulefree_c=0", "--opt", "d_coef=2.0", "--recommended"])
    assert settings.opt == dict(RECOMMENDED) | {"schedulefree_c": 0, "d_coef": 2.0}
    assert "--recommended" not in options.resume_command(
        settings, ProcessInfo(0, 0, 1, 1, torch.device("cpu"), "python")
    )


def test_a_picture_of_two_runs_has_the_curves_of_both(tmp_path: Path) -> None:
    """As the demo draws it; a folder without a run is named, and nothing is drawn."""
    for name in ("default", "recommended"):
        once = [*TINY, "--steps", "4", "--eval-every", "2", "--output", str(tmp_path / name)]
        subprocess.run(
            [*PLAIN, str(LAUNCH / "train.py"), *once, *(["--recommended"] if name == "recommended" else [])], check=True
        )
    picture, folders = tmp_path / "both.png", [str(tmp_path / name) for name in ("default", "recommended")]
    plot = [sys.executable, str(LAUNCH / "plot.py")]
    subprocess.run([*plot, *folders, "--picture", str(picture)], check=True)
    pixels = imread(picture)[:, :, :3]
    for colour in ("#4c78a8", "#d1495b"):
        ink = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (abs(pixels - ink).max(axis=2) < 0.02).sum() > 200, colour
    empty = subprocess.run(
        [*plot, str(tmp_path / "nothing"), "--picture", str(tmp_path / "no.png")], capture_output=True, text=True
    )
    assert empty.returncode == 2 and f"{tmp_path / 'nothing'} holds no run" in empty.stderr
    assert not (tmp_path / "no.png").exists()


def test_the_demo_says_which_arguments_are_for_one_run() -> None:
    """Before it installs or trains anything."""
    done = subprocess.run(["bash", str(LAUNCH / "demo.sh"), "--resume"], capture_output=True, text=True)
    assert done.returncode == 2 and "launch/train.py --resume" in done.stderr
