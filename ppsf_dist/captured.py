"""A step that is captured once and run again: on a GPU one launch in place of some hundred."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch.optim import Optimizer

from ppsf_dist.engine.engine import Engine
from ppsf_dist.engine.plan import Plan
from ppsf_dist.optimizers.base import DistributedOptimizer

logger = logging.getLogger(__name__)

Record = Callable[[Callable[[], object]], Callable[[], object]]


def record_cuda_graph(function: Callable[[], object]) -> Callable[[], object]:
    """Capture what a function launches on the current device.

    Args:
        function: launches kernels, all of whose memory stays where it is.

    Returns:
        What launches it all again. Nothing has run yet.
    """
    graph = torch.cuda.CUDAGraph()
    # NCCL's watchdog asks for events in a thread of its own, which the default forbids everywhere.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        function()
    return graph.replay


class CapturedStep:
    """``optimizer.step()`` as one launch of a CUDA graph, sums of all ranks included::

        step = CapturedStep(optimizer)
        for batch in batches:
            model(batch).backward()
            step()
            optimizer.zero_grad()

    The first calls make ordinary steps; then one is captured. Kernels read where gradients and weights are from a table
    that each call renews, so gradients may move (``zero_grad()`` with ``set_to_none=True``, FSDP2), be missing, or be
    not finite. Numbers may be changed (``lr``, ``weight_decay``, ``d``) and weights averaged between calls. Where
    something else has changed (parameters, switches, a loaded checkpoint, a step size that is frozen from now on), a
    call makes an ordinary step and the next one captures anew. On several ranks all of them must call it alike.

    Args:
        optimizer: of this package, on a GPU, with all parameters on Triton's kernels (``PPSF_KERNELS=native``).
        warm_up: how many ordinary steps come before the first captured one, at least 1.

    Raises:
        TypeError: the optimizer is none of this package's own (a wrapped one launches its base optimizer's step).
        ValueError: ``warm_up`` is less than 1, or the optimizer steps in the backward pass.
        RuntimeError: later, from a call: the step cannot be captured, or what
            ``ppsf_dist.optimizers.base.DistributedOptimizer.step`` raises.
    """

    def __init__(self, optimizer: DistributedOptimizer, *, warm_up: int = 3) -> None:
        engine: Engine | None = getattr(optimizer, "_engine", None)
        if engine is None:
            raise TypeError(f"{type(optimizer).__name__} has no step to capture: give an optimizer of ppsf_dist")
        if warm_up < 1:
            raise ValueError(f"warm_up={warm_up} must be at least 1: a step that is captured must have been made once")
        if engine.is_fused:
            raise ValueError("fused_back_pass=True makes its steps in the backward pass: use fused_back_pass=False")
        self._optimizer, self._engine = optimizer, engine
        self._steps_to_come = warm_up
        self._record: Record = record_cuda_graph
        self._captured: tuple[Plan, Callable[[], object]] | None = None

    def __call__(self) -> None:
        """Make a step, as ``ppsf_dist.optimizers.base.DistributedOptimizer.step`` does."""
        plan = self._settled_plan()
        if plan is None:
            self._captured = None
            self._optimizer.step()
            self._steps_to_come = max(0, self._steps_to_come - 1)
            return
        if self._captured is None:
            self._captured = plan, self._capture(plan)
        # With the hooks of the optimizer's step around it.
        Optimizer.profile_hook_step(self._replay)(self._optimizer)
        self._conclude(plan)

    @torch.no_grad()
    def _settled_plan(self) -> Plan | None:
        """The plan of this step, bound to its tensors, if it is that of the one before; else an ordinary step comes."""
        engine = self._engine
        engine.refuse_torn()
        averaged = not all(group.get("train_mode", True) for group in engine.groups)
        if self._steps_to_come or averaged or not engine.plans:
            return None
        layout = engine.current_layout()
        if layout.all_parts or len(engine.plans) > 1:
            raise RuntimeError(
                "a step that comes in parts (DeepSpeed's ZeRO) cannot be captured: call optimizer.step()"
            )
        ((part, plan),) = engine.plans.items()
        with engine.together(layout, part):
            if plan.frozen != [engine.method.is_frozen(group) for group in engine.groups]:
                return None
            if engine.current_plan(part, layout) is not plan or (self._captured and self._captured[0] is not plan):
                return None
            why = plan.why_not_captured()
            if why is not None:
                raise RuntimeError(f"this step cannot be captured, because {why}, or call optimizer.step()")
            self._refresh(plan)
        return plan

    @torch.no_grad()
    def _refresh(self, plan: Plan) -> None:
        """What the host does for a step: its own numbers, and where everything lies."""
        engine = self._engine
        assert engine.numbers is not None
        engine.method.validate_step(engine.groups)
        engine.numbers.absorb(engine.groups)
        engine.numbers.hyper(engine.groups)
        plan.capture_unseen()
        plan.bind()

    def _replay(self, optimizer: DistributedOptimizer) -> None:
        assert self._captured is not None
        self._captured[1]()

    @torch.no_grad()
    def _capture(self, plan: Plan) -> Callable[[], object]:
        logger.info("the step is captured")
        plan.host.captures = True
        try:
            return self._record(lambda: self._engine.run(None))
        finally:
            plan.host.captures = False

    @torch.no_grad()
    def _conclude(self, plan: Plan) -> None:
        """What the host learns from a step."""
        # As torch's own writes do: autograd refuses a backward pass through weights that are no longer there.
        torch.autograd.graph.increment_version([shard.weights() for shard in plan.shards])
        plan.end()
        self._engine.hear_of_step()
