"""Mixture of experts: routing and the routed expert matmuls."""
