"""Tensors, formats, operators and workloads: what one kernel must compute."""

if __name__ != "mimo_compile.ir":
    raise ImportError("import mimo_compile.ir, not ir")
