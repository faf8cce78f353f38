"""How a step runs: the picture in ``ppsf_dist.engine.step``, what it is planned from, its numbers on the device."""
