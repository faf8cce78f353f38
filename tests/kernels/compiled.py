"""The Triton kernels compiled for GPUs that are not here: ``python -m tests.kernels.compiled`` prints what of each."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from typing import Any

from ppsf_dist.engine.group_numbers import OF_THE_STEP

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
EVERYWHERE = (("pass_3", "bf16"),)


DEFAULT = ("owned", "factored", "schedulefree", "second_moment", "statistics", "needs_norms", "matrix", "flat")
IN_BF16 = ("weights_in_bf16", "samples_in_bf16", "stochastic")
VARIANTS = {
    "convolution": tuple({*DEFAULT} - {"matrix"}),
    "unfactored": tuple({*DEFAULT} - {"matrix", "factored"}),
    "momentum": ("owned", "second_moment", "statistics", "momentum", "speed", "decays", "grams", "flat"),
    "cautious": (*DEFAULT, "cautious", "decays", "decays_by_lr", "atan2"),
    "columns": tuple({*DEFAULT} - {"flat"}),
}
"""Other formulas and cuts, in fp32."""

BETWEEN: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "add_columns": ("plan", ("columns", "blocks"), {"BT": 64, "BN": 64}),
    "add_results": ("plan", ("table", "slots", "firsts", "order"), {"SUMS": (0, 1, 6), "COUNT": 3, "BT": 256}),
    "add_vectors": ("plan", ("vectors", "boxes", "blocks"), {"BLOCK": 128}),
    "update_moments": ("plan", ("moments", "after", "count"), {"ROWS": None, "BLOCK": 1024, "ANY_BF16": True}),
    "average_cells": ("moments", ("means", "starts"), {"BLOCK": 1024}),
    "fill_roots": ("plan", ("moments", "count"), {"BLOCK": 1024}),
    "scale_rows": ("plan", ("moments", "means", "count"), {"BLOCK": 1024, "ANY_CELLS": True}),
    "write_moments": ("plan", ("moments", "after", "count"), {"BLOCK": 1024}),
}
"""What lies between the passes: its tables, its arguments, and what is compiled in."""

_OF_GROUPS: dict[str, Any] = {"ON": None, "AT": None, "BLOCK": 32}
_OF_PARAMETERS: dict[str, Any] = {"AT": None, "COLUMNS": 12, "BLOCK": 128}
NUMBERS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "begin_prodigy_plus": (("groups", "count"), {**_OF_GROUPS, "ARGUMENTS": 20}),
    "end_prodigy_plus": (("groups", "totals", "after", "count"), _OF_GROUPS),
    "begin_prodigy": (("groups", "count"), {**_OF_GROUPS, "ARGUMENTS": 11, "ADAPTIVE": 7}),
    "learn_prodigy": (("groups", "totals", "count"), _OF_GROUPS),
    "end_prodigy": (("groups", "totals", "after", "count"), _OF_GROUPS),
    "begin_schedulefree": (("groups", "count"), {**_OF_GROUPS, "ARGUMENTS": 9, "ADAPTIVE": 5}),
    "end_schedulefree": (("groups", "totals", "after", "count"), _OF_GROUPS),
    "fill_coefficients": (("groups", "of", "groups_count", "count"), {"ROWS": 16, "BLOCK": 128}),
    "fill_keys": (("of", "seed", "count"), {"AT": None, "BLOCK": 128}),
    "fill_scales": (("groups", "of", "groups_count", "count"), _OF_PARAMETERS),
    "find_cause": (("groups", "of", "squares", "active", "cause", "groups_count", "count"), _OF_PARAMETERS),
    "contribute": (
        ("groups", "of", "active", "cause", "totals", "after", "groups_count", "count"),
        {"ON": None, **_OF_PARAMETERS},
    ),
    "fill_gates": (("groups", "of", "active", "cause", "groups_count", "count"), {"AT": None, "BLOCK": 128}),
}
"""The numbers of groups and parameters, with everything on: arguments, and what is compiled in."""


ON_SM_90 = (
    *[(kernel, dtype) for kernel in ("pass_1", "pass_2", "pass_3") for dtype in ("fp32", "bf16")],
    *[("pass_3", variant) for variant in VARIANTS],
    ("pass_1", "convolution"), ("count_masks", "cautious"), ("pack", "columns"),
    *[(kernel, "") for kernel in (*BETWEEN, *NUMBERS)],
)  # fmt: skip


def _tables() -> dict[str, Any]:
    """Types of everything that kernels are given."""
    from ppsf_dist.kernels.triton.tables import MomentsOnDevice, Plan

    kinds = {
        **dict.fromkeys(("pieces", "tasks", "addresses", "sizes", "slot_of", "rows", "cell_of", "ordered"), "*i64"),
        **dict.fromkeys(("moments_gate", "weights_gate", "done", "in_bf16", "own_mean"), "*u8"),
        **dict.fromkeys(("columns", "blocks", "vectors", "boxes", "slots", "firsts", "order", "starts"), "*i64"),
        **dict.fromkeys(("results", "table"), "*fp64"),
        **dict.fromkeys(("first", "count"), "i32"),
        "keys": "*i32",
    }
    tables: dict[str, Any] = {
        "plan": Plan(**{name: kinds.get(name, "*fp32") for name in Plan._fields}),
        "moments": MomentsOnDevice(**{name: kinds.get(name, "*fp32") for name in MomentsOnDevice._fields}),
        "after": "*fp32",
        "means": "*fp32",
    }
    return kinds | tables


def _tables_of_numbers() -> dict[str, Any]:
    """The same for the numbers of groups and parameters."""
    from ppsf_dist.engine.triton_numbers import OfParameters
    from ppsf_dist.kernels.triton.step_numbers import Groups

    kinds = {
        **dict.fromkeys(("traits", "group_of", "param_id"), "*i64"),
        **dict.fromkeys(("moments_gate", "weights_gate"), "*u8"),
        **dict.fromkeys(("coefficients", "scales"), "*fp32"),
        "keys": "*i32",
    }
    return {
        "groups": Groups._make(kinds.get(name, "*fp64") for name in Groups._fields),
        "of": OfParameters._make(kinds.get(name, "*fp64") for name in OfParameters._fields),
        **dict.fromkeys(("totals", "after", "cause", "squares"), "*fp64"),
        **dict.fromkeys(("count", "groups_count"), "i32"),
        "active": "*u8",
        "seed": "i64",
    }


def _compile(
    kernel: Any,
    arguments: tuple[str, ...],
    constants: dict[str, Any],
    target: str,
    warps: int,
    most: int | None = None,
    tables: dict[str, Any] | None = None,
) -> Any:
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tables = _tables() if tables is None else tables
    signature = {**{name: tables[name] for name in arguments}, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = {"num_warps": warps, "enable_fp_fusion": False}
    if most is not None and not target.startswith("gfx"):
        options["maxnreg"] = most
    return compile(source, target=GPUTarget(*TARGETS[target]), options=options)


def compiled(kernel: str, what: str, target: str) -> Any:
    """A pass over the tiles of a matrix, by default, in one of ``VARIANTS``, or a kernel of ``BETWEEN``."""
    from ppsf_dist.kernels.triton import between, passes
    from ppsf_dist.kernels.triton.cutting import WIDE, Variant
    from ppsf_dist.kernels.triton.tables import On, Rows

    rows = Rows(*range(len(Rows._fields)))
    if kernel in BETWEEN:
        table, arguments, constants = BETWEEN[kernel]
        given = {name: rows if value is None else value for name, value in constants.items()}
        return _compile(getattr(between, kernel), (table, *arguments), given, target, 4)
    if kernel in NUMBERS:
        return _compiled_numbers(kernel, target)
    switches = {*VARIANTS.get(what, DEFAULT), *(IN_BF16 if what == "bf16" else ())}
    on = On(*[name in switches for name in On._fields])
    warps, most = Variant(on, 1, WIDE, apart=8, short=False).launched(kernel)
    cut = {"BM": WIDE.lines, "BN": WIDE.along, "BS": WIDE.along // 8, "SHORT": False}
    constants = {"ON": on, "ROWS": rows, "AXES": 1, **cut}
    return _compile(getattr(passes, kernel), ("plan", "first"), constants, target, warps, most)


def _compiled_numbers(kernel: str, target: str) -> Any:
    from ppsf_dist.kernels.numbers import FAST_NUMBERS, Options
    from ppsf_dist.kernels.triton import numbers_of_parameters, step_numbers
    from ppsf_dist.methods.adamw_schedulefree import RADAM_METHOD
    from ppsf_dist.methods.prodigy import PRODIGY
    from ppsf_dist.methods.prodigy_plus import PRODIGY_PLUS

    arguments, constants = NUMBERS[kernel]
    _, _, kind = kernel.partition("_")
    method = {"prodigy": PRODIGY, "schedulefree": RADAM_METHOD}.get(kind, PRODIGY_PLUS)
    own = FAST_NUMBERS[method.step_numbers].own
    everything = {
        "ON": Options(*[True] * len(Options._fields)),
        "AT": step_numbers.rows_of(method.hyper, (*method.numbers, *OF_THE_STEP), own, method.coefficients),
    }
    given = {name: everything[name] if value is None else value for name, value in constants.items()}
    function = getattr(step_numbers, kernel, None) or getattr(numbers_of_parameters, kernel)
    return _compile(function, arguments, given, target, 4, tables=_tables_of_numbers())


def registers(target: str, code: Any) -> tuple[int, int]:
    """How many a thread has, and how many bytes of them are spilled."""
    if target.startswith("gfx"):
        text = code.asm["amdgcn"]
        counts = [int(re.findall(rf"\.{name}:\s*(\d+)", text)[0]) for name in ("vgpr_count", "vgpr_spill_count")]
        return counts[0], counts[1]
    from triton.backends.nvidia.compiler import get_ptxas

    assembler = get_ptxas(TARGETS[target][1]).path
    architecture = re.findall(r"\.target (\w+)", code.asm["ptx"])[0]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(code.asm["ptx"])
        file.flush()
        command = [assembler, "-v", f"--gpu-name={architecture}", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill", said)]
    return int(re.findall(r"Used (\d+) registers", said)[0]), sum(spilled)


def spills_of_wide_loops(code: Any) -> int:
    """Reads and writes of spilled registers in the loops that read 16 bytes at a time, compiled for NVIDIA."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    labels: dict[str, int] = {}
    instructions: list[str] = []
    loops = []
    for line in lines:
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(instruction[1])
            target = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", instruction[1])
            if target and target[1] in labels:
                loops.append(instructions[labels[target[1]] :])
    wide = [loop for loop in loops if any("LDG.E.128" in one for one in loop)]
    # A loop around another one has its instructions too.
    return sum(one.split()[0].startswith(("LDL", "STL")) for one in min(wide, key=len, default=[]))


def describe(kernel: str, what: str, target: str) -> dict[str, int]:
    code = compiled(kernel, what, target)
    is_amd = target.startswith("gfx")
    text = code.asm["amdgcn" if is_amd else "ptx"]
    # AMD's compiler makes two stores of eight bytes of one of sixteen.
    load, store = (
        ("global_load_dwordx4", "global_store_dwordx2") if is_amd else ("ld.global.v4.b32", "st.global.v4.b32")
    )
    used, spilled = registers(target, code)
    in_loops = {} if is_amd else {"spills of wide loops": spills_of_wide_loops(code)}
    return in_loops | {
        "wide loads": text.count(load),
        "wide stores": text.count(store),
        "registers": used,
        "spilled bytes": spilled,
    }


def main() -> None:
    found = {}
    for target in TARGETS:
        for kernel, what in ON_SM_90 if target == "sm_90" else EVERYWHERE:
            found[f"{target} {kernel} {what}"] = describe(kernel, what, target)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
