"""The documentation says what is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

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
