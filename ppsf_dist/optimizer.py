"""ProdigyPlusScheduleFree: what a person constructs. How a step runs is in :mod:`ppsf_dist.engine`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ppsf_dist import checkpoint
from ppsf_dist.compiling import uncompiled
from ppsf_dist.engine import Engine
from ppsf_dist.options import (
    ARGUMENTS,
    naming,
    refuse_unknown,
    settle,
    validate_group,
    validate_numbers,
    validate_seed,
    validate_together,
)
from ppsf_dist.refusals import refuse_process_group, refuse_zero_redundancy
from ppsf_dist.scalars import initial_numbers

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

OF_THE_WHOLE = ("decouple_lr", "process_group", "seed")
"""Arguments that no parameter group has."""


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
        ValueError: an argument is out of range or misspelt, groups disagree where they must not, or torch's
            ZeroRedundancyOptimizer builds this one.

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
        self._seed = validate_seed(seed)
        validate_group(defaults, lr_may_be_zero=False)
        refuse_process_group(process_group)
        refuse_zero_redundancy()
        for message in settle(defaults):
            warnings.warn(message, stacklevel=2)
        self._engine = Engine(self, process_group, self._seed)
        super().__init__(params, defaults)
        self._engine.all_groups = self.param_groups

    @uncompiled
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its arguments default to the optimizer's. Possible at any time.

        Keys that are no argument, such as a ``name``, stay in the group.

        Raises:
            ValueError: an argument is out of range, misspelt, or does not fit the other groups; nothing is added then.
        """
        if isinstance(param_group, dict):
            param_group.update(self._complete_group(param_group))
        self._engine.settle_backward()
        self._engine.settle()
        super().add_param_group(param_group)
        self._engine.given.append(self.param_groups[-1]["params"])
        self._engine.forget("a parameter group has been added")

    def _complete_group(self, given: dict[str, Any]) -> dict[str, Any]:
        """Everything that a new group holds but its parameters, checked."""
        with naming(f"parameter group {len(self.param_groups)}"):
            refuse_unknown(given, OF_THE_WHOLE)
            group = {**self.defaults, **given}
            validate_group(group)
            train_mode = self.param_groups[0]["train_mode"] if self.param_groups else True
            start = {"state_version": checkpoint.STATE_VERSION, "train_mode": train_mode}
            group = {**start, **initial_numbers(group), **group}
            validate_numbers(group)
        known = settle({**self.defaults})
        for message in settle(group):
            if message not in known:
                warnings.warn(message, stacklevel=3)
        validate_together([*self.param_groups, group])
        return {name: value for name, value in group.items() if name != "params"}

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @uncompiled
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step on all parameters that have a gradient. ``torch.compile`` leaves it as it is.

        With ``fused_back_pass`` it makes no step but ends the one that the backward pass has made: d and k are those of
        the next step then. Without one it changes nothing (and creates the state that is missing, for checkpoints).

        If any gradient element (or its square in fp32) on any of the ranks that share the parameters is not finite, or
        a number of a group is not, nothing changes on any of them and :attr:`skipped_steps` grows. Under DDP ranks
        share nothing: each decides for itself.

        An exception undoes the step or comes after its end. Where a framework steps in parts, the parts before it stay.

        Raises:
            RuntimeError: the optimizer is in eval mode, another rank could not step or has other parameters or
                arguments, or a step before could not be brought to its end.
            ValueError: a gradient is sparse or complex, or does not have the shape of its weights.
        """
        return self._engine.run(None if closure is None else torch.enable_grad()(closure))

    @uncompiled
    @torch.no_grad()
    def step_param(self, p: Tensor, group: dict[str, Any] | None = None) -> None:
        """Step one parameter at once, so that its gradient can be freed. For hooks that run during the backward pass.

        ``step()`` ends the step. For trainers that never call it, a parameter that comes a second time ends the step
        before, and so do ``eval()``, ``train()`` and ``state_dict()``. A parameter without a gradient changes nothing.
        To accumulate gradients, do not call this before the last backward pass.

        A gradient that is not finite leaves its parameter, d and k as they were; what was stepped before stays stepped.

        Args:
            p: a parameter of this optimizer.
            group: accepted because trainers pass it. Arguments come from ``param_groups`` as they are now, also where a
                hook still holds a group that is no longer in use.

        Raises:
            ValueError: ``fused_back_pass`` is not set, or the parameter belongs to no group.
            RuntimeError: the parameter is sharded, or the optimizer is in eval mode.
        """
        if not self.param_groups[0]["fused_back_pass"]:
            raise ValueError("step_param() needs ProdigyPlusScheduleFree(..., fused_back_pass=True)")
        if p.grad is None:
            return
        self._engine.run_alone(p)

    def step_parameter(self, p: Tensor, group: dict[str, Any] | None = None, i: int | None = None) -> None:
        """The same as :meth:`step_param` for trainers that also pass the parameter's index in its group."""
        self.step_param(p, group)

    def supports_fused_back_pass(self) -> bool:
        """True; trainers ask."""
        return True

    @torch.no_grad()
    def _step_params(self, params: list[Tensor]) -> None:
        """Step some parameters, on all ranks that hold pieces of them. They may come again with gradients of others."""
        self._engine.run_some(params)

    @uncompiled
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
        self._engine.switch(train=False, keep=keep)

    @uncompiled
    @torch.no_grad()
    def train(self, mode: bool = True) -> None:
        """Put the training weights y into the parameters. Does nothing if they are there already.

        Args:
            mode: False means :meth:`eval`.
        """
        if not mode:
            self.eval()
            return
        self._engine.switch(train=True, keep=False)

    def get_d(self) -> list[float]:
        """The step size d of each parameter group. Waits for the device."""
        self._engine.settle()
        return [group["d"] for group in self.param_groups]

    def get_d_estimate(self) -> float:
        """The step size in use; the largest where groups differ. Waits for the device."""
        return max(self.get_d())

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
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        # What a hook has written is current too.
        self._settle()
        state_dict = self._state_dict()
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def _settle(self) -> None:
        self._engine.settle_backward()
        self._engine.settle()

    def _state_dict(self) -> dict[str, Any]:
        layout = self._engine.current_layout()
        own = layout.state_dict(self.state)
        if own is not None:
            return own
        if any(isinstance(entries, dict) and "step" in entries for entries in self.state.values()):
            # A parameter that has joined or thawed since the last step.
            self._engine.create_missing_state(layout)
        # A parameter may stand in several groups that somebody has put together.
        stateful = dict.fromkeys(p for group in self.param_groups for p in group["params"] if p in self.state)
        return checkpoint.pack(self.param_groups, self.state, layout.shards(list(stateful), self._engine.process_group))

    @uncompiled
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of any layout, or of prodigy-plus-schedule-free 2.0.1.

        Arguments come from the checkpoint, but for ``fused_back_pass``, which says how the program's loop is written.
        Keys of a group, and entries of the state, that nothing here knows are kept. Hooks see and change what torch
        says they do.

        Raises:
            ValueError: the checkpoint does not fit, or holds what is out of range; the message names the group or the
                parameter, and the key. Nothing is changed.
        """
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self._load_state_dict(state_dict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _load_state_dict(self, state_dict: dict[str, Any]) -> None:
        layout = self._engine.current_layout()
        if not layout.load_state_dict(state_dict, self.state):
            parameters = layout.parameters()
            ours = [{**group, "params": params} for group, params in zip(self._engine.groups, parameters, strict=True)]
            groups = checkpoint.read_groups(state_dict, ours)
            shards = layout.shards([p for params in parameters for p in params], self._engine.process_group)
            state = checkpoint.read_state(state_dict, shards, groups)
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
        self._engine = Engine(self, None, self._seed)
        self._engine.given, self._engine.all_groups = given, all_groups
