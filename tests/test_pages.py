"""The examples of the pages run as they stand, and their links lead somewhere."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from torch import nn

PAGES = Path(__file__).parents[1] / "docs"
OTHERS = [PAGES / name for name in ("moving.md", "monitor.md", "start.md", "trainers/kohya-onetrainer.md")]
WITH_EXAMPLES = [*sorted((PAGES / "coming-from").glob("*.md")), *OTHERS]
_BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def examples(page: Path) -> list[str]:
    return _BLOCK.findall(page.read_text())


def a_readers_own() -> dict[str, Any]:
    """What the pages say is the reader's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 3))
    loader = [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(5)]
    return {"model": model, "criterion": nn.CrossEntropyLoss(), "train_loader": loader, "test_loader": loader[:2]}


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: page.stem)
def test_the_examples_of_a_page_run_one_after_the_other(
    page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each with a new model, and with what the examples before it have imported and made; none of them warns."""
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.print", lambda *_: None)
    found = examples(page)
    assert found
    names: dict[str, Any] = {}
    for number, example in enumerate(found, start=1):
        names |= a_readers_own()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            exec(compile(example, f"{page.name}, example {number}", "exec"), names)  # noqa: S102


def test_every_document_that_the_package_implements_has_a_page() -> None:
    """Of the documents the package follows: two versions of one package, its two sources, and an interface."""
    expected = {"prodigy-plus-schedule-free", "first-version", "prodigyopt", "schedulefree", "nexus"}
    assert {page.stem for page in (PAGES / "coming-from").glob("*.md")} == expected


@pytest.mark.parametrize("page", [*sorted(PAGES.rglob("*.md")), *PAGES.parent.glob("*.md")], ids=lambda page: page.stem)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
