"""Starts ``torch.distributed`` with one call under python, torchrun, mpirun, srun and the deepspeed launcher."""

from ppsf_dist.bootstrap.process import ProcessInfo, init_process_group

__all__ = ["ProcessInfo", "init_process_group"]
