"""Generic functions on GPUs whose iterations meet: what is refused, what waits; ends of float types."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest
from generic_cases import Case, legalised_case

from mimo_compile._tvm import compiler as tvm_compiler
from mimo_compile.ir import functions
from mimo_compile.ir.hardware import CUDA
from mimo_compile.schedules import get_schedule
from mimo_compile.schedules.cuda.emulate import COMMON, DEVICE, compiler, emulate
from mimo_compile.schedules.generic.cuda_tir import BlocksConfig, prepared
from mimo_compile.search.measure.emulated import check_emulated

tvm_compiler()
from tvm.relax import op as R
from tvm.script import tirx as T

H200 = CUDA["cuda:sm_90a"]
CUDA_TIR = get_schedule("tir.cuda")
needs_compiler = pytest.mark.skipif(compiler() is None, reason="emulation needs a C++ compiler")


@T.prim_func(s_tir=True)
def scattered(
    ix: T.Buffer((64,), "int32"), a: T.Buffer((64,), "float32"), b: T.Buffer((8,), "float32")
):
    for i in range(64):
        with T.sblock("m"):
            vi = T.axis.spatial(64, i)
            b[ix[vi]] = a[vi]


@T.prim_func(s_tir=True)
def last_wins(a: T.Buffer((8, 64), "float32"), b: T.Buffer((8,), "float32")):
    for i, j in T.grid(8, 64):
        with T.sblock("m"):
            vi, vj = T.axis.remap("SS", [i, j])
            b[vi] = a[vi, vj]


@T.prim_func(s_tir=True)
def halved(a: T.Buffer((64,), "float32"), b: T.Buffer((32,), "float32")):
    for i in range(64):
        with T.sblock("m"):
            vi = T.axis.spatial(64, i)
            b[vi // 2] = a[vi]


@T.prim_func(s_tir=True)
def summed(a: T.Buffer((8, 64), "float32"), b: T.Buffer((71,), "float32")):
    for i, j in T.grid(8, 64):
        with T.sblock("m"):
            vi, vj = T.axis.remap("SS", [i, j])
            b[vi + vj] = a[vi, vj]


@T.prim_func(s_tir=True)
def both(a: T.Buffer((8,), "float32"), b: T.Buffer((9,), "float32")):
    for i in range(8):
        with T.sblock("m"):
            vi = T.axis.spatial(8, i)
            b[vi] = a[vi]
            b[vi + 1] = a[vi]


@T.prim_func(s_tir=True)
def own_start(a: T.Buffer((8, 40), "float32"), b: T.Buffer((9,), "float32")):
    for i, j in T.grid(8, 40):
        with T.sblock("r"):
            vi, vj = T.axis.remap("SR", [i, j])
            with T.init():
                b[vi] = b[vi + 1]
            b[vi] = b[vi] + a[vi, vj]


@pytest.mark.parametrize(
    ("func", "reason"),
    [
        (scattered, "store where numbers in memory say"),
        (last_wins, "store to the same element"),
        (halved, "store to the same element"),
        (summed, "store to the same element"),
        (both, "store several elements"),
        (own_start, "starts from its own results"),
    ],
)
def test_iterations_that_race_are_refused(func, reason):
    assert not CUDA_TIR.supports(functions.workload_of(func), H200)
    with pytest.raises(ValueError, match=reason):
        prepared(func)


@T.prim_func(s_tir=True)
def moved(a: T.Buffer((6, 30), "float32"), b: T.Buffer((6, 64), "float32")):
    for i, j in T.grid(6, 30):
        with T.sblock("m"):
            vi, vj = T.axis.remap("SS", [i, j])
            b[5 - vi, vj * 2 + 1] = a[vi, vj]


def test_places_that_differ_are_not():
    assert len(prepared(moved).stages) == 1


@T.prim_func(s_tir=True)
def started(
    a: T.Buffer((64, 40), "float32"), m: T.Buffer((64,), "float32"), b: T.Buffer((64,), "float32")
):
    for i, j in T.grid(64, 40):
        with T.sblock("r"):
            vi, vj = T.axis.remap("SR", [i, j])
            with T.init():
                b[vi] = m[vi]
            b[vi] = b[vi] + a[vi, vj]


@T.prim_func(s_tir=True)
def started_from_a_neighbour(
    a: T.Buffer((64, 40), "float32"),
    m: T.Buffer((64, 40), "float32"),
    b: T.Buffer((64,), "float32"),
):
    for i, j in T.grid(64, 40):
        with T.sblock("m"):
            vi, vj = T.axis.remap("SS", [i, j])
            m[vi, vj] = T.exp(a[vi, vj])
    for i, j in T.grid(64, 40):
        with T.sblock("r"):
            vi, vj = T.axis.remap("SR", [i, j])
            with T.init():
                b[vi] = m[(vi + 1) % 64, 0]
            b[vi] = b[vi] + a[vi, vj]


def test_what_a_reduction_starts_from_is_read():
    workload = functions.workload_of(started)
    kernel = CUDA_TIR.lower(workload, BlocksConfig(64), H200)
    assert set(kernel.device.launches[0].operands) == {"in0", "in1", "out0"}
    assert kernel.counts.bytes["dram"] == 4 * (64 * 40 + 64 + 64)
    p = prepared(started_from_a_neighbour)
    assert not p.in_rows, "another block's row is read"


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("func", [started, started_from_a_neighbour])
def test_reductions_that_start_from_arrays_are_right(func):
    check_emulated(functions.workload_of(func), CUDA_TIR, None, H200)


@T.prim_func(s_tir=True)
def doubled(
    a: T.Buffer((T.int64(20000), T.int64(152576)), "float32"),
    b: T.Buffer((T.int64(20000), T.int64(152576)), "float32"),
):
    for i, j in T.grid(T.int64(20000), T.int64(152576)):
        with T.sblock("m"):
            vi, vj = T.axis.remap("SS", [i, j])
            b[vi, vj] = a[vi, vj] * T.float32(2)


@needs_compiler
def test_more_threads_than_an_int_counts_are_still_cpp(tmp_path):
    workload = functions.workload_of(doubled)
    text = CUDA_TIR.lower(workload, BlocksConfig(), H200).device.text
    source = tmp_path / "text.cpp"
    source.write_text(f'#define MIMO_EMULATE 1\n#include "emulation/launch.cuh"\n{text}')
    command = [compiler(), *COMMON, "-fsyntax-only", "-I", str(DEVICE), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[:500]


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("how", [R.sin, R.cos])
def test_sines_of_any_float(how):
    rng = np.random.default_rng(0)
    x = rng.uniform(1, 2, (40, 33)) * 2.0 ** rng.integers(-10, 128, (40, 33))
    x[0, :6] = [
        2.0**50,
        np.nextafter(np.float32(2**50), np.float32(0)),
        2.0**127,
        2.0**87,
        2.0**88,
        0,
    ]
    x[0, 6] = np.finfo(np.float32).max
    x[0, 7] = 16367173 * 2.0**72  # of all floats the nearest to a multiple of a quarter turn
    x = (np.minimum(x, np.finfo(np.float32).max) * rng.choice([-1, 1], x.shape)).astype(np.float32)
    ((func, _, _),) = legalised_case(Case(how, [x.shape]))
    workload = functions.workload_of(func)
    check_emulated(workload, CUDA_TIR, None, H200, inputs={"in0": x}, orders=(0,))
    kernel = CUDA_TIR.lower(workload, BlocksConfig(), H200)
    x[1] = np.resize(np.array([np.nan, np.inf, -np.inf], np.float32), x.shape[1])
    got = emulate(kernel, H200, {"in0": x})["out0"]
    assert np.isnan(got[1]).all() and np.isfinite(np.delete(got, 1, 0)).all()
    want = getattr(np, "sin" if how is R.sin else "cos")(np.delete(x, 1, 0).astype(np.float64))
    np.testing.assert_allclose(np.delete(got, 1, 0), want, rtol=3e-7, atol=1e-14)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(("how", "want"), [(R.max, np.max), (R.min, np.min)])
@pytest.mark.parametrize("team", [1, 32])
def test_a_nan_is_the_largest_and_the_least_of_its_row_wherever_it_stands(how, want, team):
    ((func, _, _),) = legalised_case(Case(lambda x: how(x, [1]), [(8, 70)]))
    x = np.random.default_rng(0).standard_normal((8, 70)).astype(np.float32)
    for row, column in ((0, 0), (1, 31), (2, 32), (3, 69), (5, 40)):
        x[row, column] = np.nan
    kernel = CUDA_TIR.lower(functions.workload_of(func), BlocksConfig(64, team), H200)
    np.testing.assert_array_equal(emulate(kernel, H200, {"in0": x})["out0"], want(x, 1))
