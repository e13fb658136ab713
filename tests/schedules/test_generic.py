"""Scheduled generic functions equal the unscheduled ones and numpy; rules that must fire do."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mimo_compile._tvm import as_aligned, compiler, empty_aligned, from_numpy, load_object
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import PRESETS, local_cpu
from mimo_compile.ir.ops import parse_workload
from mimo_compile.schedules import schedules_for
from mimo_compile.schedules.base import Kernel
from mimo_compile.schedules.compile import assembly, compile_kernels
from mimo_compile.schedules.generic import x86_tir
from mimo_compile.schedules.generic.blocks import block_facts
from mimo_compile.schedules.generic.x86_tir import TirConfig, default_config, lower_tir

tvm = compiler()
from tvm import relax
from tvm.relax import op as R
from tvm.s_tir.schedule import ScheduleError
from tvm.script import relax as script

CPU = local_cpu()


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def gelu(x):
    from math import erf

    return 0.5 * x * (1 + np.vectorize(erf)(x / 2**0.5))


def layer_norm(x, g, b):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-5) * g + b


def conv(x, w, stride=1):
    x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (2, 3))[:, :, ::stride, ::stride]
    return np.einsum("nchwyx,fcyx->nfhw", windows, w)


CASES = {
    "softmax": (lambda x: R.nn.softmax(x, -1), [(3, 5, 48)], softmax),
    "softmax_odd": (lambda x: R.nn.softmax(x, -1), [(12, 7, 53)], softmax),
    "layer_norm": (lambda *a: R.nn.layer_norm(*a, axes=[-1]), [(6, 64), (64,), (64,)], layer_norm),
    "gelu": (R.nn.gelu, [(5, 21)], gelu),
    "silu": (R.nn.silu, [(5, 32)], lambda x: x / (1 + np.exp(-x))),
    "tanh": (R.tanh, [(7, 33)], np.tanh),
    "conv": (lambda x, w: R.nn.conv2d(x, w, padding=1), [(1, 3, 8, 16), (8, 3, 3, 3)], conv),
    "conv_stride": (
        lambda x, w: R.nn.conv2d(x, w, strides=2, padding=1),
        [(2, 3, 9, 14), (4, 3, 3, 3)],
        lambda x, w: conv(x, w, 2),
    ),
    "matmul": (R.matmul, [(2, 12, 7), (2, 7, 64)], np.matmul),
    "matmul_ragged": (R.matmul, [(2, 37, 19), (2, 19, 48)], np.matmul),
    "matmul_odd": (R.matmul, [(3, 19, 37), (3, 37, 53)], np.matmul),
    "matmul_nt": (
        lambda a, b: R.matmul(a, R.permute_dims(b, [1, 0])),
        [(12, 32), (20, 32)],
        lambda a, b: a @ b.T,
    ),
    "linear_gelu": (
        lambda a, b, c: R.nn.gelu(R.add(R.matmul(a, b), c)),
        [(17, 7), (7, 48), (48,)],
        lambda a, b, c: gelu(a @ b + c),
    ),
    "transpose": (lambda a: R.permute_dims(a, [0, 2, 1, 3]), [(2, 5, 6, 16)],
                  lambda a: a.transpose(0, 2, 1, 3)),
    "concat": (lambda a, b: R.concat([a, b], 1), [(3, 5), (3, 7)],
               lambda a, b: np.concatenate([a, b], 1)),
    "mean": (lambda a: R.mean(a, [1, 2]), [(4, 5, 16)], lambda a: a.mean((1, 2))),
    "sum_all": (R.sum, [(7, 9)], np.sum),
    "pad": (lambda a: R.nn.pad(a, [0, 0, 1, 2]), [(4, 16)], lambda a: np.pad(a, ((0, 0), (1, 2)))),
}  # fmt: skip


def legalised(name):
    """Return the PrimFuncs of one case, fused as the pipeline does it, in the order of their calls."""
    make, shapes, _ = CASES[name]
    builder = relax.BlockBuilder()
    inputs = [relax.Var(f"x{i}", script.Tensor(s, "float32")) for i, s in enumerate(shapes)]
    with builder.function("main", inputs):
        with builder.dataflow():
            out = builder.emit_output(builder.emit(make(*inputs)))
        builder.emit_func_output(out)
    passes = relax.transform
    module = builder.get()
    for step in (
        passes.LegalizeOps(),
        passes.AnnotateTIROpPattern(),
        passes.FuseOps(),
        passes.FuseTIR(),
    ):
        module = step(module)
    bindings = module["main"].body.blocks[0].bindings
    calls = [b.value for b in bindings if hasattr(b.value, "op") and hasattr(b.value.op, "name")]
    calls = [c for c in calls if c.op.name == "relax.call_tir"]
    return [module[c.args[0]] for c in calls]


def run(kernel, inputs, poison=np.nan):
    code = load_object(compile_kernels([kernel], CPU))
    arrays, feed = [], iter(inputs)
    for arg in kernel.args:
        array = empty_aligned(arg.shape, arg.dtype)
        array[...] = poison if arg.role == "output" else next(feed)
        arrays.append(array)
    code[kernel.name](*(from_numpy(as_aligned(a)) for a in arrays))
    return [a for a, arg in zip(arrays, kernel.args, strict=True) if arg.role == "output"]


@pytest.fixture
def always_parallel(monkeypatch):
    monkeypatch.setattr(x86_tir, "PARALLEL_WORK", 1)


@pytest.mark.parametrize("name", CASES)
def test_scheduled_equals_unscheduled_and_numpy(name, always_parallel):
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal(s, dtype=np.float32) for s in CASES[name][1]]
    scheduled, plain = list(inputs), list(inputs)
    for i, func in enumerate(legalised(name)):
        kernel = lower_tir(func, f"{name}_{i}", default_config(func), CPU)
        assert kernel.compact
        bare = Kernel(
            f"bare_{i}", func.with_attr("global_symbol", f"bare_{i}"), kernel.args, Counts()
        )
        count = sum(a.role == "input" for a in kernel.args)
        if count < len(scheduled):  # a chain: the last value goes first or last, by its shape
            take = [scheduled[0], scheduled[-1]] if count == 2 else scheduled[-1:]
            take_plain = [plain[0], plain[-1]] if count == 2 else plain[-1:]
            shapes = [a.shape for a in kernel.args if a.role == "input"]
            if [t.shape for t in take] != shapes:
                take, take_plain = scheduled[-1:], plain[-1:]
        else:
            take, take_plain = scheduled, plain
        scheduled += run(kernel, take)
        plain += run(bare, take_plain)
    expected = CASES[name][2](*[a.astype(np.float64) for a in inputs])
    assert np.allclose(scheduled[-1], plain[-1], rtol=2e-5, atol=2e-6)
    assert np.allclose(scheduled[-1], expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["softmax_odd", "matmul_ragged", "conv", "layer_norm"])
def test_every_knob_gives_the_same(name, always_parallel):
    rng = np.random.default_rng(1)
    inputs = [rng.standard_normal(s, dtype=np.float32) for s in CASES[name][1]]
    (func,) = legalised(name)
    expected = CASES[name][2](*[a.astype(np.float64) for a in inputs])
    for config in (TirConfig(False, 1, 1, 1), TirConfig(True, 8, 2, 3), TirConfig(False, 16, 8, 6)):
        (got,) = run(lower_tir(func, f"k_{name}", config, CPU), inputs)
        assert np.allclose(got, expected, rtol=2e-5, atol=2e-5), config


def test_matmul_runs_on_vectors_of_multiply_adds():
    (func,) = legalised("matmul")
    v3 = PRESETS["x86-64-v3"]
    code = assembly([lower_tir(func, "vectors", TirConfig(False), v3)], v3)
    assert code.count("vfmadd") >= 8
    assert "ymm" in code


def test_gelu_calls_no_library():
    (func,) = legalised("gelu")
    code = assembly([lower_tir(func, "lib", TirConfig(False), CPU)], CPU)
    assert "erff@PLT" not in code
    assert "expf@PLT" not in code


def test_functions_of_the_expansion_are_accurate_and_keep_nan():
    x = np.concatenate(
        [np.linspace(-100, 100, 4001), np.linspace(-1, 1, 998), [np.nan]]
    ).astype(np.float32)  # fmt: skip
    wide = x.astype(np.float64)
    for op, want in (
        (R.exp, np.exp),
        (R.tanh, np.tanh),
        (R.sigmoid, lambda v: 1 / (1 + np.exp(-v))),
    ):
        CASES["probe"] = (op, [x.shape], want)
        try:
            (func,) = legalised("probe")
        finally:
            del CASES["probe"]
        (got,) = run(lower_tir(func, "probe", TirConfig(False), CPU), [x])
        with np.errstate(over="ignore"):
            expected = want(wide)
        assert np.isnan(got[-1])
        error = np.abs(got[:-1] - expected[:-1]) / np.maximum(np.abs(expected[:-1]), 1e-37)
        assert error[np.abs(wide[:-1]) < 87].max() < 1e-6


def test_only_pays_for_threads_with_enough_work():
    assert not default_config(legalised("gelu")[0]).parallel
    (func,) = legalised("matmul_odd")
    assert default_config(func).parallel == (x86_tir.PARALLEL_WORK <= 3 * 19 * 37 * 53)


def test_counts_and_arguments_of_a_matmul():
    (func,) = legalised("matmul")
    kernel = lower_tir(func, "a b-c", TirConfig(), CPU)
    assert kernel.name == "a_b_c"
    assert [a.role for a in kernel.args] == ["input", "input", "output"]
    assert kernel.counts.ops["fma_f32"] == 2 * 12 * 7 * 64
    assert kernel.counts.bytes["dram"] == 4 * 2 * (12 * 7 + 7 * 64 + 12 * 64)


def test_a_rule_that_is_refused_leaves_the_block_as_it_was(monkeypatch):
    def refuse(*_, **__):
        raise ScheduleError("a diagnosis\n\nError message: no such loop\n")

    for rule in ("tiled_rule", "lanes_rule", "columns_rule", "outer_rule", "spatial_rule"):
        monkeypatch.setattr(x86_tir, rule, refuse)
    (func,) = legalised("matmul")
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(s, dtype=np.float32) for s in CASES["matmul"][1])
    kernel = lower_tir(func, "serial", TirConfig(), CPU)
    (got,) = run(kernel, [a, b])
    assert np.allclose(got, a @ b, rtol=1e-5, atol=1e-5)
    assert len(kernel.notes) == 4
    assert all(note.startswith("matmul: ") and "no such loop" in note for note in kernel.notes)


def test_what_is_no_refusal_is_not_swallowed(monkeypatch):
    def broken(*_, **__):
        raise TypeError("a mistake in a rule")

    monkeypatch.setattr(x86_tir, "tiled_rule", broken)
    with pytest.raises(TypeError, match="a mistake"):
        lower_tir(legalised("matmul")[0], "broken", TirConfig(), CPU)


def test_real_refusals_are_noted_and_good_schedules_have_none():
    assert lower_tir(legalised("matmul")[0], "good", TirConfig(), CPU).notes == ()
    schedule = tvm.s_tir.Schedule(legalised("gelu")[0])
    notes = []

    def twice(copy):
        (block, *_) = block_facts(copy)
        loop = copy.get_loops(copy.get_sblock(block.name))[0]
        copy.vectorize(loop)
        copy.vectorize(loop)
        copy.parallel(loop)
        copy.compute_inline(copy.get_sblock("there_is_none"))
        return True

    assert x86_tir._attempt(schedule, "twice", notes, twice) is None
    assert len(notes) == 1 and notes[0].startswith("twice: ")


def test_buffers_of_one_name_are_told_apart():
    # TVM names a product inside a fused gelu like its result: both would pass for outputs
    kernel = lower_tir(legalised("gelu")[0], "one_pass", TirConfig(), CPU)
    assert [f.output for f in block_facts(tvm.s_tir.Schedule(legalised("gelu")[0]))].count(
        True
    ) == 1
    passes = [x for x in str(kernel.func).splitlines() if x.strip().startswith("with T.sblock(")]
    assert len(passes) == 1  # over memory


@pytest.mark.parametrize("axis,rows", [(-1, True), (-2, False)])
def test_a_softmax_runs_row_by_row(axis, rows, always_parallel):
    case = (lambda x: R.nn.softmax(x, axis), [(6, 32, 32)], None)
    CASES["probe"] = case
    try:
        (func,) = legalised("probe")
    finally:
        del CASES["probe"]
    kernel = lower_tir(func, f"rows_{rows}", TirConfig(), CPU)
    text = str(kernel.func)
    if rows:  # a single loop over rows, and the row's intermediate results inside of it
        assert sum(line.startswith("    for ") for line in text.splitlines()) == 1
        assert text.count("T.parallel(") == 1
    x = np.random.default_rng(0).standard_normal((6, 32, 32), dtype=np.float32) * 5
    (got,) = run(kernel, [x])
    wide = np.exp(x - x.max(axis, keepdims=True).astype(np.float64))
    assert np.allclose(got, wide / wide.sum(axis, keepdims=True), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("n", [8, 12, 31, 40, 100])
@pytest.mark.parametrize("vector", [1, 8, 16])
def test_rows_of_any_length(n, vector):
    CASES["probe"] = (lambda x: R.nn.log_softmax(x, -1), [(5, n)], None)
    try:
        (func,) = legalised("probe")
    finally:
        del CASES["probe"]
    x = np.random.default_rng(n).standard_normal((5, n), dtype=np.float32) * 3
    (got,) = run(lower_tir(func, f"log_{n}_{vector}", TirConfig(False, vector), CPU), [x])
    wide = x.astype(np.float64) - x.max(-1, keepdims=True)
    expected = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    assert np.allclose(got, expected, rtol=2e-5, atol=2e-6)


def test_two_results_of_one_reduction(always_parallel):
    CASES["argmax"] = (lambda a: R.argmax(a, -1), [(5, 33)], None)
    try:
        (func,) = legalised("argmax")
    finally:
        del CASES["argmax"]
    x = np.random.default_rng(0).standard_normal((5, 33), dtype=np.float32)
    (got,) = run(lower_tir(func, "argmax", TirConfig(), CPU), [x], poison=-1)
    assert got.tolist() == x.argmax(-1).tolist()


def test_what_the_passes_refuse_falls_back_to_the_plain_function(monkeypatch):
    (func,) = legalised("gelu")
    monkeypatch.setattr(x86_tir, "pass_error", lambda *_: "because")
    kernel = lower_tir(func, "plain", TirConfig(), CPU)
    assert kernel.notes[-1].startswith("plain: ") and kernel.notes[-1].endswith("because")
    x = np.random.default_rng(0).standard_normal((5, 21), dtype=np.float32)
    assert np.allclose(run(kernel, [x])[0], gelu(x.astype(np.float64)), atol=1e-6)


def test_rows_of_a_register_tile_share_what_they_load():
    # output channels of a convolution read the same pixels, rows of a matmul the same columns
    (conv,) = [f for f in block_facts(tvm.s_tir.Schedule(legalised("conv")[0])) if f.reduced]
    assert (conv.reuse_axis, conv.vector_axis) == (1, 3)
    (matmul,) = block_facts(tvm.s_tir.Schedule(legalised("matmul")[0]))
    assert (matmul.reuse_axis, matmul.vector_axis) == (1, 2)
    v3 = PRESETS["x86-64-v3"]
    code = assembly([lower_tir(legalised("conv")[0], "tile", TirConfig(False), v3)], v3)
    assert "vfmadd" in code and "ymm" in code


def test_facts_of_a_matmul():
    (facts,) = block_facts(tvm.s_tir.Schedule(legalised("matmul")[0]))
    assert facts.kinds == ("S", "S", "S", "R")
    assert facts.extents == (2, 12, 64, 7)
    assert facts.vector_axis == 2
    assert facts.output
    assert not facts.vectorisable  # the second operand is strided along the reduced axis


@pytest.mark.parametrize(
    "text",
    ["cached_attention:t=4,h=2,kv=1,d=16,dv=16,cap=40,window=9", "mpgemm:m=1,n=40,k=160,w=w1.58,a=a8",
     "rms_norm:t=3,d=70,residual=1"],
)  # fmt: skip
def test_buffers_of_kernels_written_by_hand_need_no_compaction(text):
    workload = parse_workload(text)
    schedule = schedules_for(workload, CPU)[0]
    kernel = schedule.lower(workload, schedule.space(workload, CPU).default, CPU)
    codes = {compile_kernels([dataclasses.replace(kernel, compact=c)], CPU) for c in (False, True)}
    assert not kernel.compact and len(codes) == 1
