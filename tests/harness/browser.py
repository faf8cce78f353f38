"""A page in a real browser, without a window."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def look(page: Path, width: int, asks: str, profile: Path) -> dict[str, Any]:
    """What a browser sees of a page.

    Args:
        page: an HTML file; a copy of it is written beside it.
        width: of the window.
        asks: the inside of a JavaScript object, read when the page has loaded; ``root`` is the document's element.
        profile: a folder for the browser.
    """
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    assert found, (
        "There is no browser to look at the page with: install chromium (launch/test.sh does, as root on Debian), or "
        'leave these tests out with -m "not browser".'
    )
    probe = f"""<script>onload = () => {{ const root = document.documentElement;
    document.title = JSON.stringify({{page: root.scrollWidth, window: root.clientWidth, {asks}}}) }}</script></body>"""
    probed = page.with_name(f"probed-{width}-{page.name}")
    probed.write_text(page.read_text().replace("</body>", probe))
    command = [
        found, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
        f"--window-size={width},1000", "--virtual-time-budget=3000", "--dump-dom", probed.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title and title[1].startswith("{"), done.stderr
    seen: dict[str, Any] = json.loads(html.unescape(title[1]))
    return seen
