"""The documentation says what is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import torch

from ppsf_dist import AdamWScheduleFree, Prodigy, ProdigyPlusScheduleFree, RAdamScheduleFree, SGDScheduleFree
from ppsf_dist.state.inventory import Lies, needed

KEEPING: tuple[Any, ...] = (
    ProdigyPlusScheduleFree, Prodigy, AdamWScheduleFree, SGDScheduleFree, RAdamScheduleFree,
)  # fmt: skip
ROOT = Path(__file__).parent.parent
ROWS = {"O": 29, "P": 8, "S": 9}
"""How many differences from each reference are listed."""


def test_the_tables_of_differences_have_every_row_and_name_tests_that_exist() -> None:
    lines = (ROOT / "docs" / "differences.md").read_text().splitlines()
    rows = {match[1]: line for line in lines if (match := re.match(r"\| ([OPS]\d+) \|", line))}
    expected = [f"{kind}{number}" for kind, count in ROWS.items() for number in range(1, count + 1)]
    assert list(rows) == expected
    for name, row in rows.items():
        cited = re.findall(r"`(\w+)\.py::(\w+)`", row)
        assert cited, name
        for module, test in cited:
            (path,) = (ROOT / "tests").rglob(f"{module}.py")
            functions = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
            assert test in functions, (name, module, test)


def test_what_each_class_keeps_is_what_the_inventory_says() -> None:
    text = (ROOT / "docs" / "classes.md").read_text().partition("## What each keeps")[2]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")]
    assert [row[0] for row in rows] == [f"`{optimizer.__name__}`" for optimizer in KEEPING]
    for optimizer, row in zip(KEEPING, rows, strict=True):
        (group,) = optimizer([torch.nn.Parameter(torch.zeros(64, 64))]).param_groups
        entries = list(needed(optimizer.method.switches(group), (64, 64)))
        for lies, cell in zip(Lies, row[1:], strict=True):
            assert cell == ", ".join(f"`{entry.name}`" for entry in entries if entry.lies is lies), (optimizer, lies)
