"""The router: ids exact with ties, bias and groups; ids in range whatever the logits are."""

from __future__ import annotations

import numpy as np
import pytest
from harness import check, sample_config
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import parse_workload
from mimo_compile.schedules import get_schedule

CPU = local_cpu()
ROUTE = get_schedule("route.x86")


@settings(max_examples=10)
@given(data=st.data())
def test_any_router(data):
    groups = data.draw(st.sampled_from((1, 1, 2, 4)))
    size = data.draw(st.integers(1, 20))
    top = data.draw(st.integers(1, groups))
    k = data.draw(st.integers(1, min(8, size * top)))
    scoring = data.draw(st.sampled_from(("softmax", "sigmoid")))
    bias, norm = data.draw(st.integers(0, 1)), data.draw(st.integers(0, 1))
    text = (
        f"route:t={data.draw(st.integers(1, 4))},e={groups * size},k={k},scoring={scoring},"
        f"bias={bias},norm={norm},factor=2.5,groups={groups},topgroups={top}"
    )
    seed = data.draw(st.integers(0, 99))
    check(ROUTE, text, sample_config(ROUTE, parse_workload(text), CPU, seed), seed)


def test_ties_go_to_the_lowest_index():
    text = "route:t=2,e=40,k=3,scoring=sigmoid"
    logits = np.zeros((2, 40), np.float32)
    logits[1, 35] = 1
    seen = check(ROUTE, text, inputs={"logits": logits})
    assert seen.outputs["ids"].tolist() == [[0, 1, 2], [35, 0, 1]]


@pytest.mark.parametrize("extra", ["", ",groups=4,topgroups=2", ",bias=1"])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_ids_stay_in_range_and_differ(scoring, extra):
    text = f"route:t=6,e=20,k=7,scoring={scoring}{extra}"
    seen = check(ROUTE, text)
    logits = seen.memory["logits"]
    logits[0], logits[1], logits[2], logits[3, ::2] = np.nan, np.inf, -np.inf, np.nan
    logits[4, 1:] = -3e38
    logits[5] = [np.nan, np.inf, -np.inf, 0] * 5
    seen.call()
    ids = seen.memory["ids"]
    assert ((ids >= 0) & (ids < 20)).all()
    assert all(len(set(row)) == 7 for row in ids.tolist())


def test_the_largest_real_router():
    check(ROUTE, "route:t=2,e=256,k=8,scoring=sigmoid,bias=1,groups=8,topgroups=4,factor=2.5")
