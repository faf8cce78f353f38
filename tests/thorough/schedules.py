"""Random training runs, each from its seed alone, that are stopped, killed and moved, and twins that are not.

What a run does is a list of operations; when it is interrupted is a list of sections, each on a layout of its own. The
twin is the same list of operations in one section. ``tests.thorough.scripts`` runs them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from tests.harness.layouts import LAYOUTS
from tests.harness.models import Shape
from tests.switches import EVERY
from tests.thorough.cases import SWITCHES, named_shape

# Two ranks come most often: they show nearly all that more show, in half the time.
PLACES = (
    *("single", "replicated", "fsdp_real", "mixed", "shard1", "tp", "fsdp_1") * 2,
    *("fsdp_2",) * 4,
    *("fsdp_3", "fsdp_4", "hsdp_2x2", "fsdp_tp_2x2"),
)


@dataclass(frozen=True)
class Operation:
    """One thing that a training script does; what ``name``, ``number`` and ``value`` mean depends on ``kind``."""

    kind: str
    name: str = ""
    number: int = 0
    value: float = 0.0


@dataclass(frozen=True)
class Section:
    """From where the last checkpoint is to operation ``stop``, on a layout.

    Attributes:
        ending: "save"; "kill" while saving, or "crash" without having saved.
        by_time: kill after a part of the time that a save takes, not before a call.
        when: for each rank: after which part of the save.
    """

    layout: str
    stop: int
    ending: str
    by_time: bool = False
    when: tuple[float, ...] = ()


@dataclass(frozen=True)
class Schedule:
    """A run and its interruptions.

    Attributes:
        saves: operations before which the run saves and goes on.
        reloads: operations before which the optimizer loads its own state dict.
        frozen: the parameter that needs no gradient at first, or "".
        late: the parameter that no group has at first, or "".
    """

    seed: int
    switch: str
    dtype: torch.dtype
    shapes: tuple[tuple[str, Shape], ...]
    groups: int
    frozen: str
    late: str
    operations: tuple[Operation, ...]
    sections: tuple[Section, ...]
    saves: frozenset[int]
    reloads: frozenset[int]

    @property
    def stays(self) -> bool:
        """Whether the layout is always the same."""
        return len({section.layout for section in self.sections}) == 1

    def twin(self) -> Schedule:
        """The same run without an interruption; in one process, or where it was if it stayed there."""
        layout = self.sections[0].layout if self.stays else "single"
        whole = Section(layout, len(self.operations), "end")
        return replace(self, sections=(whole,), saves=frozenset(), reloads=frozenset())


def draw(seed: int) -> Schedule:
    """The schedule of a seed."""
    random_ = random.Random(f"schedule {seed}")
    stays = random_.random() < 0.3
    layouts = [random_.choice(PLACES)] * 4 if stays else random_.choices(PLACES, k=4)
    switch = random_.choice(list(EVERY) if stays else SWITCHES)
    shapes = tuple(named_shape(random_, index) for index in range(random_.randint(3, 5)))
    if "fsdp_tp_2x2" in layouts:
        # torch's checkpoints place strided shards wrongly where sizes do not divide.
        shapes = tuple((name, tuple(4 * -(-size // 4) for size in shape)) for name, shape in shapes)
    names = [name for name, _ in shapes]
    frozen = random_.choice(names[1:]) if random_.random() < 0.35 else ""
    late = random_.choice([name for name in names[1:] if name != frozen]) if random_.random() < 0.35 else ""
    groups = random_.randint(1, 2)
    operations = draw_operations(random_, names, groups, frozen, late, can_average(switch))
    return Schedule(
        seed, switch, random_.choice((torch.float32, torch.bfloat16)) if stays else torch.float32, shapes, groups,
        frozen, late, operations, draw_sections(random_, layouts, len(operations)),
        frozenset(position for position in range(1, len(operations)) if random_.random() < 0.08),
        frozenset(position for position in range(1, len(operations)) if random_.random() < 0.08),
    )  # fmt: skip


def can_average(switch: str) -> bool:
    switches = EVERY[switch]
    return not switches.get("use_schedulefree", True) or switches.get("betas", (0.9,))[0] > 0


def draw_operations(
    random_: random.Random, names: Sequence[str], groups: int, frozen: str, late: str, averages: bool
) -> tuple[Operation, ...]:
    pending = [Operation("unfreeze", frozen)] if frozen else []
    pending += [Operation("add group", late)] if late else []
    available = [name for name in names if name not in (frozen, late)]
    operations: list[Operation] = []
    while len(operations) < 12:
        kind = random_.choices(
            ("step", "skip", "evaluate", "averaged", "lr", "weight decay", "pending"), (12, 2, 2, 1, 1, 1, 3)
        )[0]
        if kind == "skip":
            value = random_.choice((float("nan"), float("inf"), -float("inf")))
            operations.append(Operation("skip", random_.choice(available), random_.randrange(1 << 16), value))
        elif kind == "evaluate" and averages:
            operations += [Operation("eval"), Operation("train")]
        elif kind == "averaged" and averages:
            operations.append(Operation("averaged"))
        elif kind == "lr":
            operations.append(Operation("set", "lr", random_.randrange(groups), random_.choice((0.5, 0.9, 1.0, 2.0))))
        elif kind == "weight decay":
            operations.append(Operation("set", "weight_decay", random_.randrange(groups), random_.choice((0.0, 0.1))))
        elif kind == "pending" and pending:
            operations.append(pending.pop(random_.randrange(len(pending))))
        else:
            operations.append(Operation("step"))
    return (*operations, *pending, Operation("step"), Operation("step"))


def draw_sections(random_: random.Random, layouts: Sequence[str], length: int) -> tuple[Section, ...]:
    stops = sorted(random_.sample(range(1, length), random_.randint(1, 3)))
    sections = []
    for layout, stop in zip(layouts, stops, strict=False):
        ending = random_.choices(("save", "kill", "crash"), (10, 9, 1))[0]
        when = tuple(random_.random() for _ in range(LAYOUTS[layout].world_size))
        sections.append(Section(layout, stop, ending, random_.random() < 0.3, when))
    return (*sections, Section(layouts[len(stops)], length, "end"))
