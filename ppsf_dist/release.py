"""The number of this release."""

RELEASE = "0.1.0"
"""Ranks must run the same one, so it is compared at the first step."""
