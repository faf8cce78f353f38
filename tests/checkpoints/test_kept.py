"""What earlier releases have saved loads, bit for bit, and goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ppsf_dist.fsdp import load_checkpoint
from ppsf_dist.methods.prodigy_plus import PRODIGY_PLUS
from tests.checkpoints.kept import KEPT, STEPS, content, start, step
from tests.harness.layouts import LAYOUTS
from tests.harness.pool import run
from tests.test_state import same

DATA = Path(__file__).parent.parent / "data"
RELEASES = sorted(entry.name for entry in DATA.iterdir())


def loaded(name: str, layout: str, folder: Path) -> dict[str, Any]:
    model, optimizer = start(name, layout)
    assert load_checkpoint(folder, model, optimizer) == {"step": STEPS}
    found = content(model, optimizer)
    step(name, model, optimizer, STEPS, STEPS + 2)
    assert all(group["k"] == STEPS + 3 for group in optimizer.param_groups)
    return found


def with_later_arguments(state_dict: dict[str, Any]) -> dict[str, Any]:
    """With those that the release did not have, as the optimizer that loads it was made."""
    groups = [{**PRODIGY_PLUS.arguments, **group} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


@pytest.mark.dist
@pytest.mark.parametrize("layout", ["single", "fsdp_2", "hsdp_2x2"])
@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("release", RELEASES)
def test_a_checkpoint_of_a_release_loads_bit_for_bit(release: str, name: str, layout: str) -> None:
    folder = DATA / release / name
    expected = torch.load(folder / "expected.pt", weights_only=True)
    expected["optimizer"] = with_later_arguments(expected["optimizer"])
    for found in run(LAYOUTS[layout].world_size, loaded, name, layout, folder):
        assert same(found, expected)


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("release", RELEASES)
def test_a_state_dict_of_a_release_loads_bit_for_bit(release: str, name: str) -> None:
    expected = torch.load(DATA / release / name / "expected.pt", weights_only=True)
    _, optimizer = start(name, "single")
    optimizer.load_state_dict(expected["optimizer"])
    assert same(optimizer.state_dict(), with_later_arguments(expected["optimizer"]))
