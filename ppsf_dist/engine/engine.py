"""How a step runs: when it begins and ends, what an exception does to it, and how weights and modes are swapped.

The picture of a step is in ``ppsf_dist.engine.step``, what it is planned from in ``ppsf_dist.engine.planning``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from ppsf_dist.engine.open_step import Begun, OpenStep
from ppsf_dist.engine.plan import Plan
from ppsf_dist.engine.planning import Owner, Planner
from ppsf_dist.engine.step import PartStep
from ppsf_dist.engine.swap import Swap
from ppsf_dist.engine.together import Waiting
from ppsf_dist.methods.base import Cause, Method, StepNumbers, Total, merged
from ppsf_dist.sharding import Group, Layout, Part, drop_gathered_copies
from ppsf_dist.sharding.slots import describe, share_failure
from ppsf_dist.state.writes import Write, Writes

ATTEMPTS = 3
"""How often what must come to its end is tried."""


class Engine(Planner):
    """Everything between an optimizer's ``step()`` and its kernels.

    Args:
        owner, method, process_group, seed: as of ``ppsf_dist.engine.planning.Planner``.
    """

    def __init__(self, owner: Owner, method: Method, process_group: dist.ProcessGroup | None, seed: int) -> None:
        super().__init__(owner, method, process_group, seed)
        self._open: OpenStep | None = None
        self._begun: Begun | None = None
        self._torn: str | None = None
        self._small = Waiting(self._step_small)

    def settle(self) -> None:
        """As of a planner; torn state is no state to save.

        Raises:
            RuntimeError: a step or a swap could not be brought to its end.
        """
        self.refuse_torn()
        super().settle()
        self._tell_observers()

    def forget(self, reason: str) -> None:
        """As of a planner; what has been begun is forgotten too."""
        super().forget(reason)
        self._drop_step()
        self._small.forget()
        self._torn, self._unheard = None, []

    @property
    def is_fused(self) -> bool:
        """Whether parameters are stepped during the backward pass."""
        return bool(self._owner.param_groups[0].get("fused_back_pass", False))

    def _averages(self, group: Group) -> bool:
        return self.method.switches(group).schedulefree

    def run(self, closure: Callable[[], float] | None) -> float | None:
        """One call of ``step()``: a step, a part of one, or the end of the one that the backward pass has made."""
        self.refuse_torn()
        layout = self.current_layout()
        if self.is_fused:
            loss = None if closure is None else closure()
            self._end_backward(layout)
            return loss
        part = layout.part(self._owner.param_groups)
        with self.together(layout, part):
            loss = None if closure is None else closure()
            if self._open is not None and self._open.stepped & part:
                # The framework has left out some parts of the step before.
                self._finish_step()
            fresh = not self.state
            plan = self.current_plan(part, layout if closure is None else None)
            if plan is None:
                self._doubt_frozen(layout)
            elif not (fresh and self._creates_state_only(plan)):
                self._step_part(part, plan, ends_with=layout.all_parts)
        return loss

    def _doubt_frozen(self, layout: Layout) -> None:
        if not any(param.requires_grad for params in layout.parameters() for param in params):
            warnings.warn(
                "step() changed nothing: none of the optimizer's parameters requires a gradient; call "
                "requires_grad_(True) on those that are to be trained, or give the optimizer other ones",
                stacklevel=4,
            )

    def run_alone(self, param: Tensor) -> None:
        """Step one parameter, a small one with others; one that comes a second time ends the step before.

        Raises:
            ValueError: the parameter belongs to no group.
            RuntimeError: it is sharded.
        """
        self.refuse_torn()
        layout = self.current_layout()
        if layout.all_parts or param not in layout.param_ids:
            raise ValueError(f"the parameter of shape {tuple(param.shape)} is in none of the optimizer's param_groups")
        part = frozenset((layout.param_ids[param],))
        is_new = part not in self.plans and param.requires_grad
        if self.process_group is not None or (is_new and self.trained_shards(layout)[param].domain):
            raise RuntimeError(
                "step_param() steps a parameter on its own, but this one is sharded and needs sums from other ranks in "
                "the same order on all: call ppsf_dist.fsdp.step_in_backward(model, optimizer) in place of these hooks"
            )
        if param in self._small or (self._open is not None and self._open.stepped & part):
            self._step_small()
            self._finish_step()
        if not self._small.add(param):
            self._step_alone(layout, part)
        elif self._small.is_full:
            self._step_small()

    def _step_alone(self, layout: Layout, part: Part) -> None:
        plan = self.current_plan(part, layout)
        if plan is not None:
            self._step_part(part, plan)

    @torch.no_grad()
    def _step_small(self) -> None:
        """Step the small parameters that wait for each other."""
        with self._small.taken() as params:
            if params:
                layout = self.current_layout()
                self._step_alone(layout, frozenset(layout.param_ids[param] for param in params))

    def run_some(self, params: list[Tensor]) -> None:
        """Step some parameters, on all ranks that hold pieces of them.

        Their first sums are on their way when this returns; the next call, or the end of the step, does the rest.
        """
        self.refuse_torn()
        self._end_begun()
        layout = self.current_layout()
        part = frozenset(layout.param_ids[param] for param in params)
        with self.together(layout, part):
            plan = self.current_plan(part)
            if plan is None:
                return
            if plan.team.is_alone or not plan.sums_travel_alone:
                self._step_part(part, plan)
            else:
                self._begun = self._begin_part(part, plan, goes_ahead=True)

    def _end_begun(self) -> None:
        """Bring the part to its end whose sums have travelled meanwhile."""
        begun, self._begun = self._begun, None
        if begun is not None:
            with self.together(self.current_layout(), begun.part, goes_on=True):
                self._end_part(begun)

    def _end_backward(self, layout: Layout) -> None:
        """End the step that the backward pass has made, if it has made one, and create the state that is missing."""
        if layout.all_parts:
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

    @torch.no_grad()
    def create_missing_state(self, layout: Layout) -> None:
        """Create the state of parameters that have not made a step: what a checkpoint holds depends on no step."""
        members = layout.members(layout.all_parts)
        stateless = frozenset(param_id for param, _, param_id in members if "step" not in self.state.get(param, {}))
        if stateless:
            self.current_plan(stateless)

    def settle_backward(self) -> None:
        """End a step that nobody has ended, now that the backward pass must be over."""
        self._end_begun()
        self._step_small()
        if self._open is not None and self.is_fused:
            self._finish_step()

    def _step_part(self, part: Part, plan: Plan, *, ends_with: Part | None = None) -> None:
        """Step the parameters of a part; the first one begins the step, and all of ``ends_with`` end it.

        An exception undoes the part and drops the step, as long as the ranks have not decided; from then on everything
        is brought to its end before the exception goes on its way.
        """
        self._end_part(self._begin_part(part, plan), ends_with=ends_with)

    def _begin_part(self, part: Part, plan: Plan, *, goes_ahead: bool = False) -> Begun:
        opened = self._open or OpenStep(self._begin_step())
        frozen = [self.method.is_frozen(group) for group in self.groups]
        if plan.frozen != frozen:
            plan.freeze(frozen)
        step = PartStep(plan, opened.numbers)
        plan.reductions.expect()
        try:
            self._open = opened
            step.begin(goes_ahead=goes_ahead)
        except BaseException:
            plan.end()
            self._drop_step()
            raise
        return Begun(part, step, opened)

    def _end_part(self, begun: Begun, *, ends_with: Part | None = None) -> None:
        part, step, opened = begun
        plan = step.plan
        waits = self.method.d_timing == "current"
        ends = ends_with is not None and ends_with <= opened.stepped | part

        def conclude() -> None:
            # From what was there before this part, so that twice is once.
            if self._open is None:
                return
            if not waits:
                step.write()
            known = step.verdict.known
            if known is not None and known.cause == Cause.FAILURE:
                plan.end()
                return
            self._open = opened.after(part, step, waits=waits)
            if ends:
                self._finish_step(step)

        try:
            step.measure()
            conclude()
        except BaseException:
            if plan.reductions.decided:
                self._bring_to_its_end(conclude, "step()")
            else:
                plan.end()
                self._drop_step()
            raise
        known = step.verdict.known
        if known is not None and known.cause == Cause.FAILURE:
            self._drop_step()
            share_failure(None, plan.team)

    def _begin_step(self) -> StepNumbers:
        """The numbers that all parts of a step use."""
        if any(not group["train_mode"] and self._averages(group) for group in self.groups):
            raise RuntimeError(
                "step() was called while the parameters hold the averaged weights: call optimizer.train() after "
                "evaluating, before the next forward pass"
            )
        assert self.numbers is not None and self.host is not None
        self.method.validate_step(self.groups)
        self.learning_rates.see(self.groups)
        self.numbers.absorb(self.groups)
        numbers = self.kernels.step_numbers(self.method, self.groups, self.host.device, host_reads=self.host.free)
        return numbers(self.numbers, self.groups, self.seed)

    def _drop_step(self) -> None:
        """The step that has begun ends without a trace, but for parts that were written."""
        ended = [*([self._begun.step] if self._begun else []), *(self._open.waiting if self._open else ())]
        self._begun = self._open = None
        for step in ended:
            step.plan.end()

    def _finish_step(self, last: PartStep | None = None) -> None:
        """What has waited is written, and d for the next step comes from the sums of all parts.

        Args:
            last: the part whose call this is.
        """
        opened = self._open
        if opened is None or self.numbers is None or not opened.totals:
            return
        totals = merged(opened.totals)
        if opened.waiting:
            opened.numbers.learn(totals)
            for step in opened.waiting:
                step.write(totals[Total.CAUSE].amax())
            late = [shard.param for step in opened.waiting if step is not last for shard in step.plan.shards]
            if late:
                self.current_layout().show(late)
        opened.numbers.commit(totals)
        self._unheard += self.numbers.end_step(self.groups)
        self._open = None
        self._hear_of_steps()

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

    def switch(self, *, train: bool, keep: bool) -> None:
        """Swap training and averaged weights of all groups, and their modes with them: all of it or nothing."""
        self.refuse_torn()
        groups = self._owner.param_groups
        changing = [group for group in groups if self._averages(group) and group["train_mode"] != train]
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
            drop_gathered_copies([swap.param for swap in swaps])
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
                    exact = keep or (not self.method.switches(group).quirks and weights.dtype != torch.float32)
                    swaps.append(Swap(param, weights, state, self.method.beta1(group), train=train, keep=exact))
        return swaps

    def put_average(self, compute: Callable[[], list[Write]]) -> None:
        """Write averaged weights, and the mode with them.

        Args:
            compute: what to write, from what nothing of it changes.
        """
        writes = Writes()

        def put() -> None:
            writes.restart()
            writes.put(compute)
            for group in self._owner.param_groups:
                group["train_mode"] = False

        try:
            put()
        except BaseException:
            self._bring_to_its_end(put, "step()")
            raise
        layout = self.current_layout()
        drop_gathered_copies([param for params in layout.parameters() for param in params])
        layout.refresh()

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
        self.refuse_torn()

    def refuse_torn(self) -> None:
        if self._torn is not None:
            raise RuntimeError(
                f"{self._torn} while it wrote, and could not be brought to its end: weights and state are partly those "
                "before and partly those after it; load the last checkpoint, weights and load_state_dict()"
            )
