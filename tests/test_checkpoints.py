"""A run stops in one layout and goes on in another; what does not fit is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ppsf_dist import ProdigyPlusScheduleFree
from ppsf_dist.fsdp import load_checkpoint, save_checkpoint
from tests.harness.layouts import LAYOUTS, Layout, gather, set_grads, shard_parameters
from tests.harness.models import D0, gradient_sequence, initial_weights, named_shapes
from tests.harness.pool import run
from tests.reference import make_reference, quiet_step
from tests.runs import make_optimizer
from tests.test_state import Net, build, same, snapshot, train, whole
from tests.test_tensor_parallel import Model, place

SHAPES = named_shapes("small")


def _loss(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(4, 6, 12, generator=generator), torch.randn(4, 6, 3, generator=generator)
    loss: Tensor = (model(x) - y).square().mean()
    return loss


def _transformer(dp: int, tp: int, path: str, mode: str, first: int, last: int) -> dict[str, Tensor]:
    """Steps ``first`` to ``last`` of a run, from a checkpoint if there is one; saves after the first five."""
    model = Model()
    if dp * tp > 1:
        place(model, dp, tp, False)
    optimizer = ProdigyPlusScheduleFree(model.parameters(), d0=D0)
    if first:
        assert load_checkpoint(path, model, optimizer) == {"step": first}
        optimizer.train()
    for step in range(first, last):
        if step == 5 and not first:
            if mode == "eval":
                optimizer.eval()
            save_checkpoint(path, model, optimizer, {"step": step})
            optimizer.train()
        optimizer.zero_grad()
        _loss(model, step).backward()
        optimizer.step()
    return gather(dict(model.named_parameters()))


@pytest.mark.dist
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(("before", "after"), [((2, 2), (2, 1)), ((2, 2), (1, 1)), ((1, 1), (2, 2)), ((2, 1), (4, 1))])
def test_tensor_parallelism_too(before: tuple[int, int], after: tuple[int, int], mode: str, tmp_path: Path) -> None:
    expected = run(before[0] * before[1], _transformer, *before, str(tmp_path), mode, 0, 25)[0]
    for weights in run(after[0] * after[1], _transformer, *after, str(tmp_path), mode, 5, 25):
        for name, weight in expected.items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-6)


def _move_in(layout: Layout, reference_state: dict[str, Any], weights: dict[str, Tensor], switch: Any) -> Any:
    parameters = shard_parameters(weights, layout)
    optimizer = make_optimizer(parameters, 2, **switch)
    optimizer.load_state_dict(reference_state)
    for step, gradients in enumerate(gradient_sequence(SHAPES, 12)):
        if step >= 6:
            set_grads(parameters, gradients)
            optimizer.step()
    return gather(parameters), optimizer.get_d()


@pytest.mark.dist
@pytest.mark.parametrize(
    "switch", [{}, {"use_speed": True}, {"use_schedulefree": False}, {"prodigy_steps": 4}], ids=str
)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_of_the_reference_moves_in(name: str, switch: Any) -> None:
    theirs = {key: nn.Parameter(w) for key, w in initial_weights(SHAPES).items()}
    reference = make_reference(theirs, 2, **switch)
    for step, gradients in enumerate(gradient_sequence(SHAPES, 12)):
        if step == 6:
            moved = copy.deepcopy(reference.state_dict()), {k: p.detach().clone() for k, p in theirs.items()}
        for key, p in theirs.items():
            p.grad = gradients[key]
        quiet_step(reference)
    for weights, d in run(LAYOUTS[name].world_size, _move_in, LAYOUTS[name], *moved, switch):
        assert d == pytest.approx([group["d"] for group in reference.param_groups], rel=1e-6)
        for key, p in theirs.items():
            torch.testing.assert_close(weights[key], p.detach(), rtol=2e-6, atol=1e-7)


def _saved(**switches: Any) -> tuple[Net, ProdigyPlusScheduleFree, dict[str, Any]]:
    model, optimizer = build("single", **switches)
    train(model, optimizer, 0, 3)
    return model, optimizer, copy.deepcopy(optimizer.state_dict())


def _refused(optimizer: ProdigyPlusScheduleFree, state: dict[str, Any], match: str) -> None:
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(state)
    assert same(before, snapshot(optimizer)), "a refused checkpoint has changed the optimizer"


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("use_schedulefree", {"use_schedulefree": False}),
        ("use_speed", {"use_speed": True}),
        ("factored", {"factored": False}),
    ],
)
def test_other_switches_are_refused(name: str, other: dict[str, Any]) -> None:
    _, optimizer, _ = _saved()
    _, _, state = _saved(**other)
    _refused(optimizer, state, name)


def test_other_shapes_groups_and_versions_are_refused() -> None:
    _, optimizer, state = _saved()
    other = copy.deepcopy(state)
    other["state"][0]["z"] = torch.zeros(3, 3)
    _refused(optimizer, other, r"z has shape \(3, 3\).*parameter 0 ")
    other = copy.deepcopy(state)
    del other["state"][0]["z"]
    _refused(optimizer, other, "'z'")
    other = copy.deepcopy(state)
    other["param_groups"].pop()
    _refused(optimizer, other, "1 parameter groups")
    other = copy.deepcopy(state)
    other["param_groups"][0]["params"].pop()
    _refused(optimizer, other, "parameter group 0")
    other = copy.deepcopy(state)
    other["param_groups"][1]["state_version"] = 2
    _refused(optimizer, other, "state_version is 2 in parameter group 1")
    other = copy.deepcopy(state)
    for group in other["param_groups"]:
        del group["prev_d_numerator"]
    _refused(optimizer, other, "1.x")
    _refused(optimizer, torch.optim.AdamW(build("single")[0].parameters()).state_dict(), "parameter groups|'d'")


def test_before_the_first_step_and_with_a_group_that_joined(tmp_path: Path) -> None:
    model, optimizer = build("single")
    save_checkpoint(tmp_path / "fresh", model, optimizer)
    train(model, optimizer, 0, 4)
    resumed_model, resumed = build("single")
    assert load_checkpoint(tmp_path / "fresh", resumed_model, resumed) == {}
    train(resumed_model, resumed, 0, 4)
    assert same(whole(model), whole(resumed_model))

    def joined() -> tuple[Net, ProdigyPlusScheduleFree, nn.Parameter]:
        net, opt = build("single")
        late = nn.Parameter(torch.ones(33, 5))
        net.register_parameter("late", late)
        return net, opt, late

    first, first_optimizer, late = joined()
    train(first, first_optimizer, 0, 3)
    first_optimizer.add_param_group({"params": [late]})
    late.grad = torch.ones_like(late)
    first_optimizer.step()
    save_checkpoint(tmp_path / "joined", first, first_optimizer)
    second, second_optimizer, other_late = joined()
    second_optimizer.add_param_group({"params": [other_late]})
    load_checkpoint(tmp_path / "joined", second, second_optimizer)
    assert same(snapshot(first_optimizer), snapshot(second_optimizer))


def test_no_checkpoint_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no finished checkpoint"):
        load_checkpoint(tmp_path, *build("single"))


def test_a_checkpoint_that_is_refused_changes_nothing(tmp_path: Path) -> None:
    """Neither weights nor state, whether the optimizer does not fit or the model."""
    cases: list[tuple[str, int, dict[str, Any]]] = [("speed", 3, {"use_speed": True}), ("shape", 2, {})]
    for name, rows, switches in cases:
        model, optimizer = build("single", **switches)
        model.register_buffer("table", torch.ones(rows, 3))
        train(model, optimizer, 0, 3)
        save_checkpoint(tmp_path / name, model, optimizer)

    model, optimizer = build("single")
    model.register_buffer("table", torch.zeros(3, 3))
    train(model, optimizer, 0, 2)
    before = whole(model), snapshot(optimizer)
    for name, message in {"speed": "use_speed", "shape": r"table has shape \(2, 3\)"}.items():
        with pytest.raises(ValueError, match=message):
            load_checkpoint(tmp_path / name, model, optimizer)
        assert same(before, (whole(model), snapshot(optimizer))) and not model.get_buffer("table").any()
