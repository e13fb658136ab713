"""Generic functions by content, their reference in float64, and the bound of their rounding errors."""

from __future__ import annotations

import numpy as np
import pytest
from generic_cases import CASES, Case, check, legalised, legalised_case

from mimo_compile._tvm import compiler
from mimo_compile.errors import InputError, UsageError
from mimo_compile.ir import functions, tir_numbers
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.numerics import bf16_to_f32
from mimo_compile.ir.tir_numbers import FLOORS, UNITS, Num, Unsupported
from mimo_compile.ir.tir_reading import constant
from mimo_compile.ir.tir_reference import Evaluator, evaluate
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules import get_schedule
from mimo_compile.search.measure.verify import judge

tvm = compiler()
from tvm.relax import op as R
from tvm_ffi import structural_equal

CPU = local_cpu().with_threads(1)

U32 = 2.0**-24


@pytest.mark.parametrize("name", [n for n in CASES if CASES[n].want is not None])
def test_reference_is_what_numpy_says(name):
    case = CASES[name]
    rng = np.random.default_rng(0)
    inputs = case.draw(rng)
    values = dict(enumerate(inputs))
    for func, takes, gives in legalised(name):
        names = [f"p{i}" for i in range(len(func.params))]
        given = {n: values[t] for n, t in zip(names, takes, strict=False)}
        (result,) = evaluate(func, given, names).values()
        values[gives] = result.value
    wide = [x.astype(np.float64) if x.dtype.kind == "f" else x for x in inputs]
    expected = case.want(*wide)
    assert result.value.shape == expected.shape
    if expected.dtype.kind != "f":
        assert (result.value == expected).all() and not np.any(result.error)
        return
    assert np.allclose(result.value, expected, rtol=1e-5, atol=1e-6)
    assert np.isfinite(result.error).all()


@pytest.mark.parametrize("name", ["softmax", "layer_norm", "matmul", "conv", "mean", "gelu"])
def test_bound_holds_for_float32_and_refuses_a_wrong_element(name):
    case = CASES[name]
    ((func, _, _),) = legalised(name)
    workload = functions.workload_of(func)
    op = get_op("tir")
    inputs = op.make_inputs(workload, np.random.default_rng(3))
    expected, bound = op.reference(workload, inputs), None
    bound = op.bound(workload, inputs, expected)
    single = case.want(*(inputs[a.name] for a in op.args(workload) if a.role == "input"))
    assert single.dtype == np.float32
    error = np.abs(single - expected["out0"])
    assert (error <= bound["out0"]).all()
    # a thousandth of the typical size is no rounding
    typical = np.sqrt(np.mean(expected["out0"] ** 2))
    assert np.median(bound["out0"]) < 1e-3 * typical
    args = op.args(workload)
    assert judge(args, {"out0": single}, expected, bound, inputs)[0] <= 1
    wrong = single.copy()
    wrong.flat[wrong.size // 2] += np.float32(1e-2 * typical)
    assert judge(args, {"out0": wrong}, expected, bound, inputs)[0] > 1


def test_wrong_kernels_are_refused():
    """What a kernel may get wrong: a term, a tail, a neighbour's element, sums of low precision."""
    ((func, _, _),) = legalised("matmul_odd")
    workload = functions.workload_of(func)
    op = get_op("tir")
    inputs = op.make_inputs(workload, np.random.default_rng(1))
    expected = op.reference(workload, inputs)
    bound = op.bound(workload, inputs, expected)
    a, b = inputs["in0"], inputs["in1"]
    right = a @ b
    tail = right.copy()
    tail[..., -1] = 0
    wrong = {
        "a term": a[..., :-1] @ b[:, :-1], "the tail": tail, "a neighbour": np.roll(right, 1, -1),
        "half precision": (a.astype(np.float16) @ b.astype(np.float16)).astype(np.float32),
        "bfloat16": ((a.view(np.uint32) & 0xFFFF0000).view(np.float32)) @ b,
    }  # fmt: skip
    args = op.args(workload)
    assert judge(args, {"out0": right}, expected, bound, inputs)[0] <= 1
    backwards = np.einsum("bik,bkj->bij", a[..., ::-1], b[:, ::-1])
    assert judge(args, {"out0": backwards}, expected, bound, inputs)[0] <= 1
    for what, result in wrong.items():
        assert judge(args, {"out0": result}, expected, bound, inputs)[0] > 1, what


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("make", [lambda x: R.max(x, -1), lambda x: R.nn.softmax(x, -1)])
def test_lowest_numbers_of_short_types_are_exact(make, dtype):
    """What a maximum starts from; were it taken for rounded, no maximum could be verified."""
    ((func, _, _),) = legalised_case(Case(make, [(4, 8)], dtypes=(dtype,)))
    workload = functions.workload_of(func)
    op = get_op("tir")
    assert op.reason(workload) == ""
    inputs = op.make_inputs(workload, np.random.default_rng(0))
    expected = op.reference(workload, inputs)
    bound = op.bound(workload, inputs, expected)["out0"]
    if workload.text("does") == "max":
        x = bf16_to_f32(inputs["in0"]) if dtype == "bfloat16" else inputs["in0"]
        assert (expected["out0"] == x.max(-1)).all() and bound.max() <= 4 * FLOORS[dtype]
    kind = get_schedule("tir.x86_rules")
    check(workload, kind.lower(workload, kind.space(workload, CPU).default, CPU))


def test_constants_are_exact_where_a_type_has_them():
    has = {"float16": (65504.0, 0.5, 2.0**-24), "bfloat16": (-(2.0**127) * (2 - 2**-7), 1.5)}
    lacks = {"float16": (0.1, 65505.0, 1e6), "bfloat16": (0.1, 257.0, 1e-5), "float32": (0.1,)}
    for dtype, values in has.items():
        assert all(constant(v, dtype).error is None for v in values)
    for dtype, values in lacks.items():
        for v in values:
            assert constant(v, dtype).error == pytest.approx(UNITS[dtype] * abs(v))


def test_errors_of_a_sum_grow_with_its_length_in_any_order():
    rng = np.random.default_rng(0)
    for n in (10, 1000, 100_000):
        x = rng.standard_normal(n).astype(np.float32)
        got = tir_numbers.total(Num(x.astype(np.float64)), (0,), n, "float32")
        serial = np.float32(0)
        for v in x[:5000]:
            serial += v
        head = tir_numbers.total(Num(x[:5000].astype(np.float64)), (0,), min(n, 5000), "float32")
        assert abs(float(serial) - head.value.item()) <= head.error.item()
        assert got.error.item() == pytest.approx(n * U32 * np.abs(x.astype(np.float64)).sum())


def test_contraction_equals_the_plain_sum_of_products():
    rng = np.random.default_rng(1)
    for a_shape, b_shape, axes in (
        ((3, 5, 1, 7), (3, 1, 4, 7), (3,)),
        ((2, 1, 6, 3), (1, 5, 6, 3), (2, 3)),
        ((4, 1, 6), (1, 3, 1), (2,)),
        ((1, 3, 6), (4, 1, 6), (2,)),
    ):
        a, b = rng.standard_normal(a_shape), rng.standard_normal(b_shape)
        assert np.allclose(tir_numbers.matmul(a, b, axes), (a * b).sum(axes, keepdims=True))


def test_uncertain_comparisons_widen_what_they_choose_between():
    x = Num(np.array([1.0, 1.0]), np.array([0.5, 0.0]))
    y = Num(np.array([1.2, 1.2]))
    less = tir_numbers.BINARY["LT"](x, y, "bool")
    assert less.value.tolist() == [True, True] and less.error.tolist() == [1.0, 0.0]
    chosen = tir_numbers.select(less, Num(np.array([5.0, 5.0])), Num(np.array([9.0, 9.0])))
    assert chosen.value.tolist() == [5.0, 5.0] and chosen.err.tolist() == [4.0, 0.0]


def test_errors_of_what_loses_do_not_count():
    x = Num(np.array([1.0, 1.0, np.nan]), np.array([0.25, 0.25, 0.25]))
    y = Num(np.array([-9.0, 0.5, 0.0]), np.array([2.0, 2.0, 2.0]))
    assert tir_numbers.BINARY["Max"](x, y, "float32").err.tolist() == [0.25, 2.0, 2.0]
    assert tir_numbers.BINARY["Max"](y, x, "float32").err.tolist() == [0.25, 2.0, 2.0]
    assert tir_numbers.BINARY["Min"](x, y, "float32").err.tolist() == [2.0, 2.0, 2.0]
    assert tir_numbers.BINARY["Min"](Num(-x.value, x.error), Num(-y.value, y.error), "float32").err[
        0
    ] == pytest.approx(0.25)


def test_a_workload_is_its_content_and_not_its_names():
    ((first, _, _),) = legalised("softmax")
    ((again, _, _),) = legalised("softmax")
    ((other, _, _),) = legalised("softmax_odd")
    a = functions.workload_of(first.with_attr("global_symbol", "one"))
    b = functions.workload_of(again.with_attr("global_symbol", "two"))
    c = functions.workload_of(other)
    assert a == b != c
    assert str(a) == str(Workload.parse(str(a)))
    assert a.text("does") == "max_map_sum_map" and a.text("out") == "f32.3x5x48"


def test_a_function_travels_as_text(monkeypatch):
    ((func, _, _),) = legalised("matmul")
    workload = functions.workload_of(func)
    text = functions.text_of(workload)
    monkeypatch.setattr(functions, "_KNOWN", {})
    with pytest.raises(UsageError, match="not known here"):
        get_op("tir").args(workload)
    assert not functions.known(workload)
    with pytest.raises(InputError, match="not the text"):
        functions.learn(workload, "{}")
    wrong = functions.workload_of(legalised("gelu")[0][0])
    with pytest.raises(InputError, match="another function"):
        functions.learn(wrong.replace(hash="h0000000000000000"), text)
    functions.learn(workload, text)
    assert structural_equal(functions.function_of(workload), functions.plain(func))


def test_functions_come_from_a_source_that_was_added(monkeypatch):
    ((func, _, _),) = legalised("mean")
    workload = functions.workload_of(func)
    text = functions.text_of(workload)
    monkeypatch.setattr(functions, "_KNOWN", {})
    monkeypatch.setattr(functions, "_SOURCES", [])
    functions.add_source({workload.text("hash"): text}.get)
    assert functions.known(workload)


def test_variances_are_drawn_positive():
    ((func, _, _),) = legalised("rsqrt")
    workload = functions.workload_of(func)
    inputs = get_op("tir").make_inputs(workload, np.random.default_rng(0))
    assert (inputs["in0"] > 0).all()
    same = get_op("tir").make_inputs(workload, np.random.default_rng(0))
    assert (inputs["in0"] == same["in0"]).all()


@pytest.mark.parametrize("make", [R.floor_divide, R.floor_mod, R.mod])
def test_whole_divisors_are_not_zero(make):
    """A processor stops the process at one."""
    case = Case(make, [(5, 16), (5, 16)], dtypes=("int32", "int32"))
    ((func, _, _),) = legalised_case(case)
    workload = functions.workload_of(func)
    op = get_op("tir")
    assert op.reason(workload) == ""
    inputs = op.make_inputs(workload, np.random.default_rng(0))
    assert inputs["in1"].min() >= 1
    zeros = {**inputs, "in1": np.zeros_like(inputs["in1"])}
    with pytest.raises(Unsupported, match="a division by zero"):
        op.reference(workload, zeros)
    kind = get_schedule("tir.x86_rules")
    check(workload, kind.lower(workload, kind.space(workload, CPU).default, CPU))


def test_a_division_that_a_branch_guards_may_have_zeros():
    x = [tvm.tirx.Var(n, "int32") for n in "ab"]
    divided = tvm.tirx.floordiv(*x)
    follow = Evaluator()
    for v, n in zip(x, ([6, 7], [0, 2]), strict=True):
        follow.env[hash(v)] = Num(np.array(n, "int32"))
    guarded = tvm.tirx.if_then_else(x[1] != 0, divided, tvm.tirx.IntImm("int32", -1))
    assert follow.evaluate(guarded).value.tolist() == [-1, 3]
    both = tvm.tirx.Select(x[1] != 0, divided, tvm.tirx.IntImm("int32", -1))
    for computed in (divided, both):  # a select computes both
        with pytest.raises(Unsupported, match="a division by zero"):
            follow.evaluate(computed)


def test_what_cannot_be_verified_says_why():
    ((func, _, _),) = legalised("cancelled")
    workload = functions.workload_of(func)
    reason = get_op("tir").reason(workload)
    assert "cannot be verified" in reason and "rounding" in reason
    with pytest.raises(Unsupported):
        evaluate(func.with_body(tvm.tirx.Evaluate(tvm.tirx.IntImm("int32", 0))), {}, ["a", "b"])


def test_necessary_counts_of_a_matmul():
    ((func, _, _),) = legalised("matmul")
    counts = get_op("tir").counts(functions.workload_of(func))
    assert counts.ops == {"fma_f32": 2 * 12 * 7 * 64}
    assert counts.bytes["dram"] == 4 * 2 * (12 * 7 + 7 * 64 + 12 * 64)
