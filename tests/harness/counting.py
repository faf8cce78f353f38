"""Count what a step costs in communication and in waiting: collectives, and reads of device values by the host.

Both counters look below autograd, at the operators that really run, so it does not matter which library function issued
them. They work with and without DTensors. They see one process: every rank of interest enters its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COLLECTIVE_NAMESPACES = frozenset({"c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor"})
NOT_COLLECTIVES = frozenset({"wait_tensor", "_wrap_tensor_autograd"})

# Operators whose result, or the shape of whose result, the host needs before it can go on.
HOST_READS = frozenset(
    {"_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "masked_select"}
    | {"_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount"}
)
# These reach the memory of a CPU tensor past the dispatcher. On an accelerator they copy to the host first.
HOST_METHODS = frozenset({"tolist", "numpy", "__array__", "cpu"})


@dataclass
class Collectives:
    """Collectives that this process has issued.

    ``blocking`` counts those that were waited for where they were issued, functional ones included; ``asynchronous``
    those issued with ``async_op=True``. A coalesced collective is one. ``names`` maps operator names to counts, as in
    ``{"allreduce_": 2}``; ``sizes`` are the bytes of the tensors that each was given, in order.
    """

    blocking: int = 0
    asynchronous: int = 0
    names: Counter[str] = field(default_factory=Counter)
    sizes: list[int] = field(default_factory=list)

    @property
    def total(self) -> int:
        return self.blocking + self.asynchronous


@dataclass
class HostSyncs:
    """Reads of tensor values by the host; ``names`` maps operator or method names to counts."""

    names: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return self.names.total()


@contextmanager
def count_collectives() -> Iterator[Collectives]:
    """Count the collectives of this process, from c10d and functional, issued directly and by DTensor.

    ``CommDebugMode`` counts the same, but it misses barriers and does not tell blocking from asynchronous.
    """
    collectives = Collectives()
    with _CollectiveMode(collectives):
        yield collectives


@contextmanager
def count_host_syncs() -> Iterator[HostSyncs]:
    """Count what makes, or on an accelerator would make, the host wait for a value.

    On CPU tensors this sees ``item``, ``bool``, ``float``, ``int``, formatting, ``equal``, ``nonzero``, boolean
    indexing, scalar arguments given as tensors (``alpha=tensor``), slicing by tensors, ``tolist``, ``numpy``, ``cpu``
    and ``torch.tensor([tensor])``. Copies are seen only if they really cross devices, and count unless they are
    ``non_blocking``. ``tolist`` on a CPU tensor does not dispatch at all, so it and its like are caught as Python
    calls and cannot be seen inside C++.
    """
    syncs = HostSyncs()
    with _HostMethodMode(syncs), _HostReadMode(syncs):
        yield syncs


class _CollectiveMode(TorchDispatchMode):
    def __init__(self, collectives: Collectives) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._collectives = collectives

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # Its collectives come back here as operators on local tensors.
        name = func.overloadpacket.__name__
        if func.namespace in COLLECTIVE_NAMESPACES and name not in NOT_COLLECTIVES:
            self._collectives.names[name] += 1
            given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
            self._collectives.sizes.append(sum(tensor.nbytes for tensor in given))
            if _argument(func, "async_op", args, kwargs, missing=False):
                self._collectives.asynchronous += 1
            else:
                self._collectives.blocking += 1
        return func(*args, **kwargs)


class _HostReadMode(TorchDispatchMode):
    def __init__(self, syncs: HostSyncs) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._syncs = syncs

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and (
            name in HOST_READS or _has_boolean_index(name, args) or _crosses_devices(func, name, args, kwargs)
        ):
            self._syncs.names[name] += 1
        return func(*args, **kwargs)


class _HostMethodMode(TorchFunctionMode):
    def __init__(self, syncs: HostSyncs) -> None:
        super().__init__()
        self._syncs = syncs

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        first = args[0] if args else None
        if name in HOST_METHODS and isinstance(first, torch.Tensor) and first.device.type == "cpu":
            self._syncs.names[name] += 1
        elif name in ("tensor", "as_tensor") and isinstance(first, list | tuple):
            self._syncs.names[name] += sum(isinstance(value, torch.Tensor) for value in first)
        return func(*args, **(kwargs or {}))


def _argument(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], *, missing: Any) -> Any:
    """The value that the call gives to the parameter ``name``: passed, or the default of the schema."""
    for position, parameter in enumerate(func._schema.arguments):
        if parameter.name == name:
            if position < len(args):
                return args[position]
            return kwargs.get(name, parameter.default_value)
    return missing


def _has_boolean_index(name: str, args: tuple[Any, ...]) -> bool:
    if name not in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return False
    masked = any(isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    # Assigning one number under a mask is a masked fill, which needs no indices.
    return masked and (name == "index" or args[2].numel() != 1)


def _crosses_devices(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if name == "_to_copy":
        source, target = args[0].device, kwargs.get("device")
    elif name in ("copy", "copy_"):
        source, target = args[1].device, args[0].device
    else:
        return False
    crosses = target is not None and torch.device(target).type != source.type
    return crosses and not _argument(func, "non_blocking", args, kwargs, missing=False)
