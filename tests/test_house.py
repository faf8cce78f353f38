"""The rules of the house that no linter knows. The others are import contracts in ``pyproject.toml``."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ppsf_dist"
LONGEST = 400
NO_PROCESS_GROUP = ("algorithm", "methods", "kernels")
OF_AN_OPTIMIZER = {
    "SGDScheduleFree": ("optimizers/sgd_schedulefree.py", "methods/sgd_schedulefree.py", "methods/schedulefree.py"),
    "AdamWScheduleFree": ("optimizers/adamw_schedulefree.py", "methods/adamw_schedulefree.py"),
    "RAdamScheduleFree": ("optimizers/adamw_schedulefree.py", "methods/adamw_schedulefree.py"),
    "Prodigy": ("optimizers/prodigy.py", "methods/prodigy.py"),
}
LINES = {"SGDScheduleFree": 150}
"""Of the smallest optimizer: a measure of what a new one must say that is not its own."""
COLLECTIVES = {"sharding/team.py", "deepspeed/refresh.py", "bootstrap/process.py"}
"""Where a collective is called: sums and exchanges of a step, DeepSpeed's gathered weights, and the start of a job."""


def modules(room: str = "") -> list[Path]:
    return sorted((PACKAGE / room).rglob("*.py"))


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def names_it(path: Path, name: str) -> bool:
    """Whether code, not a comment or docstring, has a name or a string that is this one."""
    for node in ast.walk(ast.parse(path.read_text())):
        named = {
            ast.Name: "id", ast.Attribute: "attr", ast.alias: "name", ast.ClassDef: "name", ast.Constant: "value",
        }.get(type(node))  # fmt: skip
        if named is not None and getattr(node, named) == name:
            return True
    return False


@pytest.mark.parametrize("room", NO_PROCESS_GROUP)
def test_a_room_of_formulas_knows_no_process_group(room: str) -> None:
    assert modules(room)
    for path in modules(room):
        assert not any(name.startswith("torch.distributed") for name in imported(path)), path


def test_no_module_is_too_long() -> None:
    files = [path for folder in ("ppsf_dist", "launch", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 200
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert {path: n for path, n in lengths.items() if n > LONGEST} == {}


@pytest.mark.parametrize("name", OF_AN_OPTIMIZER)
def test_only_the_lists_of_classes_know_an_optimizer(name: str) -> None:
    files = [PACKAGE / path for path in OF_AN_OPTIMIZER[name]]
    assert sum(len(path.read_text().splitlines()) for path in files) <= LINES.get(name, LONGEST)
    knowing = {str(path.relative_to(PACKAGE)) for path in modules() if names_it(path, name)}
    assert knowing - {*OF_AN_OPTIMIZER[name]} == {"__init__.py", "deepspeed/registration.py"}


def test_the_library_prints_nothing_and_catches_nothing_unnamed() -> None:
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            prints = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            assert not prints, path
            assert not (isinstance(node, ast.ExceptHandler) and node.type is None), path


def test_collectives_are_called_in_few_places() -> None:
    calling = set()
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dist":
                if node.attr.startswith(
                    ("all_", "broadcast", "barrier", "gather", "scatter", "reduce", "send", "recv")
                ):
                    calling.add(str(path.relative_to(PACKAGE)))
    assert calling == COLLECTIVES
