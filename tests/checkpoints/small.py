"""A run that is saved in milliseconds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppsf_dist import ProdigyPlusScheduleFree
from ppsf_dist.fsdp import save_checkpoint
from tests.harness.models import D0
from tests.test_state import same, snapshot

Pair = tuple[nn.Module, ProdigyPlusScheduleFree]
DATA, METADATA, EXTRA, MANIFEST = "__0_0.distcp", ".metadata", "extra.json", "ppsf_dist.json"
FILES = (DATA, METADATA, EXTRA, MANIFEST)


def fresh(seed: int = 0) -> Pair:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 33), nn.Linear(33, 2))
    return model, ProdigyPlusScheduleFree(model.parameters(), d0=D0)


def trained(steps: int, seed: int = 0) -> Pair:
    model, optimizer = fresh(seed)
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 5, generator=generator)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def saved(path: Path, steps: int = 3, seed: int = 0) -> Pair:
    pair = trained(steps, seed)
    save_checkpoint(path, *pair, {"step": steps})
    return pair


def content(pair: Pair) -> tuple[dict[str, Any], dict[str, Any]]:
    """Everything that a load may change, bit for bit."""
    return copy.deepcopy(pair[0].state_dict()), snapshot(pair[1])


def equal(one: Pair, other: Pair) -> bool:
    return same(content(one), content(other))


def as_early_release(path: Path) -> Path:
    """Make a checkpoint what the first releases would have left: no mark, no checksums. Returns its folder."""
    folder = path / (path / "latest").read_text().split()[0]
    (folder / MANIFEST).unlink()
    (path / "latest").write_text(folder.name)
    return folder
