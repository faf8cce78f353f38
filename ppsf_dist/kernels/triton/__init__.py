"""The passes in Triton, for accelerators: whatever the number of parameters, a few launches for each pass.

Nothing in here is imported before somebody asks for these kernels (``ppsf_dist.kernels.choice``): Triton comes with
torch for CUDA, not with torch for CPUs.
"""
