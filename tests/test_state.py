"""State: checkpoints, modes, copies, groups that change."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ppsf_dist import ProdigyPlusScheduleFree, averaged
from ppsf_dist.fsdp import load_checkpoint, save_checkpoint
from tests.harness.layouts import gather
from tests.harness.models import D0
from tests.harness.pool import run
from tests.rotation import rotated
from tests.switches import EVERY, Switch

CHECKPOINTED = (
    "default", "speed", "unfactored", "momentum", "adopt", "focus", "prodigy_steps", "bias_correction",
    "one_d", "mean_d", "cautious", "no_quirks", "no_quirks_focus",
)  # fmt: skip


class Net(nn.Module):
    """Awkward on purpose: uneven rows, a convolution, a one-element parameter, a zero start, one never used."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Linear(19, 37, dtype=dtype)
        self.conv = nn.Conv1d(1, 33, 3, dtype=dtype)
        self.out = nn.Linear(33, 3, dtype=dtype)
        self.scale = nn.Parameter(torch.ones(1, dtype=dtype))
        self.zero = nn.Parameter(torch.zeros(33, 35, dtype=dtype))
        self.unused = nn.Parameter(torch.ones(4, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv(torch.relu(self.embed(x)).unsqueeze(1)) @ self.zero.t() * self.scale
        conv = self.conv(torch.relu(self.embed(x)).unsqueeze(1))
        out: Tensor = self.out((hidden.mean(-1, keepdim=True) + conv).mean(-1))
        return out


def build(layout: str, dtype: torch.dtype = torch.float32, **switches: Any) -> tuple[Net, ProdigyPlusScheduleFree]:
    model = Net(dtype)
    if layout == "fsdp":
        fully_shard(model.embed)
        fully_shard(model)
    elif layout == "hsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model, ProdigyPlusScheduleFree([{"params": decayed}, {"params": others}], **{"d0": D0, **switches})


def train(model: Net, optimizer: ProdigyPlusScheduleFree, first: int, last: int) -> None:
    """Every rank sees the same whole batch, so all layouts see the same gradients."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 19, generator=generator).to(next(model.parameters()).dtype)
        y = torch.randn(8, 3, generator=generator).to(x.dtype)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


def whole(model: Net) -> dict[str, Tensor]:
    return gather(dict(model.named_parameters()))


def snapshot(optimizer: ProdigyPlusScheduleFree) -> dict[str, Any]:
    """A checkpoint's content with tensors as bytes, for comparisons bit for bit."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def same(a: Any, b: Any) -> bool:
    """Equal bit for bit; NaN equals NaN."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("switch", CHECKPOINTED)
def test_resume_is_bit_exact(switch: str, dtype: torch.dtype) -> None:
    model, optimizer = build("single", dtype, **EVERY[switch])
    train(model, optimizer, 0, 6)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    train(model, optimizer, 6, 12)

    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed_model, resumed = build("single", dtype, **EVERY[switch])
    resumed_model.load_state_dict(weights)
    resumed.load_state_dict(state)
    train(resumed_model, resumed, 6, 12)
    assert same(model.state_dict(), resumed_model.state_dict())
    assert same(snapshot(optimizer), snapshot(resumed))


@pytest.mark.parametrize("copied_by", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_go_on_as_the_original(copied_by: Any) -> None:
    model, optimizer = build("single")
    train(model, optimizer, 0, 5)
    copied_model, copied = copied_by((model, optimizer))
    train(model, optimizer, 5, 9)
    train(copied_model, copied, 5, 9)
    assert same(model.state_dict(), copied_model.state_dict())
    assert same(snapshot(optimizer), snapshot(copied))


def test_a_copy_shares_nothing_with_the_original() -> None:
    model, optimizer = build("single")
    train(model, optimizer, 0, 5)
    before = snapshot(optimizer)
    copied_model, copied = copy.deepcopy((model, optimizer))
    train(copied_model, copied, 5, 9)
    assert same(before, snapshot(optimizer))


def test_state_has_the_same_keys_for_every_parameter_of_a_kind_and_no_tuples() -> None:
    model, optimizer = build("single")
    train(model, optimizer, 0, 2)
    for entries in optimizer.state_dict()["state"].values():
        assert {"z", "p0", "s", "step"} <= entries.keys()
        assert all(isinstance(value, (Tensor, float, int)) for value in entries.values())


def test_eval_holds_the_average_and_train_brings_back_the_weights() -> None:
    model, optimizer = build("single")
    train(model, optimizer, 0, 5)
    y = {n: p.detach().clone() for n, p in model.named_parameters()}
    z = {n: optimizer.state[p]["z"].clone() for n, p in model.named_parameters() if "z" in optimizer.state.get(p, {})}
    optimizer.eval()
    optimizer.eval()
    for name, x in model.named_parameters():
        if name != "unused":
            assert torch.allclose(y[name], 0.9 * x + 0.1 * z[name], rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match=r"optimizer\.train\(\)"):
        train(model, optimizer, 5, 6)
    optimizer.train()
    for name, p in model.named_parameters():
        assert torch.allclose(y[name], p, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averaged_comes_back_bit_for_bit(dtype: torch.dtype) -> None:
    model, optimizer = build("single", dtype)
    train(model, optimizer, 0, 5)
    before, moments = copy.deepcopy(model.state_dict()), snapshot(optimizer)
    with averaged(optimizer, model):
        assert not same(before, model.state_dict())
        inside = copy.deepcopy(model.state_dict())
        with averaged(optimizer, model):
            assert same(inside, model.state_dict())
    assert same(before, model.state_dict())
    assert same(moments, snapshot(optimizer))


def test_without_quirks_bf16_weights_survive_evaluation() -> None:
    model, optimizer = build("single", torch.bfloat16, reference_quirks=False)
    train(model, optimizer, 0, 5)
    before = copy.deepcopy(model.state_dict())
    optimizer.eval()
    checkpoint = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    optimizer.train()
    assert same(before, model.state_dict())

    resumed_model, resumed = build("single", torch.bfloat16, reference_quirks=False)
    resumed_model.load_state_dict(checkpoint[0])
    resumed.load_state_dict(checkpoint[1])
    resumed.train()
    assert same(before, resumed_model.state_dict())


def test_beta1_of_zero_trains_but_has_no_average() -> None:
    with pytest.warns(UserWarning, match="betas"):
        optimizer = ProdigyPlusScheduleFree([nn.Parameter(torch.ones(3))], betas=(0.0, 0.99))
    with pytest.raises(ValueError, match=r"betas\[0\]=0"):
        optimizer.eval()
    assert optimizer.param_groups[0]["train_mode"]


def test_a_group_can_join_at_any_time() -> None:
    first, second = (nn.Parameter(torch.randn(40, 40)) for _ in range(2))
    optimizer = ProdigyPlusScheduleFree([first], d0=D0)
    for step in range(6):
        if step == 3:
            optimizer.add_param_group({"params": [second], "lr": 0.5})
        first.grad, second.grad = torch.full_like(first, 0.01), torch.full_like(second, 0.02)
        optimizer.step()
    assert [group["k"] for group in optimizer.param_groups] == [7, 4]
    assert len(optimizer.get_d()) == 2


def test_a_group_that_does_not_fit_is_not_added() -> None:
    optimizer = ProdigyPlusScheduleFree([nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match=r"betas\[1\]=1.5"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "betas": (0.9, 1.5)})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("switch", ["default", "adopt", "bias_correction", "weight_decay_not_by_lr", "speed"])
def test_the_step_that_creates_state_changes_nothing(switch: str, mode: str, flatten: bool) -> None:
    model, optimizer = build("single", **EVERY[switch])
    fresh_model, fresh = build("single", **EVERY[switch])
    if mode == "eval":
        optimizer.eval()
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    get_optimizer_state_dict(model, optimizer, options=options)
    assert optimizer.state
    assert [group["k"] for group in optimizer.param_groups] == [1, 1]
    assert same(model.state_dict(), fresh_model.state_dict())
    optimizer.train()
    train(model, optimizer, 0, 6)
    train(fresh_model, fresh, 0, 6)
    assert same(model.state_dict(), fresh_model.state_dict())
    assert same(snapshot(optimizer), snapshot(fresh))


def _save(layout: str, path: str, switch: Switch, mode: str, dtype: torch.dtype) -> dict[str, Tensor]:
    model, optimizer = build(layout, dtype, **switch)
    train(model, optimizer, 0, 6)
    if mode == "eval":
        optimizer.eval()
    save_checkpoint(path, model, optimizer, {"step": 6})
    optimizer.train()
    train(model, optimizer, 6, 10)
    return whole(model)


def _go_on(layout: str, path: str, switch: Switch, dtype: torch.dtype) -> tuple[dict[str, Tensor], list[float], int]:
    model, optimizer = build(layout, dtype, **switch)
    extra = load_checkpoint(path, model, optimizer)
    optimizer.train()
    train(model, optimizer, 6, 10)
    return whole(model), optimizer.get_d(), extra["step"]


WORLDS = {"single": 1, "fsdp2": 2, "fsdp3": 3, "fsdp4": 4, "hsdp": 4}


def _kind(layout: str) -> str:
    return layout.rstrip("0123456789")


MOVES = ("fsdp2", "fsdp2"), ("fsdp2", "fsdp4"), ("fsdp4", "single"), ("single", "fsdp3"), ("hsdp", "fsdp2")


@pytest.mark.dist
@pytest.mark.parametrize(("move", "switch"), rotated(MOVES, CHECKPOINTED), ids=str)
def test_a_run_goes_on_in_another_layout(move: tuple[str, str], switch: str, tmp_path: Path) -> None:
    before, after = move
    arguments = (str(tmp_path), EVERY[switch])
    expected = run(WORLDS[before], _save, _kind(before), *arguments, "train", torch.float32)[0]
    weights, d, step = run(WORLDS[after], _go_on, _kind(after), *arguments, torch.float32)[0]
    assert step == 6
    for name in expected:
        if before == after:
            assert torch.equal(weights[name], expected[name]), name
        else:
            torch.testing.assert_close(weights[name], expected[name], rtol=1e-5, atol=1e-6)


def _round_trip(path: str, options: dict[str, bool]) -> None:
    """Through torch's own functions, with each of their options."""
    model, optimizer = build("fsdp")
    train(model, optimizer, 0, 5)
    settings = StateDictOptions(**cast(Any, options))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=settings))
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, optimizer, 5, 8)
    expected = whole(model)
    other, fresh = build("fsdp")
    with torch.no_grad():
        for name, p in other.named_parameters():
            p.copy_(weights[name])
    if options.get("broadcast_from_rank0") and torch.distributed.get_rank() > 0:
        saved = {}
    set_optimizer_state_dict(other, fresh, saved, options=settings)
    train(other, fresh, 5, 8)
    for name, value in whole(other).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.dist
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"flatten_optimizer_state_dict": True},
        {"full_state_dict": True},
        {"full_state_dict": True, "cpu_offload": True, "broadcast_from_rank0": True},
    ],
)
def test_torchs_own_functions_and_options(options: dict[str, bool], tmp_path: Path) -> None:
    run(2, _round_trip, str(tmp_path), options)


def joined_and_thawed() -> tuple[Net, ProdigyPlusScheduleFree]:
    """Three steps without two of the parameters; then one is added, and the other no longer frozen."""
    model = Net()
    model.scale.requires_grad_(False)
    first = [p for name, p in model.named_parameters() if name != "zero"]
    optimizer = ProdigyPlusScheduleFree(first, d0=D0)
    train(model, optimizer, 0, 3)
    model.scale.requires_grad_(True)
    optimizer.add_param_group({"params": [model.zero]})
    return model, optimizer


def test_what_joined_and_what_thawed_is_saved_before_its_first_step(tmp_path: Path) -> None:
    model, optimizer = joined_and_thawed()
    optimizer.state_dict()
    save_checkpoint(tmp_path, model, optimizer)
    saved = [optimizer.state[p] for p in model.parameters()]
    assert all(state and not any(torch.is_tensor(v) and v.requires_grad for v in state.values()) for state in saved)
    resumed_model, resumed = joined_and_thawed()
    load_checkpoint(tmp_path, resumed_model, resumed)
    uninterrupted_model, uninterrupted = joined_and_thawed()
    for each in ((resumed_model, resumed), (uninterrupted_model, uninterrupted)):
        train(*each, 3, 6)
    assert same(whole(resumed_model), whole(uninterrupted_model))
    assert same(snapshot(resumed), snapshot(uninterrupted))
