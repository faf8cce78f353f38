"""DTensor parameters (FSDP2, HSDP, tensor parallel and their mixtures) as shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate
from torch.distributed.tensor import Shard as ShardPlacement
from torch.distributed.tensor.placement_types import _StridedShard

from ppsf_dist.sharding import Box, Shard
from ppsf_dist.sharding.geometry import chunk


@dataclass(eq=False)
class DTensorShard(Shard):
    """The local tensor of a DTensor parameter."""

    def weights(self) -> Tensor:
        return self.local(self.param)

    def local(self, tensor: Tensor) -> Tensor:
        assert isinstance(tensor, DTensor)
        return tensor._local_tensor

    def summand(self) -> tuple[dist.ProcessGroup, Tensor] | None:
        """Sequence-parallel norms: each tensor-parallel rank holds the gradient of its part of the sequence."""
        gradient = self.param.grad
        if not isinstance(gradient, DTensor) or gradient.placements == self._dtensor.placements:
            return None
        partial = [axis for axis, placement in enumerate(gradient.placements) if placement.is_partial("sum")]
        rest = [p for axis, p in enumerate(gradient.placements) if axis not in partial]
        ours = [p for axis, p in enumerate(self._dtensor.placements) if axis not in partial]
        if len(partial) != 1 or rest != ours:
            raise ValueError(
                f"the gradient of a parameter of shape {self.shape} has placements {gradient.placements}, the "
                f"parameter {self._dtensor.placements}: they must be equal but for one Partial('sum'); redistribute "
                "the gradient before step()"
            )
        return gradient.device_mesh.get_group(partial[0]), self.local(gradient)

    def spread(self, local: Tensor) -> Tensor:
        param = self._dtensor
        return DTensor.from_local(
            local, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
        )

    def spread_rows(self, local: Tensor) -> Tensor:
        param = self._dtensor
        shape, stride = torch.Size((self.shape[0], local.shape[1])), (local.shape[1], 1)
        # Ranks that cut the same rows by columns each fill in their own samples: summing them completes the rows.
        cut = [_row_placement(placement, shared=Partial()) for placement in param.placements]
        joined = [_row_placement(placement, shared=Replicate()) for placement in param.placements]
        rows = DTensor.from_local(local, param.device_mesh, cut, run_check=False, shape=shape, stride=stride)
        return rows if cut == joined else rows.redistribute(placements=joined)

    def extract(self, value: Tensor) -> Tensor:
        if not isinstance(value, DTensor):
            return super().extract(value)
        if value.placements == self._dtensor.placements and value.device_mesh == self._dtensor.device_mesh:
            return self.local(value)
        return super().extract(value.full_tensor())

    def extract_rows(self, value: Tensor) -> Tensor:
        if isinstance(value, DTensor):
            if value._local_tensor.shape[0] == self.row_count and value.device_mesh == self._dtensor.device_mesh:
                return self.local(value)
            value = value.full_tensor()
        return super().extract_rows(value)

    @property
    def _dtensor(self) -> DTensor:
        assert isinstance(self.param, DTensor)
        return self.param


def _row_placement(placement: Placement, shared: Placement) -> Placement:
    """Placement of a by-row matrix: like the parameter's where that cuts rows, ``shared`` where it cuts columns."""
    axis = _sharded_axis(placement)
    if axis is None:
        return Replicate()
    return placement if axis == 0 else shared


def _sharded_axis(placement: object) -> int | None:
    """The axis that a placement cuts, or None if it repeats the tensor."""
    if isinstance(placement, (ShardPlacement, _StridedShard)):
        return placement.dim
    return None


def local_box(param: DTensor) -> Box:
    """The box of the logical parameter that this rank holds.

    torch's own offsets are wrong for uneven shapes under tensor parallel plus FSDP: there the FSDP axis, marked
    ``_StridedShard``, comes first in the mesh but cuts last. So the plain shards are applied first.

    Raises:
        ValueError: the placements describe another shape than the local tensor has.
    """
    mesh, coordinate = param.device_mesh, param.device_mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(f"this rank is not part of the mesh {mesh} of a parameter of shape {tuple(param.shape)}")
    offset, size = [0] * param.ndim, list(param.shape)
    axes = list(range(mesh.ndim))
    strided = [axis for axis in axes if isinstance(param.placements[axis], _StridedShard)]
    for mesh_axis in [axis for axis in axes if axis not in strided] + strided:
        axis = _sharded_axis(param.placements[mesh_axis])
        if axis is not None:
            axis %= param.ndim
            start, size[axis] = chunk(size[axis], mesh.size(mesh_axis), coordinate[mesh_axis])
            offset[axis] += start
    local = tuple(param._local_tensor.shape)
    if tuple(size) != local and 0 in size and 0 in local:
        size = list(local)
    if tuple(size) != local:
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} with placements {param.placements} on a mesh of shape "
            f"{tuple(mesh.shape)} should hold {tuple(size)} here, but holds {local}: only the placements that "
            "fully_shard and parallelize_module make are supported"
        )
    return Box(tuple(param.shape), tuple(offset), tuple(size))


def dtensor_shards(params: Sequence[DTensor], beside: Sequence[Shard]) -> list[Shard]:
    """Shards of DTensor parameters, with one owner for each element.

    A parameter on a sub-mesh is repeated on the ranks that other parameters of the same root mesh add: under tensor
    parallel plus FSDP, modules that tensor parallel leaves alone live on the data-parallel sub-mesh only, and nothing
    in their placements says that the other tensor-parallel ranks hold copies.

    Raises:
        ValueError: a parameter has a ``Partial`` placement, or the meshes cover no common set of ranks.
    """
    ranks = {mesh: tuple(sorted(mesh.mesh.flatten().tolist())) for mesh in {p.device_mesh for p in params}}
    # Equal meshes may have different roots: torch caches meshes by their content.
    roots = [p.device_mesh._get_root_mesh() for p in params]
    domains: dict[DeviceMesh, tuple[int, ...]] = {}
    for param, root in zip(params, roots, strict=True):
        domains[root] = max(domains.get(root, ()), ranks[param.device_mesh], key=len)
    shards: list[Shard] = []
    for param, root in zip(params, roots, strict=True):
        own, domain = ranks[param.device_mesh], domains[root]
        _check_domain(param, own, domain)
        coordinate: list[int] = list(param.device_mesh.get_coordinate() or ())
        first_copy, copies = domain[0] in own, len(domain) // len(own)
        for mesh_axis, placement in enumerate(param.placements):
            if placement.is_partial():
                raise ValueError(
                    f"a parameter of shape {tuple(param.shape)} has placements {param.placements}: a Partial parameter "
                    "has no value of its own; redistribute it to Replicate() or Shard() before training"
                )
            if _sharded_axis(placement) is None:
                copies *= param.device_mesh.size(mesh_axis)
                first_copy = first_copy and coordinate[mesh_axis] == 0
        box = local_box(param)
        shards.append(DTensorShard(param, tuple(param.shape), (box,), first_copy, domain, copied=copies > 1))
    return shards


def _check_domain(param: DTensor, own: tuple[int, ...], domain: tuple[int, ...]) -> None:
    if not set(own) <= set(domain):
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} lives on ranks {own}, others of the same root mesh on "
            f"{domain}: no single mesh covers both; build one mesh that does, or use one optimizer for each"
        )


def refuse_flat_parameters(param: Tensor) -> NoReturn:
    """Refuse a parameter of FSDP1.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(
        f"a parameter of shape {tuple(param.shape)} is a flat slice made by FullyShardedDataParallel (FSDP1), "
        "which hides the shape that factored moments and the step size are computed from: use FSDP2, "
        "torch.distributed.fsdp.fully_shard(model)"
    )
