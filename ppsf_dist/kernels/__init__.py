"""The three passes over memory.

:mod:`ppsf_dist.kernels.interface` says what a backend computes; :mod:`ppsf_dist.kernels.eager` is the readable one
that runs anywhere and that every faster one is tested against.
"""
