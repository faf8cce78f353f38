"""What trainers need beside the optimizer, one module for each. Nobody else here imports them."""
