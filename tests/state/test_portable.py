"""The portable form of state: what it is, and that it comes back as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ppsf_dist.methods.prodigy import PRODIGY
from ppsf_dist.methods.prodigy_plus import PRODIGY_PLUS
from ppsf_dist.sharding import plain_shard
from ppsf_dist.state.inventory import needed
from ppsf_dist.state.portable import pack, read_groups, read_state, to_portable
from ppsf_dist.state.samples import sample_count

METHODS: dict[str, Any] = {"plus": PRODIGY_PLUS, "prodigy": PRODIGY}
SHAPES = [(64, 48), (7, 33), (40,), (5,), (1,), ()]


def group_of(method: Any, params: list[nn.Parameter], **arguments: Any) -> dict[str, Any]:
    group = {**method.arguments, **arguments}
    method.validate_group(group)
    return {**group, **method.initial_numbers(group), "train_mode": True, "state_version": 1, "params": params}


def filled(method: Any, group: dict[str, Any], param: nn.Parameter, seed: int) -> dict[str, Any]:
    """State with a value of its own in every element."""
    generator = torch.Generator().manual_seed(seed)
    switches, shard = method.switches(group), plain_shard(param)
    state: dict[str, Any] = {"step": 3.0}
    for entry in needed(switches, tuple(param.shape)):
        shape: tuple[int, ...] = tuple(param.shape)
        if entry.name in ("p0", "s"):
            shape = (sample_count(shard, switches.slice_p),)
        elif entry.name == "exp_avg_sq_row":
            shape = (1, param.shape[1]) if param.shape[0] > param.shape[1] else (param.shape[0], 1)
        elif entry.name == "exp_avg_sq_col":
            shape = (param.shape[0], 1) if param.shape[0] > param.shape[1] else (1, param.shape[1])
        state[entry.name] = torch.rand(shape, generator=generator).to(entry.dtype(param.dtype, switches))
    state |= dict.fromkeys(("exp_avg_x0_dot", "max_x0_minus_l1_norm", "max_x0_minus_l2_norm"), 0.5)
    return state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_it_comes_back_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    method = METHODS[name]
    params = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in SHAPES]
    group = group_of(method, params)
    state = {param: filled(method, group, param, seed) for seed, param in enumerate(params)}
    saved = pack(method, [group], state, [plain_shard(param) for param in params])
    assert saved["param_groups"][0]["params"] == list(range(len(SHAPES)))
    groups = read_groups(method, saved, [group])
    back = read_state(method, saved, [plain_shard(param) for param in params], groups)
    for param, entries in state.items():
        for key, value in entries.items():
            found = back[param][key]
            if isinstance(value, Tensor):
                assert found.dtype == value.dtype and torch.equal(found, value), key
            else:
                assert found == value, key


@pytest.mark.parametrize("slice_p", [1, 2, 11])
def test_samples_have_a_row_for_each_row_of_the_parameter(slice_p: int) -> None:
    weights = torch.arange(7.0 * 33).view(7, 33)
    param = nn.Parameter(weights.clone())
    group = group_of(PRODIGY, [param], slice_p=slice_p)
    state = filled(PRODIGY, group, param, 0) | {"p0": weights.flatten()[::slice_p].clone()}
    rows = to_portable(plain_shard(param), state, PRODIGY.switches(group))["p0"]
    assert rows.shape == (7, -(-33 // slice_p))
    for index, row in enumerate(rows):
        expected = [float(x) for x in weights[index] if int(x) % slice_p == 0]
        assert row[: len(expected)].tolist() == expected and not row[len(expected) :].any()


def test_what_prodigy_steps_has_freed_is_zero_in_a_checkpoint() -> None:
    param = nn.Parameter(torch.ones(7, 33))
    group = group_of(PRODIGY_PLUS, [param], prodigy_steps=2)
    kept = filled(PRODIGY_PLUS, group, param, 0)
    freed = {name: value for name, value in kept.items() if name not in ("p0", "s")}
    switches = PRODIGY_PLUS.switches(group)
    full, without = (to_portable(plain_shard(param), state, switches) for state in (kept, freed))
    assert full.keys() == without.keys()
    assert full["p0"].shape == without["p0"].shape and not without["p0"].any()


def test_a_number_of_samples_that_slice_p_does_not_give_is_refused() -> None:
    param = nn.Parameter(torch.ones(7, 33))
    group = group_of(PRODIGY, [param], slice_p=2)
    saved = pack(PRODIGY, [group], {param: filled(PRODIGY, group, param, 0)}, [plain_shard(param)])
    other = group_of(PRODIGY, [param], slice_p=11)
    with pytest.raises(ValueError, match="slice_p is 2 in parameter group 0 of the checkpoint and 11 here"):
        read_groups(PRODIGY, saved, [other])
    saved["state"][0]["s"] = saved["state"][0]["s"][:, :-1]
    with pytest.raises(ValueError, match="s"):
        read_state(PRODIGY, saved, [plain_shard(param)], read_groups(PRODIGY, saved, [group]))
