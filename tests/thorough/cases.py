"""Random small problems, each from its seed alone: shapes, placements, ranks, groups, switches, missing gradients."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from tests.harness.layouts import Layout, Placed, _mesh, _place_each, gather, set_grads, shard_parameters
from tests.harness.models import ZERO_PREFIX, NamedShapes, Shape, gradient_sequence, initial_weights
from tests.runs import SINGLE, Run, make_optimizer
from tests.switches import EVERY

MESHES: dict[int, list[Shape]] = {1: [(1,)], 2: [(2,), (1, 2), (2, 1)], 3: [(3,)], 4: [(4,), (2, 2)]}
"""By number of ranks."""

UNSTABLE = frozenset({"d_limiter"})
"""Here d multiplies rounding errors from step to step, in one process too: another order of sums is another run."""

SWITCHES = [name for name in EVERY if name not in UNSTABLE]

Spec = tuple[Shape, tuple[str, ...]] | None
"""A mesh and one placement for each of its dimensions ("replicate", "shard 1", "strided 0"); None for no DTensor."""


@dataclass(frozen=True)
class Case:
    """One problem. ``missing`` holds the (step, name) of gradients that are None."""

    seed: int
    ranks: int
    shapes: tuple[tuple[str, Shape], ...]
    specs: tuple[Spec, ...]
    groups: int
    switch: str
    steps: int
    missing: frozenset[tuple[int, str]]

    def lacks(self, step: int, name: str) -> bool:
        return (step, name) in self.missing

    def layout(self) -> Layout:
        return Layout("case", self.ranks, partial(_place_each, partial(placed, self.specs)))


def draw(seed: int, ranks: int) -> Case:
    """The case of a seed."""
    random_ = random.Random(seed)
    shapes = tuple(named_shape(random_, index) for index in range(random_.randint(1, 4)))
    steps = random_.randint(2, 4)
    missing = {(step, name) for step in range(steps) for name, _ in shapes if random_.random() < 0.05}
    return Case(
        seed, ranks, shapes, tuple(spec(random_, ranks, len(shape)) for _, shape in shapes),
        random_.randint(1, min(3, len(shapes))), random_.choice(SWITCHES), steps, frozenset(missing),
    )  # fmt: skip


def named_shape(random_: random.Random, index: int) -> tuple[str, Shape]:
    """Mostly small and uneven; now and then two dimensions from 32 up, which are factored; some start at zero."""
    kind = random_.choice(("vector", "matrix", "matrix", "factored", "tensor"))
    if kind == "vector":
        shape: Shape = (random_.randint(1, 40),)
    elif kind == "matrix":
        shape = (random_.randint(1, 40), random_.randint(1, 24))
    elif kind == "factored":
        shape = (random_.randint(32, 40), random_.randint(32, 40))
    else:
        shape = (random_.randint(1, 34), random_.randint(1, 5), random_.choice((1, 2, 3, 33)))
    prefix = ZERO_PREFIX if random_.random() < 0.15 else ""
    return f"{prefix}p{index}", shape


def spec(random_: random.Random, ranks: int, ndim: int) -> Spec:
    """Any way of DTensor to put a parameter on a mesh of all ranks."""
    if random_.random() < 0.15:
        return None
    mesh = random_.choice(MESHES[ranks])
    choices = ["replicate", *(f"shard {axis}" for axis in range(ndim))]
    placements = tuple(random_.choice(choices) for _ in mesh)
    if len(mesh) == 2 and placements == ("shard 0", "shard 0") and random_.random() < 0.5:
        placements = ("strided 0", "shard 0")  # As fully_shard leaves what tensor parallelism has cut.
    return mesh, placements


def placed(specs: Sequence[Spec], position: int, ndim: int) -> Placed | None:
    chosen = specs[position]
    if chosen is None:
        return None
    shape, placements = chosen
    mesh = _mesh(shape, tuple(f"axis{axis}" for axis in range(len(shape))))
    return mesh, tuple(_placement(text, shape) for text in placements)


def _placement(text: str, mesh: Shape) -> Placement:
    kind, _, axis = text.partition(" ")
    if kind == "replicate":
        return Replicate()
    return Shard(int(axis)) if kind == "shard" else _StridedShard(int(axis), split_factor=mesh[1])


def run_cases(cases: Sequence[Case], alone: bool = False) -> list[Run]:
    """Run each case; ``alone`` on one process without DTensors. Weights and z are whole on rank 0, absent elsewhere."""
    runs, weights, states = [], {}, {}
    for index, case in enumerate(cases):
        parameters = shard_parameters(initial_weights(list(case.shapes), case.seed), SINGLE if alone else case.layout())
        optimizer = make_optimizer(parameters, case.groups, **EVERY[case.switch])
        run = Run({}, {}, {})
        for gradients in gradient_sequence(list(case.shapes), case.steps, case.seed, missing=case.lacks):
            set_grads(parameters, gradients)
            optimizer.step()
            optimizer.get_d()
            run.groups.append([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
        runs.append(run)
        for name, parameter in parameters.items():
            weights[f"{index}/{name}"] = parameter
            states[f"{index}/{name}"] = optimizer.state[parameter].get("z", parameter)
    # One exchange for all cases, which also compares replicas bit for bit.
    whole_weights = gather(weights)
    whole_z = gather(weights, {name: local(value) for name, value in states.items()})
    if not dist.is_initialized() or dist.get_rank() == 0:
        for index, (case, run) in enumerate(zip(cases, runs, strict=True)):
            run.weights = {name: whole_weights[f"{index}/{name}"] for name, _ in case.shapes}
            run.z = {name: whole_z[f"{index}/{name}"] for name, _ in case.shapes}
    return runs


def local(tensor: Any) -> Any:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def starts(case: Case) -> Mapping[str, Any]:
    shapes: NamedShapes = list(case.shapes)
    return initial_weights(shapes, case.seed)
