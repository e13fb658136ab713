"""The bound of integers for queries and weights: numbers next to a tie may go either way, and move others."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mimo_compile.ir import kv_rounding
from mimo_compile.ir.kv_groups import GROUPED
from mimo_compile.ir.ops import get_op, load_all, parse_workload
from mimo_compile.ir.ops.numerics import U32

load_all()
OP = get_op("cached_attention")


@settings(max_examples=2)
@given(c=st.sampled_from(sorted(GROUPED)), seed=st.integers(0, 999))
@example(c="i8", seed=39)  # a query that goes another way turns a weight that no rounding would
def test_queries_that_are_a_rounding_off_stay_within_the_bound(c, seed):
    workload = parse_workload(f"cached_attention:t=16,h=2,kv=1,d=16,dv=16,cap=128,len=89,c={c}")
    rng, scale = np.random.default_rng(seed), 16**-0.5
    inputs = OP.make_inputs(workload, rng)
    want = OP.reference(workload, inputs)
    bound = OP.bound(workload, inputs, want)["out"]
    given_ = {name: torch.from_numpy(array) for name, array in inputs.items()}
    for _ in range(4):
        off = (8 * U32 * (rng.random(inputs["q"].shape) - 0.5)).astype(np.float32)
        q = torch.from_numpy(inputs["q"] * (1 + off))
        got = kv_rounding.attend_rounded({**given_, "q": q}, scale, GROUPED[c], None)
        assert (np.abs(got.numpy() - want["out"]) <= bound).all()
