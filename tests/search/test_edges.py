"""A kernel that is exact and reads the values of other keys is refused, whichever inputs are drawn."""

from __future__ import annotations

from dataclasses import replace

import pytest
from attention_zoo import Neighbours

from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import parse_workload
from mimo_compile.schedules import get_schedule
from mimo_compile.search.measure import Measurer, Timing
from mimo_compile.search.records import Verdict
from mimo_compile.search.space import JointSpace

pytestmark = [pytest.mark.compile, pytest.mark.slow]
QUICK = Timing(warm_up_s=0.001, batches=3, batch_s=0.001, budget_s=0.02, repeats=1, cache="hot")


def test_values_of_other_keys_are_refused_with_a_single_kv_head() -> None:
    cpu = local_cpu().with_threads(1)
    honest, wrong = get_schedule("cached_attention.x86_flash_pairs"), Neighbours()
    space = JointSpace(
        parse_workload("cached_attention:t=1,h=4,kv=1,d=64,dv=64,cap=8192,c=bf16"),
        cpu,
        [honest, wrong],
    )
    pair = [
        space.candidate(s.name, replace(space.spaces[s.name].default, arith="widen"))
        for s in (honest, wrong)
    ]
    with Measurer(cpu, timing=QUICK, builders=1) as measurer:
        for seed in range(6):
            found = {m.candidate: m for m in measurer.measure(space, pair, seed, energy=False)}
            assert found[pair[0]].verdict is Verdict.OK, found[pair[0]].message
            assert found[pair[1]].verdict is Verdict.WRONG, (seed, found[pair[1]].error_ratio)
