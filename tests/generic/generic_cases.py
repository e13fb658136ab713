"""Generic functions as the pipeline makes them, with what numpy says of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mimo_compile._tvm import compiler, empty_aligned, from_numpy, load_object, set_threads
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.passes.lower import lower_generic
from mimo_compile.schedules.compile import compile_kernels
from mimo_compile.search.measure.cases import make_case
from mimo_compile.search.measure.verify import judge

compiler()
from tvm import relax
from tvm.relax import op as R
from tvm.script import relax as script


@dataclass(frozen=True)
class Case:
    """An expression of Relax over inputs, and the same in numpy."""

    make: Callable[..., Any]
    shapes: list[tuple[int, ...]]
    want: Callable[..., Any] | None = None
    dtypes: tuple[str, ...] = ()
    below: int = 5
    """Whole numbers are drawn below it."""

    def dtype(self, i: int) -> str:
        return self.dtypes[i] if self.dtypes else "float32"

    def draw(self, rng: np.random.Generator) -> list[Any]:
        out = []
        for i, shape in enumerate(self.shapes):
            if self.dtype(i).startswith("float"):
                out.append(rng.standard_normal(shape).astype(self.dtype(i)))
            else:
                out.append(rng.integers(0, self.below, shape).astype(self.dtype(i)))
        return out


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def gelu(x):
    from scipy.special import erf

    return x * 0.5 * (1 + erf(x / np.sqrt(x.dtype.type(2))))


def layer_norm(x, g, b):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + x.dtype.type(1e-5)) * g + b


def conv(x, w, stride=1):
    x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (2, 3))[:, :, ::stride, ::stride]
    return np.einsum("nchwyx,fcyx->nfhw", windows, w)


CASES = {
    "softmax": Case(lambda x: R.nn.softmax(x, -1), [(3, 5, 48)], softmax),
    "softmax_odd": Case(lambda x: R.nn.softmax(x, -1), [(12, 7, 53)], softmax),
    "layer_norm": Case(
        lambda *a: R.nn.layer_norm(*a, axes=[-1]), [(6, 64), (64,), (64,)], layer_norm
    ),
    "gelu": Case(R.nn.gelu, [(5, 21)], gelu),
    "silu": Case(R.nn.silu, [(5, 32)], lambda x: x / (1 + np.exp(-x))),
    "conv": Case(lambda x, w: R.nn.conv2d(x, w, padding=1), [(1, 3, 8, 16), (8, 3, 3, 3)], conv),
    "conv_stride": Case(
        lambda x, w: R.nn.conv2d(x, w, strides=2, padding=1), [(2, 3, 9, 14), (4, 3, 3, 3)],
        lambda x, w: conv(x, w, 2),
    ),
    "matmul": Case(R.matmul, [(2, 12, 7), (2, 7, 64)], np.matmul),
    "matmul_odd": Case(R.matmul, [(3, 19, 37), (3, 37, 53)], np.matmul),
    "linear_gelu": Case(
        lambda a, b, c: R.nn.gelu(R.add(R.matmul(a, b), c)), [(17, 7), (7, 48), (48,)],
        lambda a, b, c: gelu(a @ b + c),
    ),
    "transpose": Case(
        lambda a: R.permute_dims(a, [0, 2, 1, 3]), [(2, 5, 6, 16)], lambda a: a.transpose(0, 2, 1, 3)
    ),
    "concat": Case(
        lambda a, b: R.concat([a, b], 1), [(3, 5), (3, 7)], lambda a, b: np.concatenate([a, b], 1)
    ),
    "mean": Case(lambda a: R.mean(a, [1, 2]), [(4, 5, 16)], lambda a: a.mean((1, 2))),
    "sum_all": Case(R.sum, [(7, 9)], lambda a: np.asarray(np.sum(a))),
    "take": Case(
        lambda t, i: R.take(t, i, axis=0), [(11, 32), (7,)], lambda t, i: t[i],
        ("float32", "int64"),
    ),
    "whole": Case(
        lambda a, b: R.add(R.multiply(a, b), b), [(6, 40), (6, 40)], lambda a, b: a * b + b,
        ("int32", "int32"),
    ),
    "argmax": Case(lambda a: R.argmax(a, -1), [(5, 33)], lambda a: a.argmax(-1)),
    "greater": Case(lambda a, b: R.greater(a, b), [(5, 33), (5, 33)], lambda a, b: a > b),
    "rsqrt": Case(R.rsqrt, [(5, 33)]),
    "cancelled": Case(
        lambda a: R.subtract(
            R.add(a, relax.const(1e8, "float32")), relax.const(1e8, "float32")
        ), [(4, 16)],
    ),
}  # fmt: skip


def legalised(name: str) -> list[tuple[Any, list[int], int]]:
    """Return the PrimFuncs of a case, fused as the pipeline does it, in the order of their calls.

    Each with the places of its arguments (inputs first, then results) and of its result.
    """
    return legalised_case(CASES[name])


def legalised_case(case: Case) -> list[tuple[Any, list[int], int]]:
    """Return the PrimFuncs of a case as `legalised` does."""
    builder = relax.BlockBuilder()
    inputs = [
        relax.Var(f"x{i}", script.Tensor(s, case.dtype(i))) for i, s in enumerate(case.shapes)
    ]
    with builder.function("main", inputs):
        with builder.dataflow():
            out = builder.emit_output(builder.emit(case.make(*inputs)))
        builder.emit_func_output(out)
    module = lower_generic(builder.get())
    main = module["main"]
    places = {hash(p): i for i, p in enumerate(main.params)}
    found = []
    for binding in main.body.blocks[0].bindings:
        call = binding.value
        if getattr(getattr(call, "op", None), "name", "") == "relax.call_tir":
            takes = [places[hash(a)] for a in call.args[1].fields]
            places[hash(binding.var)] = len(places)
            found.append((module[call.args[0]], takes, places[hash(binding.var)]))
        else:
            places[hash(binding.var)] = places.get(hash(call), -1)
    return found


def made(joint, schedule, rng):
    """Return the candidate of values that are drawn for each knob."""
    space = joint.spaces[schedule]
    for _ in range(500):
        config = space.make(**{k: v[rng.integers(len(v))] for k, v in space.knobs.items()})
        if space.legal(config):
            return joint.candidate(schedule, config)
    raise AssertionError("no legal config")


def check(w, kernel):
    """Build, run on fresh inputs and compare with the reference within its bound."""
    case = make_case(w, 5)
    code = load_object(compile_kernels([kernel], local_cpu()))
    arrays = {}
    for arg in kernel.args:
        arrays[arg.name] = empty_aligned(arg.shape, arg.dtype)
        if arg.role == "output":
            arrays[arg.name].view(np.uint8)[...] = 0xFF
        else:
            into = arrays[arg.name]  # bfloat16 travels as its bits
            (into.view(np.uint16) if arg.dtype == "bfloat16" else into)[...] = case.inputs[arg.name]
    set_threads(1)
    code[kernel.name](*(from_numpy(a) for a in arrays.values()))
    arrays = {
        a.name: arrays[a.name].view(np.uint16) if a.dtype == "bfloat16" else arrays[a.name]
        for a in case.args
    }
    ratio, message = judge(case.args, arrays, case.expected, case.bound, case.inputs)
    assert ratio <= 1, message
    return arrays
