"""The passes in C++, for weights on a CPU."""
