"""torchtitan: an optimizers container with one step size over all of a rank's stages and all ranks.

See ``docs/trainers/torchtitan.md``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

import ppsf_dist
from ppsf_dist.extras import missing
from ppsf_dist.integrations.modes import step_sizes
from ppsf_dist.optimizers.base import DistributedOptimizer
from ppsf_dist.optimizers.prodigy_plus import RECOMMENDED
from ppsf_dist.sharding import everyone, from_every_rank
from ppsf_dist.sharding.marks import is_dtensor

try:
    from torchtitan.components.checkpointer.utils import canonical_fqn
    from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, ParamGroupConfig
except ModuleNotFoundError as error:
    raise missing(error, "torchtitan") from error

if TYPE_CHECKING:
    # torchtitan ships no types.
    @dataclass(kw_only=True)
    class _Config:
        optimizer_factory_kwargs_by_name: dict[str, dict[str, Any]] = field(default_factory=dict)

        def build(self, *, model_parts: list[nn.Module]) -> ScheduleFreeOptimizers: ...

    @dataclass(kw_only=True)
    class _ScheduleConfig: ...

    class _Container(Optimizer):
        optimizers: list[DistributedOptimizer]
        model_parts: list[nn.Module]

        def _log_optimizer(self, optimizer: Optimizer, part_idx: int, patterns: list[str]) -> None: ...

        def _post_init(self, all_params: list[Tensor]) -> None: ...

    class _Schedulers:
        def __init__(self, optimizers: _Container, lr_lambda: Callable[[int], float]) -> None: ...

        def get_metrics(self) -> dict[str, float]: ...
else:
    _Container, _Config = OptimizersContainer, OptimizersContainer.Config
    _Schedulers, _ScheduleConfig = LRSchedulersContainer, LRSchedulersContainer.Config

Holding = tuple[list[str], bool]
"""The names of a rank's parameters, and whether some are sharded."""
NAME = "ProdigyPlusScheduleFree"
_OF_GROUPS = "groups"
"""Under this a checkpoint holds the groups once more: a stage may have no parameter of some."""


def _one_group() -> list[ParamGroupConfig]:
    return [ParamGroupConfig(pattern=".*", optimizer_name=NAME, optimizer_kwargs=dict(RECOMMENDED))]


class ScheduleFreeOptimizers(_Container):
    """One optimizer of this package for all parts of a model, where torchtitan's container makes one for each.

    So all pipeline stages share d. ``Trainer.Config(optimizer=ScheduleFreeOptimizers.Config(),
    lr_scheduler=NoSchedule.Config())`` trains with the recommended setting.

    ``averaged(container)`` evaluates with the average, ``train`` and ``eval`` swap. Checkpoints have
    torchtitan's flat keys, by the names of parameters, so that another number of stages can load them.

    Args:
        config: its groups name classes of this package, all the same one, and the arguments of each group. A pattern
            may match nothing on some stages. ``implementation`` has no effect: kernels are chosen by themselves.
        model_parts: of this rank.

    Raises:
        ValueError: groups name several classes or one that is not here, parameters are in no group, or pipeline stages
            are copied by DDP.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(_Config):
        """As torchtitan's; without groups of one's own, all parameters in one with the recommended setting."""

        param_groups: list[ParamGroupConfig] = field(default_factory=_one_group)

    optimizer: Any
    """The one optimizer."""

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        self.model_parts = model_parts
        named: dict[str, Tensor] = {
            canonical_fqn(name): p for part in model_parts for name, p in part.named_parameters() if p.requires_grad
        }
        name, own = _only_name(config.param_groups), config.optimizer_factory_kwargs_by_name
        groups: list[dict[str, Any]] = []

        def deal_out() -> Holding:
            groups.extend(_groups(named, config.param_groups))
            return sorted(named), any(is_dtensor(p) for p in named.values())

        # A stage of which a parameter is in no group raises on all ranks.
        told = from_every_rank(everyone(), deal_out)
        given: dict[str, Any] = {"process_group": _process_group(told)} | own.get(name, {})
        self.optimizer = getattr(ppsf_dist, name)(groups, **given)
        self.optimizers = [self.optimizer]
        self._log_optimizer(self.optimizer, 0, [group.pattern for group in config.param_groups])
        self._post_init(list(named.values()))

    def train(self) -> None:
        """Bring the training weights y back into the model."""
        self.optimizer.train()

    def eval(self) -> None:
        """Put the average x into the model, for an evaluation or to export it."""
        self.optimizer.eval()

    def state_dict(self) -> dict[str, Any]:
        """torchtitan's flat state, with the numbers of each group once more."""
        flat: dict[str, Any] = super().state_dict()
        for index, group in enumerate(self.optimizer.param_groups):
            for key, value in group.items():
                if key not in ("params", "param_names"):
                    flat[f"{_OF_GROUPS}.{index}.{key}"] = value
        return flat

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a flat state of this container, of any number of stages.

        Raises:
            ValueError, KeyError: it does not fit; nothing that was there is changed.
        """
        from torchtitan.components.optimizer import utils

        utils.init_optim_state(self.optimizer)
        content = utils._unflatten_optim_state_dict(self.optimizer, state_dict)
        for index, (group, loaded) in enumerate(zip(self.optimizer.param_groups, content["param_groups"], strict=True)):
            for key in group:
                if key not in ("params", "param_names"):
                    loaded.setdefault(key, state_dict[f"{_OF_GROUPS}.{index}.{key}"])
        self.optimizer.load_state_dict(content)


class NoSchedule(_Schedulers):
    """torchtitan's container of schedulers with a constant learning rate, which shows d where the others show lr."""

    def __init__(self, optimizers: ScheduleFreeOptimizers) -> None:
        super().__init__(optimizers, lambda _: 1.0)
        self._optimizer = optimizers.optimizer

    @dataclass(kw_only=True, slots=True)
    class Config(_ScheduleConfig):
        """Of torchtitan's fields none has an effect."""

        def build(self, *, optimizers: ScheduleFreeOptimizers, training_steps: int) -> NoSchedule:
            """Make it. ``training_steps`` is torchtitan's, and does not matter."""
            return NoSchedule(optimizers)

    def get_metrics(self) -> dict[str, float]:
        """What torchtitan logs in each step beside the loss: lr, ``d``, ``d_lr``, ``d_effective_lr``."""
        return super().get_metrics() | step_sizes(self._optimizer)


def _only_name(groups: Iterable[ParamGroupConfig]) -> str:
    names = {group.optimizer_name for group in groups}
    name = next(iter(names)) if len(names) == 1 else ""
    cls = getattr(ppsf_dist, name, None)
    if not (isinstance(cls, type) and issubclass(cls, DistributedOptimizer)):
        raise ValueError(
            f"optimizer_name of param_groups is {', '.join(map(repr, sorted(names))) or 'missing'}: allowed is one "
            f"class of ppsf_dist for all groups, {NAME!r} for instance"
        )
    return name


def _groups(named: dict[str, Tensor], configs: Iterable[ParamGroupConfig]) -> list[dict[str, Any]]:
    """The parameters of each group, first match first, as torchtitan deals them out."""
    left, groups = dict(named), []
    for config in configs:
        pattern = re.compile(config.pattern)
        names = [name for name in left if pattern.search(name)]
        params = [left.pop(name) for name in names]
        groups.append({"params": params, "param_names": names, **config.optimizer_kwargs})
    if left:
        raise ValueError(f"param_groups leave out {', '.join(left)}: add a last group with pattern='.*'")
    return groups


def _process_group(told: Sequence[Holding]) -> dist.ProcessGroup | None:
    """All ranks, where each holds some of the model; none, where each has a copy of all."""
    if len(told) == 1:
        return None
    if any(is_sharded for _, is_sharded in told):
        return cast(dist.ProcessGroup, dist.group.WORLD)
    stages = {tuple(names) for names, _ in told}
    if len(stages) == 1:
        return None
    if len(stages) < len(told):
        raise ValueError(
            "pipeline stages that DDP copies would count their gradients twice: shard them, with "
            "data_parallel_shard_degree in place of data_parallel_replicate_degree (or beside it)"
        )
    return cast(dist.ProcessGroup, dist.group.WORLD)
