"""The passes in plain PyTorch."""

from ppsf_dist.kernels.eager.passes import EagerKernels

__all__ = ["EagerKernels"]
