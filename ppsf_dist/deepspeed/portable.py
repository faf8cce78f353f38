"""Checkpoints in the form of ``ppsf_dist.fsdp``: from ZeRO to FSDP2, DDP or one device, and back.

Every tensor is gathered whole, one after the other, and written by one rank; each is read by all of them. So saving
takes the memory of this rank's share of the checkpoint on the host, loading that of the largest parameter.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ppsf_dist.checkpoints import CheckpointFiles, Entry, open_checkpoint, write_checkpoint
from ppsf_dist.deepspeed.gather import gather_elements, gather_samples
from ppsf_dist.deepspeed.shards import ZeroShard
from ppsf_dist.evaluation import innermost
from ppsf_dist.sharding import Shard, everyone, together, whole
from ppsf_dist.sharding.marks import is_expert
from ppsf_dist.state.inventory import LIKE_PARAMETER, SAMPLED
from ppsf_dist.state.portable import to_portable

Location = str | os.PathLike[str]


@torch.no_grad()
def save_checkpoint(path: Location, engine: Any, extra: dict[str, Any] | None = None) -> None:
    """Save weights and optimizer state so that ``ppsf_dist.fsdp.load_checkpoint`` loads them on another layout.

    The weights are the fp32 ones. Every rank must call it, between steps; ``path`` must be shared.

    Args:
        path: folder of the checkpoint.
        engine: of ``deepspeed.initialize``, at any stage.
        extra: values that JSON can hold, such as the number of steps done.

    Raises:
        NotImplementedError: the model has experts, which are not the same on every rank.
        TypeError, OSError, RuntimeError: as ``ppsf_dist.fsdp.save_checkpoint``.
    """
    run = _Run(engine)

    def state() -> dict[str, Any]:
        return {
            "model": dict(run.whole_weights()),
            "optimizer": {"state": dict(run.whole_states()), "param_groups": run.named_groups()},
        }

    write_checkpoint(path, state, extra)


@torch.no_grad()
def load_checkpoint(path: Location, engine: Any, *, verify: bool = True) -> dict[str, Any]:
    """Load what ``save_checkpoint`` or ``ppsf_dist.fsdp.save_checkpoint`` saved. Every rank must call it.

    Args:
        path: folder of the checkpoint.
        engine: of ``deepspeed.initialize``, at any stage.
        verify: compare each file with its checksum before it is used.

    Returns:
        The ``extra`` values of the save.

    Raises:
        FileNotFoundError: ``path`` holds no finished checkpoint.
        ValueError: the checkpoint was made with other switches, shapes or groups, or it is damaged; the message names
            what. Nothing is changed then.
        NotImplementedError: the model has experts, which are not the same on every rank.
    """
    files = open_checkpoint(path, verify=verify)
    run = _Run(engine)
    together(everyone(), lambda: files.check_model(run.shapes()))
    together(everyone(), lambda: run.load_optimizer(files))
    run.load_weights(files)
    return files.extra


class _Run:
    """An engine's model and optimizer, and what connects them: the names of the parameters."""

    def __init__(self, engine: Any) -> None:
        self.module: nn.Module = engine.module
        if any(is_expert(param) for param in self.module.parameters()):
            raise NotImplementedError(
                "the model has experts, and each rank holds other ones under the same names: use DeepSpeed's "
                "engine.save_checkpoint and load_checkpoint with the same number of ranks"
            )
        self.optimizer = innermost(engine.optimizer)
        # What lives on the device comes into state and groups.
        self.optimizer._engine.settle()
        self.layout = self.optimizer._engine.current_layout()
        # Of a parameter with several names only the first.
        self._name_of = {id(param): name for name, param in self.module.named_parameters()}
        self.group_names = [[self._name_of[id(param)] for param in params] for params in self.layout.given]
        names = [name for group in self.group_names for name in group]
        members = self.layout.members(self.layout.all_parts)
        shards = self.layout.shards([member.param for member in members], None)
        self.shards: dict[str, Shard] = {
            names[member.param_id]: shard for member, shard in zip(members, shards, strict=True)
        }
        switches = [self.optimizer.method.switches(group) for group in self.layout.groups]
        self._switches = {member.param: switches[member.group] for member in members}

    def named_groups(self) -> list[dict[str, Any]]:
        groups = zip(self.layout.groups, self.group_names, strict=True)
        return [{**group, "params": names} for group, names in groups]

    def whole_states(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The state of each parameter, in portable form, on the rank that writes it."""
        for index, (name, shard) in enumerate(self.shards.items()):
            entry = {
                key: _gathered(shard, key, value, self._switches[shard.param].slice_p)
                for key, value in self.optimizer.state[shard.param].items()
            }
            if entry and _writes(index):
                portable = to_portable(
                    Shard(shard.param, shard.shape, (whole(shard.shape),)), entry, self._switches[shard.param]
                )
                yield name, {k: v.cpu() if isinstance(v, Tensor) else v for k, v in portable.items()}

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Weights (in fp32 where ZeRO keeps them so) and buffers, on the rank that writes them."""
        for index, (name, value) in enumerate(self._tensors()):
            shard = self._shard(value)
            if shard is not None:
                tensor = gather_elements(shard, shard.weights()) if isinstance(shard, ZeroShard) else shard.weights()
            else:
                with deepspeed.zero.GatheredParameters(_partitioned(value)):
                    tensor = value.detach().clone()
            if _writes(index):
                yield name, tensor.cpu()

    def load_optimizer(self, files: CheckpointFiles) -> None:
        """Load the optimizer's state, parameter by parameter."""
        groups = files.groups()
        names = {shard.param: name for name, shard in self.shards.items()}
        ours = [[names.get(param) for param in params] for params in self.layout.parameters()]
        for index, (group, expected) in enumerate(zip(groups, self.group_names, strict=False)):
            if set(group["params"]) != set(expected):
                differing = sorted(set(group["params"]) ^ set(expected))
                raise ValueError(
                    f"parameter group {index} of the checkpoint has other parameters than here ({differing[0]}, for "
                    "instance): build the optimizer with the groups that the checkpoint was made with"
                )
        if len(groups) == len(ours):
            groups = [{**group, "params": params} for group, params in zip(groups, ours, strict=True)]
        self.optimizer.load_state_dict({"state": _States(files), "param_groups": groups})

    def load_weights(self, files: CheckpointFiles) -> None:
        """Load weights and buffers, one after the other, and show them to the model."""
        for name, value in self._tensors():
            shard = self._shard(value)
            loaded: Tensor = files.read([("model", name)])["model", name]
            with deepspeed.zero.GatheredParameters(_partitioned(value) if shard is None else [], modifier_rank=0):
                if shard is None:
                    value.copy_(loaded)
                else:
                    shard.weights().copy_(shard.extract(loaded))
        self.layout.refresh()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of weights and buffers, also of those that stage 3 has taken away."""
        return {name: tuple(getattr(value, "ds_shape", value.shape)) for name, value in self._tensors()}

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return list(self.module.state_dict(keep_vars=True).items())

    def _shard(self, value: Tensor) -> Shard | None:
        """What the optimizer has of a tensor of the model, if it trains it."""
        return self.shards.get(self._name_of.get(id(value), ""))


def _gathered(shard: Shard, key: str, value: Any, slice_p: int) -> Any:
    if isinstance(shard, ZeroShard) and key in LIKE_PARAMETER:
        return gather_elements(shard, value)
    return gather_samples(shard, value, slice_p) if isinstance(shard, ZeroShard) and key in SAMPLED else value


def _writes(index: int) -> bool:
    """Whether this rank writes a tensor: they take turns."""
    return index % dist.get_world_size() == dist.get_rank()


def _partitioned(value: Any) -> list[Any]:
    """A parameter that stage 3 has taken away, as frozen ones too."""
    return [value] if hasattr(value, "ds_id") else []


class _States(Mapping[str, dict[str, Any]]):
    """The state of each parameter by its name, read when it is asked for."""

    def __init__(self, files: CheckpointFiles) -> None:
        self._files = files
        self._paths: dict[str, list[Entry]] = {}
        for path in files.below("optimizer", "state"):
            self._paths.setdefault(path[2], []).append(path)

    def __getitem__(self, name: str) -> dict[str, Any]:
        return {path[-1]: value for path, value in self._files.read(self._paths[name]).items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)
