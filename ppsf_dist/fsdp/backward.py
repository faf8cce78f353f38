"""Step parameters during the backward pass, one FSDP2 group at a time, and free their gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from ppsf_dist.optimizers.prodigy_plus import ProdigyPlusScheduleFree


def step_in_backward(model: nn.Module, optimizer: ProdigyPlusScheduleFree) -> StepInBackward:
    """Let ``loss.backward()`` step the parameters, so that only the gradients of two FSDP groups are alive at a time.

    ``optimizer.step()`` stays where it is in the training loop and ends the step: with d and k, nothing is left to
    chance or to a count of parameters. Call it after every backward pass, except those that only accumulate::

        optimizer = ProdigyPlusScheduleFree(model.parameters(), fused_back_pass=True)
        step_in_backward(model, optimizer)
        ...
        loss.backward()
        optimizer.step()

    The step of a group of ``fully_shard`` begins when its last gradient arrives: pass 1 reads it, and its sums travel
    while the backward pass goes on to the next group, whose last gradient then ends it. Where some of its parameters
    have no gradient, it is stepped when the next group begins or at ``optimizer.step()``. On one process without
    ``fully_shard`` each parameter is a group, and stepped at once: nothing has to travel. Parameters beside those of
    FSDP (``ignored_params``, tensor parallelism alone) keep their gradients until ``optimizer.step()``, which steps
    them together.

    The run is that of the usual loop, but for the order of summation, with two exceptions. A gradient that is not
    finite skips its own group and the update of d and k, not what was stepped before it. And gradients cannot be
    changed between backward pass and step: no clipping of the global norm and no ``GradScaler``.

    To accumulate gradients use ``model.set_requires_gradient_sync(False)`` of FSDP2, or on any model
    ``StepInBackward.accumulating``, for all backward passes but the last.

    Args:
        model: the model, after ``fully_shard``.
        optimizer: of its parameters, with ``fused_back_pass=True``.

    Returns:
        A handle that ends this again; it need not be kept.

    Raises:
        ValueError: ``fused_back_pass`` is not set, or the model is wrapped by ``DistributedDataParallel``, which
            reduces gradients only after these hooks. Later, from ``optimizer.step()``: it was given a closure.
        RuntimeError: later, from ``backward()``: a parameter that was stepped gets another gradient before
            ``optimizer.step()``.
    """
    return StepInBackward(model, optimizer)


class StepInBackward:
    """What ``step_in_backward`` returns."""

    def __init__(self, model: nn.Module, optimizer: ProdigyPlusScheduleFree) -> None:
        if not optimizer._engine.is_fused:
            raise ValueError("step_in_backward() needs ProdigyPlusScheduleFree(..., fused_back_pass=True)")
        if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
            raise ValueError(
                "step_in_backward() cannot work with DistributedDataParallel, which reduces gradients after the hooks "
                "of their parameters: use fully_shard(model), or fused_back_pass=False"
            )
        optimizer._engine.learn_names(model)
        self._optimizer = optimizer
        params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        is_alone = optimizer._engine.process_group is None and not any(isinstance(p, DTensor) for p in params)
        groups = [[p] for p in params] if is_alone else fsdp_groups(model)
        known = set(params)
        self._groups = [members for group in groups if (members := [p for p in group if p in known])]
        self._group_of = {p: index for index, group in enumerate(self._groups) for p in group}
        self._rest = [p for p in params if p not in self._group_of]
        self._open: int | None = None
        self._arrived: set[Tensor] = set()
        self._used: set[Tensor] = set()
        self._accumulates = self._any_arrived = False
        self._handles: list[RemovableHandle] = [p.register_post_accumulate_grad_hook(self._arrive) for p in params]
        self._handles.append(optimizer.register_step_pre_hook(self._finish))

    def remove(self) -> None:
        """Take the hooks away. The optimizer's ``fused_back_pass`` stays as it is."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Backward passes inside only add to the gradients; the first one after it steps with the sums."""
        self._accumulates = True
        try:
            yield
        finally:
            self._accumulates = False

    def _arrive(self, param: Tensor) -> None:
        if self._accumulates:
            return
        if param in self._used:
            raise RuntimeError(
                f"a parameter of shape {tuple(param.shape)} got a gradient after it was stepped: call optimizer.step() "
                "after each backward pass; to accumulate gradients, call model.set_requires_gradient_sync(False) "
                "(FSDP2) or use accumulating() of step_in_backward's handle for all backward passes but the last"
            )
        self._any_arrived = True
        index = self._group_of.get(param)
        if index is None:
            return
        if self._open not in (None, index):
            self._flush()
        self._open = index
        self._arrived.add(param)
        if len(self._arrived) == len(self._groups[index]):
            self._flush()

    def _flush(self) -> None:
        """Step the group whose gradients have come in."""
        if self._open is not None:
            group = self._groups[self._open]
            self._open = None
            self._arrived = set()
            self._step(group)

    def _step(self, params: list[Tensor]) -> None:
        self._used.update(p for p in params if p.grad is not None)
        self._optimizer._step_params(params)
        for param in params:
            param.grad = None

    def _finish(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Step what is left, before ``optimizer.step()`` ends the step.

        Without a backward pass nothing is done: distributed checkpoints make a step on gradients of their own.
        """
        if kwargs.get("closure") is not None or any(callable(arg) for arg in args[1:]):
            raise ValueError(
                "optimizer.step(closure) does not work with step_in_backward(), because step() must find the backward "
                "pass behind it: call loss.backward() first, then optimizer.step()"
            )
        if self._any_arrived:
            self._flush()
            for group in self._groups:
                # Only an accumulating backward pass has reached these.
                if any(p.grad is not None for p in group):
                    self._step(group)
            if self._rest:
                self._step(self._rest)
        self._used = set()
        self._any_arrived = False


def fsdp_groups(model: nn.Module) -> list[list[Tensor]]:
    """The parameters that each module under ``fully_shard`` gathers and reduces together."""
    groups: list[list[Tensor]] = []
    seen: set[Tensor] = set()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            group: list[Tensor] = [p for p in _own_parameters(module) if isinstance(p, DTensor) and p not in seen]
            seen.update(group)
            groups.append(group)
    return groups


def _own_parameters(module: nn.Module) -> Iterator[Tensor]:
    """Parameters of a module and its children, but not of children that are groups themselves."""
    yield from module.parameters(recurse=False)
    for child in module.children():
        if not isinstance(child, FSDPModule):
            yield from _own_parameters(child)
