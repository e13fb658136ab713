"""Relax passes that turn an imported module into kernels and workloads."""
