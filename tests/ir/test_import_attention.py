"""Ops of one layer agree about the order of its caches, and their arguments about extents."""

from __future__ import annotations

import pytest

from mimo_compile.errors import InputError, UsageError
from mimo_compile.ir.guard import check_arguments
from mimo_compile.ir.import_attention import ListConverters
from mimo_compile.ir.ops import get_op, parse_workload


@pytest.mark.parametrize("op", ["describe_blocks", "score_lowbit", "key_mean", "int8_attention"])
def test_ops_that_read_no_caches_by_rows_are_refused_there(op) -> None:
    converters = ListConverters(lambda *_, **__: None, lambda *_: "f32", lay="rows")
    with pytest.raises(UsageError, match=f"{op} does not read caches with lay=rows"):
        converters.table[f"{op}.default"](None, None)


def test_keys_are_indexed_where_caches_keep_each_by_itself() -> None:
    converters = ListConverters(lambda *_, **__: None, lambda *_: "f32")
    with pytest.raises(UsageError, match="index_keys reads caches with lay=rows, not lay="):
        converters.table["index_keys.default"](None, None)


@pytest.mark.parametrize(
    "text",
    [
        "index_keys:t=1,kv=2,d=8,cap=64,span=16",
        "append_entries:t=3,kv=1,d=8,cap=64",
        "score_keys:t=2,h=4,kv=2,d=8,cap=64,kind=channels,agg=mean,block=1,channels=4,span=16",
        "cached_attention:t=1,h=4,kv=2,d=8,dv=8,cap=64,sink=1",
    ],
)
def test_arguments_fit_the_workload_that_stands_for_them(text) -> None:
    workload = parse_workload(text)
    args = [a for a in get_op(workload.op).args(workload) if a.role != "output"]
    shapes = [list(a.shape) for a in args]
    check_arguments(workload, shapes)
    for i, arg in enumerate(args):
        for axis in range(len(shapes[i])):
            other = [list(s) for s in shapes]
            other[i][axis] += 1
            with pytest.raises(InputError, match=f"{arg.name} of {workload.op}.*has the extents"):
                check_arguments(workload, other)
    with pytest.raises(InputError, match="arguments, not"):
        check_arguments(workload, shapes[:-1])
