"""Kernels that pass over rows once: normalisation, activation, embedding, rotary tables."""
