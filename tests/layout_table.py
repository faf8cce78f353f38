"""The tables of layouts in docs/layouts/index.md and docs/classes.md, from real runs: ``python -m tests.layout_table``.

The same work (fixed global gradients, awkward shapes) on every layout, compared with one process: our optimizer, and
others as they are, without a change. With ``--classes`` every class of the package, and before the layouts each in one
process compared with its reference.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import prodigyopt
import schedulefree
import torch
from prodigyplus.prodigy_plus_schedulefree import ProdigyPlusScheduleFree as Reference
from torch import Tensor

import ppsf_dist
from ppsf_dist import ProdigyPlusScheduleFree, ScheduleFreeWrapper
from ppsf_dist.optimizers.base import AdaptiveOptimizer
from tests.harness.counting import count_collectives
from tests.harness.layouts import LAYOUTS, Layout, gather, shard_parameters
from tests.harness.models import D0, NamedShapes, gradient_sequence, initial_weights, named_shapes
from tests.harness.pool import JobFailed, close, run
from tests.runs import take_step

STEPS = 12
AWKWARD = [(name, shape) for name, shape in named_shapes("all") if not name.startswith("zero")]
EVEN = named_shapes("matrices")

OURS, PPSF = "ppsf_dist", "prodigy-plus-schedule-free"
OPTIMIZERS: dict[str, Callable[[list[Any]], torch.optim.Optimizer]] = {
    OURS: lambda p: ProdigyPlusScheduleFree(p, d0=D0),
    PPSF: lambda p: Reference(p, d0=D0),
    "prodigyopt": lambda p: prodigyopt.Prodigy(p, d0=D0),
    "schedulefree": lambda p: schedulefree.AdamWScheduleFree(p, lr=1e-3),
    "torch AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "torch Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-3),
}

Make = Callable[[list[Any]], torch.optim.Optimizer]
CLASSES: dict[str, tuple[Make, str, Make]] = {
    "ProdigyPlusScheduleFree": (OPTIMIZERS[OURS], f"{PPSF} 2.0.1", OPTIMIZERS[PPSF]),
    "Prodigy": (lambda p: ppsf_dist.Prodigy(p, d0=D0), "prodigyopt 1.1.2", OPTIMIZERS["prodigyopt"]),
    **{
        name: (
            lambda p, name=name: getattr(ppsf_dist, name)(p),  # type: ignore[misc]
            "schedulefree 1.4.1",
            lambda p, name=name: getattr(schedulefree, name)(p),  # type: ignore[misc]
        )
        for name in (
            "AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree", "AdamWScheduleFreeClosure",
            "SGDScheduleFreeClosure", "RAdamScheduleFreeClosure",
        )
    },
    "ScheduleFreeWrapper": (
        lambda p: ScheduleFreeWrapper(ppsf_dist.Prodigy(p, d0=D0)),
        "schedulefree 1.4.1 around prodigyopt 1.1.2",
        lambda p: schedulefree.ScheduleFreeWrapperReference(prodigyopt.Prodigy(p, d0=D0)),
    ),
}  # fmt: skip
"""By name: how it is made, the name of its reference, and how that is made."""
OPTIMIZERS |= {name: make for name, (make, _, _) in CLASSES.items()}
OPTIMIZERS |= {f"reference of {name}": make for name, (_, _, make) in CLASSES.items()}
NOT_ON_ZERO = ("ScheduleFreeWrapper",)
"""Beside the closure forms."""

ON_MESHES = {
    "replicated": "DDP, 2 ranks",
    "fsdp_2": "FSDP2, 2 ranks, nothing but matrices that divide evenly",
    "fsdp_real": "FSDP2 (`fully_shard`), 2 ranks",
    "fsdp_3": "FSDP2, 3 ranks, uneven",
    "fsdp_4": "FSDP2, 4 ranks, uneven, empty shards",
    "hsdp_2x2": "HSDP, 2 x 2 ranks",
    "shard1": "FSDP2, sharded by columns, 2 ranks",
    "tp": "tensor parallel, 2 ranks",
    "fsdp_tp_2x2": "FSDP2 x tensor parallel, 2 x 2 ranks",
    "fsdp_tp_3x2": "FSDP2 x tensor parallel, 3 x 2 ranks, uneven",
    "mixed": "FSDP2 with ignored parameters, 2 ranks",
}

ON_ZERO = {
    (1, 2): "DeepSpeed ZeRO-1, 2 ranks",
    (2, 2): "DeepSpeed ZeRO-2, 2 ranks",
    (3, 2): "DeepSpeed ZeRO-3, 2 ranks",
    (3, 4): "DeepSpeed ZeRO-3, 4 ranks",
}
"""By stage and number of ranks."""

Outcome = tuple[dict[str, Tensor], float, int]
"""Whole weights, d of this rank (0 if there is none), and blocking collectives of the last step."""

SAME = 1e-5
"""Largest difference, relative to the movement of the parameter, that another order of summation explains."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def on_mesh(layout: Layout, name: str, shapes: NamedShapes) -> Outcome:
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    parameters = shard_parameters(initial_weights(shapes), layout)
    with quiet():
        optimizer = OPTIMIZERS[name](list(parameters.values()))
        if hasattr(optimizer, "train"):
            optimizer.train()
        for gradients in gradient_sequence(shapes, STEPS):
            with count_collectives() as collectives:
                take_step(optimizer, parameters, gradients)
    return gather(parameters), d_of(optimizer), collectives.blocking


def on_zero(stage: int, name: str, shapes: NamedShapes) -> Outcome:
    from tests.deepspeed.engines import config, count_in_steps, feed, full_weights, gradients_for, make_engine

    settings = config(stage) | {"zero_allow_untested_optimizer": True}
    with quiet():
        engine = make_engine(shapes, settings, make=OPTIMIZERS[name])
        optimizer = engine.basic_optimizer
        if hasattr(optimizer, "train"):
            optimizer.train()
        counted = count_in_steps(optimizer)
        for gradients in gradients_for(shapes, STEPS, torch.float32):
            counted.clear()
            feed(engine, gradients)
        result = full_weights(engine), d_of(optimizer), sum(collectives.blocking for collectives in counted)
        engine.destroy()
    return result


def d_of(optimizer: torch.optim.Optimizer) -> float:
    if isinstance(optimizer, AdaptiveOptimizer):
        return optimizer.get_d_estimate()
    return float(optimizer.param_groups[0].get("d", 0.0))


def compared(
    name: str, ranks: int, work: Callable[..., Outcome], where: Layout | int, shapes: NamedShapes
) -> tuple[float, float, int] | str:
    """Largest relative difference of d and of weights from one process, and collectives; or how it failed."""
    expected = on_mesh(LAYOUTS["single"], name, shapes)
    # Workers find functions by the name of their module, which is not the one that runs as a script.
    job = getattr(importlib.import_module("tests.layout_table"), work.__name__)
    try:
        runs = run(ranks, job, where, name, shapes, timeout=60)
    except JobFailed as failure:
        text = str(failure)
        if "differ" in text:
            return "wrong: replicas differ"
        return "hangs" if "did not return" in text else "raises"
    return apart(runs, expected, shapes)


def apart(runs: list[Outcome], expected: Outcome, shapes: NamedShapes) -> tuple[float, float, int]:
    """Largest relative difference of d and of weights from what is expected, and collectives."""
    weights, _, collectives = runs[0]
    start = initial_weights(shapes)
    of_weights = max(
        float((weights[k] - w).abs().max() / (w - start[k]).abs().max().clamp_min(1e-12))
        for k, w in expected[0].items()
    )
    of_d = max(abs(r[1] - expected[1]) / expected[1] for r in runs) if expected[1] else 0.0
    return of_d, of_weights, collectives


def cell(result: tuple[float, float, int] | str, *, detailed: bool) -> str:
    if isinstance(result, str):
        return result
    d, weights, collectives = result
    if detailed:
        return f"{d:.0e} | {weights:.0e} | {collectives}"
    verdict = "right" if max(d, weights) <= SAME else f"wrong ({max(d, weights):.0e})"
    return verdict if collectives <= 3 else f"{verdict}, {collectives} reductions"


def rows() -> list[tuple[str, int, Callable[..., Outcome], Layout | int, NamedShapes]]:
    """Title, ranks, work, layout or stage, and shapes of each row."""
    on_meshes = [
        (title, LAYOUTS[key].world_size, on_mesh, LAYOUTS[key], EVEN if key == "fsdp_2" else AWKWARD)
        for key, title in ON_MESHES.items()
    ]
    return [*on_meshes, *[(title, ranks, on_zero, stage, AWKWARD) for (stage, ranks), title in ON_ZERO.items()]]


def print_table() -> None:
    others = [name for name in OPTIMIZERS if name not in (OURS, *CLASSES) and not name.startswith("reference of")]
    print(f"| layout | d | weights | reductions | {' | '.join(others)} |")
    print("|" + "---|" * (4 + len(others)))
    for title, ranks, work, where, shapes in rows():
        results = {name: compared(name, ranks, work, where, shapes) for name in (OURS, *others)}
        ours = cell(results[OURS], detailed=True)
        print(
            f"| {title} | {ours} | " + " | ".join(cell(results[n], detailed=False) for n in others) + " |", flush=True
        )


def print_classes() -> None:
    print("| class | its reference | d | weights |")
    print("|---|---|---|---|")
    for name, (_, reference, _) in CLASSES.items():
        expected = on_mesh(LAYOUTS["single"], f"reference of {name}", AWKWARD)
        d, weights, _ = apart([on_mesh(LAYOUTS["single"], name, AWKWARD)], expected, AWKWARD)
        print(f"| `{name}` | {reference} | {f'{d:.0e}' if expected[1] else ''} | {weights:.0e} |", flush=True)
    print()
    print("| layout | " + " | ".join(f"`{name}`" for name in CLASSES) + " |")
    print("|" + "---|" * (1 + len(CLASSES)))
    for title, ranks, work, where, shapes in rows():
        cells = []
        for name in CLASSES:
            if work is on_zero and (name in NOT_ON_ZERO or name.endswith("Closure")):
                cells.append("refused")
                continue
            result = compared(name, ranks, work, where, shapes)
            cells.append(result if isinstance(result, str) else f"{max(result[:2]):.0e}, {result[2]}")
        print(f"| {title} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", action="store_true", help="every class of the package, and no other")
    (print_classes if parser.parse_args().classes else print_table)()
    close()


if __name__ == "__main__":
    main()
