"""What cannot be stepped, and the way out. Each function raises before anything has changed, or does nothing."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
"""Of weights. The arithmetic is fp32."""

_ZERO_REDUNDANCY = ("torch.distributed.optim.zero_redundancy_optimizer", "ZeroRedundancyOptimizer")


def refuse_weights(dtype: torch.dtype, where: object) -> None:
    """Refuse weights of a dtype that no step can be computed in.

    Args:
        dtype: of the weights.
        where: the parameter, as a message names it.

    Raises:
        ValueError: the dtype is not one of ``DTYPES``.
    """
    if dtype in DTYPES:
        return
    if dtype.is_complex:
        way_out = (
            "the optimizer knows no complex numbers; keep real and imaginary part in a real parameter and use "
            "torch.view_as_complex(parameter) in the forward pass"
        )
    elif dtype == torch.float16:
        way_out = (
            "in fp16 second moments vanish; keep the weights in fp32 and compute in fp16 under torch.autocast, or use "
            "bfloat16"
        )
    else:
        way_out = "a step is smaller than its digits; keep the weights in one of these and convert them in the forward"
    allowed = ", ".join(map(str, DTYPES))
    raise ValueError(f"the weights of {where} are {dtype}: allowed is {allowed}; {way_out}")


def refuse_quantized(weights: Tensor, where: object) -> None:
    """Refuse a tensor subclass that keeps the weights in another form than their dtype says.

    Args:
        weights: on this rank.
        where: the parameter, as a message names it.

    Raises:
        ValueError: none of the tensors that it is made of has its dtype and shape.
    """
    if type(weights) in (Tensor, Parameter) or not is_traceable_wrapper_subclass(weights):
        return
    inner = {name: getattr(weights, name) for name in weights.__tensor_flatten__()[0]}
    if any(part.dtype == weights.dtype and part.shape == weights.shape for part in inner.values()):
        return
    kept = ", ".join(f"{name} ({part.dtype})" for name, part in inner.items())
    raise ValueError(
        f"the weights of {where} are a {type(weights).__name__}, which keeps them as {kept}: a step is smaller than "
        f"its digits; train weights that are kept in {weights.dtype} (torchao's int8_mixed_precision_training and "
        "float8 training keep them so) and quantize when training is over"
    )


def refuse_gradient(gradient: Tensor, shape: Sequence[int], where: object) -> None:
    """Refuse a local gradient that does not lie like the local weights.

    Args:
        gradient: of this rank's piece of a parameter.
        shape: of this rank's weights.
        where: the parameter, as a message names it.

    Raises:
        ValueError: it is not strided, complex, or of another shape.
    """
    if gradient.layout is not torch.strided:
        raise ValueError(
            f"the gradient of {where} is {gradient.layout}: allowed is a dense one, as the "
            "step size depends on all elements; use nn.Embedding(..., sparse=False), or gradient.to_dense()"
        )
    if gradient.is_complex():
        raise ValueError(f"the gradient of {where} is {gradient.dtype}: allowed is a real one")
    if tuple(gradient.shape) != tuple(shape):
        raise ValueError(
            f"the gradient of {where} has shape {tuple(gradient.shape)} here, its weights {tuple(shape)}: param.data "
            "was replaced after the backward pass; call zero_grad() and backward() again"
        )


def refuse_reshaped(now: Sequence[int], planned: Sequence[int], where: object) -> None:
    """Refuse local weights whose shape has changed since their state was made.

    Args:
        now: shape of this rank's weights.
        planned: shape of their state.
        where: the parameter, as a message names it.

    Raises:
        ValueError: the shapes differ.
    """
    if tuple(now) != tuple(planned):
        raise ValueError(
            f"the weights of {where} have shape {tuple(now)} here, their state {tuple(planned)}: param.data was "
            "replaced by a tensor of another shape, to which moments and starting point do not belong; build a new "
            "optimizer"
        )


def refuse_process_group(process_group: Any) -> None:
    """Refuse what is no process group.

    Raises:
        ValueError: it is neither None nor a ``torch.distributed.ProcessGroup``.
    """
    if process_group is None or (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
        return
    if process_group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("process_group is one that this rank is no member of: build the optimizer on its members only")
    raise ValueError(
        f"process_group={process_group!r} is a {type(process_group).__name__}: allowed is None or a process group, "
        "torch.distributed.group.WORLD for all ranks, or mesh.get_group(...) of a device mesh"
    )


def refuse_zero_redundancy(name: str) -> None:
    """Refuse to be built by torch's ZeroRedundancyOptimizer, which gives each rank some of the parameters only.

    Nothing in the parameters tells: only the stack leads to it, and only while the optimizer is built.

    Args:
        name: of the class that is being built.

    Raises:
        ValueError: that class is building this optimizer.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if _is_zero_redundancy(type(frame.f_locals.get("self"))):
            raise ValueError(
                f"ZeroRedundancyOptimizer(optimizer_class={name}) gives each rank some of the "
                "parameters, so that each would find a step size of its own, and no rank sees the averaged weights of "
                "the others: shard the model in its place, with torch.distributed.fsdp.fully_shard(model) and "
                f"{name}(model.parameters()), which shards the optimizer's state too"
            )
        frame = frame.f_back


def _is_zero_redundancy(cls: type) -> bool:
    """By name, for to ask torch for the class would import what few runs have."""
    return any((base.__module__, base.__qualname__) == _ZERO_REDUNDANCY for base in cls.__mro__)
