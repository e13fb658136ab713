"""Vocabulary that schedules compose: vectors, dots, unpacking; expressions and macros, no kernels."""
