"""Ground of the distributed tests: worker pool, counters, parameter sets and layouts."""
