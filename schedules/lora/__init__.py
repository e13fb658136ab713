"""Matmuls with low-rank adapters: those of `mpgemm`, with the adapter's two small products fused in."""
