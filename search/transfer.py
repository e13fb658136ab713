"""Good starting points from what was measured on similar shapes."""

from __future__ import annotations

import math

from mimo_compile.ir.workload import Workload
from mimo_compile.search.database import Database
from mimo_compile.search.lookup import summarise
from mimo_compile.search.records import Record
from mimo_compile.search.space import Candidate, JointSpace


def distance(a: Workload, b: Workload) -> float:
    """Return how far apart workloads of one op are: log-ratios of extents, 3 for other differences."""
    left, right = dict(a.params), dict(b.params)
    total = 0.0
    for name in {*left, *right}:
        x, y = left.get(name), right.get(name)
        if x == y:
            continue
        numbers = isinstance(x, int | float) and isinstance(y, int | float) and x > 0 and y > 0
        total += abs(math.log2(x / y)) if numbers else 3.0  # type: ignore[operator]
    return total


def similar_seeds(db: Database, space: JointSpace, count: int = 3) -> list[Candidate]:
    """Return the best candidates of the nearest recorded workloads that are legal in this space."""
    groups: dict[str, list[Record]] = {}
    for record in db.records(hardware=space.hardware, op=space.workload.op):
        if record.workload != str(space.workload):
            groups.setdefault(record.workload, []).append(record)
    order = sorted(groups, key=lambda text: (distance(space.workload, Workload.parse(text)), text))
    out: list[Candidate] = []
    for text in order:
        if len(out) == count:
            break
        results = sorted(summarise(groups[text]), key=lambda r: (r.latency_us, r.record.key))
        for result in results[:1]:
            adopted = space.adopt(result.record.schedule, result.record.config)
            if adopted is not None and adopted not in out:
                out.append(adopted)
    return out
