"""What ``import ppsf_dist`` costs and shows, and what an extra that is not installed says."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest

import ppsf_dist

LIMIT_SECONDS = 0.05
ATTEMPTS = 3
"""Of which one must be within the limit: a busy machine makes them longer, never shorter."""


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_costs_next_to_nothing_on_top_of_torch() -> None:
    code = (
        "import time, sys, torch; before = time.perf_counter(); import ppsf_dist; "
        "print(time.perf_counter() - before, sum(name.startswith('ppsf_dist.') for name in sys.modules))"
    )
    found = [python(code).split() for _ in range(ATTEMPTS)]
    assert {int(modules) for _, modules in found} == {1}
    assert min(float(seconds) for seconds, _ in found) < LIMIT_SECONDS


def test_it_shows_what_it_has_and_all_of_it_is_there() -> None:
    shown = dir(ppsf_dist)
    assert set(ppsf_dist.__all__) < set(shown) and "engine" not in shown
    assert all(getattr(ppsf_dist, name) is not None for name in shown)
    with pytest.raises(
        AttributeError, match="module 'ppsf_dist' has no attribute 'Prodigi': it has AdamWScheduleFree,"
    ):
        ppsf_dist.Prodigi  # noqa: B018
    assert ppsf_dist.__version__ == metadata.version("ppsf-dist")


def test_a_submodule_can_be_used_after_importing_the_package_alone() -> None:
    assert "report" in python("import ppsf_dist; print(ppsf_dist.kernels.report.__name__, ppsf_dist.fsdp.__name__)")


@pytest.mark.parametrize(
    ("module", "missing", "extra"),
    [
        ("deepspeed", "deepspeed", "deepspeed"),
        ("integrations.transformers", "transformers", "transformers"),
        ("integrations.lightning", "lightning", "lightning"),
        ("integrations.accelerate", "accelerate", "accelerate"),
        ("integrations.torchtitan", "torchtitan", "torchtitan"),
    ],
)
def test_a_missing_extra_is_named(module: str, missing: str, extra: str) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        f"try:\n    import ppsf_dist.{module}\nexcept ModuleNotFoundError as error:\n    print(error)"
    )
    assert f"pip install 'ppsf-dist[{extra}]'" in python(code)


def test_a_missing_extra_of_the_picture_and_the_command_is_named() -> None:
    code = """import sys; sys.modules["matplotlib"] = sys.modules["matplotlib.figure"] = sys.modules["rich"] = None
from pathlib import Path
from ppsf_dist.monitor.picture import draw
from ppsf_dist.report.command import write_report
row, here = {"step": 1, "groups": [{}]}, Path(".")
for attempt in (lambda: draw([row], here / "x.png"), lambda: write_report([here], here)):
    try:
        attempt()
    except ModuleNotFoundError as error:
        print(error)"""
    assert python(code).splitlines() == [
        "matplotlib is not installed: pip install 'ppsf-dist[report]'",
        "rich is not installed: pip install 'ppsf-dist[report]'",
    ]
