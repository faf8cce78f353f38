"""Layouts hold what they should: the same as torch's own distribution, and together the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.harness.layouts import LAYOUTS, Layout, box_of, gather, set_grads, shard_parameters
from tests.harness.models import gradient_sequence, initial_weights, named_shapes
from tests.harness.pool import JobFailed, run

pytestmark = pytest.mark.dist


def _assert_equal(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=0.0)


def _full(layout: Layout) -> dict[str, Tensor]:
    kind = "single_process" if layout.name in ("single", "replicated") else "all"
    return initial_weights([*named_shapes(kind), ("row", (1, 40))])  # The row leaves ranks with no rows.


def _round_trip(layout: Layout) -> None:
    full = _full(layout)
    gradients = next(gradient_sequence([(name, tuple(value.shape)) for name, value in full.items()], 1))
    gradients["short"] = None
    for variant in layout.every_shift():
        parameters = shard_parameters(full, variant)
        assert list(parameters) == list(full)
        assert all(isinstance(parameter, nn.Parameter) and parameter.is_leaf for parameter in parameters.values())
        _assert_equal(gather(parameters), full)
        # Independent of gather: torch's own reassembly.
        whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in parameters.items()}
        _assert_equal({name: value.detach() for name, value in whole.items()}, full)
        set_grads(parameters, gradients)
        for name, parameter in parameters.items():
            assert isinstance(parameter.grad, DTensor) == (isinstance(parameter, DTensor) and name != "short")
        _assert_equal(
            gather({name: p.grad for name, p in parameters.items() if p.grad is not None}),
            {name: value for name, value in gradients.items() if value is not None},
        )
        doubled = {name: 2 * (p.to_local() if isinstance(p, DTensor) else p) for name, p in parameters.items()}
        _assert_equal(gather(parameters, doubled), {name: 2 * value for name, value in full.items()})


@pytest.mark.parametrize("name", LAYOUTS)
def test_shards_make_up_the_whole(name: str) -> None:
    run(LAYOUTS[name].world_size, _round_trip, LAYOUTS[name])


def _held(layout: Layout) -> dict[str, tuple[str, tuple[int, ...]]]:
    held = {}
    for name, parameter in shard_parameters(_full(layout), layout).items():
        if isinstance(parameter, DTensor):
            held[name] = (str(parameter.placements), tuple(parameter.to_local().shape))
        else:
            held[name] = ("plain", tuple(parameter.shape))
    return held


@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if layout.roles > 1])
def test_every_parameter_meets_every_role(name: str) -> None:
    layout = LAYOUTS[name]
    held = [run(layout.world_size, _held, variant) for variant in layout.every_shift()]
    for parameter in ("wide", "uneven", "conv_out"):
        assert len({of_rank_0[parameter][0] for of_rank_0, *_ in held}) == layout.roles


@pytest.mark.parametrize("name", ["fsdp_2", "fsdp_3", "fsdp_4", "shard1", "hsdp_2x2", "fsdp_tp_2x2", "fsdp_tp_3x2"])
def test_uneven_and_empty_shards_occur(name: str) -> None:
    ranks = run(LAYOUTS[name].world_size, _held, LAYOUTS[name])
    shapes = [{held[parameter][1] for held in ranks} for parameter in ranks[0]]
    assert any(len(of_ranks) > 1 for of_ranks in shapes)
    assert any((0,) in of_ranks for of_ranks in shapes)


class _Block(nn.Module):
    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.column = nn.Linear(columns, rows)
        self.row = nn.Linear(columns, rows)
        self.norm = nn.LayerNorm(rows)


def _compare_with_real_tensor_parallelism(data_ranks: int, rows: int, columns: int) -> None:
    block = _Block(rows, columns)
    # In the order of the roles of the layout.
    names = ["column.weight", "row.weight", "norm.weight", "column.bias", "row.bias", "norm.bias"]
    full = {name: block.get_parameter(name).detach().clone() for name in names}
    mesh = init_device_mesh("cpu", (data_ranks, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(block, mesh["tp"], {"column": ColwiseParallel(), "row": RowwiseParallel()})
    fully_shard(block, mesh=mesh["dp"])
    ours = shard_parameters(full, LAYOUTS[f"fsdp_tp_{data_ranks}x2"])
    for name in names:
        theirs, mine = block.get_parameter(name), ours[name]
        assert isinstance(theirs, DTensor) and isinstance(mine, DTensor)
        assert (mine.placements, mine.shape, mine.stride()) == (theirs.placements, theirs.shape, theirs.stride()), name
        assert mine.device_mesh.mesh_dim_names == theirs.device_mesh.mesh_dim_names
        _assert_equal(mine.to_local(), theirs.to_local())
        assert mine.to_local().stride() == theirs.to_local().stride()


@pytest.mark.parametrize("rows", [7, 8, 33])
@pytest.mark.parametrize("data_ranks", [2, 3])
def test_fsdp_tp_is_what_torch_makes(data_ranks: int, rows: int) -> None:
    run(2 * data_ranks, _compare_with_real_tensor_parallelism, data_ranks, rows, 6)


def _compare_with_real_fsdp() -> None:
    full = _full(LAYOUTS["fsdp_2"])
    ours, theirs = shard_parameters(full, LAYOUTS["fsdp_2"]), shard_parameters(full, LAYOUTS["fsdp_real"])
    for name in full:
        mine, real = ours[name], theirs[name]
        assert isinstance(mine, DTensor) and isinstance(real, DTensor)
        assert (mine.placements, mine.shape, mine.stride()) == (real.placements, real.shape, real.stride())
        _assert_equal(mine.to_local(), real.to_local())
        assert box_of(mine) == box_of(real)


def test_fsdp_is_what_torch_makes() -> None:
    run(2, _compare_with_real_fsdp)


def _disagree(layout: Layout, by: float) -> None:
    parameters = shard_parameters(_full(layout), layout)
    if torch.distributed.get_rank() == 1:
        local = parameters["vector"].detach()
        (local.to_local() if isinstance(local, DTensor) else local).add_(by)
    gather(parameters)


@pytest.mark.parametrize("name", ["replicated", "fsdp_tp_2x2"])
def test_replicas_that_differ_are_an_error(name: str) -> None:
    # A vector in role 2 of fsdp_tp lives on the data-parallel sub-mesh and is replicated across the other dimension.
    layout = LAYOUTS[name]
    position = list(_full(layout)).index("vector")
    layout = layout.every_shift()[(2 - position) % layout.roles]
    run(layout.world_size, _disagree, layout, 0.0)
    with pytest.raises(JobFailed, match="vector: rank 1 and a rank before it differ"):
        run(layout.world_size, _disagree, layout, 1e-3)


def test_without_a_process_group_only_the_single_layout_works() -> None:
    full = _full(LAYOUTS["single"])
    _assert_equal(gather(shard_parameters(full, LAYOUTS["single"])), full)
    with pytest.raises(ValueError, match="layout fsdp_2 needs a world of 2 ranks; this one has 1"):
        shard_parameters(full, LAYOUTS["fsdp_2"])


def _shard_a_scalar() -> None:
    with pytest.raises(ValueError, match="scalar has no dimension to shard"):
        shard_parameters({"scalar": torch.ones(())}, LAYOUTS["fsdp_2"])


def test_scalars_are_refused_where_fsdp_refuses_them() -> None:
    run(2, _shard_a_scalar)
