"""The documentation builds without a warning, and its pages fit a wide and a narrow screen in a real browser."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bootstrap.launchers import ROOT
from tests.harness.browser import look

PAGES = ("settings.html", "layouts/index.html", "optimizers/prodigy-plus-schedule-free.html")
ASKS = """broken: [...document.images].filter(one => !one.naturalWidth).length,
heading: document.querySelector("h1").innerText, roles: /:(meth|func|class|data):/.test(document.body.innerText)"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.browser
@pytest.mark.parametrize("width", [1400, 500])
@pytest.mark.parametrize("page", PAGES)
def test_a_page_fits_the_screen(page: str, width: int, site: Path, tmp_path: Path) -> None:
    seen = look(site / page, width, ASKS, tmp_path / "profile")
    assert seen["page"] <= seen["window"] and not seen["broken"] and seen["heading"] and not seen["roles"], seen


def test_nothing_comes_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        found = re.findall(r'<(?:link|script|img)[^>]*(?:href|src)="(https?:[^"]*)"', page.read_text())
        assert not found, (page.name, found)


def test_every_page_is_in_the_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert str(page.relative_to(ROOT / "docs")) in nav, page
