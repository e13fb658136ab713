"""How to compute each operator: one parametrised generator per algorithm and hardware family."""

if __name__ != "mimo_compile.schedules":
    raise ImportError("import mimo_compile.schedules, not schedules")
