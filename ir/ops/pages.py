"""Pages of KV caches that sequences take from one pool: block tables.

With ``page`` positions in a page and a ``pool`` of so many pages, the caches of all sequences are one array
of slots, ``[pool * page, KV, D]``, and a state ``pages`` int32 ``[B, width]``, the block table, says where
they lie: position j of sequence i is in slot ``pages[i, j // page] * page + j % page``. Sequences may name
the same page: then it holds positions of an equal beginning, and none of them appends to it. What a table
holds behind the page of its sequence's newest position is not looked at. The method is that of PagedAttention
(Kwon et al., 2023).

A row of another state may stand for several positions, a *span* of them: the bounds of 16 keys, the scales of
64. It lies in the page that holds its last position, so that pages of an equal beginning have it once it is
complete. With n rows in a page (one, where a span is longer), row r of sequence i is that of number
``pages[i, ((r + 1) * span - 1) // page] * n + r % n`` in the pool.

So an op over pages is defined by the op over what each sequence's pages hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mimo_compile.errors import UsageError
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.kv_groups import GROUPED
from mimo_compile.ir.ops.base import Arg, Array, Param

PARAMS = (Param("page", int, 0), Param("pool", int, 0))
TABLE = "pages"
"""Name of the argument that holds the block tables."""
CACHES = ("k_cache", "v_cache")
_LANES = 16
_ENTRY = 4
"""Bytes of an entry of a table."""


def rows_in_page(page: int, span: int) -> int:
    """Return how many rows of a state lie in a page, each of which stands for so many positions."""
    return max(page // span, 1)


def row_of(table: Any, page: int, span: int, row: Any) -> Any:
    """Return where rows of a sequence lie in a pool: integers, arrays or tensors; ``table`` is its own."""
    each = rows_in_page(page, span)
    return table[((row + 1) * span - 1) // page] * each + row % each


def span_of(p: Mapping[str, Any], name: str) -> int:
    """Return the positions that a row of a state stands for; 0: each sequence has its own."""
    if name in (*CACHES, "v_scale"):
        return 1
    if name == "k_scale":
        return GROUPED[p["c"]].group
    return int(p.get("size") or p["block"]) if name == "desc" else 0


def in_pool(p: Mapping[str, Any], name: str) -> bool:
    """Say whether a state is one that all sequences have together."""
    return paged(p) and span_of(p, name) > 0


def pages_of(positions: int, page: int) -> int:
    """Return how many pages hold so many positions."""
    return -(-positions // page)


def width_of(cap: int, page: int) -> int:
    """Return the entries of a sequence's table: a page each for ``cap`` positions, in whole vectors of 16."""
    return -(-pages_of(cap, page) // _LANES) * _LANES


def least_pool(p: Mapping[str, Any]) -> int:
    """Return the pages of one whole context, beside other sequences that append a call's tokens each."""
    others: int = (p["b"] - 1) * ((p["t"] + p["page"] - 2) // p["page"] + 1)
    return pages_of(p["cap"], p["page"]) + others


def paged(p: Mapping[str, Any]) -> bool:
    """Say whether a workload's parameters ask for caches in a pool."""
    return bool(p.get("pool"))


def check_pages(op: str, p: Mapping[str, Any], ring: int = 0) -> None:
    """Refuse pages that kernels have no layout for, and pools that are too small.

    Args:
        op: The op.
        p: Its parameters.
        ring: Positions that its caches are a ring for; 0: they hold whole contexts.

    Raises:
        UsageError: naming the op.
    """
    page, pool = p["page"], p["pool"]
    if not page and not pool:
        return
    if page % _LANES or not page:
        raise UsageError(
            f"{op}: page={page} is not a multiple of {_LANES} positions", remedy="use page=64"
        )
    if p.get("arith", "float") != "float":
        raise UsageError(f"{op}: page={page} is for float arithmetic", remedy="leave out arith")
    if (fmt := GROUPED.get(p.get("c", ""))) and page % fmt.group:
        raise UsageError(
            f"{op}: page={page} does not hold whole groups of {fmt.group} positions, as c={fmt} has them",
            remedy=f"use page={fmt.group}",
        )
    if ring:
        raise UsageError(
            f"{op}: page={page} is for caches of whole contexts; a ring has no pages",
            remedy="leave out page and pool, or window and first",
        )
    if pool < (least := least_pool(p)):
        raise UsageError(
            f"{op}: pool={pool} pages are too few for cap={p['cap']} and b={p['b']}",
            remedy=f"use pool={least} or more",
        )


def check_entries(op: str, p: Mapping[str, Any]) -> None:
    """Refuse entries of blocks that do not fit pages, beside what `check_pages` refuses.

    Raises:
        UsageError: naming the op.
    """
    check_pages(op, p)
    page, span = p["page"], span_of(p, "desc")
    if page and page % span and span % page:
        raise UsageError(
            f"{op}: blocks of {span} positions are neither parts of a page of {page} nor whole pages",
            remedy="use blocks of 1, 2, 4, 8, 16, ... positions",
        )


def paged_args(args: Sequence[Arg], p: Mapping[str, Any]) -> tuple[Arg, ...]:
    """Return the arguments of ``b`` sequences over a pool from those of one with states of its own."""
    b, page, named = p["b"], p["page"], False
    out = []
    for a in args:
        shape, span = a.shape, span_of(p, a.name) if a.role == "state" else 0
        if span:
            shape = (p["pool"] * rows_in_page(page, span), *shape[1:])
        elif a.role == "state" or a.name == "pos":
            shape = (b, *shape) if b > 1 else shape
        elif a.role != "weight":
            shape = (b * shape[0], *shape[1:])
        if span and not named:
            out.append(Arg(TABLE, "state", (b, width_of(p["cap"], page)), "int32"))
            named = True
        out.append(Arg(a.name, a.role, shape, a.dtype, a.mutated))
    return tuple(out)


def flat(p: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return parameters whose caches are the slots of a pool, as if those were one sequence's."""
    return {**p, "cap": p["pool"] * p["page"], "b": 1} if paged(p) else p


def places_of(pos: Array) -> list[tuple[int, int]]:
    """Return start and valid of each sequence."""
    return [(int(start), int(valid)) for start, valid in pos.reshape(-1, 2)]


def drawn_tables(
    p: Mapping[str, Any], places: Sequence[tuple[int, int]], rng: np.random.Generator
) -> Array:
    """Draw tables int32 ``[B, width]`` for sequences that append at these places (start, valid).

    Pages follow one another in no order. Those that are appended to are a sequence's own, and so are whole
    ones before them, as long as there are any; then the others share those of the longest.
    """
    page, order = p["page"], rng.permutation(p["pool"]).tolist()
    table = rng.integers(0, p["pool"], (p["b"], width_of(p["cap"], page)), np.int32)
    whole = [start // page for start, _ in places]
    for row, full, (start, valid) in zip(table, whole, places, strict=True):
        for j in range(full, pages_of(start + valid, page)):
            row[j] = order.pop()
    longest = int(np.argmax(whole))
    for i in sorted(range(p["b"]), key=lambda i: i != longest):
        for j in range(whole[i]):
            table[i, j] = order.pop() if order else table[longest, j]
    return table


def drawn_place(p: Mapping[str, Any], valid: int, rng: np.random.Generator) -> Array:
    """Draw start and valid int32 [2] of tokens that cross from page to page, where they can."""
    edge = p["page"] * int(rng.integers(pages_of(p["cap"], p["page"]) + 1))
    start = min(edge - int(rng.integers(valid + 1)), p["cap"] - valid)
    return np.array([max(start, 0), valid], np.int32)


def counted(p: Mapping[str, Any], each: Counts, positions: Sequence[int], numbers: float) -> Counts:
    """Return the work of all sequences over pages: tables are read, and no page of the pool twice.

    Args:
        p: Parameters of the workload.
        each: Work of the sequences with caches of their own.
        positions: KV length of each of them.
        numbers: Bytes of a position of the caches.
    """
    shared = max(0, sum(positions) - p["pool"] * p["page"])
    tables = table_bytes(positions, p["page"])
    return each + Counts({}, {"dram": tables - numbers * shared})


def table_bytes(positions: Iterable[int], page: int) -> float:
    """Return the bytes of the entries that name the pages of sequences of so many positions."""
    return float(_ENTRY * sum(pages_of(n, page) for n in positions))
