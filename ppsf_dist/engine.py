"""How a step runs: which plan it takes, when it begins and ends, and what must be known before it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ppsf_dist.adapters import Group, Layout, Member, Part, State, check_calling_framework, find_layout, find_team
from ppsf_dist.host import HostAccess
from ppsf_dist.kernels.eager import EagerKernels
from ppsf_dist.kernels.interface import Kernels
from ppsf_dist.kernels.writes import Writes
from ppsf_dist.options import ARGUMENTS, Switches
from ppsf_dist.plan import Plan
from ppsf_dist.reductions import Outcome, Reductions
from ppsf_dist.release import RELEASE
from ppsf_dist.scalars import GROUP_NUMBERS, Cause, GroupNumbers, StepNumbers
from ppsf_dist.sharding import Shard, Team
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
from ppsf_dist.step import PartStep
from ppsf_dist.swap import Swap

logger = logging.getLogger(__name__)

ATTEMPTS = 3
"""How often what must come to its end is tried."""

COMPARED = (*ARGUMENTS, "reference_quirks", "train_mode", *GROUP_NUMBERS)
"""What of a group all ranks must agree on."""


class Owner(Protocol):
    """The optimizer that an engine serves: torch replaces its dictionaries, so they are looked up each time."""

    param_groups: list[Group]
    state: Any


class OpenStep(NamedTuple):
    """A step that has begun: its numbers, and the parts of it that are done."""

    numbers: StepNumbers
    stepped: Part


class Engine:
    """Everything between an optimizer's ``step()`` and its kernels.

    Args:
        owner: the optimizer.
        process_group: ranks that share the step size, or None for those that the parameters live on.
        seed: of stochastic rounding.
    """

    def __init__(self, owner: Owner, process_group: dist.ProcessGroup | None, seed: int) -> None:
        self._owner = owner
        self.process_group = process_group
        self.seed = seed
        self.given: list[list[Tensor]] = []
        self.all_groups: list[Group] = []
        self.names: dict[Tensor, str] = {}
        self.host: HostAccess | None = None
        self.kernels: Kernels = EagerKernels()
        self.team: Team | None = None
        self.plans: dict[Part, Plan] = {}
        self.numbers: GroupNumbers | None = None
        self._layout: Layout | None = None
        self._trained: tuple[Layout, list[bool], dict[Tensor, Shard]] | None = None
        self._domains: frozenset[tuple[int, ...]] = frozenset()
        self._outdated: dict[Part, tuple[Reductions, str]] = {}
        self._open: OpenStep | None = None
        self._heard: dict[str, float] | None = None
        self._shared: BaseException | None = None
        self._torn: str | None = None

    @property
    def state(self) -> State:
        """The optimizer's state as it is now."""
        state: State = self._owner.state
        return state

    @property
    def groups(self) -> list[Group]:
        """All parameter groups, also while a framework lets ``param_groups`` show only some of them."""
        known = {id(group) for group in self.all_groups}
        if any(id(group) not in known for group in self._owner.param_groups):
            self.all_groups = self._owner.param_groups
        return self.all_groups

    def current_layout(self) -> Layout:
        """How the parameters stand in the groups now, after taking over what a framework has loaded there."""
        groups = self.groups
        check_calling_framework(groups)
        if self._layout is None or self._layout.groups is not groups or not self._layout.is_current():
            self._layout = find_layout(groups, self.given)
        if self._layout.adopt(self.state):
            self.forget("its framework has loaded a checkpoint")
        return self._layout

    def run(self, closure: Callable[[], float] | None) -> float | None:
        """One call of ``step()``: a step, a part of one, or the end of the one that the backward pass has made."""
        self._refuse_torn()
        layout = self.current_layout()
        if self._owner.param_groups[0]["fused_back_pass"]:
            loss = None if closure is None else closure()
            self._end_backward(layout)
            return loss
        part = layout.part(self._owner.param_groups)
        with self._together(layout, part):
            loss = None if closure is None else closure()
            if self._open is not None and self._open.stepped & part:
                # The framework has left out some parts of the step before.
                self._finish_step()
            fresh = not self.state
            plan = self.current_plan(part)
            if plan is not None and not (fresh and self._creates_state_only(plan)):
                self._step_part(part, plan, ends_with=layout.whole)
        return loss

    def run_alone(self, param: Tensor) -> None:
        """Step one parameter; one that comes a second time ends the step before.

        Raises:
            ValueError: the parameter belongs to no group.
            RuntimeError: it is sharded.
        """
        self._refuse_torn()
        layout = self.current_layout()
        if layout.whole or param not in layout.places:
            raise ValueError(f"the parameter of shape {tuple(param.shape)} is in none of the optimizer's param_groups")
        part = frozenset((layout.places[param],))
        is_new = part not in self.plans and param.requires_grad
        if self.process_group is not None or (is_new and self._trained_shards(layout)[param].domain):
            raise RuntimeError(
                "step_param() steps a parameter on its own, but this one is sharded and needs sums from other ranks in "
                "the same order on all: call ppsf_dist.fsdp.step_in_backward(model, optimizer) in place of these hooks"
            )
        if self._open is not None and self._open.stepped & part:
            self._finish_step()
        plan = self.current_plan(part)
        if plan is not None:
            self._step_part(part, plan)

    def run_some(self, params: list[Tensor]) -> None:
        """Step some parameters, on all ranks that hold pieces of them."""
        self._refuse_torn()
        layout = self.current_layout()
        part = frozenset(layout.places[param] for param in params)
        with self._together(layout, part):
            plan = self.current_plan(part)
            if plan is not None:
                self._step_part(part, plan)

    def _end_backward(self, layout: Layout) -> None:
        """End the step that the backward pass has made, if it has made one, and create the state that is missing."""
        if layout.whole:
            raise RuntimeError("fused_back_pass=True does not work under DeepSpeed ZeRO: use fused_back_pass=False")
        unused = self._open is None and any(p.grad is not None for params in layout.parameters() for p in params)
        if unused and any(float(group["lr"]) != 0 for group in self.groups):
            warnings.warn(
                "step() found gradients that no one has used: with fused_back_pass=True it makes no step itself; call "
                "ppsf_dist.fsdp.step_in_backward(model, optimizer) once, or step_param() from hooks, or use "
                "fused_back_pass=False",
                stacklevel=4,
            )
        self.settle_backward()
        self.create_missing_state(layout)

    def create_missing_state(self, layout: Layout) -> None:
        """Create the state of parameters that have not made a step: what a checkpoint holds depends on no step."""
        stateless = frozenset(place for param, _, place in layout.members(layout.whole) if param not in self.state)
        if stateless:
            self.current_plan(stateless)

    def settle_backward(self) -> None:
        """End a step that nobody has ended, now that the backward pass must be over."""
        if self._open is not None and self._owner.param_groups[0]["fused_back_pass"]:
            self._finish_step()

    def _step_part(self, part: Part, plan: Plan, *, ends_with: Part | None = None) -> None:
        """Step the parameters of a part; the first one begins the step, and all of ``ends_with`` end it.

        An exception undoes the part and drops the step, as long as the ranks have not decided; from then on everything
        is brought to its end before the exception goes on its way.
        """
        if self._open is None:
            self._open = OpenStep(self._begin_step(), frozenset())
        frozen = [_is_frozen(group) for group in self.groups]
        if plan.frozen != frozen:
            plan.freeze(frozen)
        step = PartStep(self.kernels, plan, self._open.numbers)

        def conclude() -> None:
            step.write()
            known = step.verdict.known
            if self._open is None or (known is not None and known.cause == Cause.FAILURE):
                return
            self._open = self._open._replace(stepped=self._open.stepped | part)
            if ends_with is not None and self._open.stepped >= ends_with:
                self._finish_step()

        try:
            step.measure()
            conclude()
        except BaseException:
            if plan.reductions.decided:
                self._bring_to_its_end(conclude, "step()")
            else:
                plan.end()
                self._open = None
            raise
        known = step.verdict.known
        if known is not None and known.cause == Cause.FAILURE:
            self._open = None
            share_failure(None, plan.team)

    def _begin_step(self) -> StepNumbers:
        """The numbers that all parts of a step use."""
        if any(group["use_schedulefree"] and not group["train_mode"] for group in self.groups):
            raise RuntimeError(
                "step() was called while the parameters hold the averaged weights: call optimizer.train() after "
                "evaluating, before the next forward pass"
            )
        assert self.numbers is not None
        self.numbers.absorb(self.groups)
        return StepNumbers(self.numbers, self.groups, self.seed)

    def _finish_step(self) -> None:
        """d for the next step, from the sums of all parts."""
        if self._open is None or self.numbers is None:
            return
        self._open.numbers.commit()
        news = self.numbers.publish(self.groups, wait=False)
        self._open = None
        if news is not None:
            self._hear(news)

    def _hear(self, news: list[dict[str, float]]) -> None:
        """What the host learns from the numbers of a step, when they arrive."""
        before, self._heard = self._heard, news[0]
        if self.host is not None and not self.host.free:
            was_void = before is not None and news[0]["k"] == before["k"]
            for plan in self.plans.values():
                plan.search_unsound_weights(begin=was_void)
        if before is not None and news[0]["failures"] > before["failures"]:
            raise Disagreement(
                "an earlier step changed nothing on any rank, because one of them could not make it, or had other "
                "parameters or switches: see the first error of the other ranks"
            )

    def current_plan(self, part: Part) -> Plan | None:
        """The plan for a part as it is now, made anew if its parameters or their switches have changed."""
        layout, groups = self.current_layout(), self.groups
        switches = [Switches.of(group, statistics=True) for group in groups]
        signature = (layout.signature(part), tuple(switches), tuple([group["prodigy_steps"] for group in groups]))
        plan = self.plans.get(part)
        if plan is not None:
            if plan.signature == signature and plan.is_current():
                return plan
            self._outdated[part] = (plan.reductions, _what_changed(plan.signature, signature))
        if part in self._outdated:
            self._agree_to_plan_anew(*self._outdated.pop(part))
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
        trained = self._trained_shards(layout)
        shards = [trained[param] for param in params]
        team = self._find_team(layout)
        slots = self.slots(layout, members, shards)
        if self.numbers is not None and not (team.is_alone and all(g["prodigy_steps"] == 0 for g in self.groups)):
            # Ranks compare these numbers, and k says which groups are frozen: late copies will not do.
            self.numbers.publish(self.groups, wait=True)
        table = agree_on_slots(shards, slots, self.common(), self.settings(), team)
        unseen = [not self.state.get(param, {}).get("step") for param in params]
        before = {param: set(self.state[param]) for param in params if param in self.state}
        failure: Exception | None = None
        try:
            if self.host is None or self.host.device != shards[0].weights().device:
                self.host = HostAccess(shards[0].weights().device)
            frozen = [_is_frozen(group) for group in self.groups]
            plan = Plan(shards, groups_of, table, switches, frozen, team, self.host, self.state, signature)
            if self.numbers is None or len(self.numbers.published) != len(self.groups):
                self.numbers, self._heard = GroupNumbers(self.groups, self.host), None
        except Exception as error:
            failure = error
        new = [(shard, slot) for shard, slot, is_new in zip(shards, slots, unseen, strict=True) if is_new]
        self._shared = failure
        try:
            confirm(failure, [shard for shard, _ in new], [slot for _, slot in new], team)
        except Exception:
            self._keep_state(params, before)
            raise
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
        return {"seed": self.seed, "the release of ppsf_dist": RELEASE}

    def settings(self) -> list[dict[str, object]]:
        """What all ranks must agree on for each group, by name. Waits for a learning rate that is a tensor."""
        return [
            {name: value.item() if isinstance(value := group.get(name), Tensor) else value for name in COMPARED}
            for group in self.groups
        ]

    def slots(self, layout: Layout, members: list[Member], shards: list[Shard]) -> list[Slot]:
        """What each shard belongs to, as all ranks see it."""
        names = self._names_by_place(layout)
        return [
            Slot(group, shard.shape, str(shard.weights().dtype), identity, names.get(identity, ""))
            for shard, (_, group, identity) in zip(shards, members, strict=True)
        ]

    def _names_by_place(self, layout: Layout) -> dict[int, str]:
        """The names of parameters, by their place among all, as far as somebody has told them."""
        params = [param for of_group in layout.parameters() for param in of_group]
        told = [name for group in self.groups for name in group.get("param_names", ())]
        if len(told) == len(params):
            return dict(enumerate(told))
        return {place: self.names[param] for place, param in enumerate(params) if param in self.names}

    def _find_team(self, layout: Layout) -> Team:
        """The ranks that share sums: those on which the parameters live that are trained now."""
        shards = list(self._trained_shards(layout).values())
        domains = frozenset(shard.domain for shard in shards if shard.domain)
        if self.team is None or domains != self._domains:
            self.team, self._domains = find_team(shards, self.process_group), domains
        return self.team

    def _trained_shards(self, layout: Layout) -> dict[Tensor, Shard]:
        """The shards of all parameters that are trained now: who counts what depends on all of them."""
        trains = [param.requires_grad for of_group in layout.parameters() for param in of_group]
        if self._trained is None or self._trained[0] is not layout or self._trained[1] != trains:
            params = [member.param for member in layout.members(layout.whole)]
            shards = layout.shards(params, self.process_group)
            self._trained = layout, trains, {shard.param: shard for shard in shards}
        return self._trained[2]

    @contextmanager
    def _together(self, layout: Layout, part: Part) -> Iterator[None]:
        """A call in which all ranks meet: an exception of this one reaches the others, which would wait for it."""
        self._shared = None
        reductions = self._reductions_of(part)
        if reductions is not None:
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

    def _creates_state_only(self, plan: Plan) -> bool:
        """Whether this is the step with lr 0 and zero gradients that distributed checkpoints make to create state."""
        assert self._layout is not None
        if any(float(group["lr"]) != 0 for group in self.groups) and not self._layout.starts_with_zeros:
            return False
        total = torch.zeros(1, dtype=torch.float64, device=plan.parameters.device)
        for shard in plan.shards:
            gradient = shard.gradient()
            if gradient is not None:
                total += (gradient != 0).any()
        plan.team.sum_(total, why="whether the first step of step() has gradients")
        return bool(total == 0)

    def settle(self) -> None:
        """Write everything that lives on the device into ``state`` and ``param_groups``. Waits for the device."""
        for plan in self.plans.values():
            plan.settle()
        if self.numbers is not None:
            # Groups that somebody has put into param_groups by hand come with the next plan.
            known = self.groups[: len(self.numbers.published)]
            self.numbers.absorb(known)
            self.numbers.publish(known, wait=True)

    def forget(self, reason: str) -> None:
        """Start anew from ``state`` and ``param_groups``, which somebody has replaced.

        Args:
            reason: what for, if the other ranks should not do the same.
        """
        self._outdated |= {part: (plan.reductions, reason) for part, plan in self.plans.items()}
        self.plans, self.numbers, self._trained = {}, None, None
        self._open, self._torn = None, None

    def switch(self, *, train: bool, keep: bool) -> None:
        """Swap training and averaged weights of all groups, and their modes with them: all of it or nothing."""
        self._refuse_torn()
        groups = self._owner.param_groups
        changing = [group for group in groups if group["use_schedulefree"] and group["train_mode"] != train]
        if changing:
            self.settle_backward()
            self.settle()
        layout = self.current_layout()
        swaps = self._swaps(layout, changing, train=train, keep=keep)
        writes = Writes()

        def swap() -> None:
            writes.restart()
            for one in swaps:
                writes.put(one.write)
            for one in swaps:
                one.end()
            for group in groups:
                group["train_mode"] = train

        try:
            swap()
        except BaseException:
            self._bring_to_its_end(swap, "train()" if train else "eval()")
            raise
        if changing:
            layout.refresh()

    def _swaps(self, layout: Layout, changing: list[Group], *, train: bool, keep: bool) -> list[Swap]:
        shards = {shard.param: shard for plan in self.plans.values() for shard in plan.shards}
        unplanned = [p for params in layout.parameters() for p in params if p in self.state and p not in shards]
        shards |= {shard.param: shard for shard in layout.shards(unplanned, self.process_group)}
        swaps = []
        for group, params in zip(self.groups, layout.parameters(), strict=True):
            if not any(group is other for other in changing):
                continue
            for param in params:
                state = self.state.get(param)
                if state and state.get("step") and "z" in state:
                    weights = shards[param].weights()
                    exact = keep or (not group["reference_quirks"] and weights.dtype != torch.float32)
                    swaps.append(Swap(weights, state, group["betas"][0], train=train, keep=exact))
        return swaps

    def _bring_to_its_end(self, action: Callable[[], None], name: str) -> None:
        """Go on with what an exception has ended too late to be undone.

        Raises:
            RuntimeError: it cannot be, and weights are torn.
        """
        error: BaseException | None = None
        for _ in range(ATTEMPTS):
            try:
                action()
                return
            except BaseException as again:  # noqa: BLE001 - a second ctrl-C is no reason to tear weights either
                error = again
        self._torn = f"{name} was ended by {describe(error) if error else ''}"
        self._refuse_torn()

    def _refuse_torn(self) -> None:
        if self._torn is not None:
            raise RuntimeError(
                f"{self._torn} while it wrote, and could not be brought to its end: weights and state are partly those "
                "before and partly those after it; load the last checkpoint, weights and load_state_dict()"
            )


def _is_frozen(group: Group) -> bool:
    return bool(group["prodigy_steps"] > 0 and group["k"] >= group["prodigy_steps"])


def _what_changed(before: Any, now: Any) -> str:
    """Why a plan no longer fits, for ranks whose plans still do."""
    (members, switches, steps), (new_members, new_switches, new_steps) = before, now
    for index, (old, new) in enumerate(zip(switches, new_switches, strict=False)):
        for name, value in vars(old).items():
            if getattr(new, name) != value:
                return f"{name} of parameter group {index} has changed from {value} to {getattr(new, name)}"
    if members != new_members:
        return "other parameters are trained than in the step before, or have another dtype, shape or device"
    if steps != new_steps:
        return f"prodigy_steps has changed from {steps} to {new_steps}"
    return "the optimizer's state has been replaced"
