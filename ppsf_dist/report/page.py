"""The page of several runs: one file, without anything from elsewhere."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --paper: #ffffff; --line: #d8dee6; --quiet: #5a6877; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6ebf1; --paper: #12171d; --line: #333d48; --quiet: #9aa7b4; } }
body { margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: var(--ink); background: var(--paper);
       font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; } p { color: var(--quiet); }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } img { width: 100%; background: #ffffff; border-radius: .3rem; }
"""


def page(
    title: str, headings: Sequence[str], rows: Mapping[str, Sequence[str]], settings: Mapping[str, Sequence[str]],
    picture: bytes,
) -> str:  # fmt: skip
    """The page as HTML.

    Args:
        title: of the page.
        headings: of the columns of numbers.
        rows: the numbers of each run, by its name.
        settings: those that differ, by name, the values in the order of the runs.
        picture: a PNG.
    """
    parts = [
        f"<h1>{escape(title)}</h1>",
        _table(["run", *headings], [[name, *values] for name, values in rows.items()]),
        f'<h2>Loss and d</h2><img alt="Loss and d of each run over its steps" src="data:image/png;base64,'
        f'{b64encode(picture).decode()}">',
        "<h2>Settings that differ</h2>",
        _table(["setting", *rows], [[name, *values] for name, values in settings.items()])
        if settings
        else "<p>None that the files hold.</p>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
