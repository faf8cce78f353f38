"""Groups and parameters in the middle of a run, drawn at random, as the numbers between the passes meet them."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from hypothesis import strategies as st

import ppsf_dist
from ppsf_dist import ProdigyPlusScheduleFree
from ppsf_dist.engine.part_numbers import Traits
from ppsf_dist.engine.reductions import Outcome, Reductions
from ppsf_dist.kernels.interface import Buffers, Coefficients, Gates, Scales
from ppsf_dist.methods.adamw_schedulefree import ADAMW_METHOD, RADAM_METHOD
from ppsf_dist.methods.base import Method
from ppsf_dist.methods.prodigy import PRODIGY
from ppsf_dist.methods.prodigy_plus import POOLED, PRODIGY_PLUS
from ppsf_dist.methods.sgd_schedulefree import SGD_METHOD
from ppsf_dist.methods.sums import Stat
from ppsf_dist.sharding import Team
from ppsf_dist.sharding.slots import Slot, SlotTable
from ppsf_dist.state.inventory import PARAMETER_NUMBERS
from ppsf_dist.state.moments import FactoredMoments
from tests.family import FAMILY
from tests.switches import EVERY

CPU = torch.device("cpu")
WIDE = ("split_groups", "split_groups_mean", "reference_quirks")
SHAPES = ((16, 64), (7,), (40, 3), (), (5, 33, 2))

COVERED = {
    name: switch
    for name, switch in EVERY.items()
    if not {"use_adopt", "use_orthograd", "use_focus"} & {key for key, value in switch.items() if value is True}
}
"""The switches that the numbers of parameters know in C++."""

METHODS = {method.name: method for method in (PRODIGY_PLUS, PRODIGY, SGD_METHOD, ADAMW_METHOD, RADAM_METHOD)}

positive = st.floats(1e-8, 1e3)
signed = st.floats(-1e3, 1e3)


@st.composite
def of_prodigy_plus(draw: st.DrawFn, switches: dict[str, dict[str, Any]] = EVERY) -> list[dict[str, Any]]:
    """One to five validated groups with a switch each, and the numbers of some step."""
    some = st.sampled_from(sorted(switches))
    of_all = st.sampled_from(sorted(name for name, switch in switches.items() if {*WIDE} & {*switch}))
    first = switches[draw(st.one_of(some, of_all))]
    # What all groups must agree on is the first one's.
    shared = WIDE if first.get("split_groups", True) else (*WIDE, *POOLED)
    made: list[dict[str, Any]] = []
    for _ in range(draw(st.sampled_from((1, 2, 3, 5)))):
        other = switches[draw(some)] if made else first
        wide = {name: first[name] for name in shared if name in first}
        other = {name: value for name, value in other.items() if name not in shared} | wide
        if shared is WIDE and draw(st.booleans()):
            other["prodigy_steps"] = 5
        lr = draw(st.sampled_from((1.0, 0.5, 0.0)))
        made.append({"params": [torch.nn.Parameter(torch.zeros(2))], **other, "lr": lr})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        of: list[dict[str, Any]] = ProdigyPlusScheduleFree(made).param_groups
    for group in of:
        group |= {
            "k": draw(st.sampled_from((1, 2, 3, 4, 5, 6, 30, 1000))),
            "d": group["d0"] * draw(st.sampled_from((1.0, 1.05, 40.0))),
            "weight_sum": draw(st.sampled_from((0.0, 1e-7, 3.0))),
            "d_numerator": draw(st.sampled_from((0.0, 1e-5, 1.0, -1.0))),
            "max_d_numerator": draw(st.sampled_from((0.0, 1e-5, 1.0))),
            "shared_d": draw(st.sampled_from((None, 1e-3))),
        }
    return of


@st.composite
def of_sister(draw: st.DrawFn, name: str) -> list[dict[str, Any]]:
    """One to five groups of another class, and the numbers of some step."""
    method, variants = METHODS[name], FAMILY[name].variants
    some = st.sampled_from([variant for variant in variants if variant != "powers"])
    first = variants[draw(some)]
    lr, growth_rate = draw(st.sampled_from((1.0, 0.02))), draw(st.sampled_from((math.inf, 1.02)))
    made: list[dict[str, Any]] = []
    for _ in range(draw(st.sampled_from((1, 2, 3, 5)))):
        other = variants[draw(some)] if made else first
        # What all groups must agree on is the first one's.
        of_all = {name: {**method.arguments, **first}[name] for name in method.wide}
        rates = (lr, lr, 0.0) if method is PRODIGY else (lr, 0.3, 0.0)
        rate = draw(st.sampled_from(rates)) if made else lr
        made.append({"params": [torch.nn.Parameter(torch.zeros(2))], **other, **of_all, "lr": rate})
        if method is PRODIGY:
            made[-1] |= {"growth_rate": growth_rate}
        else:
            made[-1] |= {"r": draw(st.sampled_from((0.0, 1.0, 2.0, -1.0)))}
            made[-1] |= {"weight_lr_power": draw(st.sampled_from((2.0, 0.0, 1.0, 3.0)))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        of: list[dict[str, Any]] = getattr(ppsf_dist, name)(made, lr=lr).param_groups
    k = st.sampled_from((0, 1, 3, 4, 5, 6, 30, 1000))
    d = draw(st.sampled_from((1.0, 1.05, 40.0)))
    for group in of:
        group["k"] = draw(k)
        if method is PRODIGY:
            size = group["d0"] * d
            group |= {"d": size, "d_max": size * draw(st.sampled_from((1.0, 2.0))), "d_hat": size}
            group |= {"d_numerator": draw(st.sampled_from((0.0, 1e-5, 1.0, -1.0))), "d_denom": 1e-3}
        elif group["k"]:
            group |= {"weight_sum": draw(st.sampled_from((0.0, 3.0))), "lr_max": draw(st.sampled_from((0.0, 0.1, 2.0)))}
    return of


def groups_of(name: str, switches: dict[str, dict[str, Any]] = EVERY) -> st.SearchStrategy[list[dict[str, Any]]]:
    return of_prodigy_plus(switches) if METHODS[name] is PRODIGY_PLUS else of_sister(name)


class Part:
    """Some parameters of the groups, with buffers and sums of their own."""

    def __init__(self, method: Method, of: list[dict[str, Any]], data: st.DataObject) -> None:
        self.method, switches = method, [method.switches(group) for group in of]
        dtype = st.sampled_from(("torch.float32", "torch.bfloat16"))
        count = data.draw(st.sampled_from((1, 2, 4, 7, 10)))
        slots = tuple(
            Slot(data.draw(st.integers(0, len(of) - 1)), SHAPES[i % len(SHAPES)], data.draw(dtype), 3 * i)
            for i in range(count)
        )
        self.traits = Traits.of(SlotTable(slots, ()), switches, CPU)
        self.moments = FactoredMoments([None] * count, CPU)
        masks = self.traits.any_late_mask
        self.reductions = Reductions(Team(), count, [11], CPU, sums_early=True, needs_norms=True, masks_late=masks)
        values = st.lists(positive, min_size=count, max_size=count)
        self.parameters = torch.tensor([data.draw(values) for _ in PARAMETER_NUMBERS], dtype=torch.float64)
        self.parameters[0].round_()
        if data.draw(st.booleans()):
            self.parameters[1:] = 0
        stats = self.reductions.table.stats
        for column in Stat:
            stats[:, column] = torch.tensor(data.draw(values))
        stats[:, Stat.DOT] -= 1.0
        stats[:, Stat.PRESENT] = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count)))
        if data.draw(st.sampled_from((False, False, True))):
            stats[:, Stat.S_L1] = 0.0
        self.reductions.sums.fill_(data.draw(st.sampled_from((1.0, 1.0, 1.0, math.inf))))
        where = data.draw(st.sampled_from((None, None, None, Stat.LARGEST_SQUARE, Stat.DOT, Stat.UU, Stat.GG)))
        if where is not None:
            stats[data.draw(st.integers(0, count - 1)), where] = data.draw(st.sampled_from((math.nan, math.inf)))
        # What no rank has a gradient of adds nothing.
        stats[stats[:, Stat.PRESENT] == 0, Stat.GG] = 0.0
        outcome = data.draw(st.sampled_from((*[None] * 6, *Outcome)))
        if outcome is not None:
            self.reductions.last.outcome[outcome] = 1.0
        self.count = count

    def buffers(self) -> Buffers:
        n = self.count
        return Buffers(
            coefficients=Coefficients(self.method.coefficients, n, CPU),
            factors=torch.zeros(0),
            new_moments=torch.zeros(0),
            adopt=None,
            scales=torch.zeros(len(Scales._fields), n),
            keys=torch.zeros(n, dtype=torch.int32),
            gates=Gates(torch.zeros(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)),
            sums=self.reductions.sums,
            stats=self.reductions.table.stats,
            masks=None if self.reductions.masks is None else self.reductions.masks.stats,
        )
