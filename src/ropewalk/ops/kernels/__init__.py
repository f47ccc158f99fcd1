"""Kernels written by hand, each for the one kind of device where XLA's own code is slow."""
