"""Propose, build, verify, measure, learn: the search for the best kernel of each workload."""

if __name__ != "mimo_compile.search":
    raise ImportError("import mimo_compile.search, not search")
