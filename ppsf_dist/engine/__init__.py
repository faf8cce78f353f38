"""How a step runs: the picture in :mod:`ppsf_dist.engine.step`, what it is planned from, its numbers on the device."""
