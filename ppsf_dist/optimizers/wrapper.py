"""ScheduleFreeWrapper: Schedule-Free averaging around any optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ppsf_dist.algorithm import averaging
from ppsf_dist.compiling import uncompiled
from ppsf_dist.engine.wrapped_step import PREFIX, from_base, like, look_at_gradients, spread, to_base
from ppsf_dist.methods.base import Group
from ppsf_dist.methods.rules import ANY, DECAY, NOT_NEGATIVE, Rule, checked, integer, naming
from ppsf_dist.optimizers.base import AdaptiveOptimizer, DistributedOptimizer
from ppsf_dist.optimizers.hooks import StateDict, hooked_load, hooked_state_dict
from ppsf_dist.refusals import refuse_process_group
from ppsf_dist.sharding import Layout, drop_gathered_copies, find_layout, find_shards, placement_of

SETTINGS = {
    "momentum": Rule(
        "0 < momentum < 1, from which y and z give back the average", lambda value: DECAY.fits(value) and value > 0
    ),
    "weight_decay_at_y": NOT_NEGATIVE,
    "weight_lr_power": ANY,
    "r": ANY,
}
NUMBERS = {"k": integer(0), "weight_sum": NOT_NEGATIVE, "lr_max": NOT_NEGATIVE, "skipped_steps": integer(0)}


class ScheduleFreeWrapper(Optimizer):
    """Schedule-Free averaging around a base optimizer, in place of a schedule and of the base's own momentum.

    The base optimizer steps the sequence z; gradients are taken at y, between z and the average x of all z, and x is
    what to evaluate. Switch the momentum of SGD or AdamW off (``momentum=0``, ``betas=(0, ...)``): the average takes
    its place (but leave Prodigy its own, which bounds its steps while d grows). Arguments, defaults and numerics are
    those of schedulefree 1.4.1; what differs is listed in ``docs/differences.md``. The result does not depend on how
    parameters are sharded, as far as the base optimizer's does not: element by element with torch's, and for a step
    size d with ``ppsf_dist.Prodigy``.

    Call ``train`` before training and ``eval`` before evaluating or saving weights, where you call the model's,
    or evaluate inside ``ppsf_dist.averaged``. Checkpoints hold the base's state, and z beside it.

    Before each step all ranks tell each other whether a gradient is not finite, and wait for the answer: a base
    optimizer cannot take a step back. Such a step changes nothing. A parameter without a gradient stays as it is.

    Args:
        base: an optimizer that does no averaging of its own. The wrapper shares its groups: a schedule may be given
            either. From now on only the wrapper is stepped.
        weight_decay_at_y: decay of the weights, at the training weights y, times lr (but not d). That of the base
            decays z.
        momentum: interpolation between z and the average, 0 < momentum < 1.
        weight_lr_power: the average weights a step by the largest learning rate so far (lr * d) to this power.
        r: the average weights a step by its number to this power.
        process_group: ranks that tell each other of a bad gradient. Default: all that the parameters live on.

    Raises:
        TypeError: ``base`` is no optimizer.
        ValueError: an argument is out of range, or ``base`` averages by itself or steps in the backward pass.

    Source: Defazio et al., "The Road Less Scheduled", arXiv:2405.15682.
    """

    def __init__(
        self,
        base: Optimizer,
        weight_decay_at_y: float = 0.0,
        momentum: float = 0.9,
        weight_lr_power: float = 2,
        r: float = 0,
        *,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        given = locals()
        _refuse_base(base)
        refuse_process_group(process_group)
        settings = {PREFIX + name: checked(name, given[name], rule) for name, rule in SETTINGS.items()}
        if weight_decay_at_y and _finds_d(base):
            warnings.warn(
                f"weight_decay_at_y={weight_decay_at_y} is multiplied by lr, but not by the step size d that "
                f"{type(base).__name__} finds, as in schedulefree: each step takes off this share of the weights; give "
                "the base a weight_decay in its place",
                stacklevel=2,
            )
        self.base = base
        self.z: dict[Tensor, Tensor] = {}
        self._kept: dict[Tensor, Tensor] = {}
        self._start: Group = settings | {PREFIX + name: 0 for name in NUMBERS} | {"train_mode": True}
        self._process_group = process_group
        self._given = [group["params"] for group in base.param_groups]
        # What torch itself sets up in an optimizer that does not come from its constructor: hooks, and the profiler's.
        super().__setstate__({})
        self._groups()

    # The wrapper has no groups and no state but the base's, however those have been replaced.
    @property
    def param_groups(self) -> list[Group]:  # type: ignore[override]
        """The groups of the base optimizer, with the wrapper's own numbers under ``wrapper_...``."""
        return self.base.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The state of the base optimizer; the sequence z of each parameter is in ``z``."""
        return self.base.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """Those of the base optimizer."""
        return self.base.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer; its average begins with its first step."""
        self.base.add_param_group(param_group)
        self._given.append(self.param_groups[-1]["params"])
        self._groups()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @uncompiled
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of the base optimizer on z, and of the average. Without a gradient anywhere it changes nothing.

        If any gradient element (or its square in fp32) is not finite on any of the ranks that share the parameters,
        nothing changes on any of them and ``skipped_steps`` grows. Under DDP each rank decides for itself.

        An exception of the base optimizer leaves weights and average as they were, as far as the base does with z.

        Raises:
            RuntimeError: the optimizer is in eval mode.
            ValueError: a gradient is sparse or complex, or a learning rate is not finite or negative. Like an exception
                of the closure both are raised on every rank, with rank and cause.
            NotImplementedError: DeepSpeed has put other tensors in place of the parameters.
        """
        groups = self._groups()
        params = [p for group in groups for p in group["params"]]
        placement = placement_of(params, self._process_group)
        rates, loss, failure = [], None, None
        try:
            if not all(group["train_mode"] for group in groups):
                raise RuntimeError("ScheduleFreeWrapper is in eval mode: call train() before the next step")
            rates = [_rate(group, index) for index, group in enumerate(groups)]
            loss = None if closure is None else torch.enable_grad()(closure)()
        except Exception as error:
            # The other ranks wait, and are told.
            failure = error
        any_gradient, finite = look_at_gradients(placement, params, failure)
        if not any_gradient:
            return loss
        if not finite:
            for group in groups:
                group[PREFIX + "skipped_steps"] += 1
            return loss
        # With which distributed checkpoints create the state that they load into.
        only_creates = not any(rates) and not self.z
        moving = [[p for p in group["params"] if p.grad is not None] for group in groups]
        local = dict(zip(params, [s.local(p) for s, p in zip(placement.shards, params, strict=True)], strict=True))
        z = {p: placement.shards[index].local(self._z(p)) for index, p in enumerate(params) if p.grad is not None}
        for group, lr, here in zip(groups, rates, moving, strict=True):
            to_base(group, lr, [local[p] for p in here], [z[p] for p in here])
        try:
            self.base.step()
        except BaseException:
            for group, here in zip(groups, moving, strict=True):
                from_base(group, 0.0, [local[p] for p in here], [z[p] for p in here])
            raise
        for group, lr, here in zip(groups, rates, moving, strict=True):
            c = 0.0 if only_creates else self._share(group, lr)
            from_base(group, c, [local[p] for p in here], [z[p] for p in here])
        return loss

    def _z(self, p: Tensor) -> Tensor:
        if p not in self.z:
            self.z[p] = p.detach().clone()
        return self.z[p]

    def _share(self, group: Group, lr: float) -> float:
        """Count a step, and return its share in the average."""
        k, weight_sum, lr_max, _ = (PREFIX + name for name in NUMBERS)
        if isinstance(self.base, AdaptiveOptimizer):
            self.base.get_d()
        length = lr * float(group.get("shared_d") or group.get("d", 1.0))
        group[lr_max] = max(length, group[lr_max])
        weight = (group[k] + 1) ** group[PREFIX + "r"] * group[lr_max] ** group[PREFIX + "weight_lr_power"]
        numbers = [torch.tensor(float(value), dtype=torch.float64) for value in (weight, group[weight_sum])]
        c, total = averaging.share(*numbers)
        group[weight_sum] = float(total)
        group[k] += 1
        return float(c)

    @torch.no_grad()
    def eval(self, *, keep: bool = False) -> None:
        """Put the averaged weights x into the parameters. Does nothing if they are there already.

        Args:
            keep: keep a copy of the training weights, so that ``train`` brings them back bit for bit; those of 16
                bits are always kept.
        """
        for group, points in self._changing(train=False):
            weight = averaging.train_to_eval_weight(group[PREFIX + "momentum"])
            for p, here, z in points:
                if keep or p.element_size() < torch.float32.itemsize:
                    self._kept[p] = here.clone()
                here.lerp_(z, weight)
            group["train_mode"] = False

    @torch.no_grad()
    def train(self, mode: bool = True) -> None:
        """Put the training weights y into the parameters. Does nothing if they are there already.

        Args:
            mode: False means ``eval``.
        """
        if not mode:
            self.eval()
            return
        for group, points in self._changing(train=True):
            weight = averaging.eval_to_train_weight(group[PREFIX + "momentum"])
            for p, here, z in points:
                if p in self._kept:
                    here.copy_(self._kept.pop(p))
                else:
                    here.lerp_(z, weight)
            group["train_mode"] = True

    def _changing(self, *, train: bool) -> Iterator[tuple[Group, list[tuple[Tensor, Tensor, Tensor]]]]:
        """The groups whose mode changes, with each stepped parameter, its local weights and its local z."""
        groups = self._groups()
        params = [p for group in groups for p in group["params"]]
        shards = dict(zip(params, placement_of(params, self._process_group).shards, strict=True))
        for group in groups:
            if group["train_mode"] != train:
                stepped = [p for p in group["params"] if p in self.z]
                yield group, [(p, shards[p].local(p), shards[p].local(self.z[p])) for p in stepped]
                drop_gathered_copies(stepped)

    @property
    def skipped_steps(self) -> int:
        """How many steps changed nothing because a gradient was not finite."""
        return int(self.param_groups[0][PREFIX + "skipped_steps"])

    def get_d_estimate(self) -> float:
        """The step size d of the base optimizer in use, the largest where groups differ. Waits for the device.

        Raises:
            AttributeError: the base optimizer finds none.
        """
        if isinstance(self.base, AdaptiveOptimizer):
            return self.base.get_d_estimate()
        if not _finds_d(self.base):
            raise AttributeError(f"{type(self.base).__name__} finds no step size d: it takes lr as it is")
        return max(float(group["d"]) for group in self.param_groups)

    def state_dict(self) -> StateDict:
        """The state of the base optimizer, with the sequence z of each parameter in it. On shards every rank calls it.

        Hooks of the wrapper and of the base see and change what torch says they do.
        """
        return hooked_state_dict(self, self._state_dict)

    def _state_dict(self) -> StateDict:
        groups = self._groups()
        made = self.base.state_dict()
        state = dict(made["state"])
        for packed, group in zip(made["param_groups"], groups, strict=True):
            for key, p in zip(packed["params"], group["params"], strict=True):
                # Before the first step, too: a distributed checkpoint reads nothing else than what stands here.
                if p in self.z or p.requires_grad:
                    state[key] = {**state.get(key, {}), "z": self._z(p)}
        return {**made, "state": state}

    @torch.no_grad()
    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a checkpoint of this wrapper, of any layout, or of schedulefree's, around the same base optimizer.

        Arguments come from the checkpoint. That of schedulefree does not say where its weights are: they are taken for
        the training weights.

        Raises:
            ValueError: the checkpoint does not fit; nothing is changed. That of a base optimizer alone goes into
                ``wrapper.base.load_state_dict()``: the average begins then.
        """
        hooked_load(self, state_dict, self._load_state_dict)

    def _load_state_dict(self, state_dict: StateDict) -> None:
        theirs = state_dict["param_groups"]
        ours = self._groups()
        if [len(group["params"]) for group in theirs] != [len(group["params"]) for group in ours]:
            raise ValueError(
                f"the checkpoint has groups of {[len(group['params']) for group in theirs]} parameters, the optimizer "
                f"of {[len(group['params']) for group in ours]}: build it with the same groups, in the same order"
            )
        read = [self._read_group(group, index) for index, group in enumerate(theirs)]
        state = dict(state_dict["state"])
        z: dict[Tensor, Tensor] = {}
        for packed, group in zip(read, ours, strict=True):
            shards = find_shards(group["params"], self._process_group)
            for key, shard in zip(packed["params"], shards, strict=True):
                entries = dict(state.get(key, {}))
                if "z" in entries:
                    with naming(f"parameter {key} of the checkpoint"):
                        z[shard.param] = like(shard, "z", entries.pop("z")).to(shard.param.dtype)
                if not isinstance(self.base, DistributedOptimizer):
                    entries = {name: spread(shard, value) for name, value in entries.items()}
                if key in state:
                    # schedulefree's form for reading keeps the other sequences too.
                    state[key] = {name: value for name, value in entries.items() if name not in ("x", "y")}
        self.base.load_state_dict({**state_dict, "state": {k: v for k, v in state.items() if v}, "param_groups": read})
        self.z.clear()
        self.z.update(z)
        self._kept.clear()

    def _read_group(self, theirs: Group, index: int) -> Group:
        """A group of a checkpoint as this wrapper would have written it, checked."""
        group = dict(theirs)
        with naming(f"parameter group {index} of the checkpoint"):
            if PREFIX + "k" not in group:
                self._from_schedulefree(group)
            for name, rule in {**SETTINGS, **NUMBERS}.items():
                group[PREFIX + name] = checked(PREFIX + name, group.get(PREFIX + name), rule)
        return group

    def _from_schedulefree(self, group: Group) -> None:
        """Name the numbers of a group of schedulefree's wrapper as this one does."""
        if not {"k", "weight_sum", "lr_max"} <= set(group):
            raise ValueError(
                "there is no 'wrapper_k', and no 'k', 'weight_sum' and 'lr_max' of schedulefree's wrapper: to go on "
                "from a base optimizer alone call wrapper.base.load_state_dict(), and the average begins there"
            )
        k = group.pop("k")
        if "k" in self.param_groups[0]:
            # Both counted on the same number there.
            if k % 2:
                raise ValueError(f"k={k} counts each step twice, once for the base optimizer, so it must be even")
            k //= 2
            group["k"] = k
        own = {"k": k, "weight_sum": group.pop("weight_sum"), "lr_max": group.pop("lr_max"), "skipped_steps": 0}
        settings = {name: self._start[PREFIX + name] for name in SETTINGS}
        group |= {PREFIX + name: value for name, value in (settings | own).items()} | {"train_mode": True}

    def _groups(self) -> list[Group]:
        """The groups, with the numbers of the wrapper in those that were added to the base."""
        groups = self.param_groups
        for group in groups:
            for name, value in self._start.items():
                group.setdefault(name, value)
        # A framework may have put other tensors in their place since the last call.
        if type(find_layout(groups, self._given)) is not Layout:
            raise NotImplementedError(
                "DeepSpeed (or another framework) has put tensors of its own in place of the parameters, in which "
                "ScheduleFreeWrapper cannot show the average: name AdamWScheduleFree, SGDScheduleFree or "
                "ProdigyPlusScheduleFree in the config in its place"
            )
        return groups

    def __getstate__(self) -> dict[str, Any]:
        """What a copy has, by pickle or deepcopy: as with torch's optimizers no hooks.

        Raises:
            TypeError: there is a ``process_group``, which cannot be copied.
        """
        if self._process_group is not None:
            raise TypeError("an optimizer with process_group= cannot be copied or pickled, because groups cannot")
        names = ("base", "z", "_kept", "_start", "_process_group", "_given")
        return {name: self.__dict__[name] for name in names}

    def __repr__(self) -> str:
        return f"ScheduleFreeWrapper({self.base!r})"


def _refuse_base(base: Any) -> None:
    if not isinstance(base, Optimizer):
        raise TypeError(f"base={base!r} is a {type(base).__name__}: allowed is an optimizer, torch.optim.SGD(...) say")
    ours = isinstance(base, DistributedOptimizer)
    averages = any(base.method.switches(group).schedulefree for group in base.param_groups) if ours else False  # type: ignore[attr-defined]
    if averages or (not ours and hasattr(base, "eval")):
        raise ValueError(
            f"base is a {type(base).__name__}, which averages by itself: use it without the wrapper, or wrap one that "
            "does not, torch.optim.AdamW(..., betas=(0.0, 0.999)) or ppsf_dist.Prodigy(...) for instance"
        )
    if any(group.get("fused_back_pass") for group in base.param_groups):
        raise ValueError("base has fused_back_pass=True, with which it would step y in place of z: leave it False")


def _finds_d(base: Optimizer) -> bool:
    return all("d" in group for group in base.param_groups)


def _rate(group: Group, index: int) -> float:
    """The learning rate of a group, checked before anything changes."""
    with naming(f"parameter group {index}"):
        return float(checked("lr", group["lr"], NOT_NEGATIVE))
