"""Entries of new tokens: exact, no other one touched, laid out as scores read them."""

from __future__ import annotations

import numpy as np
import pytest
from harness import check, sample_config
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.errors import UsageError
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.schedules import get_schedule

CPU = local_cpu()
APPEND, SCORE = get_schedule("append_entries.x86"), get_schedule("score_blocks.x86")
OP = get_op("append_entries")


@settings(max_examples=3)
@given(
    st.integers(1, 20), st.integers(1, 3), st.integers(1, 40), st.integers(0, 60),
    st.sampled_from(["f32", "bf16"]), st.integers(0, 99),
)  # fmt: skip
def test_any_shape_position_and_format(t, kv, d, more, e, seed):
    workload = parse_workload(f"append_entries:t={t},kv={kv},d={d},cap={t + more},e={e}")
    rng = np.random.default_rng(seed)
    rows = OP.make_inputs(workload, rng)["rows"]
    start, valid = int(rng.integers(0, more + 1)), int(rng.integers(0, t + 1))
    rows[valid:] = np.nan  # padding is not looked at
    given_ = {"rows": rows, "pos": np.array([start, valid], np.int32)}
    check(APPEND, workload, sample_config(APPEND, workload, CPU, seed), seed, inputs=given_)


@pytest.mark.parametrize("e", ["f32", "bf16"])
def test_an_indexer_reads_the_entries_as_they_lie(e):
    """A prompt in pieces, then single tokens."""
    scored = parse_workload(
        f"score_blocks:t=1,h=4,kv=1,d=23,cap=90,kind=indexer,agg=sum,block=1,e={e}"
    )
    added = parse_workload(f"append_entries:t=40,kv=1,d=23,cap=90,e={e}")
    assert APPEND.layouts(added, None)["desc"] == SCORE.layouts(scored, None)["desc"]
    desc = get_op("score_blocks").make_inputs(scored, np.random.default_rng(0))["desc"]
    every = desc[:, :, 0].astype(np.float32)
    if e == "bf16":
        every = (desc[:, :, 0].astype(np.uint32) << 16).view(np.float32)
    run = check(APPEND, added, inputs={"rows": every[:40], "pos": np.array([0, 40], np.int32)})
    for start, count in ((40, 40), *((at, 1) for at in range(80, 90))):
        run.memory["rows"][:count] = every[start : start + count]
        run.memory["pos"][...] = [start, count]
        run.call()
    packed = SCORE.pack(scored, None, {"desc": desc})["desc"]
    assert np.array_equal(run.memory["desc"].reshape(packed.shape)[0, :5], packed[0, :5])
    got = APPEND.unpack_state(added, None, {"desc": run.memory["desc"].reshape(packed.shape)})
    assert np.array_equal(got["desc"], desc)


def test_more_tokens_than_entries_are_refused():
    with pytest.raises(UsageError, match="t=9 tokens do not fit cap=8 entries"):
        parse_workload("append_entries:t=9,kv=1,d=8,cap=8")
