"""Checksums of what a rank holds, to be compared with those of its copies."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 1 << 22
"""Elements that are summed at a time: their 64-bit copies are all the memory that a checksum takes."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MIX = 0x9E3779B97F4A7C15 - (1 << 64)


class Entry(NamedTuple):
    """Numbers that every rank with the same ``key`` holds alike."""

    key: int
    checksum: int


def key(held: object) -> int:
    """A number that stands for a description, on every host alike."""
    return int.from_bytes(hashlib.blake2b(repr(held).encode(), digest_size=8).digest())


def checksum(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """A 64-bit sum of the bits of all elements, in which no one changed element and no two swapped ones can hide."""
    total = torch.zeros((), dtype=torch.int64, device=device)
    for tensor in tensors:
        bits = tensor.detach().reshape(-1).view(_BITS[tensor.element_size()])
        total = total * _MIX + bits.numel()
        for piece in torch.split(bits, CHUNK):
            weights = torch.arange(piece.numel(), device=device) * 2 + 1
            total = total * _MIX + (piece.to(device=device, dtype=torch.int64) * weights).sum()
    return total


def first_difference(entries: Sequence[Sequence[Entry]]) -> tuple[int, list[list[int]]] | None:
    """The first key under which ranks have different checksums, and the group ranks that have each checksum."""
    seen: dict[int, dict[int, list[int]]] = {}
    for group_rank, own in enumerate(entries):
        for name, value in own:
            seen.setdefault(name, {}).setdefault(value, []).append(group_rank)
    return next(((name, list(by_value.values())) for name, by_value in seen.items() if len(by_value) > 1), None)


def name_ranks(ranks: Sequence[int]) -> str:
    """Ranks as a sentence names them."""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
