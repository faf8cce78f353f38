"""How a step runs: which plan it takes, when it begins and ends, and what must be known before it."""

from __future__ import annotations

import warnings
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ppsf_dist import checkpoint
from ppsf_dist.adapters import Group, Layout, Part, State, find_layout, find_team
from ppsf_dist.algorithm import averaging
from ppsf_dist.host import HostAccess
from ppsf_dist.kernels.eager import EagerKernels
from ppsf_dist.kernels.interface import Kernels, Stat
from ppsf_dist.options import Switches
from ppsf_dist.plan import Plan
from ppsf_dist.scalars import GroupNumbers, PartNumbers, StepNumbers
from ppsf_dist.sharding import Shard, Team


class Owner(Protocol):
    """The optimizer that an engine serves: torch replaces its dictionaries, so they are looked up each time."""

    param_groups: list[Group]
    state: Any


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
        self._layout: Layout | None = None
        self.team: Team | None = None
        self.plans: dict[Part, Plan] = {}
        self._every_shard: dict[Tensor, Shard] = {}
        self.numbers: GroupNumbers | None = None
        self._step: StepNumbers | None = None
        self._stepped: Part = frozenset()
        self._kernels: Kernels = EagerKernels()

    @property
    def state(self) -> State:
        state: State = self._owner.state
        return state

    @property
    def groups(self) -> list[dict[str, Any]]:
        """All parameter groups, also while a framework lets ``param_groups`` show only some of them."""
        known = {id(group) for group in self.all_groups}
        if any(id(group) not in known for group in self._owner.param_groups):
            self.all_groups = self._owner.param_groups
        return self.all_groups

    def current_layout(self) -> Layout:
        """How the parameters stand in the groups now, after taking over what a framework has loaded there."""
        groups = self.groups
        if self._layout is None or self._layout.groups is not groups or not self._layout.is_current():
            self._layout = find_layout(groups, self.given)
        if self._layout.adopt(self.state):
            self.forget()
        return self._layout

    def run(self) -> None:
        """One call of ``step()``: a step, a part of one, or the end of the one that the backward pass has made."""
        layout = self.current_layout()
        if self._owner.param_groups[0]["fused_back_pass"]:
            self.end_backward(layout)
            return
        part = layout.part(self._owner.param_groups)
        if self._stepped & part:
            # The framework has left out some parts of the step before.
            self._finish_step()
        fresh = not self.state
        plan = self.current_plan(part)
        if plan is None or (fresh and self._creates_state_only(plan)):
            return
        self._step_part(part, plan)
        if self._stepped >= layout.whole:
            self._finish_step()

    def run_alone(self, param: Tensor) -> None:
        """Step one parameter; one that comes a second time ends the step before.

        Raises:
            ValueError: the parameter belongs to no group.
            RuntimeError: it is sharded.
        """
        layout = self.current_layout()
        if layout.whole or param not in layout.places:
            raise ValueError(f"the parameter of shape {tuple(param.shape)} is in none of the optimizer's param_groups")
        part = frozenset((layout.places[param],))
        if self.shards_of(layout, part, [param])[0].domain or self.process_group is not None:
            raise RuntimeError(
                "step_param() steps a parameter on its own, but this one is sharded and needs sums from other ranks in "
                "the same order on all: call ppsf_dist.fsdp.step_in_backward(model, optimizer) in place of these hooks"
            )
        if self._stepped & part:
            self._finish_step()
        plan = self.current_plan(part)
        if plan is not None:
            self._step_part(part, plan)

    def run_some(self, params: list[Tensor]) -> None:
        """Step some parameters, on all ranks that hold pieces of them."""
        places = self.current_layout().places
        part = frozenset(places[param] for param in params)
        plan = self.current_plan(part)
        if plan is not None:
            self._step_part(part, plan)

    def end_backward(self, layout: Layout) -> None:
        """End the step that the backward pass has made, if it has made one, and create the state that is missing."""
        if layout.whole:
            raise RuntimeError("fused_back_pass=True does not work under DeepSpeed ZeRO: use fused_back_pass=False")
        unstepped = self._step is None and any(float(group["lr"]) != 0 for group in self.groups)
        if unstepped and any(param.grad is not None for params in layout.parameters() for param in params):
            warnings.warn(
                "step() found gradients that no one has used: with fused_back_pass=True it makes no step itself; call "
                "ppsf_dist.fsdp.step_in_backward(model, optimizer) once, or step_param() from hooks, or use "
                "fused_back_pass=False",
                stacklevel=4,
            )
        self.settle_backward()
        stateless = frozenset(place for param, _, place in layout.members(layout.whole) if param not in self.state)
        if stateless:
            self.current_plan(stateless)

    def settle_backward(self) -> None:
        """End a step that nobody has ended, now that the backward pass must be over."""
        if self._step is not None and self._owner.param_groups[0]["fused_back_pass"]:
            self._finish_step()

    def _step_part(self, part: Part, plan: Plan) -> None:
        """Step the parameters of a part; the first one begins the step."""
        if self._step is None:
            self._step = self._begin_step()
        self._advance(plan, self._step)
        self._stepped |= part

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

    def _advance(self, plan: Plan, step: StepNumbers) -> None:
        """The picture: pass 1, reduce 1, moments, pass 2, reduce 2, pass 3, for the parameters of a plan."""
        kernels, works, team, moments = self._kernels, plan.works, plan.team, plan.moments
        sums, stats = plan.sums, plan.stats
        plan.capture_unseen()
        plan.begin()
        numbers = PartNumbers(step, plan.parameters, plan.traits)
        coefficients = numbers.coefficients

        factors = moments.factors(moments.values) if plan.adopts else moments.values
        kernels.pass_1(works, coefficients, factors, sums, stats)
        if plan.reduces_sums_early:
            team.sum_(*plan.first_reduction)
            new_moments = numbers.moments(moments, sums)
            factors = numbers.factors(moments, new_moments)

        if plan.needs_norms:
            kernels.pass_2(works, coefficients, factors, stats)
        team.sum_(*plan.second_reduction)
        if not plan.reduces_sums_early:
            new_moments = numbers.moments(moments, sums)

        scales = numbers.scales(stats)
        if plan.counts_masks_late:
            masks = torch.zeros_like(stats)
            kernels.count_masks(works, coefficients, factors, scales, masks)
            team.sum_(masks)
            stats[:, Stat.LATE_MASK] = masks[:, Stat.LATE_MASK]
            scales = numbers.scales(stats)

        gates = numbers.gates(stats, plan.host)
        moments.commit(new_moments, gates.moments)
        kernels.pass_3(works, coefficients, factors, scales, gates, numbers.keys)
        numbers.commit(stats, gates)
        plan.end()

    def _finish_step(self) -> None:
        """d for the next step, from the sums of all parts."""
        assert self.numbers is not None and self._step is not None
        self._step.commit()
        self.numbers.publish(self.groups, wait=False)
        self._step, self._stepped = None, frozenset()

    def current_plan(self, part: Part) -> Plan | None:
        """The plan for a part as it is now, made anew if its parameters or their switches have changed."""
        layout, groups = self.current_layout(), self.groups
        frozen = [group["prodigy_steps"] > 0 and group["k"] >= group["prodigy_steps"] for group in groups]
        switches = [Switches.of(group, statistics=not f) for group, f in zip(groups, frozen, strict=True)]
        key = (layout.signature(part), tuple(switches))
        plan = self.plans.get(part)
        if plan is not None and plan.signature == key and plan.is_current():
            return plan
        members = layout.members(part)
        if not members:
            return None
        for other in [other for other in self.plans if not other or not part or other & part]:
            self.plans.pop(other).settle()
        params, groups_of, identities = (list(column) for column in zip(*members, strict=True))
        shards = self.shards_of(layout, part, params)
        if self.team is None:
            everything = [member.param for member in layout.members(layout.whole)]
            every_shard = shards if len(everything) == len(params) else layout.shards(everything, self.process_group)
            self.team = find_team(every_shard, self.process_group)
        host = HostAccess(shards[0].weights().device)
        plan = Plan(shards, groups_of, identities, switches, self.team, host, self.state, key)
        self.plans[part] = plan
        if self.numbers is None or len(self.numbers.published) != len(groups):
            self.numbers = GroupNumbers(groups, host)
        return plan

    def shards_of(self, layout: Layout, part: Part, params: list[Tensor]) -> list[Shard]:
        """The shards of a part. Who counts what depends on all parameters, of which a part shows only some."""
        if not part or layout.whole:
            return layout.shards(params, self.process_group)
        if any(param not in self._every_shard for param in params):
            everything = [member.param for member in layout.members(layout.whole)]
            self._every_shard = {shard.param: shard for shard in layout.shards(everything, self.process_group)}
        return [self._every_shard[param] for param in params]

    def _creates_state_only(self, plan: Plan) -> bool:
        """Whether this is the step with lr 0 and zero gradients that distributed checkpoints make to create state."""
        assert self._layout is not None
        if any(float(group["lr"]) != 0 for group in self.groups) and not self._layout.starts_with_zeros:
            return False
        total = torch.zeros(1, dtype=torch.float64, device=plan.stats.device)
        for shard in plan.shards:
            gradient = shard.gradient()
            if gradient is not None:
                total += (gradient != 0).any()
        plan.team.sum_(total)
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

    def forget(self) -> None:
        """Start anew from ``state`` and ``param_groups``, which somebody has replaced."""
        self.plans, self._every_shard, self.numbers, self.team = {}, {}, None, None
        self._step, self._stepped = None, frozenset()

    def switch(self, *, train: bool, keep: bool) -> None:
        changing = [g for g in self._owner.param_groups if g["use_schedulefree"] and g["train_mode"] != train]
        for group in self._owner.param_groups:
            group["train_mode"] = train
        if not changing:
            return
        self.settle_backward()
        self.settle()
        layout = self.current_layout()
        shards = {shard.param: shard for plan in self.plans.values() for shard in plan.shards}
        unplanned = [p for params in layout.parameters() for p in params if p in self.state and p not in shards]
        shards |= {shard.param: shard for shard in layout.shards(unplanned, self.process_group)}
        for group, params in zip(self.groups, layout.parameters(), strict=True):
            if not any(group is other for other in changing):
                continue
            beta1 = group["betas"][0]
            weight = averaging.eval_to_train_weight(beta1) if train else averaging.train_to_eval_weight(beta1)
            for param in params:
                state = self.state.get(param)
                if state and state.get("step") and "z" in state:
                    weights = shards[param].weights()
                    exact = keep or (not group["reference_quirks"] and weights.dtype != torch.float32)
                    checkpoint.interpolate(weights, state, weight, train=train, keep=exact)
        layout.refresh()
