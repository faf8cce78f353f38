"""What a step is planned from: which shards there are, whom they are shared with, and what all ranks agree on."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ppsf_dist.engine.group_numbers import GroupNumbers, News
from ppsf_dist.engine.host import HostAccess
from ppsf_dist.engine.learning_rates import LearningRates
from ppsf_dist.engine.plan import Plan
from ppsf_dist.engine.reductions import Outcome, Reductions
from ppsf_dist.engine.reports import Observer, report_of
from ppsf_dist.kernels.choice import ChosenKernels
from ppsf_dist.methods.base import Method
from ppsf_dist.methods.switches import Switches
from ppsf_dist.release import RELEASE
from ppsf_dist.sharding import (
    Group,
    Layout,
    Member,
    Part,
    Shard,
    State,
    Team,
    check_calling_framework,
    find_layout,
    find_team,
)
from ppsf_dist.sharding.slots import (
    Disagreement,
    Slot,
    agree_on_slots,
    confirm,
    describe,
    share_failure,
    tell_failure,
)
from ppsf_dist.sharding.team import CollectiveFailed

KERNELS = "the kernels (PPSF_KERNELS=eager on all ranks makes them equal; docs/performance.md)"
"""What messages call a backend, whose last bits are its own."""


class Owner(Protocol):
    """The optimizer that is served: torch replaces its dictionaries, so they are looked up each time."""

    param_groups: list[Group]
    state: Any


class Planner:
    """The plans of an optimizer, and when they are no longer those of its parameters.

    A plan is made anew when parameters, switches or state are other ones, and after ``forget``. Making one is
    collective. A rank that needs a new one while the others step by the old one says so in the sums of that step
    (``ppsf_dist.engine.reductions.Outcome``): then all of them raise, unless all need one.

    Args:
        owner: the optimizer.
        method: what it is.
        process_group: ranks that share the step size, or None for those that the parameters live on.
        seed: of stochastic rounding.
    """

    def __init__(self, owner: Owner, method: Method, process_group: dist.ProcessGroup | None, seed: int) -> None:
        self._owner, self.method = owner, method
        self.kernels = ChosenKernels()
        self.process_group = process_group
        self.seed = seed
        self.given: list[list[Tensor]] = []
        self.all_groups: list[Group] = []
        self.names: dict[Tensor, str] = {}
        self.host: HostAccess | None = None
        self.team: Team | None = None
        self.plans: dict[Part, Plan] = {}
        self.numbers: GroupNumbers | None = None
        self.learning_rates = LearningRates(method)
        self._unheard: list[News] = []
        # A handle keeps a weak reference to it, which a plain dict does not allow.
        self.observers: OrderedDict[int, Observer] = OrderedDict()
        self._layout: Layout | None = None
        self._trained: tuple[Layout, list[bool], dict[Tensor, Shard]] | None = None
        self._domains: frozenset[tuple[int, ...]] = frozenset()
        self._outdated: dict[Part, tuple[Reductions, str]] = {}
        self._shared: BaseException | None = None

    @property
    def state(self) -> State:
        """The optimizer's state as it is now."""
        state: State = self._owner.state
        return state

    @property
    def groups(self) -> list[Group]:
        """All parameter groups, also while a framework lets ``param_groups`` show only some of them."""
        shown = self._owner.param_groups
        if shown is not self.all_groups:
            known = {id(group) for group in self.all_groups}
            if any(id(group) not in known for group in shown):
                self.all_groups = shown
        return self.all_groups

    def current_layout(self) -> Layout:
        """How the parameters stand in the groups now, after taking over what a framework has loaded there."""
        groups = self.groups
        check_calling_framework(groups)
        if self._layout is None or self._layout.groups is not groups or not self._layout.is_current():
            self._layout = find_layout(groups, self.given)
        if self._layout.take_over(self.method, self.state):
            self.forget("its framework has loaded a checkpoint")
        return self._layout

    def current_plan(self, part: Part, layout: Layout | None = None) -> Plan | None:
        """The plan for a part as it is now, made anew if its parameters or their switches have changed."""
        layout, groups = layout or self.current_layout(), self.groups
        switches = [self.method.switches(group) for group in groups]
        signature = (layout.signature(part), tuple(switches))
        plan = self.plans.get(part)
        if plan is not None and plan.signature == signature and plan.is_current():
            return plan
        if plan is not None:
            _refuse_another_meaning(plan.signature, signature)
            self._agree_to_plan_anew(plan.reductions, _what_changed(plan.signature, signature))
        elif part in self._outdated:
            self._agree_to_plan_anew(*self._outdated[part])
            del self._outdated[part]
        members = layout.members(part)
        for other in [other for other in self.plans if not other or not part or other & part]:
            self.plans.pop(other).settle()
        if members:
            self.plans[part] = plan = self._make_plan(layout, part, switches, signature)
            return plan
        return None

    def _make_plan(self, layout: Layout, part: Part, switches: list[Switches], signature: Any) -> Plan:
        """Agree with the other ranks on what is to be planned, plan it, and see that all of them have."""
        members = layout.members(part)
        params, groups_of = [member.param for member in members], [member.group for member in members]
        # A part of ZeRO has slices that nothing else decides.
        trained = self.trained_shards(layout)
        shards = [trained[param] for param in params]
        team = self._find_team(layout)
        slots = self.slots(layout, members, shards)
        if self.numbers is not None and not (team.is_alone and all(s.prodigy_steps == 0 for s in switches)):
            # Ranks compare these numbers, and k says which groups are frozen: late copies will not do.
            self._publish()
        table = agree_on_slots(shards, slots, self.common(), self.settings(), team)
        unseen = [not self.state.get(param, {}).get("step") for param in params]
        before = {param: set(self.state[param]) for param in params if param in self.state}
        failure: Exception | None = None
        try:
            if self.host is None or self.host.device != shards[0].weights().device:
                self.host = HostAccess(shards[0].weights().device)
            frozen = [self.method.is_frozen(group) for group in self.groups]
            plan = Plan(
                self.kernels, self.method.coefficients, shards, groups_of, table, switches, frozen, team, self.host,
                self.state, signature,
            )  # fmt: skip
            if self.numbers is None or len(self.numbers.published) != len(self.groups):
                self.numbers = GroupNumbers(self.method, self.groups, self.host)
        except Exception as error:
            failure = error
        new = [(shard, slot) for shard, slot, is_new in zip(shards, slots, unseen, strict=True) if is_new]
        self._shared = failure
        try:
            confirm(failure, [shard for shard, _ in new], [slot for _, slot in new], team)
        except BaseException:
            self._keep_state(params, before)
            raise
        plan.drop_unneeded()
        return plan

    def _keep_state(self, params: list[Tensor], names: dict[Tensor, set[str]]) -> None:
        """Take away state that has come since it had these names."""
        for param in params:
            entries = self.state.get(param, {})
            for name in set(entries) - names.get(param, set()):
                del entries[name]
            if param not in names:
                self.state.pop(param, None)

    def common(self) -> dict[str, object]:
        """What all ranks must agree on for the whole optimizer, by name."""
        device = next((p.device for group in self.groups for p in group["params"]), torch.device("cpu"))
        return {
            "seed": self.seed,
            "the release of ppsf_dist": RELEASE,
            "the optimizer": self.method.name,
            KERNELS: self.kernels.arithmetic(device),
        }

    def settings(self) -> list[dict[str, object]]:
        """What all ranks must agree on for each group, by name. Waits for a learning rate that is a tensor."""
        compared = (*self.method.arguments, "train_mode", *self.method.numbers)
        return [
            {name: value.item() if isinstance(value := group.get(name), Tensor) else value for name in compared}
            for group in self.groups
        ]

    def slots(self, layout: Layout, members: list[Member], shards: list[Shard]) -> list[Slot]:
        """What each shard belongs to, as all ranks see it."""
        names = self._names_by_id(layout)
        return [
            Slot(group, shard.shape, str(shard.weights().dtype), param_id, names.get(param_id, ""))
            for shard, (_, group, param_id) in zip(shards, members, strict=True)
        ]

    def learn_names(self, model: nn.Module | None) -> None:
        """Take the names of parameters from their model, for what ranks compare and for messages."""
        if model is not None and not self.names:
            self.names = {param: name for name, param in model.named_parameters()}

    def _names_by_id(self, layout: Layout) -> dict[int, str]:
        """The names of parameters, by param_id, as far as somebody has told them."""
        params = [param for of_group in layout.parameters() for param in of_group]
        told = [name for group in self.groups for name in group.get("param_names", ())]
        if len(told) == len(params):
            return dict(enumerate(told))
        return {param_id: self.names[param] for param_id, param in enumerate(params) if param in self.names}

    def _find_team(self, layout: Layout) -> Team:
        """The ranks that share sums: those on which the parameters live that are trained now."""
        shards = list(self.trained_shards(layout).values())
        domains = frozenset(shard.domain for shard in shards if shard.domain)
        if self.team is None or domains != self._domains:
            self.team, self._domains = find_team(shards, self.process_group), domains
        return self.team

    def trained_shards(self, layout: Layout) -> dict[Tensor, Shard]:
        """The shards of all parameters that are trained now: who counts what depends on all of them."""
        trains = [param.requires_grad for of_group in layout.parameters() for param in of_group]
        if self._trained is None or self._trained[0] is not layout or self._trained[1] != trains:
            params = [member.param for member in layout.members(layout.all_parts)]
            shards = layout.shards(params, self.process_group)
            self._trained = layout, trains, {shard.param: shard for shard in shards}
        return self._trained[2]

    @contextmanager
    def together(self, layout: Layout, part: Part, *, goes_on: bool = False) -> Iterator[None]:
        """A call in which all ranks meet: an exception of this one reaches the others, which would wait for it.

        Args:
            layout, part: what it is about.
            goes_on: whether it goes on with sums that have begun.
        """
        self._shared = None
        reductions = self._reductions_of(part)
        if reductions is not None and not goes_on:
            reductions.expect()
        try:
            yield
        except (Disagreement, CollectiveFailed):
            raise
        except Exception as error:
            if error is not self._shared:
                self._tell(error, layout, part)
            raise

    def _reductions_of(self, part: Part) -> Reductions | None:
        if part in self.plans:
            return self.plans[part].reductions
        return self._outdated[part][0] if part in self._outdated else None

    def _tell(self, error: Exception, layout: Layout, part: Part) -> None:
        """Take part in what the other ranks are waiting in, only to say that this one has failed."""
        reductions = self._reductions_of(part)
        try:
            if reductions is None:
                tell_failure(error, self._find_team(layout))
            elif not reductions.decided and not reductions.team.is_alone:
                reductions.tell(Outcome.FAILED)
                if self.host is not None and self.host.free:
                    share_failure(describe(error), reductions.team)
        except (Disagreement, CollectiveFailed):
            # The other ranks say what they have heard; this one raises its own error.
            return

    def _agree_to_plan_anew(self, reductions: Reductions, reason: str) -> None:
        """Tell the ranks that step by the old plan that this one cannot, unless all of them need a new one.

        Raises:
            Disagreement: not all do. Raised on every rank alike where the host hears of it at once.
        """
        team = reductions.team
        if team.is_alone:
            return
        reductions.expect()
        told = reductions.tell(Outcome.REPLANS)
        if told[Outcome.REPLANS] == len(team.ranks):
            return
        if self.host is not None and self.host.free:
            share_failure(reason, team)
        raise Disagreement(f"no rank has made this step, because only this one finds that {reason}")

    def settle(self) -> None:
        """Write everything that lives on the device into ``state`` and ``param_groups``. Waits for the device."""
        for plan in self.plans.values():
            plan.settle()
        self._publish()

    def _publish(self) -> None:
        """Let ``param_groups`` show the numbers as they are, what somebody has written there included."""
        if self.numbers is not None:
            # Groups that somebody has put into param_groups by hand come with the next plan.
            known = self.groups[: len(self.numbers.published)]
            self.numbers.absorb(known)
            self._unheard += self.numbers.publish(known)

    def hear_of_step(self) -> None:
        """Begin to bring the numbers after a step to the host, and tell of those that have arrived."""
        assert self.numbers is not None
        self._unheard += self.numbers.end_step(self.groups)
        self._hear_of_steps()

    def _hear_of_steps(self) -> None:
        news = self._unheard[-1] if self._unheard else None
        self._tell_observers()
        if news is not None:
            self._hear(news)

    def _tell_observers(self) -> None:
        """Report the steps whose numbers have arrived."""
        if self.numbers is None:
            return
        while self._unheard:
            news = self._unheard.pop(0)
            before, self.numbers.told = self.numbers.told, news[0]
            if self.observers:
                report = report_of(self.method, news, before)
                for observer in list(self.observers.values()):
                    observer(report)

    def _hear(self, news: News) -> None:
        """What the host learns from the numbers of a step, when they arrive."""
        assert self.numbers is not None
        before, self.numbers.heard = self.numbers.heard, news[0]
        if self.host is not None and not self.host.free:
            was_void = news[0]["k"] == before["k"]
            for plan in self.plans.values():
                plan.search_unsound_weights(begin=was_void)
        if news[0]["failures"] > before["failures"]:
            raise Disagreement(
                "an earlier step changed nothing on any rank, because one of them could not make it, or had other "
                "parameters or switches: see the first error of the other ranks"
            )

    def forget(self, reason: str) -> None:
        """Start anew from ``state`` and ``param_groups``, which somebody has replaced.

        Args:
            reason: what for, if the other ranks should not do the same.
        """
        self._outdated |= {part: (plan.reductions, reason) for part, plan in self.plans.items()}
        self.plans, self.numbers, self._trained = {}, None, None
        self.learning_rates.restart()


def _refuse_another_meaning(before: Any, now: Any) -> None:
    """Refuse a switch with which state of the same name is something else.

    Raises:
        ValueError: FOCUS has been switched on or off, whose second moment is an average of weights.
    """
    for index, (old, new) in enumerate(zip(before[1], now[1], strict=False)):
        if old.focus != new.focus:
            raise ValueError(
                f"use_focus of parameter group {index} has changed from {old.focus} to {new.focus} in mid-run, but "
                "exp_avg_sq is an average of weights with it and of squares without: set it back, or build a new "
                "optimizer on the averaged weights, with d0= the d that was found"
            )


def _what_changed(before: Any, now: Any) -> str:
    """Why a plan no longer fits, for ranks whose plans still do."""
    (members, switches), (new_members, new_switches) = before, now
    for index, (old, new) in enumerate(zip(switches, new_switches, strict=False)):
        for name, value in vars(old).items():
            if getattr(new, name) != value:
                return f"{name} of parameter group {index} has changed from {value} to {getattr(new, name)}"
    if members != new_members:
        return "other parameters are trained than in the step before, or have another dtype, shape or device"
    return "the optimizer's state has been replaced"
