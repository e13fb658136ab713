"""Generic functions for GPUs, by names that stand where other ops have the text of a workload."""

from __future__ import annotations

from functools import cache

from mimo_compile.ir.ops import parse_workload
from mimo_compile.ir.workload import Workload

FUNCTIONS = ("tir:softmax", "tir:layer_norm", "tir:logits", "tir:argmax", "tir:gather", "tir:join")


def parsed(text: str) -> Workload:
    """Return the workload of a text, or of one of the functions here."""
    return _function(text) if text in FUNCTIONS else parse_workload(text)


@cache
def _function(name: str) -> Workload:
    """Build a function as the pipeline does; TVM is loaded when the first one is asked for."""
    from generic_cases import Case, legalised_case
    from tvm.relax import op as R

    from mimo_compile.ir import functions

    case = {
        "tir:softmax": Case(lambda x: R.nn.softmax(x, -1), [(64, 4096)]),
        "tir:layer_norm": Case(
            lambda x, g, b: R.nn.layer_norm(x, g, b, axes=[-1]), [(64, 4096), (4096,), (4096,)]
        ),
        "tir:logits": Case(
            lambda x, w: R.matmul(R.nn.silu(x), R.permute_dims(w, [1, 0])), [(4, 512), (300, 512)]
        ),
        "tir:argmax": Case(lambda x: R.argmax(x, -1), [(8, 2000)]),
        "tir:gather": Case(
            lambda t, i: R.take(t, i, axis=0), [(1000, 384), (64,)], None, ("float32", "int64"),
        ),
        "tir:join": Case(lambda a, b: R.nn.gelu(R.concat([a, b], 1)), [(64, 500), (64, 77)]),
    }[name]  # fmt: skip
    return functions.workload_of(legalised_case(case)[-1][0])
