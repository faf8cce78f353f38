"""The counters count: each kind of event is planted and must be seen, and harmless work must not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from tests.harness.counting import Collectives, count_collectives, count_host_syncs
from tests.harness.pool import run


def _step(name: str) -> None:
    """One event under the name by which the counter should report it."""
    ones, world = torch.ones(2), dist.group.WORLD
    assert world is not None
    if name == "allreduce_":
        dist.all_reduce(ones)
    elif name == "all_reduce":
        functional.all_reduce(ones, "sum", world).sum()
    elif name == "allgather_":
        dist.all_gather([torch.empty(2), torch.empty(2)], ones)
    elif name == "_allgather_base_":
        dist.all_gather_single(torch.empty(4), ones)
    elif name == "_reduce_scatter_base_":
        dist.reduce_scatter_single(torch.empty(1), ones)
    elif name == "broadcast_":
        dist.broadcast(ones, 0)
    elif name == "reduce_":
        dist.reduce(ones, 0)
    elif name == "alltoall_base_":
        dist.all_to_all_single(torch.empty(2), ones)
    elif name == "barrier":
        dist.barrier()
    else:
        raise ValueError(name)


PLANTED_COLLECTIVES = (
    "allreduce_",
    "all_reduce",
    "allgather_",
    "_allgather_base_",
    "_reduce_scatter_base_",
    "broadcast_",
    "reduce_",
    "alltoall_base_",
    "barrier",
)


def _plant_collectives() -> dict[str, Collectives]:
    counts = {}
    for name in PLANTED_COLLECTIVES:
        with count_collectives() as counts[name]:
            _step(name)
            _step(name)
    return counts


def _plant_asynchronous() -> Collectives:
    with count_collectives() as collectives:
        first = dist.all_reduce(torch.ones(2), async_op=True)
        dist.all_reduce(torch.ones(2))
        assert first is not None
        first.wait()
    return collectives


def _dtensor_collectives() -> tuple[Collectives, int, Collectives]:
    mesh = init_device_mesh("cpu", (2,))
    sharded = distribute_tensor(torch.arange(6.0), mesh, [Shard(0)])

    def gather_and_sum() -> None:
        total = sharded.sum()
        assert isinstance(total, DTensor)
        total.redistribute(placements=[Replicate()])
        sharded.redistribute(placements=[Replicate()])

    with count_collectives() as ours:
        gather_and_sum()
    with CommDebugMode() as theirs:
        gather_and_sum()
    with count_collectives() as elementwise:
        sharded.mul(2.0).add(sharded)
    return ours, theirs.get_total_counts(), elementwise


@pytest.mark.dist
def test_every_kind_of_collective_is_counted() -> None:
    for counts in run(2, _plant_collectives):
        assert {name: dict(count.names) for name, count in counts.items()} == {
            name: {name: 2} for name in PLANTED_COLLECTIVES
        }
        assert {(count.blocking, count.asynchronous, count.total) for count in counts.values()} == {(2, 0, 2)}


@pytest.mark.dist
def test_asynchronous_collectives_are_told_from_blocking_ones() -> None:
    for collectives in run(2, _plant_asynchronous):
        assert (collectives.blocking, collectives.asynchronous, collectives.names) == (1, 1, {"allreduce_": 2})


@pytest.mark.dist
def test_collectives_of_dtensors_are_counted_as_comm_debug_mode_does() -> None:
    for ours, theirs, elementwise in run(2, _dtensor_collectives):
        assert ours.blocking == theirs == 2
        assert elementwise.total == 0


ONE = torch.ones(())
FOUR = torch.ones(4)
MASK = torch.tensor([True, False, True, False])
META = torch.ones(4, device="meta")


@pytest.mark.parametrize(
    ("name", "event"),
    [
        ("_local_scalar_dense", lambda: ONE.item()),
        ("_local_scalar_dense", lambda: bool(FOUR.any())),
        ("_local_scalar_dense", lambda: float(ONE)),
        ("_local_scalar_dense", lambda: max(ONE, ONE)),
        ("_local_scalar_dense", lambda: f"{ONE:.1f}"),
        ("_local_scalar_dense", lambda: FOUR.add(FOUR, alpha=ONE)),  # type: ignore[arg-type]
        ("_local_scalar_dense", lambda: FOUR[torch.ones((), dtype=torch.long) :]),
        ("equal", lambda: torch.equal(FOUR, FOUR)),
        ("allclose", lambda: torch.allclose(FOUR, FOUR)),
        ("nonzero", lambda: FOUR.nonzero()),
        ("nonzero", lambda: torch.where(MASK)),
        ("masked_select", lambda: FOUR.masked_select(MASK)),
        ("_unique2", lambda: torch.unique(FOUR)),
        ("index", lambda: FOUR[MASK]),
        ("index_put_", lambda: FOUR.clone().__setitem__(MASK, torch.ones(2))),
        ("tolist", lambda: FOUR.tolist()),
        ("numpy", lambda: FOUR.numpy()),
        ("cpu", lambda: FOUR.cpu()),
        ("tensor", lambda: torch.tensor([ONE])),
    ],
)
def test_host_reads_are_counted(name: str, event: Callable[[], object]) -> None:
    with count_host_syncs() as syncs:
        event()
    assert syncs.names == {name: 1}
    assert syncs.total == 1


def test_copies_between_devices_are_counted_unless_non_blocking() -> None:
    # A meta tensor has no elements, so copying it to the CPU is counted and then refused.
    with count_host_syncs() as syncs, pytest.raises(NotImplementedError):
        META.to("cpu")
    assert syncs.names == {"_to_copy": 1}
    with count_host_syncs() as syncs:
        META.copy_(FOUR)
        META.copy_(FOUR, non_blocking=True)
    assert syncs.names == {"copy_": 1}


def test_arithmetic_is_no_host_read() -> None:
    values = torch.ones(4)
    with count_host_syncs() as syncs:
        values.mul_(ONE).add_(values, alpha=2.0).copy_(FOUR)
        torch._foreach_mul_([values], ONE)
        torch.where(MASK, values, values.double().sum())
        values[MASK] = 0.0
        values[::2].to(torch.bfloat16)
        torch.tensor([1.0, 2.0])
    assert syncs.total == 0


def _dtensor_host_reads() -> int:
    mesh = init_device_mesh("cpu", (1,))
    with count_host_syncs() as syncs:
        distribute_tensor(torch.ones(3), mesh, [Shard(0)]).sum().item()
    return syncs.total


@pytest.mark.dist
def test_host_reads_of_dtensors_are_counted_once() -> None:
    assert run(1, _dtensor_host_reads) == [1]
