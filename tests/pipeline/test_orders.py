"""What it costs that kernels add up in one order, from the times behind two plans."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mimo_compile.ir.workload import Workload
from mimo_compile.pipeline.orders import Orders, order_costs, rounded

ONE, FOUR, HEAD, LONG = (
    Workload.parse(f"mpgemm:m={m},n=64,k={k},w=w8,a=a8")
    for m, k in ((1, 64), (4, 64), (4, 128), (64, 64))
)
CALLS = {
    ONE: {"step_1": 2, "head_1": 1},
    FOUR: {"step_4": 3},
    HEAD: {"head_8": 1, "step_4": 1},
    LONG: {"step_64": 5},
}


def plan(**times):
    """A plan whose kernels take such times: a number, or with a place where it comes from."""
    choices = {}
    for workload, time in zip((ONE, FOUR, HEAD, LONG), times.values(), strict=True):
        us, source = time if isinstance(time, tuple) else (time, "measured")
        option = SimpleNamespace(candidate=(us, source), latency_us=us, source=source)
        choices[workload] = SimpleNamespace(option=option)
    return SimpleNamespace(choices=choices)


def test_costs_are_of_the_entry_points_that_have_the_order():
    ours, free = plan(a=3.0, b=2.0, c=4.0, d=9.0), plan(a=3.0, b=1.0, c=2.0, d=1.0)
    found = rounded(order_costs(Orders(tokens=(1, 4)), CALLS, ours, free))
    # head_8 gives the logits of four tokens; step_64 has no order
    assert found == {"step_1": 0.0, "step_4": 1.0, "head_1": 0.0, "head_8": 1.0}


@pytest.mark.parametrize("guessed", ["ours", "free"])
def test_entries_with_kernels_that_differ_unmeasured_have_no_cost(guessed):
    both = {"ours": 2.0, "free": 1.0}
    both[guessed] = (both[guessed], "default")
    ours, free = (plan(a=(3.0, "default"), b=both[n], c=4.0, d=1.0) for n in ("ours", "free"))
    found = order_costs(Orders(tokens=(1, 4)), CALLS, ours, free)
    # the same default in both costs the same, measured or not
    assert found == {"step_1": 0.0, "head_1": 0.0, "head_8": 0.0}
