"""Suites expand to workloads of their op, and conditions keep a part of them."""

from __future__ import annotations

import pytest

from mimo_compile.bench.suites import KINDS, suite, suite_names
from mimo_compile.errors import UsageError
from mimo_compile.ir.ops import parse_workload


@pytest.mark.parametrize("kind", KINDS)
def test_every_entry_is_a_workload_of_its_op(kind: str) -> None:
    for name in suite_names(kind):
        entries = suite(kind, name)
        assert entries
        for entry in entries:
            workload = parse_workload(entry)
            assert workload.op == KINDS[kind]


def test_llm_has_every_shape_at_every_number_of_tokens_in_every_format() -> None:
    entries = suite("mpgemm", "llm")
    assert len(set(entries)) == len(entries) == 5 * 5 * 6
    assert "mpgemm:m=512,n=3200,k=8640,w=w1.58,a=a8" in entries


def test_conditions_keep_a_part() -> None:
    assert suite("mpgemm", "llm:m=1+16,w=w4g64,n=4096,k=4096") == [
        "mpgemm:m=1,n=4096,k=4096,w=w4g64,a=a8",
        "mpgemm:m=16,n=4096,k=4096,w=w4g64,a=a8",
    ]
    assert suite("mpgemm", "llm:") == suite("mpgemm", "llm")
    assert len(suite("mpgemm", "llm:a=a8")) == 150  # parameters not written out have their defaults
    assert len(suite("mpgemm", "llm:bias=0,m=4")) == 30


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("llm:m=2", "m=1+4+16+128+512"),
        ("llm:m=1,w=w9", "w=w8+w4g64"),
        ("llm:colour=red", "a parameter of the op"),
        ("llm:m", "m=1+4"),
        ("everything", "use one of quick"),
    ],
)
def test_what_is_not_there_is_named_with_what_is(text: str, remedy: str) -> None:
    with pytest.raises(UsageError) as error:
        suite("mpgemm", text)
    assert remedy in str(error.value)
