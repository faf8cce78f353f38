"""FSDP2 and every other layout made of DTensors: checkpoints, and what to do after weights were swapped."""

from ppsf_dist.checkpoints import release_checkpoint, remove_checkpoint
from ppsf_dist.fsdp.backward import StepInBackward, step_in_backward
from ppsf_dist.fsdp.checkpoint import load_checkpoint, save_checkpoint
from ppsf_dist.fsdp.modules import reshard

__all__ = [
    "StepInBackward",
    "load_checkpoint",
    "release_checkpoint",
    "remove_checkpoint",
    "reshard",
    "save_checkpoint",
    "step_in_backward",
]
