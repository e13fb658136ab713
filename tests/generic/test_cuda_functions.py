"""Generic functions as CUDA text, run on the CPU thread by thread and held to what rounding may do."""

from __future__ import annotations

import numpy as np
import pytest
from generic_cases import CASES, Case, legalised_case
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile._tvm import compiler as tvm_compiler
from mimo_compile.ir import functions
from mimo_compile.ir.hardware import CUDA, local_cpu
from mimo_compile.ir.ops import get_op
from mimo_compile.schedules import get_schedule, schedules_for
from mimo_compile.schedules.cuda import limits
from mimo_compile.schedules.cuda.emulate import compiler
from mimo_compile.schedules.generic.cuda_tir import BlocksConfig, prepared
from mimo_compile.search.measure.emulated import check_emulated

tvm_compiler()
from tvm import relax
from tvm.relax import op as R
from tvm.script import tirx as T

H200 = CUDA["cuda:sm_90a"]
CUDA_TIR = get_schedule("tir.cuda")
MORE = {
    "halves": Case(lambda a, b: R.add(R.multiply(a, b), a), [(5, 33), (5, 33)], None, ("float16",) * 2),
    "rounded": Case(
        lambda a: R.astype(R.astype(R.multiply(a, relax.const(1.7, "float32")), "bfloat16"), "float32"),
        [(5, 33)],
    ),
    "widened": Case(lambda a: R.sum(R.astype(a, "float32"), [1]), [(6, 70)], None, ("bfloat16",)),
    "doubles": Case(lambda a: R.exp(R.sum(a, [1])), [(6, 70)], None, ("float64",)),
    "bytes": Case(lambda a, b: R.add(a, b), [(5, 33), (5, 33)], None, ("int8", "int8"), 100),
    "turns": Case(lambda a: R.add(R.sin(a), R.cos(R.multiply(a, relax.const(900.0, "float32")))), [(5, 33)]),
    "functions": Case(lambda a: R.tanh(R.sqrt(R.abs(R.floor(R.exp(a))))), [(5, 33)]),
    "powers": Case(lambda a: R.power(R.abs(a), relax.const(1.5, "float32")), [(5, 33)]),
    "padded": Case(lambda a: R.nn.pad(a, [0, 0, 1, 2]), [(4, 16)]),
    "least": Case(lambda a: R.min(a, [0]), [(40, 9)], None, ("int32",), 1000),
    "whole_axis": Case(lambda a: R.max(a, [1], True), [(3, 500)]),
    "chosen": Case(lambda a, b: R.where(R.less(a, b), a, R.negative(b)), [(5, 33), (5, 33)]),
    "quotients": Case(
        lambda a, b: R.floor_divide(a, R.add(b, relax.const(1, "int32"))), [(5, 33), (5, 33)], None,
        ("int32", "int32"), 50,
    ),
    "strided": Case(lambda a: R.strided_slice(a, [1], [1], [30], [3]), [(5, 33)]),
    "long": Case(lambda a: R.nn.softmax(a, -1), [(2, 3000)]),
    "cube": Case(lambda a: R.mean(a, [0, 2]), [(6, 5, 40)]),
}  # fmt: skip
ALL = {**CASES, **MORE}
needs_compiler = pytest.mark.skipif(compiler() is None, reason="emulation needs a C++ compiler")


def workloads(name):
    """Return the functions of a case as workloads."""
    return [functions.workload_of(func) for func, _, _ in legalised_case(ALL[name])]


def drawn(workload, rng):
    """Return a legal config."""
    space = CUDA_TIR.space(workload, H200)
    for _ in range(100):
        config = space.make(**{k: v[rng.integers(len(v))] for k, v in space.knobs.items()})
        if space.legal(config):
            return config
    raise AssertionError("no legal config")


@needs_compiler
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("softmax", BlocksConfig(64, 16, True)),
        ("take", BlocksConfig(64)),
    ],
)
def test_results_are_within_what_rounding_may_do(name, config):
    for workload in workloads(name):
        check_emulated(workload, CUDA_TIR, config, H200)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", [n for n in ALL if n != "cancelled"])
def test_any_function_with_its_default_and_any_knobs(name):
    rng = np.random.default_rng(0)
    for workload in workloads(name):
        default = CUDA_TIR.space(workload, H200).default
        for config in dict.fromkeys([default, drawn(workload, rng)]):
            check_emulated(workload, CUDA_TIR, config, H200, orders=(1,))


@pytest.mark.slow
@needs_compiler
@settings(max_examples=10, deadline=None)
@given(
    rows=st.integers(1, 9), columns=st.integers(1, 200), team=st.sampled_from((1, 8, 32, 64)),
    together=st.booleans(), how=st.sampled_from((R.nn.softmax, R.nn.log_softmax, R.argmax)),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_rows_of_any_length(rows, columns, team, together, how, seed):
    case = Case(lambda x: how(x, -1), [(rows, columns)])
    for func, _, _ in legalised_case(case):
        workload = functions.workload_of(func)
        if CUDA_TIR.supports(workload, H200):
            config = BlocksConfig(64, team, together)
            space = CUDA_TIR.space(workload, H200)
            config = (
                config
                if all(getattr(config, k) in v for k, v in space.knobs.items())
                else space.default
            )
            check_emulated(workload, CUDA_TIR, config, H200, seed, orders=(seed % 2,))


def test_a_softmax_is_one_launch_in_rows_and_several_without():
    (workload,) = workloads("softmax")
    rows, apart = (
        CUDA_TIR.lower(workload, BlocksConfig(64, 8, together), H200).device
        for together in (True, False)
    )
    assert len(rows.launches) == 1 and rows.launches[0].grid == (15, 1, 1)
    assert len(apart.launches) > 2 and set(rows.scratch) == set(apart.scratch)
    assert rows.text.count("joined<8>") == apart.text.count("joined<8>") == 2
    kernel = CUDA_TIR.lower(workload, BlocksConfig(64, 8, False), H200)
    assert len(kernel.counts.parts) == len(apart.launches)


def test_defaults_are_legal_and_declare_what_is_necessary():
    for name in ("softmax_odd", "matmul", "argmax", "mean", "conv"):
        for workload in workloads(name):
            space, need = CUDA_TIR.space(workload, H200), get_op("tir").counts(workload)
            assert space.legal(space.default)
            kernel = CUDA_TIR.lower(workload, space.default, H200)
            limits.check(kernel, H200)
            assert kernel.args == get_op("tir").args(workload)
            assert all(kernel.counts.ops[k] >= n for k, n in need.ops.items())
            assert kernel.counts.bytes["dram"] >= need.bytes["dram"]


def test_gpus_and_cpus_do_not_get_each_other_s_kernels():
    (workload,) = workloads("gelu")
    assert [s.name for s in schedules_for(workload, H200)] == ["tir.cuda"]
    assert "tir.cuda" not in [s.name for s in schedules_for(workload, local_cpu())]


def test_what_has_no_text_is_refused_with_the_reason():
    @T.prim_func(s_tir=True)
    def scan(a: T.Buffer((8,), "float32"), b: T.Buffer((8,), "float32")):
        for i in range(8):
            with T.sblock("scan"):
                vi = T.axis.opaque(8, i)
                T.reads(a[vi])
                T.writes(b[vi])
                b[vi] = a[vi]

    workload = functions.workload_of(scan)
    assert not CUDA_TIR.supports(workload, H200)
    with pytest.raises(ValueError, match="iterations in a certain order"):
        prepared(scan)
