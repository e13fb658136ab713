"""Pages of KV caches that sequences take from one pool: block tables.

With ``page`` positions in a page and a ``pool`` of so many pages, the caches of all sequences are one array
of slots, ``[pool * page, KV, D]``, and a state ``pages`` int32 ``[B, width]``, the block table, says where
they lie: position j of sequence i is in slot ``pages[i, j // page] * page + j % page``. Sequences may name
the same page: then it holds positions of an equal beginning, and none of them appends to it. What a table
holds behind the page of its sequence's newest position is not looked at. The method is that of PagedAttention
(Kwon et al., 2023).

So an op over pages is defined by the op over what each sequence's pages hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mimo_compile.errors import UsageError
from mimo_compile.ir.caches import FORMATS, parse_cache_format
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.ops.base import Arg, Array, OpDef, Param
from mimo_compile.ir.workload import Workload

PARAMS = (Param("page", int, 0), Param("pool", int, 0))
TABLE = "pages"
"""Name of the argument that holds the block tables."""
CACHES = ("k_cache", "v_cache")
_LANES = 16
_ENTRY = 4
"""Bytes of an entry of a table."""


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


def check_pages(op: str, p: Mapping[str, Any]) -> None:
    """Refuse pages that kernels have no layout for, and pools that are too small.

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
    if p["c"] not in FORMATS or p["lay"] or p.get("arith", "float") != "float":
        raise UsageError(
            f"{op}: page={page} is for caches of float numbers in their usual order, and float arithmetic",
            remedy="leave out c, lay and arith, or use c=bf16",
        )
    if p.get("window") or p.get("first"):
        raise UsageError(
            f"{op}: page={page} is for caches of whole contexts; a ring has no pages",
            remedy="leave out page and pool, or window and first",
        )
    if pool < (least := least_pool(p)):
        raise UsageError(
            f"{op}: pool={pool} pages are too few for cap={p['cap']} and b={p['b']}",
            remedy=f"use pool={least} or more",
        )


def paged_args(args: Sequence[Arg], p: Mapping[str, Any]) -> tuple[Arg, ...]:
    """Return the arguments of ``b`` sequences over a pool from those of one with a cache of its own."""
    b, slots = p["b"], p["pool"] * p["page"]
    out = []
    for a in args:
        shape = a.shape
        if a.name in CACHES:
            shape = (slots, *shape[1:])
        elif a.name == "pos":
            shape = (b, *shape) if b > 1 else shape
        elif a.role in ("input", "output"):
            shape = (b * shape[0], *shape[1:])
        if a.name == CACHES[0]:
            out.append(Arg(TABLE, "state", (b, width_of(p["cap"], p["page"])), "int32"))
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


def together(
    op: OpDef, workload: Workload, parts: Sequence[Mapping[str, Array]], rng: np.random.Generator,
    fill: Callable[[tuple[int, ...]], Array],
) -> dict[str, Array]:  # fmt: skip
    """Return inputs of all sequences from those of each alone, whose caches go where drawn tables say.

    Args:
        op: The op.
        workload: Over pages.
        parts: Inputs of each sequence, whose caches ``[cap, KV, D]`` count up to the newest position.
        rng: Draws the tables.
        fill: Returns numbers of a shape, for slots where no sequence has a position.
    """
    p, args = op.full(workload), {a.name: a for a in op.args(workload)}
    encode = parse_cache_format(p["c"]).encode
    pools = {n: encode(fill(args[n].shape).astype(np.float32)) for n in CACHES}
    out: dict[str, Array] = {}
    for name, first in parts[0].items():
        if args[name].role == "weight":
            out[name] = first
        elif name in CACHES:
            continue
        elif name == "pos":
            out[name] = np.stack([part[name] for part in parts]) if p["b"] > 1 else first
        else:
            out[name] = np.concatenate([part[name] for part in parts])
    table = out[TABLE] = drawn_tables(p, places_of(out["pos"]), rng)
    lengths = [start + valid for start, valid in places_of(out["pos"])]
    for i in np.argsort(lengths):  # what is shared is the longest one's
        for name, pool in pools.items():
            for j in range(pages_of(lengths[i], p["page"])):
                rows = parts[i][name][j * p["page"] : min((j + 1) * p["page"], lengths[i])]
                first_slot = int(table[i, j]) * p["page"]
                pool[first_slot : first_slot + len(rows)] = rows
    return out | pools


def gathered(p: Mapping[str, Any], arrays: Mapping[str, Array], i: int) -> dict[str, Array]:
    """Return the caches ``[cap, KV, D]`` of sequence ``i``; NaN behind its newest position."""
    pos, table, page = arrays["pos"].reshape(-1, 2), arrays[TABLE], p["page"]
    length = int(pos[i].sum())
    at = np.arange(length)
    slots = table[i, at // page] * page + at % page
    out = {}
    for name in CACHES:
        if name in arrays:
            pool = arrays[name]
            own = np.full((p["cap"], *pool.shape[1:]), 0x7FC0 if pool.dtype.kind == "u" else np.nan)
            out[name] = own.astype(pool.dtype)
            out[name][:length] = pool[slots]
    return out


def split(
    p: Mapping[str, Any],
    roles: Mapping[str, str],
    inputs: Mapping[str, Array],
    arrays: Mapping[str, Array],
) -> Iterator[dict[str, Array]]:
    """Yield the part of canonical arrays that belongs to each sequence, with caches of its own.

    Args:
        p: Parameters of the workload.
        roles: Of its arguments.
        inputs: Those that say where the sequences' pages are: ``pos`` and ``pages``.
        arrays: Inputs, weights, states or outputs by name, those there are.
    """
    where = {name: inputs[name] for name in ("pos", TABLE)}
    for i in range(p["b"]):
        held = gathered(p, {**arrays, **where}, i)
        out = {}
        for name, a in arrays.items():
            if name in held:
                out[name] = held[name]
            elif name == "pos":
                out[name] = a.reshape(-1, 2)[i]
            elif roles[name] == "weight":
                out[name] = a
            elif name != TABLE:
                rows = len(a) // p["b"]
                out[name] = a[i * rows : (i + 1) * rows]
        yield out


def joined(
    p: Mapping[str, Any],
    inputs: Mapping[str, Array],
    parts: Sequence[Mapping[str, Array]],
    kept: Callable[[str], Array],
) -> dict[str, Array]:
    """Inverse of `split` for results: rows one after the other, and caches where they were appended to.

    Args:
        p: Parameters of the workload.
        inputs: ``pos`` and ``pages`` among them.
        parts: Results of each sequence.
        kept: Returns what a cache's results are in slots that no sequence appended to; a new array.
    """
    out: dict[str, Array] = {}
    for name in parts[0]:
        if name not in CACHES:
            out[name] = np.concatenate([part[name] for part in parts])
            continue
        out[name] = kept(name)
        for i, (start, valid) in enumerate(places_of(inputs["pos"])):
            at = np.arange(start, start + valid)
            slots = inputs[TABLE][i, at // p["page"]] * p["page"] + at % p["page"]
            out[name][slots] = parts[i][name][at]
    return out


def one_by_one(
    method: Callable[..., dict[str, Array]],
    op: Any,
    p: Mapping[str, Any],
    alone: Any,
    arrays: Sequence[Mapping[str, Array]],
    roles: Mapping[str, str],
) -> dict[str, Array]:
    """Compute an op's results, or their bounds, sequence by sequence.

    What no sequence appends to stays as it was, to the bit: it is what the inputs say, and its bound is 0.

    Args:
        method: Of the op, for ``alone`` and arrays.
        op: The op.
        p: Parameters of the workload.
        alone: The workload of one sequence.
        arrays: Inputs, and what else the method takes.
        roles: Of the workload's arguments.
    """
    inputs = arrays[0]
    parts = zip(*(split(p, roles, inputs, each) for each in arrays), strict=True)
    made = [method(op, alone, *given) for given in parts]

    def kept(name: str) -> Array:
        if len(arrays) > 1:
            return np.zeros(inputs[name].shape)
        found: Array = parse_cache_format(p["c"]).decode(inputs[name]).astype(np.float64)
        return found

    return joined(p, inputs, made, kept)


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
