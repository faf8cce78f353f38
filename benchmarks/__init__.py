"""What prints the figures in docs/: ``python -m benchmarks.step``, ``python -m benchmarks.scaling``."""
