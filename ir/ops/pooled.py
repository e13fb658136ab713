"""What each sequence has in states that all of them have together, in pages of a pool (see `pages`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimo_compile.ir.caches import single_format
from mimo_compile.ir.kv_groups import GROUPED
from mimo_compile.ir.ops.base import Arg, Array, OpDef
from mimo_compile.ir.ops.pages import (
    TABLE,
    drawn_tables,
    pages_of,
    places_of,
    row_of,
    span_of,
)
from mimo_compile.ir.workload import Workload


def together(
    op: OpDef, workload: Workload, parts: Sequence[Mapping[str, Array]], rng: np.random.Generator,
    fill: Callable[[Arg], Array],
) -> dict[str, Array]:  # fmt: skip
    """Return inputs of all sequences from those of each alone, whose rows go where drawn tables say.

    Args:
        op: The op.
        workload: Over pages.
        parts: Inputs of each sequence, whose states count up to the newest position. It does not read rows
            of them that are NaN: another one that shares them may.
        rng: Draws the tables.
        fill: Returns what a state of the pool holds where no sequence has a row.
    """
    p, args = op.full(workload), {a.name: a for a in op.args(workload)}
    pools = {n: fill(a) for n, a in args.items() if a.role == "state" and span_of(p, n)}
    out: dict[str, Array] = {}
    for name, first in parts[0].items():
        if args[name].role == "weight":
            out[name] = first
        elif name in pools:
            continue
        elif name == "pos" or args[name].role == "state":
            out[name] = np.stack([part[name] for part in parts]) if p["b"] > 1 else first
        else:
            out[name] = np.concatenate([part[name] for part in parts])
    table = out[TABLE] = drawn_tables(p, places_of(out["pos"]), rng)
    lengths = [start + valid for start, valid in places_of(out["pos"])]
    for i in np.argsort(lengths):  # what is shared is the longest one's
        for name, pool in pools.items():
            span = span_of(p, name)
            rows = parts[i][name][: lengths[i] // span]
            at = row_of(table[i], p["page"], span, np.arange(len(rows)))
            known = ~_is_poison(rows).any(tuple(range(1, rows.ndim)))
            pool[at[known]] = rows[known]
    return out | pools


def _is_poison(rows: Array) -> Array:
    """Say which elements are NaN, bfloat16 ones among them."""
    if rows.dtype == np.uint16:
        return (rows & 0x7FFF) > 0x7F80
    return np.isnan(rows) if rows.dtype.kind == "f" else np.zeros(rows.shape, bool)


def poison(arg: Arg) -> Array:
    """Return what nobody may read, in the shape and type of an argument: NaN."""
    return _unknown(arg.shape, np.uint16 if arg.dtype == "bfloat16" else np.dtype(arg.dtype))


def _unknown(shape: tuple[int, ...], dtype: Any) -> Array:
    """Return NaN, of bfloat16 as its bits, and of codes the largest."""
    wrong = {np.dtype(np.uint16): 0x7FC0, np.dtype(np.uint8): 255}
    return np.full(shape, wrong.get(np.dtype(dtype), np.nan), dtype)


def gathered(p: Mapping[str, Any], arrays: Mapping[str, Array], i: int) -> dict[str, Array]:
    """Return the rows of pooled states, e.g. ``[cap, KV, D]``, of sequence ``i``; NaN behind its last one."""
    pos, table, page = arrays["pos"].reshape(-1, 2), arrays[TABLE], p["page"]
    length = int(pos[i].sum())
    out = {}
    for name, pool in arrays.items():
        if span := span_of(p, name):
            own = _unknown((pages_of(p["cap"], span), *pool.shape[1:]), pool.dtype)
            at = row_of(table[i], page, span, np.arange(length // span))
            own[: len(at)] = pool[at]
            out[name] = own
    return out


def split(
    p: Mapping[str, Any],
    roles: Mapping[str, str],
    inputs: Mapping[str, Array],
    arrays: Mapping[str, Array],
) -> Iterator[dict[str, Array]]:
    """Yield the part of canonical arrays that belongs to each sequence, with states of its own.

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
            elif name == TABLE or name not in roles:  # another workload's, a sink for instance
                continue
            elif roles[name] == "weight":
                out[name] = a
            elif roles[name] == "state":
                out[name] = a[i] if p["b"] > 1 else a
            else:
                rows = len(a) // p["b"]
                out[name] = a[i * rows : (i + 1) * rows]
        yield out


def joined(
    p: Mapping[str, Any],
    roles: Mapping[str, str],
    inputs: Mapping[str, Array],
    parts: Sequence[Mapping[str, Array]],
    kept: Callable[[str], Array],
) -> dict[str, Array]:
    """Inverse of `split` for results: rows one after the other, and pooled states where sequences have rows.

    Args:
        p: Parameters of the workload.
        roles: Of its arguments.
        inputs: ``pos`` and ``pages`` among them.
        parts: Results of each sequence.
        kept: Returns what a state's results are in rows that no sequence has; a new array.
    """
    out: dict[str, Array] = {}
    for name in parts[0]:
        span = span_of(p, name) if roles[name] == "state" else 0
        if span:
            out[name] = kept(name)
            for i, (start, valid) in enumerate(places_of(inputs["pos"])):
                rows = np.arange((start + valid) // span)
                at = row_of(inputs[TABLE][i], p["page"], span, rows)
                out[name][at] = parts[i][name][rows]
        elif roles[name] == "state":
            own = [part[name] for part in parts]
            out[name] = np.stack(own) if p["b"] > 1 else own[0]
        else:
            out[name] = np.concatenate([part[name] for part in parts])
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

    Rows that no sequence has stay as they were, to the bit: as the inputs say, and their bound is 0.

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
        if p.get("c") in GROUPED:
            return inputs[name].copy()
        fmt = single_format(p.get("e", "f32") if name == "desc" else p["c"])
        found: Array = fmt.decode(inputs[name]).astype(np.float64)
        return found

    return joined(p, roles, inputs, made, kept)


def own_rows(
    pool: Tensor, table: Tensor, page: int, span: int, length: int, most: int = 0
) -> Tensor:
    """Return a copy of a pool's rows of a sequence of ``length`` positions, and zeros up to ``most``."""
    rows = pool[row_of(table.long(), page, span, torch.arange(length // span))]
    if most <= len(rows):
        return rows
    return torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])])


def put_rows(pool: Tensor, table: Tensor, page: int, span: int, rows: Tensor) -> None:
    """Inverse of `own_rows`: write the rows that a sequence has, in place."""
    pool[row_of(table.long(), page, span, torch.arange(len(rows)))] = rows


def described(
    one: Callable[[Tensor, Tensor, Tensor], None],
    pos: Tensor,
    k_cache: Tensor,
    desc: Tensor,
    table: Tensor,
    page: int,
    span: int,
) -> None:
    """Let ``one(pos, keys, entries)`` change the entries of each sequence, which lie in pages."""
    for at, own in zip(pos.reshape(-1, 2), table, strict=True):
        length = int(at.sum())
        entries = own_rows(desc, own, page, span, length)
        one(at, own_rows(k_cache, own, page, 1, length), entries)
        put_rows(desc, own, page, span, entries)


def of_each(
    pos: Tensor, states: Sequence[Tensor], spans: Sequence[int], table: Tensor, page: int, cap: int
) -> list[Tensor]:
    """Return the rows of pooled states that each sequence has, as if it had states of its own.

    Args:
        pos: int32 ``[2]`` or ``[B, 2]``, start and valid.
        states: In pages.
        spans: Positions of a row of each; 0: it is one that each sequence has for itself.
        table: Block tables, int32 ``[B, width]``.
        page: Positions in a page.
        cap: Most positions of a sequence; rows behind its own are zero.

    Returns:
        Of each state ``[rows, ...]``, with ``pos [B, 2]`` ``[B, rows, ...]``.
    """
    out = []
    for state, span in zip(states, spans, strict=True):
        if not span:
            out.append(state)
            continue
        each = [
            own_rows(state, own, page, span, int(at.sum()), pages_of(cap, span))
            for at, own in zip(pos.reshape(-1, 2), table, strict=True)
        ]
        out.append(torch.stack(each) if pos.dim() == 2 else each[0])
    return out


def keep_each(
    pos: Tensor, states: Sequence[Tensor], own: Sequence[Tensor], spans: Sequence[int], table: Tensor,
    page: int,
) -> None:  # fmt: skip
    """Inverse of `of_each`: write the rows that sequences have to where they lie in the pool, in place."""
    for state, rows, span in zip(states, own, spans, strict=True):
        if span:
            each = rows if pos.dim() == 2 else rows[None]
            for at, mine, given in zip(pos.reshape(-1, 2), table, each, strict=True):
                put_rows(state, mine, page, span, given[: int(at.sum()) // span])
