"""What of a DeepSpeed config cannot work, and what it decides without having been asked."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine

from ppsf_dist.optimizers.base import DistributedOptimizer
from ppsf_dist.sharding import check_calling_framework

Config = Mapping[str, Any]

NO_CLIPPING = '"gradient_clipping": 0.0'
_CHECKED = "_ppsf_dist_checked_config"


def build(optimizer: type[DistributedOptimizer], params: Iterable[Any], **arguments: Any) -> DistributedOptimizer:
    """Make the optimizer that a config names. DeepSpeed calls this.

    Args:
        optimizer: its class.
        params: the model's parameters, or groups of them.
        arguments: ``optimizer.params`` of the config.

    Raises:
        ValueError: the config asks for what cannot work, or an argument is unknown or out of range.
    """
    allowed = [name for name in inspect.signature(optimizer).parameters if name != "params"]
    for name, value in arguments.items():
        if name not in allowed:
            raise ValueError(
                f"optimizer.params.{name}={value!r} of the DeepSpeed config is no argument of {optimizer.__name__}: "
                f"leave it out; there are {', '.join(allowed)}"
            )
    lr = arguments.get("lr", 1.0)
    doubt = optimizer.method.doubt_about_lr(lr) if isinstance(lr, int | float) else None
    if doubt is not None:
        raise ValueError(
            f"optimizer.params of the DeepSpeed config: {doubt}. Leave lr out of the config (Trainer puts its "
            'learning_rate where it says "auto"), or write 1.0'
        )
    check_calling_framework([arguments])
    return optimizer(params, **arguments)


def check_config(config: Config | str | Path, *, averages: bool | None = None) -> None:
    """Refuse what cannot work, and warn of gradient clipping that nobody has asked for.

    An optimizer that a config names calls this by itself. Call it where you give DeepSpeed an optimizer of your own
    and want to know before the first step.

    Args:
        config: the DeepSpeed config, or the path of its JSON file.
        averages: whether ``use_schedulefree`` is on. Default: what the config says.

    Raises:
        ValueError: a setting that cannot work; the message names it and what to change.
    """
    if not isinstance(config, Mapping):
        file, config = config, json.loads(Path(config).read_text())
        if not isinstance(config, Mapping):
            raise ValueError(f"the DeepSpeed config {file} holds no JSON object: write {{...}} around its settings")
    arguments = dict(_at(config, "optimizer.params", {}))
    if averages is not None:
        arguments["use_schedulefree"] = averages
    _check(config, [arguments])


def check_caller(frame: FrameType, groups: Sequence[Mapping[str, Any]]) -> None:
    """``check_engine`` on the engine that runs in a frame of the stack."""
    check_engine(frame.f_locals["self"], groups)


def check_engine(engine: DeepSpeedEngine, groups: Sequence[Mapping[str, Any]]) -> None:
    """``check_config`` on the config of an engine, until it has passed once.

    Args:
        engine: the engine that calls its optimizer.
        groups: the arguments of the optimizer, for each of its groups; a missing one has its default.

    Raises:
        ValueError: the config asks for what cannot work.
        NotImplementedError: the engine has pipeline stages.
    """
    if _CHECKED in vars(engine):
        return
    if engine.pipeline_parallelism:
        raise NotImplementedError(
            "the model is a PipelineModule, whose stages would each find a step size of their own: shard it by ZeRO "
            "alone, or use torch's pipeline stages with process_group="
        )
    _check(engine._config._param_dict, groups)
    setattr(engine, _CHECKED, True)


def _check(config: Config, groups: Sequence[Mapping[str, Any]]) -> None:
    reasons = list(_refusals(config, groups))
    if reasons:
        raise ValueError("this DeepSpeed config cannot work with an optimizer of ppsf_dist: " + "; ".join(reasons))
    if "gradient_clipping" not in config:
        warnings.warn(
            "the DeepSpeed config does not say gradient_clipping, and DeepSpeed (0.19) then clips gradients to norm "
            f"1.0, which holds back the estimate of the step size d: add {NO_CLIPPING} to the config, or the norm "
            "that you want",
            UserWarning,
            stacklevel=4,
        )


def _refusals(config: Config, groups: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    averages = any(group.get("use_schedulefree", True) for group in groups)
    offload = "zero_optimization.offload_optimizer"
    stage = _at(config, "zero_optimization.stage", 0)
    if _at(config, f"{offload}.ratio", 1.0) < 1.0:
        yield (
            f"{offload}.ratio={_at(config, f'{offload}.ratio')} steps a part of the weights with DeepSpeedCPUAdam: "
            "leave it out, or set it to 1.0"
        )
    if _at(config, f"{offload}.super_offload", False):
        yield f"{offload}.super_offload=true steps the weights with DeepSpeedCPUAdam: leave it out"
    if _at(config, "zero_optimization.zenflow") is not None:
        yield "zero_optimization.zenflow steps a part of the gradients with Adam: leave it out"
    if averages and _at(config, f"{offload}.device") == "nvme":
        yield (
            f'{offload}.device="nvme" keeps the weights where the averaged ones cannot be computed for an evaluation: '
            'set it to "cpu", or use_schedulefree to false'
        )
    if _at(config, "zero_optimization.elastic_checkpoint", False):
        yield "zero_optimization.elastic_checkpoint=true drops state from checkpoints: set it to false"
    universal = _at(config, "checkpoint.load_universal", False)
    if universal and _at(config, "zero_optimization.round_robin_gradients", False):
        yield (
            "zero_optimization.round_robin_gradients=true makes DeepSpeed put a universal checkpoint in the wrong "
            "places: set it to false while checkpoint.load_universal is true"
        )
    if _at(config, "fp16.enabled", False) and not stage and _at(config, "fp16.loss_scale", 0) != 1:
        yield (
            "fp16.enabled=true at zero_optimization.stage=0 makes DeepSpeed (0.19) divide the gradients by a loss "
            "scale that it has not multiplied the loss with: set zero_optimization.stage to 1, or fp16.loss_scale to 1"
        )
    if any(group.get("fused_back_pass", False) for group in groups):
        yield (
            "fused_back_pass=true, an argument of the optimizer, steps parameters in the backward pass, where "
            "DeepSpeed has not yet reduced their gradients: leave it out"
        )
    if _at(config, "tensor_parallel.autotp_size", 1) > 1:
        yield (
            "tensor_parallel.autotp_size > 1 hides the shapes of the parameters: set it to 1 and shard by ZeRO alone, "
            "or use FSDP2 with tensor parallelism"
        )


def _at(config: Config, path: str, default: Any = None) -> Any:
    value: Any = config
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return default if value is None else value
