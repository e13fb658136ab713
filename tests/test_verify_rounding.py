"""Eager models round queries and weights where kernels over caches in groups do, and nowhere else."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mimo_compile.ir.kv_groups import GROUPED, STATES
from mimo_compile.ir.kv_rounding import attend_rounded
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.runtime.program import Choice
from mimo_compile.verify.rounding import Rounded

TEXT = "cached_attention:t=%d,h=4,kv=2,d=32,dv=32,cap=192,len=150,c=i4,tail=128"


def manifest(*plan):
    """Of workloads and the arithmetic of their kernels."""
    knobs = {"tile": 1, "rows": 1, "block": 64, "splits": 1, "parallel": False, "ahead": 0}
    name = "cached_attention.x86_flash_groups"
    choices = [Choice(w, name, {**knobs, "arith": arith}, "kernel", "default") for w, arith in plan]
    return SimpleNamespace(plan=choices, decoder=SimpleNamespace(steps=(1, 4, 16)))


def attend(tokens, mode, sink=False):
    """Attend to 150 positions; returns what the op gave under the mode, what is exact, what is rounded."""
    workload = parse_workload(TEXT % tokens + ",sink=1" * sink)
    drawn = get_op("cached_attention").make_inputs(workload, np.random.default_rng(0))
    given = {n: torch.from_numpy(a) for n, a in drawn.items()}
    held = [given[n] for n in STATES]
    args = (given["q"], *held, given["pos"], given.get("sink"), 32**-0.5, "i4")
    exact = torch.ops.mimo.grouped_attention(*args)
    with mode:
        got = torch.ops.mimo.grouped_attention(*args)
    return got, exact, attend_rounded(given, 32**-0.5, GROUPED["i4"], None)


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("arith", ["vnni", "madd", "real"])
def test_calls_round_where_their_kernel_does(arith, sink):
    mode = Rounded(manifest((TEXT % 4 + ",sink=1" * sink, arith)))
    got, exact, rounded = attend(4, mode, sink)
    assert (exact - rounded).abs().max() > 1e-3 * exact.abs().max()
    assert torch.equal(got, exact if arith == "real" else rounded)
    assert mode.calls == (arith != "real")


def test_the_kernel_is_that_of_the_shortest_step_that_holds_the_tokens():
    plan = [(TEXT % 1, "real"), (TEXT % 4, "vnni"), (TEXT % 16, "real")]
    for tokens, rounds in ((1, 0), (3, 1), (4, 1), (5, 0), (16, 0)):
        mode = Rounded(manifest(*plan))
        attend(tokens, mode)
        assert mode.calls == rounds, tokens


def test_tokens_that_are_decoded_together_have_the_kernel_of_the_batch():
    plan = [(TEXT % 1, "real"), (TEXT % 1 + ",b=3", "vnni")]
    for together, rounds in ((), 0), ({148}, 0), ({149}, 1):
        mode = Rounded(manifest(*plan), together)
        attend(1, mode)
        assert mode.calls == rounds


def test_other_shapes_and_unknown_schedules_do_not_count():
    made = manifest((TEXT.replace("cap=192", "cap=256") % 1, "vnni"))
    mode = Rounded(made)
    attend(1, mode)
    assert mode.calls == 0
    unknown = Choice(TEXT % 1, "cached_attention.of_another_version", {}, "kernel", "default")
    mode = Rounded(SimpleNamespace(plan=[unknown], decoder=made.decoder))
    attend(1, mode)
    assert mode.calls == 0
