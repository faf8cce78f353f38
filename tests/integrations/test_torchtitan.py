"""torchtitan's container, schedule and flat checkpoints with an optimizer of this package: one d for all stages."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import fully_shard
from torchtitan.components.optimizer import LRSchedulersContainer, ParamGroupConfig

from ppsf_dist import ProdigyPlusScheduleFree, averaged
from ppsf_dist.integrations.torchtitan import NAME, NoSchedule, ScheduleFreeOptimizers
from tests.bootstrap.launchers import ROOT
from tests.harness.pool import run

EXAMPLE = ROOT / "examples" / "torchtitan_container.py"
ARGUMENTS: dict[str, Any] = {"d0": 1e-3}
STEPS = 4
GROUPS = [
    ParamGroupConfig(pattern=r"bias$", optimizer_name=NAME, optimizer_kwargs=dict(ARGUMENTS)),
    ParamGroupConfig(pattern=r"^first", optimizer_name=NAME, optimizer_kwargs={**ARGUMENTS, "weight_decay": 0.1}),
    ParamGroupConfig(pattern=r".*", optimizer_name=NAME, optimizer_kwargs=dict(ARGUMENTS)),
]


KINDS = [("whole", 1), ("two parts", 1), ("whole", 2), ("fsdp", 2), ("pipeline", 2)]


class Layers(nn.ModuleDict):
    """Layers by name; nobody calls them, gradients are given."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs


def whole_model() -> Layers:
    torch.manual_seed(0)
    return Layers({"first": nn.Linear(40, 64), "second": nn.Linear(64, 48), "third": nn.Linear(48, 3)})


def gradients(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(p.shape, generator=generator) for name, p in whole_model().named_parameters()}


def train(parts: list[nn.Module], container: Any, first: int = 0, steps: int = STEPS) -> None:
    for step in range(first, first + steps):
        full = gradients(step)
        for part in parts:
            for name, p in part.named_parameters():
                p.grad = full[name] if not hasattr(p, "placements") else scattered(p, full[name])
        container.step()
        container.zero_grad()


def scattered(p: Any, full: Tensor) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, p.device_mesh, p.placements)


def weights(parts: list[nn.Module]) -> dict[str, Tensor]:
    named = [pair for part in parts for pair in part.named_parameters()]
    return {name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for name, p in named}


def parts_of(kind: str) -> list[nn.Module]:
    """What a rank holds: everything, shards of it, or the stages of a pipeline that are its own."""
    model = whole_model()
    if kind == "fsdp":
        return [cast(nn.Module, fully_shard(model))]
    names = {"whole": [["first", "second", "third"]], "two parts": [["first"], ["second", "third"]]}
    if kind == "pipeline":
        mine = [["first", "third"], ["second"]][dist.get_rank()]
        return [Layers({name: model[name]}) for name in mine]
    return [Layers({name: model[name] for name in part}) for part in names[kind]]


def trained(kind: str, folder: str | None = None) -> dict[str, Any]:
    """A run in two halves, with torchtitan's flat checkpoint between two processes' worth of objects."""
    parts = parts_of(kind)
    container = ScheduleFreeOptimizers.Config(param_groups=copy.deepcopy(GROUPS)).build(model_parts=parts)
    train(parts, container)
    with averaged(container):
        x = weights(parts)
    if folder is not None:
        content = {"optimizer": container.state_dict(), "model": weights(parts)}
        save(content, checkpoint_id=folder)
        return resumed(kind, folder) | {"x": x}
    train(parts, container, STEPS)
    return {"d": container.optimizer.get_d(), "y": weights(parts), "x": x}


def resumed(kind: str, folder: str) -> dict[str, Any]:
    parts = parts_of(kind)
    container = ScheduleFreeOptimizers.Config(param_groups=copy.deepcopy(GROUPS)).build(model_parts=parts)
    content = {"optimizer": container.state_dict(), "model": weights(parts)}
    load(content, checkpoint_id=folder)
    with torch.no_grad():
        for part in parts:
            for name, p in part.named_parameters():
                value = content["model"][name]
                p.copy_(value if not hasattr(p, "placements") else scattered(p, value))
    container.load_state_dict(content["optimizer"])
    train(parts, container, STEPS)
    return {"d": container.optimizer.get_d(), "y": weights(parts)}


def by_hand() -> dict[str, Any]:
    """The same run of the optimizer alone."""
    model = whole_model()
    named = dict(model.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in named.items() if name.endswith("bias")]},
        {"params": [named["first.weight"]], "weight_decay": 0.1},
        {"params": [named["second.weight"], named["third.weight"]]},
    ]
    optimizer = ProdigyPlusScheduleFree(groups, **ARGUMENTS)
    for step in range(2 * STEPS):
        if step == STEPS:
            with averaged(optimizer):
                x = weights([model])
        full = gradients(step)
        for name, p in named.items():
            p.grad = full[name]
        optimizer.step()
    return {"d": optimizer.get_d(), "y": weights([model]), "x": x}


def check(results: list[dict[str, Any]]) -> None:
    expected = by_hand()
    for result in results:
        assert result["d"] == pytest.approx(expected["d"], rel=1e-6)
        for which in ("x", "y"):
            for name, value in result[which].items():
                torch.testing.assert_close(value, expected[which][name], rtol=1e-5, atol=1e-6)
    assert set().union(*(result["y"] for result in results)) == set(expected["y"])
    assert len({tuple(result["d"]) for result in results}) == 1, "one d for all ranks"


@pytest.mark.dist
@pytest.mark.parametrize(("kind", "ranks"), KINDS)
@pytest.mark.parametrize("saved", [False, True])
def test_the_run_is_that_of_one_optimizer_also_from_a_flat_checkpoint(kind: str, ranks: int, saved: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check(run(ranks, trained, kind, folder if saved else None))


@pytest.mark.dist
def test_a_checkpoint_of_two_stages_loads_on_shards_and_on_one_process() -> None:
    with tempfile.TemporaryDirectory() as folder:
        x = run(2, trained, "pipeline", folder)[0]["x"]
        for kind, ranks in (("fsdp", 2), ("two parts", 1)):
            check([result | {"x": x} for result in run(ranks, resumed, kind, folder)])


def copied_stages() -> str:
    model = whole_model()
    part = Layers({"first": model["first"]}) if dist.get_rank() < 2 else Layers({"third": model["third"]})
    with pytest.raises(ValueError) as error:
        ScheduleFreeOptimizers.Config().build(model_parts=[part])
    return str(error.value)


@pytest.mark.dist
def test_stages_that_ddp_copies_are_refused_on_every_rank() -> None:
    assert all("pipeline stages that DDP copies would count" in said for said in run(4, copied_stages))


def left_out_on_rank_1() -> str:
    patterns = ("bias$", "^first", "^third")
    groups = [ParamGroupConfig(pattern=p, optimizer_name=NAME, optimizer_kwargs=dict(ARGUMENTS)) for p in patterns]
    with pytest.raises(ValueError) as error:
        ScheduleFreeOptimizers.Config(param_groups=groups).build(model_parts=parts_of("pipeline"))
    return str(error.value)


@pytest.mark.dist
def test_what_one_stage_leaves_out_is_an_error_on_all_ranks() -> None:
    assert all("rank 1 of 2" in said and "leave out second.weight" in said for said in run(2, left_out_on_rank_1))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            [ParamGroupConfig(pattern=".*", optimizer_name="AdamW")],
            "of param_groups is 'AdamW': allowed",
        ),
        (
            [*GROUPS, ParamGroupConfig(pattern=".*", optimizer_name="Prodigy")],
            "is 'Prodigy', 'Prodigy",
        ),
        ([], "is missing: allowed is one class"),
        (GROUPS[:2], r"leave out second.weight, third.weight: add a last group with pattern='.\*'"),
    ],
)
def test_groups_that_do_not_fit_are_named(groups: list[ParamGroupConfig], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScheduleFreeOptimizers.Config(param_groups=groups).build(model_parts=[whole_model()])


def test_torchtitans_schedule_is_heard_of_and_a_constant_one_is_not() -> None:
    for warmup, heard in ((0, 0), (3, 1)):
        model = whole_model()
        container = ScheduleFreeOptimizers.Config().build(model_parts=[model])
        schedule = LRSchedulersContainer.Config(warmup_steps=warmup, decay_ratio=0.0)
        schedulers = schedule.build(optimizers=container, training_steps=STEPS)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(STEPS):
                train([model], container, step, 1)
                schedulers.step()
        assert len([one for one in caught if "a schedule multiplies" in str(one.message)]) == heard


def test_d_stands_among_torchtitans_metrics_and_its_trainer_takes_both() -> None:
    from torchtitan.trainer import Trainer

    config = Trainer.Config(optimizer=ScheduleFreeOptimizers.Config(), lr_scheduler=NoSchedule.Config())
    model = whole_model()
    optimizers = config.optimizer.build(model_parts=[model])
    schedulers = config.lr_scheduler.build(optimizers=optimizers, training_steps=STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for step in range(STEPS):
            train([model], optimizers, step, 1)
            schedulers.step()
    metrics = schedulers.get_metrics()
    assert metrics["d"] == optimizers.optimizer.get_d_estimate() and metrics["lr/ProdigyPlusScheduleFree"] == 1.0
    assert schedulers.state_dict() == {"last_epoch": STEPS}


@pytest.mark.launch
def test_the_example_runs_on_one_rank_and_resumes_on_two(tmp_path: Path) -> None:
    for ranks, more in (("1", ()), ("2", ("--resume",))):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
        words = [str(EXAMPLE), "--output", str(tmp_path), "--steps", "100", *more]
        done = subprocess.run([*launcher, *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    found = re.search(r"loss of the averaged weights: (\S+)", done.stdout)
    assert found and float(found[1]) < 1.0
