"""Compiles the passes into a wheel, one library for each set of instructions. All else stands in pyproject.toml.

Without a compiler, or with PPSF_BUILD=none, the wheel has none and is for any machine: they are compiled at first use.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

CPU = Path("ppsf_dist/kernels/cpu")


def compiling() -> Any:
    """ppsf_dist/kernels/cpu/source.py alone: the package itself imports torch, which is not there yet."""
    spec = importlib.util.spec_from_file_location("source", CPU / "source.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildWithPasses(build_py):
    """Puts the compiled passes beside their source."""

    def run(self) -> None:
        super().run()
        if self.editable_mode or os.environ.get("PPSF_BUILD") == "none":
            return
        source = compiling()
        for instructions in source.for_this_machine():
            try:
                source.compile_into(Path(self.build_lib) / CPU / "built" / source.file_name(instructions), instructions)
            except source.Unavailable as error:
                self.announce(f"the wheel will not hold compiled passes: {error}", level=3)
                return


class WheelForThisMachine(bdist_wheel):
    """Names the machine in the wheel if there is something compiled in it; any Python and torch will do."""

    def get_tag(self) -> tuple[str, str, str]:
        compiled = Path(self.bdist_dir, CPU, "built")
        self.root_is_pure = not any(compiled.glob("*.so"))
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


setup(cmdclass={"build_py": BuildWithPasses, "bdist_wheel": WheelForThisMachine})
