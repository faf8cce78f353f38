"""What is known of DeepSpeed without importing it. :mod:`ppsf_dist.deepspeed` is the half that does."""
