"""What a kernel will cost in time and energy, predicted before it is measured."""

if __name__ != "mimo_compile.cost_models":
    raise ImportError("import mimo_compile.cost_models, not cost_models")
