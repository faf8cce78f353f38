"""``ppsf-dist report``: what it reads, what it says of runs, its picture, and its page in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ppsf_dist import RECOMMENDED, Monitor, ProdigyPlusScheduleFree
from ppsf_dist.report.command import main
from ppsf_dist.report.runs import Run, differing, read_runs
from tests.harness.browser import look


def train(to: Path, steps: int = 40, batch: int = 32, groups: int = 1, **arguments: Any) -> None:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(8, 40)) for _ in range(groups)]
    optimizer = ProdigyPlusScheduleFree([{"params": [p]} for p in params], **arguments)
    with Monitor(optimizer, every=4, to=to, settings={"batch": batch}) as monitor:
        for step in range(steps):
            for p in params:
                p.grad = p.detach() - 1 + torch.randn(8, 40) / 10
            monitor.log(loss=1 / (step + 1), tokens_per_second=100.0)
            optimizer.step()
        optimizer.eval()


def write(file: Path, *rows: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    train(tmp_path / "a" / "run.jsonl")
    train(tmp_path / "b" / "run.jsonl", steps=60, batch=64, groups=2, **RECOMMENDED)
    return tmp_path / "a", tmp_path / "b"


def test_runs_are_told_apart_by_loss_d_speed_and_settings(two: tuple[Path, Path]) -> None:
    a, b = read_runs(two)
    assert (a.name, b.name) == ("a", "b")
    one, other = a.summary(), b.summary()
    assert (one["steps"], other["steps"]) == ("40", "60")
    assert one["lowest loss"] == f"{1 / 40:.4f}" and one["tokens/s"] == "100" and one["skipped"] == "0"
    assert one["d"] == "1.000e-06" and len(other["d"].split(", ")) == 2
    settings = differing([a, b])
    assert settings["batch"] == ["32", "64"] and settings["schedulefree_c"] == ["0", "50"]
    assert settings["groups"] == ["1", "2"] and "betas" not in settings


def test_the_command_prints_a_table_and_writes_a_picture_and_a_page(
    two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", *map(str, two), "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "use_bias_correction" in said and "lowest loss" in said and "report.html" in said
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "out" / "report.html").read_text()
    assert "<td>use_bias_correction</td><td>False</td><td>True</td>" in text
    assert not re.findall(r"(?:src|href)=\"(?!data:)", text), "nothing comes from elsewhere"


def test_runs_of_launch_train_are_read_too(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 3.0 / step, "d": 1e-3, "tokens_per_second": 10.0} for step in range(1, 5)]
    write(tmp_path / "run" / "metrics.jsonl", *rows, {"step": 5, "loss": 0.5, "val_loss": 0.75, "d": 2e-3})
    (tmp_path / "run" / "run.json").write_text(json.dumps({"settings": {"seed": 1}, "ranks": 2}))
    (run,) = read_runs([tmp_path / "run"])
    assert run.settings == {"ranks": 2, "seed": 1}
    assert run.summary()["validation loss"] == "0.7500" and run.summary()["d"] == "2.000e-03"


def test_steps_that_a_run_makes_again_count_once(tmp_path: Path) -> None:
    made = [{"step": step, "loss": float(step), "groups": [{"d": 1.0}]} for step in (1, 2, 3)]
    again = [{"step": step, "loss": 10.0 * step, "groups": [{"d": 2.0}]} for step in (2, 3)]
    file = write(tmp_path / "run.jsonl", {"about": {"a": 1}}, *made, {"about": {"a": 2}}, *again)
    with file.open("a") as open_file:
        open_file.write('{"step": 4, "lo')
    (run,) = read_runs([file])
    assert run.line(("loss",)) == ([1, 2, 3], [1.0, 20.0, 30.0]) and run.settings == {"a": 2}


def test_a_run_without_a_loss_and_one_without_a_d_are_drawn(tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl", {"step": 1, "groups": [{"d": 1e-3}]})
    write(tmp_path / "y.jsonl", {"step": 1, "loss": 2.0, "groups": [{}]})
    assert main(["report", str(tmp_path / "x.jsonl"), str(tmp_path / "y.jsonl"), "--output", str(tmp_path)]) == 0
    assert Run("y", {}, [{"step": 1, "groups": [{}]}]).summary()["d"] == ""


def test_names_have_as_many_folders_as_tell_them_apart(tmp_path: Path) -> None:
    for name in ("one/lr", "two/lr"):
        write(tmp_path / name / "run.jsonl", {"step": 1, "loss": 1.0})
    assert [run.name for run in read_runs([tmp_path / "one" / "lr", tmp_path / "two" / "lr"])] == ["one/lr", "two/lr"]
    assert len({run.name for run in read_runs([tmp_path / "one" / "lr"] * 2)}) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no run at"),
        ({}, "holds no .jsonl file: Monitor(optimizer, to='run.jsonl') writes one"),
        ({"a.jsonl": "", "b.jsonl": ""}, "holds 2 .jsonl files, name one of them"),
        ({"a.jsonl": '{"about": {}}\n'}, "holds no row of a run"),
        ({"a.jsonl": 'step,loss\n1,2\n{"step": 1}\n'}, "line 1 of"),
        ({"a.jsonl": '[1]\n{"step": 1}\n'}, "is no JSON object: give the file of a Monitor"),
    ],
)
def test_what_cannot_be_read_is_named_and_nothing_is_written(
    content: dict[str, str] | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "run").mkdir()
        for name, text in content.items():
            (tmp_path / "run" / name).write_text(text)
    assert main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_console_script_is_installed() -> None:
    done = subprocess.run([Path(sys.executable).parent / "ppsf-dist", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and re.fullmatch(r"\d+\.\d+\.\d+\S*\n", done.stdout), done.stderr


@pytest.mark.browser
@pytest.mark.parametrize("width", [1200, 500])
def test_the_page_in_a_real_browser(width: int, two: tuple[Path, Path], tmp_path: Path) -> None:
    """The picture is there, no part of the page is wider than the window, and what runs are called does no harm."""
    hostile = tmp_path / "<img src=x onerror=document.title=1>"
    shutil.move(two[1], hostile)
    assert main(["report", str(two[0]), str(hostile), "--output", str(tmp_path / "out")]) == 0
    seen = look(
        tmp_path / "out" / "report.html",
        width,
        "images: document.images.length, shown: document.images[0].naturalWidth, "
        'picture: document.images[0].clientWidth, rows: document.querySelectorAll("tbody tr").length',
        tmp_path / "profile",
    )
    assert seen["images"] == 1 and seen["shown"] > 900 and seen["picture"] > 0.8 * min(seen["window"], 960) * 0.95
    assert seen["page"] <= seen["window"] and seen["rows"] > 4
