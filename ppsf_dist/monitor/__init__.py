"""Watching d: rows of numbers to wherever a person keeps them, a picture, and warnings that name a cause."""

from ppsf_dist.monitor.monitor import Monitor

__all__ = ["Monitor"]
