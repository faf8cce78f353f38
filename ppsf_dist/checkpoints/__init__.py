"""Checkpoints of every layout on disk: written so that nothing is lost, read so that nothing is taken on trust."""

from ppsf_dist.checkpoints.files import CheckpointFiles, Entry, SafePlanner, SafeReader, open_checkpoint
from ppsf_dist.checkpoints.folder import release_checkpoint, remove_checkpoint
from ppsf_dist.checkpoints.plain import load_plain
from ppsf_dist.checkpoints.writing import write_checkpoint

__all__ = [
    "CheckpointFiles",
    "Entry",
    "SafePlanner",
    "SafeReader",
    "load_plain",
    "open_checkpoint",
    "release_checkpoint",
    "remove_checkpoint",
    "write_checkpoint",
]
