"""The face of every optimizer towards torch: step, train, eval, state_dict, hooks, param_groups."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ppsf_dist.compiling import uncompiled
from ppsf_dist.engine.engine import Engine
from ppsf_dist.engine.reports import Observer
from ppsf_dist.methods.base import Group, Method
from ppsf_dist.methods.rules import naming, validate_seed
from ppsf_dist.optimizers.hooks import hooked_load, hooked_state_dict
from ppsf_dist.refusals import refuse_process_group, refuse_zero_redundancy
from ppsf_dist.sharding import refuse_unsupported
from ppsf_dist.state import portable

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

OF_THE_WHOLE = ("decouple_lr", "process_group", "seed")
"""Arguments that no parameter group has."""


class DistributedOptimizer(Optimizer):
    """What all optimizers here have in common: the face towards torch. How a step runs: ``ppsf_dist.engine``.

    The result does not depend on how parameters are sharded: give it the parameters of a model on one device, under
    DDP, or under ``fully_shard``, and the weights are those of one process.

    Args:
        params: parameters, named parameters, or groups of them.
        defaults: the arguments of a group, by name; checked here.
        process_group: ranks that share their sums, or None for all that the parameters live on.
        seed: of stochastic rounding.

    Raises:
        ValueError: an argument is out of range or misspelt, groups disagree where they must not, or torch's
            ZeroRedundancyOptimizer builds this one.
    """

    method: ClassVar[Method]
    """What the optimizer is."""
    starts_in_train_mode: ClassVar[bool] = True
    """Whether weights are the training weights between steps, until ``eval`` is called."""
    was_evaluated: bool = False
    """Whether ``eval`` has ever been called, as ``ppsf_dist.averaged`` does."""

    def __init__(
        self, params: Params, defaults: Group, *, process_group: dist.ProcessGroup | None = None, seed: int = 0
    ) -> None:
        self._seed = validate_seed(seed)
        self.method.validate_group(defaults, lr_may_be_zero=False)
        refuse_process_group(process_group)
        refuse_zero_redundancy(self.method.name)
        for message in self.method.settle(defaults):
            warnings.warn(message, stacklevel=3)
        self._engine = Engine(self, self.method, process_group, self._seed)
        super().__init__(params, defaults)
        self._engine.all_groups = self.param_groups

    @uncompiled
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its arguments default to the optimizer's. Possible at any time.

        Keys that are no argument, such as a ``name``, stay in the group.

        Raises:
            ValueError: an argument is out of range, misspelt, or does not fit the other groups; nothing is added then.
            NotImplementedError: a parameter is one of FSDP1, which hides its shape; nothing is added then.
        """
        if isinstance(param_group, dict):
            param_group.update(self._complete_group(param_group))
        self._engine.settle_backward()
        self._engine.settle()
        super().add_param_group(param_group)
        try:
            refuse_unsupported(self.param_groups[-1]["params"])
        except NotImplementedError:
            self.param_groups.pop()
            raise
        self._engine.given.append(self.param_groups[-1]["params"])
        self._engine.learning_rates.constructed_with(self.param_groups[-1:])
        self._engine.forget("a parameter group has been added")

    def _complete_group(self, given: dict[str, Any]) -> dict[str, Any]:
        """Everything that a new group holds but its parameters, checked."""
        with naming(f"parameter group {len(self.param_groups)}"):
            self.method.refuse_unknown(given, OF_THE_WHOLE)
            group = {**self.defaults, **given}
            self.method.validate_group(group)
            train_mode = self.param_groups[0]["train_mode"] if self.param_groups else self.starts_in_train_mode
            start = {"state_version": portable.STATE_VERSION, "train_mode": train_mode}
            group = {**start, **self.method.initial_numbers(group), **group}
            self.method.validate_numbers(group)
        known = self.method.settle({**self.defaults})
        for message in self.method.settle(group):
            if message not in known:
                warnings.warn(message, stacklevel=3)
        self.method.validate_together([*self.param_groups, group])
        return {name: value for name, value in group.items() if name != "params"}

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @uncompiled
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step on all parameters that have a gradient. ``torch.compile`` leaves it as it is.

        With ``fused_back_pass=True``, where a class has it, it makes no step but ends the one that the backward pass
        has made: d and k are those of the next step then. Without one it changes nothing (and creates the state that
        is missing, for checkpoints).

        If any gradient element (or its square in fp32) on any of the ranks that share the parameters is not finite, or
        a number of a group is not, nothing changes on any of them and ``skipped_steps`` grows. Under DDP ranks
        share nothing: each decides for itself.

        An exception undoes the step or comes after its end. Where a framework steps in parts, the parts before it stay.

        Raises:
            RuntimeError: the optimizer is in eval mode, another rank could not step or has other parameters or
                arguments, or a step before could not be brought to its end.
            ValueError: a gradient is sparse or complex, or does not have the shape of its weights.
        """
        return self._engine.run(None if closure is None else torch.enable_grad()(closure))

    @torch.no_grad()
    def _step_params(self, params: list[Tensor]) -> None:
        """Step some parameters, on all ranks that hold pieces of them. They may come again with gradients of others."""
        self._engine.run_some(params)

    @uncompiled
    @torch.no_grad()
    def eval(self, *, keep: bool = False) -> None:
        """Put the averaged weights x into the parameters. Does nothing if they are there already.

        Args:
            keep: keep a copy of the training weights, so that ``train`` brings them back bit for bit. Otherwise
                it computes them, which loses some digits each time.

        Raises:
            ValueError: beta1 is 0, where the average cannot be recovered.
        """
        for index, group in enumerate(self.param_groups):
            if self.method.switches(group).schedulefree and self.method.beta1(group) == 0:
                raise ValueError(
                    f"{self.method.interpolation}=0 in parameter group {index}: with Schedule-Free the average x can "
                    f"only be recovered from y and z if {self.method.interpolation} > 0; use 0.9"
                )
        self._engine.switch(train=False, keep=keep)
        self.was_evaluated = True

    @uncompiled
    @torch.no_grad()
    def train(self, mode: bool = True) -> None:
        """Put the training weights y into the parameters. Does nothing if they are there already.

        Args:
            mode: False means ``eval``.
        """
        if not mode:
            self.eval()
            return
        self._engine.switch(train=True, keep=False)

    def observe(self, observer: Observer) -> RemovableHandle:
        """Let a function know of every step: d and its sums, norms of gradient and update, and whether it was skipped.

        It costs no wait: what it gets comes with the numbers that go to the host anyway. On a CPU it is called at the
        end of the step itself; on an accelerator in a later call of ``step()``, or in one that waits for the device
        (``state_dict``, ``skipped_steps``). Steps come in order, each once; those that have not been told of
        when a checkpoint is loaded are not. It may be set on one rank alone: all have the same numbers.

        Args:
            observer: called with a ``ppsf_dist.StepReport``. An exception in it comes after the end of the step.

        Returns:
            A handle whose ``remove()`` takes the observer away.
        """
        handle = RemovableHandle(self._engine.observers)
        self._engine.observers[handle.id] = observer
        return handle

    @property
    def skipped_steps(self) -> int:
        """How many steps changed nothing because a gradient was not finite. Waits for the device."""
        self._engine.settle()
        return int(self.param_groups[0]["skipped_steps"])

    @uncompiled
    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint: plain numbers and tensors that fit every layout.

        Under a sharded layout every rank must call it. Hooks see and change what torch says they do.
        """
        self._settle()
        return hooked_state_dict(self, self._state_dict)

    def _settle(self) -> None:
        self._engine.settle_backward()
        self._engine.settle()

    def _state_dict(self) -> dict[str, Any]:
        # What a hook has written is current too.
        self._settle()
        layout = self._engine.current_layout()
        own = layout.state_dict(self.method, self.state)
        if own is not None:
            return own
        if any(isinstance(entries, dict) and "step" in entries for entries in self.state.values()):
            # A parameter that has joined or thawed since the last step.
            self._engine.create_missing_state(layout)
        # A parameter may stand in several groups that somebody has put together.
        stateful = dict.fromkeys(p for group in self.param_groups for p in group["params"] if p in self.state)
        shards = layout.shards(list(stateful), self._engine.process_group)
        return portable.pack(self.method, self.param_groups, self.state, shards)

    @uncompiled
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of any layout, or of the reference.

        Arguments come from the checkpoint, but for ``fused_back_pass``, which says how the program's loop is written.
        Keys of a group, and entries of the state, that nothing here knows are kept. Hooks see and change what torch
        says they do.

        Raises:
            ValueError: the checkpoint does not fit, or holds what is out of range; the message names the group or the
                parameter, and the key. Nothing is changed.
        """
        hooked_load(self, state_dict, self._load_state_dict)

    def _load_state_dict(self, state_dict: dict[str, Any]) -> None:
        layout = self._engine.current_layout()
        if not layout.load_state_dict(self.method, state_dict, self.state):
            parameters = layout.parameters()
            ours = [{**group, "params": params} for group, params in zip(self._engine.groups, parameters, strict=True)]
            groups = portable.read_groups(self.method, state_dict, ours)
            shards = layout.shards([p for params in parameters for p in params], self._engine.process_group)
            state = portable.read_state(self.method, state_dict, shards, groups)
            # The dictionaries stay: a framework and its hooks may hold them, and know their parameters by identity.
            for group, values in zip(self._engine.groups, groups, strict=True):
                group.update({name: value for name, value in values.items() if name != "params"})
            self.state.clear()
            self.state.update(state)
        self._engine.forget("load_state_dict() has been called")

    def __getstate__(self) -> dict[str, Any]:
        """What a copy has, by pickle or deepcopy: as with torch's optimizers no hooks.

        Raises:
            TypeError: there is a ``process_group``, which cannot be copied.
        """
        if self._engine.process_group is not None:
            raise TypeError(
                "an optimizer with process_group= cannot be copied or pickled, because process groups cannot: build a "
                "new one with the same arguments and give it this one's state_dict()"
            )
        self._engine.settle()
        own = {"_seed": self._seed, "_given": self._engine.given, "_all_groups": self._engine.all_groups}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        given, all_groups = state.pop("_given"), state.pop("_all_groups")
        super().__setstate__(state)
        self._engine = Engine(self, self.method, None, self._seed)
        self._engine.given, self._engine.all_groups = given, all_groups


class AdaptiveOptimizer(DistributedOptimizer):
    """What the optimizers have in common that find their step size d."""

    def get_d(self) -> list[float]:
        """The step size d of each parameter group. Waits for the device."""
        self._engine.settle()
        return [group["d"] for group in self.param_groups]

    def get_d_estimate(self) -> float:
        """The step size in use; the largest where groups differ. Waits for the device."""
        return max(self.get_d())
