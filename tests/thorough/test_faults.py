"""An exception in the middle of a step ends it or undoes it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.harness.layouts import LAYOUTS
from tests.harness.pool import JobFailed, run
from tests.thorough.conftest import Amount
from tests.thorough.faults import Plan, attempts
from tests.thorough.tally import Tally

MINUTES = 30
HANG_SECONDS = 600.0
SWITCHES = ("default", "cautious", "unfactored", "adopt", "momentum_cautious_no_stableadamw", "speed_one_d")
"""Each takes another way through a step, with one to three reductions."""

BOTH = ("Fault", "KeyboardInterrupt")
PLANS = {
    "single": (
        *(Plan("kernel", BOTH, both=True, before=before) for before in (0, 2)),
        Plan("operator", BOTH),
        Plan("line", ("KeyboardInterrupt",), every=6),
    ),
    # The points that both ranks come to alike, so that both raise at the same one.
    "fsdp_2": tuple(
        Plan(place, BOTH, both=True, before=before) for place in ("collective", "kernel") for before in (0, 2)
    ),
}
"""By layout. Of the first step, which makes state and plan, every operator is tried too, for the first switch."""


@pytest.mark.dist
@pytest.mark.campaign
@pytest.mark.timeout(MINUTES * 60)
def test_faults(amount: Amount, tally: Tally) -> None:
    """An exception at every collective, kernel call, operator and line of a step: the step is made, or can be again."""
    thinner = round(1 / min(1.0, amount(1000, 3) / 1000))
    for switch in SWITCHES if thinner < 100 else SWITCHES[:1]:
        for layout, plans in PLANS.items():
            for plan in plans:
                attempt(switch, layout, thinned(plan, thinner), tally)
    attempt(SWITCHES[0], "single", thinned(Plan("operator", BOTH, before=0), thinner), tally)
    tally.conclude()


def thinned(plan: Plan, thinner: int) -> Plan:
    """Fewer operators and lines; kernels and collectives are few."""
    return replace(plan, every=plan.every * thinner) if plan.place in ("operator", "line") else plan


def attempt(switch: str, layout: str, plan: Plan, tally: Tally) -> None:
    ranks = LAYOUTS[layout].world_size
    try:
        results = run(ranks, attempts, switch, layout, plan, timeout=HANG_SECONDS)
    except JobFailed as failure:
        tally.tried += 1
        tally.lost.append(f"{switch} on {layout}, {plan}: {failure}")
        return
    tried = results[0][0]
    problems = {problem for _, problems in results for problem in problems}
    tally.tried += tried
    tally.count(f"at {plan.place}s on {ranks} rank{'s' if ranks > 1 else ''}", tried)
    tally.lost.extend(sorted(problems))
