"""Readers of weight files, one module per storage format."""
