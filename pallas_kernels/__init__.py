"""Kernels that know arrays, not Context: they import jax and nothing of ours."""
