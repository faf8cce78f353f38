"""What an optimizer is: its arguments, state, numbers and formulas. Knows no rank, no framework, no memory layout."""
