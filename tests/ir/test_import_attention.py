"""Ops of one layer agree about the order of its caches."""

from __future__ import annotations

import pytest

from mimo_compile.errors import UsageError
from mimo_compile.ir.import_attention import ListConverters


@pytest.mark.parametrize("op", ["describe_blocks", "score_lowbit", "key_mean", "int8_attention"])
def test_ops_that_read_no_caches_by_rows_are_refused_there(op) -> None:
    converters = ListConverters(lambda *_, **__: None, lambda *_: "f32", lay="rows")
    with pytest.raises(UsageError, match=f"{op} does not read caches with lay=rows"):
        converters.table[f"{op}.default"](None, None)


def test_keys_are_indexed_where_caches_keep_each_by_itself() -> None:
    converters = ListConverters(lambda *_, **__: None, lambda *_: "f32")
    with pytest.raises(UsageError, match="index_keys reads caches with lay=rows, not lay="):
        converters.table["index_keys.default"](None, None)
