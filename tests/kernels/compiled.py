"""The Triton kernels compiled for GPUs that are not here: ``python -m tests.kernels.compiled`` prints what of each."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
EVERYWHERE = (("pass_3", "bf16"),)
ON_SM_90 = tuple((kernel, dtype) for kernel in ("pass_1", "pass_2", "pass_3") for dtype in ("fp32", "bf16"))


def compiled(kernel: str, dtype: str, target: str) -> Any:
    """A pass over the tiles of a matrix with the default switches."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ppsf_dist.kernels.triton import passes
    from ppsf_dist.kernels.triton.backend import SAMPLES_AT_ONCE
    from ppsf_dist.kernels.triton.cutting import WIDE
    from ppsf_dist.kernels.triton.tables import On, Plan, Rows

    half = dtype == "bf16"
    switches = {"owned", "factored", "schedulefree", "second_moment", "statistics", "needs_norms", "matrix", "flat"}
    switches |= {"weights_in_bf16", "p0_in_bf16", "s_in_bf16", "stochastic"} if half else set()
    on = On(*[name in switches for name in On._fields])
    kinds = {
        "i64": "pieces tasks addresses sizes",
        "i32": "keys",
        "u8": "moments_gate weights_gate done",
        "fp64": "results",
    }
    of = {name: f"*{kind}" for kind, names in kinds.items() for name in names.split()}
    plan = Plan(**{name: of.get(name, "*fp32") for name in Plan._fields})
    constants = {
        "ON": on,
        "ROWS": Rows(*range(len(Rows._fields))),
        "AXES": 1,
        "BM": WIDE.lines,
        "BN": WIDE.along,
        "BS": SAMPLES_AT_ONCE,
    }
    signature = {"plan": plan, "first": "i32", **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(fn=getattr(passes, kernel), signature=signature, constexprs=constants)
    options = {"num_warps": WIDE.warps, "enable_fp_fusion": False}
    return compile(source, target=GPUTarget(*TARGETS[target]), options=options)


def registers(target: str, code: Any) -> tuple[int, int]:
    """How many a thread has, and how many bytes of them are spilled."""
    if target.startswith("gfx"):
        text = code.asm["amdgcn"]
        counts = [int(re.findall(rf"\.{name}:\s*(\d+)", text)[0]) for name in ("vgpr_count", "vgpr_spill_count")]
        return counts[0], counts[1]
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    assembler = folder / ("ptxas-blackwell" if target == "sm_100" else "ptxas")
    architecture = re.findall(r"\.target (\w+)", code.asm["ptx"])[0]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(code.asm["ptx"])
        file.flush()
        command = [str(assembler), "-v", f"--gpu-name={architecture}", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill", said)]
    return int(re.findall(r"Used (\d+) registers", said)[0]), sum(spilled)


def describe(kernel: str, dtype: str, target: str) -> dict[str, int]:
    code = compiled(kernel, dtype, target)
    is_amd = target.startswith("gfx")
    text = code.asm["amdgcn" if is_amd else "ptx"]
    load, store = (
        ("global_load_dwordx4", "global_store_dwordx4") if is_amd else ("ld.global.v4.b32", "st.global.v4.b32")
    )
    used, spilled = registers(target, code)
    return {
        "wide loads": text.count(load),
        "wide stores": text.count(store),
        "registers": used,
        "spilled bytes": spilled,
    }


def main() -> None:
    found = {}
    for target in TARGETS:
        for kernel, dtype in ON_SM_90 if target == "sm_90" else EVERYWHERE:
            found[f"{target} {kernel} {dtype}"] = describe(kernel, dtype, target)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
