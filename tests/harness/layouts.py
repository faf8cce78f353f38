"""Put whole tensors on a layout of ranks, and get whole tensors back.

A distributed test is one function that runs over ``LAYOUTS``::

    def job(layout: Layout) -> dict[str, Tensor]:
        parameters = shard_parameters(initial_weights(shapes), layout)
        set_grads(parameters, gradients)
        ...
        return gather(parameters)

    results = run(layout.world_size, job, layout)

Shards are cut here, without ``distribute_tensor`` and without a forward pass, so that layouts which only arise when
several parts of torch work together (tensor parallelism under FSDP) need neither. The tests compare them with the real
ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.nn import Module, Parameter, ParameterDict

Box = tuple[slice, ...]
Placed = tuple[DeviceMesh, tuple[Placement, ...]]


@dataclass(frozen=True)
class Layout:
    """A way to spread parameters over ranks.

    Attributes:
        world_size: number of ranks it needs.
        builder: makes the parameters of this rank from whole tensors and a shift; called on every rank.
        roles: in how many ways it treats parameters. The parameter at position ``i`` gets role ``(i + shift) % roles``.
        shift: offset of the roles.
    """

    name: str
    world_size: int
    builder: Callable[[Mapping[str, Tensor], int], dict[str, Parameter]]
    roles: int = 1
    shift: int = 0

    def every_shift(self) -> list[Layout]:
        """Variants of this layout in which each parameter meets each role once."""
        return [replace(self, shift=shift) for shift in range(self.roles)]


def shard_parameters(full: Mapping[str, Tensor], layout: Layout) -> dict[str, Parameter]:
    """The parameters of this rank that hold its part of ``full``, in the same order. ``full`` is copied.

    Raises:
        ValueError: the world has the wrong size, or a tensor without dimensions is to be sharded.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if world_size != layout.world_size:
        raise ValueError(f"layout {layout.name} needs a world of {layout.world_size} ranks; this one has {world_size}.")
    return layout.builder(full, layout.shift)


def set_grads(parameters: Mapping[str, Parameter], full: Mapping[str, Tensor | None]) -> None:
    """Give each parameter its part of the whole gradient of the same name, placed like it. ``None`` stays."""
    for name, parameter in parameters.items():
        gradient = full[name]
        if gradient is None:
            parameter.grad = None
        elif isinstance(parameter, DTensor):
            parameter.grad = _distribute(gradient, parameter.device_mesh, parameter.placements)
        else:
            parameter.grad = gradient.clone()


def gather(parameters: Mapping[str, Tensor], pieces: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Whole tensors on every rank, from what all ranks hold, in one exchange.

    Every rank of the world must call this. A tensor without a DTensor is a replica of the whole.

    Args:
        parameters: tensors or DTensors.
        pieces: local tensors in the shape of the local shards, such as optimizer state, to be gathered in place of the
            parameters themselves.

    Raises:
        AssertionError: ranks that hold the same element disagree about it in any bit, or no rank holds it.
    """
    mine = {
        name: (box_of(parameter), (local(parameter) if pieces is None else pieces[name]).detach())
        for name, parameter in parameters.items()
    }
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    ranks = [mine] * world_size
    if world_size > 1:
        dist.all_gather_object(ranks, mine)
    return {
        name: _assemble(name, parameter.shape, [held[name] for held in ranks]) for name, parameter in parameters.items()
    }


def box_of(tensor: Tensor) -> Box:
    """The part of the whole tensor that this rank holds, as one slice for each dimension."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    return _box(tensor.shape, tensor.device_mesh, tensor.placements)


def _box(shape: Sequence[int], mesh: DeviceMesh, placements: Sequence[Placement]) -> Box:
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    bounds = [(0, size) for size in shape]
    # fully_shard cuts what tensor parallelism has left, although its mesh dimension comes first: strided shards go
    # last. torch's own compute_local_shape_and_global_offset replays them in another order and is wrong for some
    # uneven sizes.
    for strided in (False, True):
        for mesh_dim, placement in enumerate(placements):
            if isinstance(placement, _StridedShard if strided else Shard):
                low, high = bounds[placement.dim]
                chunk = -(-(high - low) // mesh.size(mesh_dim))
                start = min(low + chunk * coordinate[mesh_dim], high)
                bounds[placement.dim] = (start, min(start + chunk, high))
    return tuple(slice(low, high) for low, high in bounds)


def local(tensor: Tensor) -> Tensor:
    """What of a tensor lies on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _distribute(full: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    piece = full[_box(full.shape, mesh, placements)].clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(piece, mesh, placements, run_check=False, shape=full.shape, stride=full.stride())


def _assemble(name: str, shape: torch.Size, pieces: list[tuple[Box, Tensor]]) -> Tensor:
    full = torch.empty(shape, dtype=pieces[0][1].dtype)
    held = torch.zeros(shape, dtype=torch.bool)
    for rank, (box, piece) in enumerate(pieces):
        again = held[box]
        assert _bits_equal(full[box][again], piece[again]), f"{name}: rank {rank} and a rank before it differ"
        full[box] = piece
        held[box] = True
    assert bool(held.all()), f"{name}: no rank holds some of the elements"
    return full


def _bits_equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


@cache
def _mesh(shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """One mesh for each description and process: each new one would cost process groups."""
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


@cache
def _dp_mesh(shape: tuple[int, int]) -> DeviceMesh:
    return _mesh(shape, ("dp", "tp"))["dp"]


def _place_each(
    place: Callable[[int, int], Placed | None], full: Mapping[str, Tensor], shift: int
) -> dict[str, Parameter]:
    parameters = {}
    for position, (name, value) in enumerate(full.items()):
        placed = place(position + shift, value.ndim)
        if placed is None:
            parameters[name] = Parameter(value.clone())
        elif value.ndim == 0:
            raise ValueError(f"{name} has no dimension to shard; FSDP wants shape (1,) instead.")
        else:
            parameters[name] = Parameter(_distribute(value, *placed))
    return parameters


def _fully_shard(full: Mapping[str, Tensor], shift: int) -> dict[str, Parameter]:
    module = Module()
    module.weights = ParameterDict({name: Parameter(value.clone()) for name, value in full.items()})
    fully_shard(module, mesh=_mesh((dist.get_world_size(),), ("dp",)))
    sharded = dict(module.weights.named_parameters())
    return {name: sharded[name] for name in full}


def _plain(role: int, ndim: int) -> Placed | None:
    return None


def _fsdp(ranks: int, role: int, ndim: int) -> Placed:
    return _mesh((ranks,), ("dp",)), (Shard(0),)


def _hsdp(shape: tuple[int, int], role: int, ndim: int) -> Placed:
    return _mesh(shape, ("replicate", "shard")), (Replicate(), Shard(0))


def _shard1(ranks: int, role: int, ndim: int) -> Placed:
    return _mesh((ranks,), ("dp",)), (Shard(min(1, ndim - 1)),)


def _tp(ranks: int, role: int, ndim: int) -> Placed:
    matrix = (Shard(0), Shard(1), Replicate())
    vector = (Shard(0), Replicate(), Replicate())
    return _mesh((ranks,), ("tp",)), ((matrix if ndim > 1 else vector)[role % 3],)


def _fsdp_tp(shape: tuple[int, int], role: int, ndim: int) -> Placed:
    columnwise, rowwise = 0, 1
    if role % 3 == columnwise:
        return _mesh(shape, ("dp", "tp")), (_StridedShard(0, split_factor=shape[1]), Shard(0))
    if role % 3 == rowwise:
        return _mesh(shape, ("dp", "tp")), (Shard(0), Shard(1) if ndim > 1 else Replicate())
    return _dp_mesh(shape), (Shard(0),)  # As for modules that tensor parallelism leaves alone.


def _mixed(ranks: int, role: int, ndim: int) -> Placed | None:
    return _fsdp(ranks, role, ndim) if role % 2 == 0 else None


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("single", 1, partial(_place_each, _plain)),
        Layout("replicated", 2, partial(_place_each, _plain)),
        *(Layout(f"fsdp_{ranks}", ranks, partial(_place_each, partial(_fsdp, ranks))) for ranks in (1, 2, 3, 4)),
        Layout("fsdp_real", 2, _fully_shard),
        Layout("hsdp_2x2", 4, partial(_place_each, partial(_hsdp, (2, 2)))),
        Layout("shard1", 2, partial(_place_each, partial(_shard1, 2))),
        Layout("tp", 2, partial(_place_each, partial(_tp, 2)), roles=3),
        Layout("fsdp_tp_2x2", 4, partial(_place_each, partial(_fsdp_tp, (2, 2))), roles=3),
        Layout("fsdp_tp_3x2", 6, partial(_place_each, partial(_fsdp_tp, (3, 2))), roles=3),
        Layout("mixed", 2, partial(_place_each, partial(_mixed, 2)), roles=2),
    )
}
