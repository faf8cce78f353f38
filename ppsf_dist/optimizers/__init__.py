"""What a person constructs: one short file for each class."""
