"""Kernels of our own for `mode="max-autotune"`: int8 convolutions and linears generated for one layer each."""
