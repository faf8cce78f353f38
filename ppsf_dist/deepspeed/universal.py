"""Universal checkpoints: ``python -m ppsf_dist.deepspeed.universal FOLDER/TAG FOLDER/NEW_TAG``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.checkpoint.constants import PARAM
from deepspeed.git_version_info import version
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

from ppsf_dist.checkpoints import load_plain

OPTIMIZER_STATE = Path("zero") / "optimizer_state.pt"
STAGE_1_OR_2 = "mp_rank_00_model_states.pt"
STAGE_3 = "zero_pp_rank_0_mp_rank_00_model_states.pt"
WORKERS = 2
SAFE: list[Any] = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
"""What DeepSpeed puts into a checkpoint beside tensors and plain data."""


def to_universal(source: Path, target: Path, *, workers: int = WORKERS) -> None:
    """Convert a checkpoint of ``engine.save_checkpoint`` for other numbers of ranks and other ZeRO stages.

    DeepSpeed's own converter makes one that only the stage it comes from can load; what the others ask for is added.
    Load it with ``"checkpoint": {"load_universal": true}`` in the config. DeepSpeed does not load buffers and frozen
    parameters from it. The checkpoint of a stranger runs no code (``docs/security.md``).

    Args:
        source: folder of the checkpoint (with its tag).
        target: folder to make.
        workers: processes to convert with.

    Raises:
        FileNotFoundError: ``source`` is no checkpoint of ZeRO.
        ValueError: a file in ``source`` may run code, or is none of a checkpoint. Nothing is made then.
    """
    # The converter opens whatever lies there, and would run it.
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        _read(file, lazily=True)
    ds_to_universal.main(
        argparse.Namespace(
            input_folder=str(source),
            output_folder=str(target),
            num_extract_workers=workers,
            num_merge_workers=workers,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )
    path = target / OPTIMIZER_STATE
    state = _read(path)
    groups = state["param_groups"]
    steps = int(groups[0]["k"]) - 1
    # Stage 3 asks for what it would have saved itself, where DeepSpeed leaves all tensors of one rank.
    state["optimizer_state_dict"] = {"state": {0: {"step": steps}}, "param_groups": groups}
    state.pop("fp32_flat_groups", None)
    # Stages 1 and 2 ask for the version.
    state.setdefault("ds_version", version)
    torch.save(state, path)
    # Stages 1 and 2 want each tensor in a dict, stage 3 takes both but writes none.
    for name in ("fp32", "exp_avg", "exp_avg_sq"):
        for file in (target / "zero").glob(f"*/{name}.pt"):
            content = _read(file)
            if isinstance(content, Tensor):
                torch.save({PARAM: content}, file)
    present, missing = (STAGE_1_OR_2, STAGE_3) if (target / STAGE_1_OR_2).exists() else (STAGE_3, STAGE_1_OR_2)
    torch.save({**_read(target / present), "module": {}}, target / missing)


def _read(path: Path, *, lazily: bool = False) -> Any:
    """What a file holds, if that is tensors, plain data and what DeepSpeed adds.

    Args:
        path: of the file.
        lazily: leave the tensors in the file, which must then stay as it is.
    """
    with torch.serialization.safe_globals(SAFE):
        return load_plain(path, str(path), lazily=lazily)


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert the checkpoint that the command line names."""
    parser = argparse.ArgumentParser(description="Convert a DeepSpeed checkpoint for other ranks and other stages.")
    parser.add_argument("source", type=Path, help="folder of the checkpoint, with its tag")
    parser.add_argument("target", type=Path, help="folder to make")
    parser.add_argument("--workers", type=int, default=WORKERS, help="processes to convert with (default: %(default)s)")
    options = parser.parse_args(arguments)
    to_universal(options.source, options.target, workers=options.workers)


if __name__ == "__main__":
    main()
