"""The one inventory of state, and the form in which checkpoints keep it."""
