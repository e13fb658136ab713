"""Powers of two, logarithms and maxima of 16 lanes, as attention's kernels emit them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from harness import compiled

from mimo_compile._tvm import as_aligned, empty_aligned, from_numpy
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import parse_workload
from mimo_compile.ir.ops.base import Arg
from mimo_compile.schedules import schedules_for
from mimo_compile.schedules.attention import exponent
from mimo_compile.schedules.base import Kernel
from mimo_compile.schedules.emit.bf16 import NEEDS
from mimo_compile.schedules.emit.build import function, load, loop, store
from mimo_compile.schedules.emit.vector import LANES, log2, splat

CPU = local_cpu()
COUNT = 1 << 14
avx512 = pytest.mark.skipif(not CPU.has_avx512, reason="the CPU has no AVX-512")


def run(name, emit, x):
    """Return what a function of 16 lanes makes of `COUNT` numbers."""

    def body(given, out):
        with loop(COUNT // LANES) as i:
            store(out, emit(load(given, i * LANES, lanes=LANES)), i * LANES, lanes=LANES)

    args = (Arg("x", "input", (COUNT,), "float32"), Arg("out", "output", (COUNT,), "float32"))
    kernel = Kernel(name, function(name, args, body), args, Counts())
    out = empty_aligned(COUNT)
    compiled(kernel, CPU)[name](from_numpy(as_aligned(x.astype(np.float32))), from_numpy(out))
    return out


@pytest.mark.parametrize(
    ("scaled", "short"),
    [
        (False, False),
        pytest.param(True, False, marks=avx512),
        pytest.param(True, True, marks=avx512),
    ],
)
def test_powers_of_two(scaled, short):
    x = np.float32(-np.geomspace(1e-7, 125.9, COUNT))
    x[:4], x[4:8] = 0, (-151, -1e4, -1e30, -3e38)
    got = run("powers", lambda v: exponent.exp2(v, scaled=scaled, short=short), x)
    want = np.exp2(x.astype(np.float64))
    assert (got[:4] == 1).all() and (got[4:8] == 0).all()
    relative = np.abs(got[8:] / want[8:] - 1)
    assert relative.max() < (5e-6 if short else 2.5 * 2.0**-23)
    assert relative.max() > (1e-6 if short else 0)


@avx512
def test_no_number_stays_none():
    x = np.full(COUNT, np.nan)
    for short in (False, True):
        assert np.isnan(
            run("nan", lambda v, s=short: exponent.exp2(v, scaled=True, short=s), x)
        ).all()


def test_logarithms():
    x = np.float32(np.geomspace(2e-38, 3e38, COUNT))
    got, want = run("logarithms", log2, x), np.log2(x.astype(np.float64))
    assert (np.abs(got - want) <= 2.5 * 2.0**-23 * np.maximum(1, np.abs(want))).all()


def test_the_largest_of_sixteen():
    rng = np.random.default_rng(0)
    x = np.float32(rng.standard_normal(COUNT) * 10.0 ** rng.integers(-30, 30, COUNT))
    x.reshape(-1, LANES)[::2] = -np.abs(x.reshape(-1, LANES)[::2])
    got = run("largest", lambda v: exponent.from_order(splat(exponent.largest(v), LANES)), x)
    want = np.repeat(x.reshape(-1, LANES).max(1), LANES)
    assert np.array_equal(got, want)


@pytest.mark.skipif(not CPU.features >= NEEDS, reason="the CPU has no bfloat16 dots")
@pytest.mark.parametrize("arith", ["float", "int8"])
def test_only_weights_take_short_powers(arith, monkeypatch):
    # sums are multiplied with the others once a step, and errors would add up
    shorts = []

    def counted(x, *, scaled, short=False):
        shorts.append(short)
        return plain(x, scaled=scaled, short=short)

    plain = exponent.exp2
    monkeypatch.setattr(exponent, "exp2", counted)
    text = f"cached_attention:t=16,h=2,kv=1,d=32,dv=16,cap=256,c=bf16,arith={arith}"
    workload = parse_workload(text)
    (schedule, *_) = schedules_for(workload, CPU)
    config = schedule.space(workload, CPU).default
    if arith == "float":
        config = dataclasses.replace(config, arith="dot")
    schedule.lower(workload, config, CPU)
    assert True in shorts and shorts.count(False) == (2 if arith == "int8" else 1)
