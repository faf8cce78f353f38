"""What is known of DeepSpeed without importing it. ``ppsf_dist.deepspeed`` is the half that does."""
