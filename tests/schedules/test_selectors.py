"""Chains of kernels that choose blocks: one state in one layout from update to score to list."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from harness import check

from mimo_compile.ir.caches import parse_cache_format
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.ir.ops.block_lists import outside_tie_band, to_mask
from mimo_compile.ir.policies import Geometry, parse_policy
from mimo_compile.schedules import get_schedule, schedules_for

CPU = local_cpu()
DESCRIBE, SCORE, SELECT = (
    get_schedule(f"{n}.x86") for n in ("describe_blocks", "score_blocks", "select_blocks")
)
POLICIES = (
    "quest", "quest:per=head", "seer", "seer:threshold=0.01", "lessismore", "resa", "resa:heads=max", "sale",
    "hysparse", "hysparse2", "tailorkv", "nsa", "moba", "dsa",
)  # fmt: skip


@pytest.mark.parametrize(("kind", "score"), [("bounds", "quest,agg=max"), ("mean", "mean,agg=sum")])
@pytest.mark.parametrize("c", ["f32", "bf16"])
def test_descriptors_are_scored_where_they_were_written(kind, score, c):
    """Prompt, then single tokens; the choice is the exact one but for what rounding leaves open."""
    shape, cap = f"kv=2,d=24,cap={400}", 400
    fmt = parse_cache_format(c)
    rng = np.random.default_rng(0)
    keys = fmt.encode(rng.standard_normal((cap, 2, 24), dtype=np.float32))
    q = rng.standard_normal((1, 4, 24), dtype=np.float32)
    made = f"kind={kind},size=8,whole=1,c={c},e={c}"
    prompt = f"describe_blocks:t=300,{shape},{made}"
    step = f"describe_blocks:t=1,{shape},{made}"
    scored = f"score_blocks:t=1,h=4,{shape},kind={score},block=8,e={c}"
    chosen = f"select_blocks:t=1,hs=2,cap={cap},block=8,k=9,last=1"
    seen = keys.copy()
    seen[300:] = fmt.encode(np.array([np.nan], np.float32))[0]
    first = check(DESCRIBE, prompt, inputs={"k_cache": seen, "pos": np.array([0, 300], np.int32)})
    state = first.memory["desc"]
    assert (
        DESCRIBE.layouts(parse_workload(prompt), None)["desc"]
        == (SCORE.layouts(parse_workload(scored), None)["desc"])
    )
    run = check(DESCRIBE, step)
    run.memory["k_cache"][...] = DESCRIBE.pack(parse_workload(step), None, {"k_cache": keys})[
        "k_cache"
    ]
    run.memory["desc"][...] = state
    for start in range(300, 340):
        run.memory["pos"][...] = [start, 1]
        run.call()
    pos = np.array([339, 1], np.int32)
    whole = parse_workload(prompt.replace("t=300", "t=340"))
    wild = np.zeros(get_op("describe_blocks").args(whole)[2].shape, np.float32)
    given = {"k_cache": keys, "pos": np.array([0, 340], np.int32), "desc": fmt.encode(wild)}
    ref = get_op("describe_blocks").reference(whole, given)["desc"].astype(np.float32)
    ref[42:] = np.nan
    scores = check(SCORE, scored, inputs={"q": q, "desc": fmt.encode(ref), "pos": pos})
    scores.memory["desc"][...] = run.memory["desc"]
    scores.call()
    got = scores.memory["score"].copy()
    exact = get_op("score_blocks").reference(parse_workload(scored), scores.inputs)["score"]
    lists = check(SELECT, chosen, inputs={"score": got, "pos": pos}).outputs
    mask = to_mask(*(torch.from_numpy(lists[n]) for n in ("idx", "cnt")), 50)
    free = torch.isfinite(torch.from_numpy(exact))
    free[..., 42] = False
    near = torch.full_like(free, 0.0, dtype=torch.float64) + (1e-4 if kind == "bounds" else 0.05)
    assert not outside_tie_band(mask, free, torch.from_numpy(exact), near).any()
    assert mask[..., 42].all() and (lists["cnt"] == 9).all()


@pytest.mark.parametrize("t", [1, 64])
@pytest.mark.parametrize("c", ["f32", "bf16"])
@pytest.mark.parametrize("text", POLICIES)
def test_every_policy_has_kernels_for_its_scores_and_lists(text, c, t):
    g = Geometry(t=t, h=8, kv=2, d=64, dv=64, cap=4096, c=c)
    steps = parse_policy(text).workloads(g)
    for workload in (steps.score, steps.select):
        assert workload is not None
        assert schedules_for(workload, CPU), str(workload)
