"""Lists over pages of a pool: descriptors, scores and attention are those over states of a sequence's own."""

from __future__ import annotations

import numpy as np
import pytest
from harness import check, sample_config
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.errors import UsageError
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import batches, get_op, pages, parse_workload
from mimo_compile.schedules import schedules_for
from mimo_compile.schedules.attention.pages import Table

CPU = local_cpu()
OPS = ("describe_blocks", "gate_keys", "score_blocks", "score_keys", "sparse_attention")


def parameters(draw, op):
    """Draw the parameters of a workload over pages; its blocks are parts of a page, or whole ones."""
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    kv, group, t = pick(1, 2, 3), pick(1, 2, 3), pick(1, 1, 3, 20)
    page, cap, d = pick(16, 32, 64), draw(st.integers(t, 200)), draw(st.integers(2, 24))
    block = pick(1, 2, 4, 8, 16, page, 2 * page)
    p = {"t": t, "kv": kv, "d": d, "cap": cap, "b": pick(1, 2, 3), "page": page}
    p["pool"] = pages.least_pool(p) + pick(0, 1, 9)
    p["len"], c = draw(st.integers(t, cap)), pick("f32", "bf16")
    if op == "describe_blocks":
        return p | {
            "kind": pick("bounds", "mean"), "size": block, "whole": 1, "c": c,
            "e": pick("f32", c),
        }  # fmt: skip
    if op == "gate_keys":
        gate = 2 * draw(st.integers(2, 9))
        p["d"] = 2 * -(-d // 2)
        return p | {"size": block, "g": gate, "rot": p["d"], "grot": gate, "norm": 1, "c": c}
    p["h"] = kv * group
    if op == "score_blocks":
        kind = pick("quest", "mean", "gate")
        agg = "none" if kind == "gate" else pick("none", "max", "query")
        soft = int(kind == "gate" and pick(0, 1))
        return p | {"kind": kind, "agg": agg, "block": block, "e": c, "soft": soft}
    if op == "score_keys":
        kind, lay = pick("logits", "oracle"), pick("", "rows")
        return p | {"kind": kind, "agg": pick("none", "max"), "block": block, "c": c, "lay": lay}
    return p | {
        "dv": draw(st.integers(1, 24)), "hs": pick(1, kv, kv * group), "block": block, "c": c,
        "kmax": draw(st.integers(1, -(-cap // block))), "window": pick(0, 0, 20), "sink": pick(0, 1),
        "rows": pick(1, t), "lay": pick("", "rows"),
    }  # fmt: skip


def compared(draw, op):
    """Check a kernel over pages, and that one sequence gets from states of its own the same bits."""
    definition, seed = get_op(op), draw(st.integers(0, 999))
    workload = definition.workload(**parameters(draw, op))
    schedule = schedules_for(workload, CPU)[0]
    p, config = definition.full(workload), sample_config(schedule, workload, CPU, seed)
    arrays = definition.make_inputs(workload, np.random.default_rng(seed))
    found = check(schedule, workload, config, seed, inputs=arrays)
    which = draw(st.integers(0, p["b"] - 1))
    mine = list(batches.split(definition, workload, arrays))[which]
    if (
        "desc" in found.expected
    ):  # entries that a sequence does not have yet: comparisons know no NaN
        entries = mine["desc"]
        none = entries == 0x7FC0 if entries.dtype == np.uint16 else np.isnan(entries)
        mine["desc"] = np.where(none, 0, entries).astype(entries.dtype)
    alone = check(schedule, batches.alone(workload), config, seed, inputs=mine)
    for name, own in alone.outputs.items():
        rows = np.arange(which * len(own), (which + 1) * len(own))
        if span := pages.span_of(p, name):
            whole = np.arange(int(mine["pos"].sum()) // span)
            own = own[whole]
            rows = pages.row_of(arrays["pages"][which], p["page"], span, whole)
        assert np.array_equal(own, found.outputs[name][rows], equal_nan=True), name


@pytest.mark.parametrize("op", OPS)
def test_each_sequence_gets_what_it_gets_alone(op):
    @settings(max_examples=1)
    @given(data=st.data())
    def run(data):
        compared(data.draw, op)

    run()


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_each_sequence_gets_what_it_gets_alone_in_any_shape(op):
    @settings(max_examples=12)
    @given(data=st.data())
    def run(data):
        compared(data.draw, op)

    run()


WRONG = {
    "kv_append": "kv_append:t=1,h=2,kv=1,d=16,dv=16,cap=256,rot=16,c=i4,b=2,page=64,pool=9",
    "describe_blocks": "describe_blocks:t=1,kv=1,d=8,cap=64,kind=bounds,size=4,whole=1,b=2,page=16,pool=9",
    "score_blocks": "score_blocks:t=1,h=2,kv=1,d=8,cap=64,kind=quest,agg=max,block=4,b=2,page=16,pool=9",
    "sparse_attention": "sparse_attention:t=1,h=2,kv=1,d=8,dv=8,cap=64,hs=1,block=16,kmax=3,b=2,page=16,"
    "pool=9",
}


@pytest.mark.parametrize("op", WRONG)
def test_kernels_that_look_into_another_s_table_are_found(op, monkeypatch):
    made = Table.__init__
    monkeypatch.setattr(Table, "__init__", lambda self, held, _, page: made(self, held, 0, page))
    workload = parse_workload(WRONG[op])
    with pytest.raises(AssertionError):
        check(schedules_for(workload, CPU)[0], workload, seed=3)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (
            "describe_blocks:kind=mean,size=24,whole=1",
            "blocks of 24 positions are neither parts of a page of 64",
        ),
        ("describe_blocks:kind=mean,size=16", "is for bounds or means of complete blocks"),
        ("describe_blocks:kind=pool3,size=16,whole=1", "is for bounds or means of complete blocks"),
        ("score_blocks:h=1,kind=quest,block=48", "blocks of 48 positions are neither"),
        (
            "score_blocks:h=1,kind=compressed,block=16,size=8,stride=4",
            "is for kind=quest and mean and gate",
        ),
        ("score_keys:h=1,kind=channels,channels=2", "a copy of keys, which has no pages"),
        ("gate_keys:size=80,g=8,rot=8,grot=8", "blocks of 80 positions are neither"),
        ("sparse_attention:h=1,dv=8,hs=1,block=4,kmax=1,first=16,window=9", "leave out page"),
    ],
)
def test_what_pages_cannot_hold_is_refused(text, match):
    op, _, rest = text.partition(":")
    with pytest.raises(UsageError, match=match) as found:
        parse_workload(f"{op}:t=1,kv=1,d=8,cap=128,page=64,pool=9,{rest}")
    assert found.value.remedy
