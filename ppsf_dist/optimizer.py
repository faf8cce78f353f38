"""ProdigyPlusScheduleFree: the arguments, and a step as the picture in the README shows it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ppsf_dist import checkpoint
from ppsf_dist.adapters import Layout, Part, find_layout, find_team
from ppsf_dist.algorithm import averaging
from ppsf_dist.host import HostAccess
from ppsf_dist.kernels.eager import EagerKernels
from ppsf_dist.kernels.interface import Kernels, Stat
from ppsf_dist.options import ARGUMENTS, Switches, validate_group, validate_seed, validate_together
from ppsf_dist.plan import Plan
from ppsf_dist.scalars import GroupNumbers, PartNumbers, StepNumbers, initial_numbers
from ppsf_dist.sharding import Shard, Team

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class ProdigyPlusScheduleFree(Optimizer):
    """Prodigy's step size, Schedule-Free averaging and factored second moments: no learning rate, no schedule.

    The result does not depend on how parameters are sharded: give it the parameters of a model on one device, under
    DDP, or under ``fully_shard``, and d and the weights are those of one process.

    Call :meth:`train` before training and :meth:`eval` before evaluating or saving weights, where you call the model's,
    or evaluate inside :func:`ppsf_dist.averaged`.

    Every argument except ``params`` and those after the star can be set for each parameter group; ``split_groups``,
    ``split_groups_mean`` and ``fused_back_pass`` must agree.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: multiplies d. Leave it at 1.0; a schedule may change it.
        betas: ``(beta1, beta2)``: interpolation of Schedule-Free (or the decay of momentum without it), and decay of
            the second moment.
        beta3: decay of Prodigy's sums; None for sqrt(beta2).
        weight_decay: decay of the weights.
        weight_decay_by_lr: scale the decay by d * lr.
        d0: first step size.
        d_coef: multiplies the estimate of d.
        d_limiter: let d grow by at most 2^(1/4) in a step.
        prodigy_steps: stop adapting d after this many steps and free the memory for it; 0 for never.
        schedulefree_c: 0, or the C of refined Schedule-Free (arXiv:2507.07101), for large batches or long runs.
        eps: added to the denominator, times d; None for the atan2 form without one.
        split_groups: a step size for each parameter group.
        split_groups_mean: step by the harmonic mean of the groups' step sizes.
        factored: keep second moments as row and column means where a dimension is at least 32.
        factored_fp32: keep those means in fp32 whatever the dtype of the parameter.
        use_bias_correction: RAdam's rectification instead of none.
        use_stableadamw: bound the size of the update.
        use_schedulefree: average instead of a schedule; without it, momentum.
        use_speed: SPEED's rule for d.
        stochastic_rounding: round bf16 parameters stochastically.
        fused_back_pass: parameters are stepped during the backward pass, by :meth:`step_param` or by
            :func:`ppsf_dist.fsdp.step_in_backward`, and ``step()`` only ends the step.
        use_cautious, use_grams, use_adopt, use_orthograd, use_focus: variants of the update.
        decouple_lr: former name of ``not weight_decay_by_lr``; deprecated.
        reference_quirks: reproduce the oddities of the reference listed in ``docs/differences.md``.
        process_group: ranks that share the step size. Default: all that the parameters live on. Needed only where a
            rank holds no piece of some parameters, as in pipeline stages.
        seed: of stochastic rounding.

    Raises:
        ValueError: an argument is out of range, or groups disagree where they must not.

    Sources: Mishchenko and Defazio, arXiv:2306.06101 (Prodigy); Defazio et al., arXiv:2405.15682 (Schedule-Free);
    Shazeer and Stern, arXiv:1804.04235 (factored moments); prodigy-plus-schedule-free 2.0.1 (their union, SPEED).
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.99),
        beta3: float | None = None,
        weight_decay: float = 0.0,
        weight_decay_by_lr: bool = True,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        d_limiter: bool = True,
        prodigy_steps: int = 0,
        schedulefree_c: float = 0,
        eps: float | None = 1e-8,
        split_groups: bool = True,
        split_groups_mean: bool = False,
        factored: bool = True,
        factored_fp32: bool = True,
        use_bias_correction: bool = False,
        use_stableadamw: bool = True,
        use_schedulefree: bool = True,
        use_speed: bool = False,
        stochastic_rounding: bool = True,
        fused_back_pass: bool = False,
        use_cautious: bool = False,
        use_grams: bool = False,
        use_adopt: bool = False,
        use_orthograd: bool = False,
        use_focus: bool = False,
        *,
        decouple_lr: bool | None = None,
        reference_quirks: bool = True,
        process_group: dist.ProcessGroup | None = None,
        seed: int = 0,
    ) -> None:
        given = locals()
        defaults = {name: given[name] for name in ARGUMENTS} | {"reference_quirks": reference_quirks}
        if decouple_lr not in (None, True, False):
            raise ValueError(f"decouple_lr={decouple_lr!r} is out of range: allowed is None, True or False")
        if decouple_lr is not None:
            warnings.warn(
                f"decouple_lr={decouple_lr} is deprecated: pass weight_decay_by_lr={not decouple_lr}",
                DeprecationWarning,
                stacklevel=2,
            )
            defaults["weight_decay_by_lr"] = not decouple_lr
        validate_seed(seed)
        validate_group(defaults, lr_may_be_zero=False)
        self._process_group = process_group
        self._seed = seed
        self._given: list[list[Tensor]] = []
        self._all_groups: list[dict[str, Any]] = []
        self._layout: Layout | None = None
        self._team: Team | None = None
        self._plans: dict[Part, Plan] = {}
        self._every_shard: dict[Tensor, Shard] = {}
        self._numbers: GroupNumbers | None = None
        self._step: StepNumbers | None = None
        self._stepped: Part = frozenset()
        self._kernels: Kernels = EagerKernels()
        super().__init__(params, defaults)
        self._all_groups = self.param_groups
        validate_together(self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its arguments default to the optimizer's. Possible at any time.

        Raises:
            ValueError: an argument is out of range or does not fit the other groups; nothing is added then.
        """
        self._settle_backward()
        self._settle()
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            validate_group(group)
            validate_together(self.param_groups)
        except ValueError:
            self.param_groups.pop()
            raise
        self._forget()
        for name, value in initial_numbers(group).items():
            group.setdefault(name, value)
        group.setdefault("state_version", checkpoint.STATE_VERSION)
        group.setdefault("train_mode", self.param_groups[0].get("train_mode", True))
        self._given.append(group["params"])

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step on all parameters that have a gradient.

        With ``fused_back_pass`` it makes no step but ends the one that the backward pass has made: d and k are those of
        the next step then. Without one it changes nothing (and creates the state that is missing, for checkpoints).

        If any gradient element on any rank is not finite, nothing changes on any rank and :attr:`skipped_steps` grows.

        Raises:
            RuntimeError: the optimizer is in eval mode.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        layout = self._current_layout()
        if self.param_groups[0]["fused_back_pass"]:
            self._end_backward(layout)
            return loss
        part = layout.part(self.param_groups)
        if self._stepped & part:
            # The framework has left out some parts of the step before.
            self._finish_step()
        fresh = not self.state
        plan = self._current_plan(part)
        if plan is None or (fresh and self._creates_state_only(plan)):
            return loss
        self._step_part(part, plan)
        if self._stepped >= layout.whole:
            self._finish_step()
        return loss

    @torch.no_grad()
    def step_param(self, p: Tensor, group: dict[str, Any] | None = None) -> None:
        """Step one parameter at once, so that its gradient can be freed. For hooks that run during the backward pass.

        ``step()`` ends the step. For trainers that never call it, a parameter that comes a second time ends the step
        before, and so do ``eval()``, ``train()`` and ``state_dict()``. A parameter without a gradient changes nothing.
        To accumulate gradients, do not call this before the last backward pass.

        A gradient that is not finite leaves its parameter, d and k as they were; what was stepped before stays stepped.

        Args:
            p: a parameter of this optimizer.
            group: accepted because trainers pass it. Arguments come from ``param_groups`` as they are now, also where
                ``load_state_dict()`` has replaced the group that a hook still holds.

        Raises:
            ValueError: ``fused_back_pass`` is not set, or the parameter belongs to no group.
            RuntimeError: the parameter is sharded, or the optimizer is in eval mode.
        """
        if not self.param_groups[0]["fused_back_pass"]:
            raise ValueError("step_param() needs ProdigyPlusScheduleFree(..., fused_back_pass=True)")
        if p.grad is None:
            return
        layout = self._current_layout()
        if layout.whole or p not in layout.places:
            raise ValueError(f"the parameter of shape {tuple(p.shape)} is in none of the optimizer's param_groups")
        part = frozenset((layout.places[p],))
        if self._shards_of(layout, part, [p])[0].domain or self._process_group is not None:
            raise RuntimeError(
                "step_param() steps a parameter on its own, but this one is sharded and needs sums from other ranks in "
                "the same order on all: call ppsf_dist.fsdp.step_in_backward(model, optimizer) in place of these hooks"
            )
        if self._stepped & part:
            self._finish_step()
        plan = self._current_plan(part)
        if plan is not None:
            self._step_part(part, plan)

    def step_parameter(self, p: Tensor, group: dict[str, Any] | None = None, i: int | None = None) -> None:
        """The same as :meth:`step_param` for trainers that also pass the parameter's index in its group."""
        self.step_param(p, group)

    def supports_fused_back_pass(self) -> bool:
        """True; trainers ask."""
        return True

    @torch.no_grad()
    def _step_params(self, params: list[Tensor]) -> None:
        """Step some parameters, on all ranks that hold pieces of them. They may come again with gradients of others."""
        places = self._current_layout().places
        part = frozenset(places[param] for param in params)
        plan = self._current_plan(part)
        if plan is not None:
            self._step_part(part, plan)

    def _end_backward(self, layout: Layout) -> None:
        """End the step that the backward pass has made, if it has made one, and create the state that is missing."""
        if layout.whole:
            raise RuntimeError("fused_back_pass=True does not work under DeepSpeed ZeRO: use fused_back_pass=False")
        unstepped = self._step is None and any(float(group["lr"]) != 0 for group in self._groups)
        if unstepped and any(param.grad is not None for params in layout.parameters() for param in params):
            warnings.warn(
                "step() found gradients that no one has used: with fused_back_pass=True it makes no step itself; call "
                "ppsf_dist.fsdp.step_in_backward(model, optimizer) once, or step_param() from hooks, or use "
                "fused_back_pass=False",
                stacklevel=4,
            )
        self._settle_backward()
        self._create_missing_state(layout)

    @torch.no_grad()
    def _create_missing_state(self, layout: Layout) -> None:
        """Create the state of parameters that have not made a step: what a checkpoint holds depends on no step."""
        stateless = frozenset(place for param, _, place in layout.members(layout.whole) if param not in self.state)
        if stateless:
            self._current_plan(stateless)

    def _settle_backward(self) -> None:
        """End a step that nobody has ended, now that the backward pass must be over."""
        if self._step is not None and self.param_groups[0]["fused_back_pass"]:
            self._finish_step()

    def _step_part(self, part: Part, plan: Plan) -> None:
        """Step the parameters of a part; the first one begins the step."""
        if self._step is None:
            self._step = self._begin_step()
        self._advance(plan, self._step)
        self._stepped |= part

    def _begin_step(self) -> StepNumbers:
        """The numbers that all parts of a step use."""
        if any(group["use_schedulefree"] and not group["train_mode"] for group in self._groups):
            raise RuntimeError(
                "step() was called while the parameters hold the averaged weights: call optimizer.train() after "
                "evaluating, before the next forward pass"
            )
        assert self._numbers is not None
        self._numbers.absorb(self._groups)
        return StepNumbers(self._numbers, self._groups, self._seed)

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
        assert self._numbers is not None and self._step is not None
        self._step.commit()
        self._numbers.publish(self._groups, wait=False)
        self._step, self._stepped = None, frozenset()

    @property
    def _groups(self) -> list[dict[str, Any]]:
        """All parameter groups, also while a framework lets ``param_groups`` show only some of them."""
        known = {id(group) for group in self._all_groups}
        if any(id(group) not in known for group in self.param_groups):
            self._all_groups = self.param_groups
        return self._all_groups

    def _current_layout(self) -> Layout:
        """How the parameters stand in the groups now, after taking over what a framework has loaded there."""
        groups = self._groups
        if self._layout is None or self._layout.groups is not groups or not self._layout.is_current():
            self._layout = find_layout(groups, self._given)
        if self._layout.adopt(self.state):
            self._forget()
        return self._layout

    def _current_plan(self, part: Part) -> Plan | None:
        """The plan for a part as it is now, made anew if its parameters or their switches have changed."""
        layout, groups = self._current_layout(), self._groups
        frozen = [group["prodigy_steps"] > 0 and group["k"] >= group["prodigy_steps"] for group in groups]
        switches = [Switches.of(group, statistics=not f) for group, f in zip(groups, frozen, strict=True)]
        key = (layout.signature(part), tuple(switches))
        plan = self._plans.get(part)
        if plan is not None and plan.signature == key and plan.is_current():
            return plan
        members = layout.members(part)
        if not members:
            return None
        for other in [other for other in self._plans if not other or not part or other & part]:
            self._plans.pop(other).settle()
        params, groups_of, identities = (list(column) for column in zip(*members, strict=True))
        shards = self._shards_of(layout, part, params)
        if self._team is None:
            everything = [member.param for member in layout.members(layout.whole)]
            every_shard = shards if len(everything) == len(params) else layout.shards(everything, self._process_group)
            self._team = find_team(every_shard, self._process_group)
        host = HostAccess(shards[0].weights().device)
        plan = Plan(shards, groups_of, identities, switches, self._team, host, self.state, key)
        self._plans[part] = plan
        if self._numbers is None or len(self._numbers.published) != len(groups):
            self._numbers = GroupNumbers(groups, host)
        return plan

    def _shards_of(self, layout: Layout, part: Part, params: list[Tensor]) -> list[Shard]:
        """The shards of a part. Who counts what depends on all parameters, of which a part shows only some."""
        if not part or layout.whole:
            return layout.shards(params, self._process_group)
        if any(param not in self._every_shard for param in params):
            everything = [member.param for member in layout.members(layout.whole)]
            self._every_shard = {shard.param: shard for shard in layout.shards(everything, self._process_group)}
        return [self._every_shard[param] for param in params]

    def _creates_state_only(self, plan: Plan) -> bool:
        """Whether this is the step with lr 0 and zero gradients that distributed checkpoints make to create state."""
        assert self._layout is not None
        if any(float(group["lr"]) != 0 for group in self._groups) and not self._layout.starts_with_zeros:
            return False
        total = torch.zeros(1, dtype=torch.float64, device=plan.stats.device)
        for shard in plan.shards:
            gradient = shard.gradient()
            if gradient is not None:
                total += (gradient != 0).any()
        plan.team.sum_(total)
        return bool(total == 0)

    def _settle(self) -> None:
        """Write everything that lives on the device into ``state`` and ``param_groups``. Waits for the device."""
        for plan in self._plans.values():
            plan.settle()
        if self._numbers is not None:
            self._numbers.absorb(self._groups)
            self._numbers.publish(self._groups, wait=True)

    def _forget(self) -> None:
        """Start anew from ``state`` and ``param_groups``, which somebody has replaced."""
        self._plans, self._every_shard, self._numbers, self._team = {}, {}, None, None
        self._step, self._stepped = None, frozenset()

    @torch.no_grad()
    def eval(self, *, keep: bool = False) -> None:
        """Put the averaged weights x into the parameters. Does nothing if they are there already.

        Args:
            keep: keep a copy of the training weights, so that :meth:`train` brings them back bit for bit. Otherwise
                it computes them, which loses some digits each time.

        Raises:
            ValueError: ``betas[0]`` is 0, where the average cannot be recovered.
        """
        for index, group in enumerate(self.param_groups):
            if group["use_schedulefree"] and group["betas"][0] == 0:
                raise ValueError(
                    f"betas[0]=0 in parameter group {index}: with use_schedulefree=True the average x can only be "
                    "recovered from y and z if betas[0] > 0; use betas=(0.9, ...), or use_schedulefree=False"
                )
        self._switch(train=False, keep=keep)

    @torch.no_grad()
    def train(self, mode: bool = True) -> None:
        """Put the training weights y into the parameters. Does nothing if they are there already.

        Args:
            mode: False means :meth:`eval`.
        """
        if not mode:
            self.eval()
            return
        self._switch(train=True, keep=False)

    def _switch(self, *, train: bool, keep: bool) -> None:
        changing = [g for g in self.param_groups if g["use_schedulefree"] and g["train_mode"] != train]
        for group in self.param_groups:
            group["train_mode"] = train
        if not changing:
            return
        self._settle_backward()
        self._settle()
        layout = self._current_layout()
        shards = {shard.param: shard for plan in self._plans.values() for shard in plan.shards}
        unplanned = [p for params in layout.parameters() for p in params if p in self.state and p not in shards]
        shards |= {shard.param: shard for shard in layout.shards(unplanned, self._process_group)}
        for group, params in zip(self._groups, layout.parameters(), strict=True):
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

    def get_d(self) -> list[float]:
        """The step size d of each parameter group. Waits for the device."""
        self._settle()
        return [group["d"] for group in self.param_groups]

    def get_d_estimate(self) -> float:
        """The step size in use; the largest where groups differ. Waits for the device."""
        return max(self.get_d())

    @property
    def skipped_steps(self) -> int:
        """How many steps changed nothing because a gradient was not finite. Waits for the device."""
        self._settle()
        return int(self.param_groups[0]["skipped_steps"])

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint: plain numbers and tensors that fit every layout.

        Under a sharded layout every rank must call it.
        """
        self._settle_backward()
        self._settle()
        layout = self._current_layout()
        own = layout.state_dict(self.state)
        if own is not None:
            return own
        if self.state:
            # A parameter that has joined or thawed since the last step.
            self._create_missing_state(layout)
        state_dict = super().state_dict()
        packed = [p for group in self.param_groups for p in group["params"]]
        shards = layout.shards([p for p in packed if p in self.state], self._process_group)
        by_param = {shard.param: shard for shard in shards}
        state_dict["state"] = {
            index: checkpoint.to_portable(by_param[param], self.state[param])
            for index, param in enumerate(packed)
            if param in self.state
        }
        return state_dict

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of any layout, or of prodigy-plus-schedule-free 2.0.1.

        Raises:
            ValueError: the checkpoint does not fit; the message names the parameter and the key. Nothing is changed.
        """
        layout = self._current_layout()
        if layout.load_state_dict(state_dict, self.state):
            self._forget()
            return
        parameters = layout.parameters()
        ours = [{**group, "params": params} for group, params in zip(self._groups, parameters, strict=True)]
        shards = layout.shards([p for params in parameters for p in params], self._process_group)
        loaded = checkpoint.read_state(state_dict, shards, ours)
        groups = checkpoint.read_groups(state_dict, ours)
        if layout.whole:
            # The groups are the framework's as well, which looks at their tensors and knows them by identity.
            for group, values in zip(self._groups, groups, strict=True):
                group.update({name: value for name, value in values.items() if name != "params"})
            self.state.clear()
        else:
            super().load_state_dict({"state": {}, "param_groups": groups})
            self._all_groups = self.param_groups
        self._forget()
        for param, entries in loaded.items():
            self.state[param] = entries

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        gone = dict.fromkeys(("_numbers", "_step", "_layout", "_team", "_kernels", "_process_group"))
        return {**self.__dict__, "_plans": {}, "_every_shard": {}, **gone}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._kernels = EagerKernels()
