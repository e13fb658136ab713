"""Mixed-precision matmul schedules: few-bit or float weights, float or int8 activations."""
