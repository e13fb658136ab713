"""Batches of sequences in ops over KV caches: ``b`` sequences, each with ``t`` tokens and a cache of its own.

Rows of inputs and outputs are those of the first sequence, then those of the second: ``[b * t, ...]``. States
are one for each sequence, ``[b, ...]``, and so is ``pos`` int32 ``[b, 2]``: start and valid of each sequence,
none of which counts where valid is 0. Weights are shared. So a batch is defined by its sequences alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any

import numpy as np

from mimo_compile.errors import UsageError
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.ops import pages, pooled
from mimo_compile.ir.ops.base import Arg, Array, OpDef
from mimo_compile.ir.workload import Value, Workload

if TYPE_CHECKING:
    from torch import Tensor

OWN = ("b", "even", "page", "pool")
"""Parameters that a sequence by itself does not have."""


def check_batch(op: str, p: Mapping[str, Any]) -> None:
    """Refuse batches of what no kernel computes for several, and equal lengths of one sequence.

    Raises:
        UsageError: naming the op.
    """
    if p.get("even", 0) not in (0, int(p["b"] > 1)):
        raise UsageError(
            f"{op}: even={p['even']} is 1, for several sequences (b) of one length, or 0"
        )
    if p["b"] == 1:
        return
    if p.get("arith", "float") != "float":
        raise UsageError(
            f"{op}: b={p['b']} is for float arithmetic", remedy="leave out arith, or b"
        )


def batched(args: Sequence[Arg], b: int) -> tuple[Arg, ...]:
    """Return the arguments of ``b`` sequences from those of one."""
    if b == 1:
        return tuple(args)
    return tuple(Arg(a.name, a.role, _shape(a, b), a.dtype, a.mutated) for a in args)


def _shape(arg: Arg, b: int) -> tuple[int, ...]:
    if arg.role == "weight":
        return arg.shape
    if arg.role == "state" or arg.name == "pos":
        return (b, *arg.shape)
    return (b * arg.shape[0], *arg.shape[1:])


def lengths(longest: int, p: Mapping[str, Any]) -> list[int]:
    """Return the KV length of each sequence that inputs are made for: from the longest down to its half."""
    b, least = p["b"], max(p["t"], -(-longest // 2))
    fewer = (0 if p.get("even") else i * longest // (2 * b) + i for i in range(b))
    return [max(least, longest - n) for n in fewer]


def at_ends(b: int, rng: np.random.Generator) -> list[bool]:
    """Draw which sequences of a batch complete a block: any of them, but one at least besides the first."""
    chosen = rng.integers(2, size=b).astype(bool)
    chosen[int(rng.integers(1, b))] = True
    return [bool(c) for c in chosen]


def ended(
    lengths: Sequence[int], size: int, stride: int, least: int, rng: np.random.Generator
) -> list[int]:
    """Return KV lengths of a batch of which some end where a block does: which ones, `at_ends` draws.

    Args:
        lengths: KV length of each sequence. The first one's stays, since counts go by it.
        size: Positions of a block.
        stride: Positions from one block to the next.
        least: A length that none may fall below.
        rng: Draws.
    """
    out, chosen = list(lengths), at_ends(len(lengths), rng)
    for i, length in enumerate(lengths):
        end = length - (length - size) % stride
        if i and chosen[i] and end >= max(size, least):
            out[i] = end
    return out


def drawn(
    op: OpDef, workload: Workload, rng: np.random.Generator, lengths: Sequence[int],
    fill: Callable[[Arg], Array] = pooled.poison,
) -> dict[str, Array]:  # fmt: skip
    """Draw inputs of a batch, or over pages: of each sequence those of its KV length alone.

    ``fill`` says what a pool holds where no sequence has a row, see `pooled.together`.
    """
    parts = [op.make_inputs(alone(workload, len=n), rng) for n in lengths]
    if pages.paged(op.full(workload)):
        return pooled.together(op, workload, parts, rng, fill)
    return join(op, workload, parts)


def counted(op: OpDef, workload: Workload, lengths: Sequence[int]) -> Counts:
    """Return the work of a batch: that of each sequence at its KV length."""
    return sum((op.counts(alone(workload, len=n)) for n in lengths), Counts())


def rested(
    workload: Workload, inputs: Mapping[str, Array], rng: np.random.Generator
) -> dict[str, Array] | None:
    """Return inputs of a batch with sequences, one to all but one, that have no token; None: it is no batch.

    They stand where they stood, or at 0, as those do that a runtime lets rest. Their rows, and with them
    their states, are what kernels may touch by mistake. Inputs to be timed have none: all sequences of a
    batch are to go on.
    """
    pos = inputs.get("pos")
    if dict(workload.params).get("b", 1) == 1 or pos is None:
        return None
    places, b = pos.copy(), len(pos)
    resting = rng.permutation(b)[: int(rng.integers(1, b))]
    places[resting, 1] = 0
    places[resting, 0] *= rng.integers(2, size=len(resting), dtype=np.int32)
    return {**inputs, "pos": places}


def further(
    op: OpDef, workload: Workload, inputs: Mapping[str, Array], rng: np.random.Generator
) -> dict[str, Array] | None:
    """Return what a kernel is verified on besides the inputs that it is timed on; None: there is no more.

    KV lengths that models are timed at are multiples of 16, of blocks and of pages, so that no block is
    filled in part. These inputs are of another length (see `shorter`), and some sequences of a batch rest
    (`rested`).
    """
    other = shorter(op, workload, inputs, rng)
    given = inputs if other is None else op.make_inputs(other, rng)
    found = rested(workload, given, rng)
    return dict(given) if found is None and other is not None else found


def shorter(
    op: OpDef, workload: Workload, inputs: Mapping[str, Array], rng: np.random.Generator
) -> Workload | None:
    """Return a workload whose inputs are of a KV length that is no multiple of 16, from half of theirs up.

    It is odd where theirs is even, and even where theirs is odd: `edge_keys` needs one of each.
    None: the op has no such lengths, or none that fits its other parameters.
    """
    if "pos" not in inputs or all(p.name != "len" for p in op.params):
        return None
    longest, p = int(inputs["pos"].reshape(-1, 2).sum(1).max()), op.full(workload)
    fit = [n for n in range(max(p["t"], -(-longest // 2)), longest) if n % 16 and (longest - n) % 2]
    if not fit:
        return None
    try:
        other = op.workload(**{**p, "len": fit[int(rng.integers(len(fit)))]})
    except UsageError:  # shorter than something that it counts on
        return None
    return other if op.args(other) == op.args(workload) else None


def alone(workload: Workload, **changes: Value) -> Workload:
    """Return the workload of one of the sequences, with other parameters where given."""
    kept = {name: value for name, value in workload.params if name not in OWN}
    return Workload.make(workload.op, {**kept, **changes})


def split(op: OpDef, workload: Workload, arrays: Mapping[str, Array]) -> Iterator[dict[str, Array]]:
    """Yield the part of canonical arrays that belongs to each sequence, as views.

    Args:
        op: Definition of the workload's op.
        workload: A batch.
        arrays: Inputs, weights, states or outputs by name, those there are.
    """
    p = op.full(workload)
    roles = {a.name: a.role for a in op.args(workload)}
    if pages.paged(p):
        yield from pooled.split(p, roles, arrays, arrays)
        return
    for i in range(p["b"]):
        yield {
            name: a if roles[name] == "weight" else _part(a, i, p["b"], _by_itself(roles, name))
            for name, a in arrays.items()
        }


def _part(array: Array, i: int, b: int, by_itself: bool) -> Array:
    """Return what belongs to sequence ``i`` of ``b``: an entry of the first extent, or some rows."""
    rows = len(array) // b
    part: Array = array[i] if by_itself else array[i * rows : (i + 1) * rows]
    return part


def join(op: OpDef, workload: Workload, parts: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Inverse of `split`; weights are those of the first part."""
    roles = {a.name: a.role for a in op.args(workload)}
    out: dict[str, Array] = {}
    for name, first in parts[0].items():
        if roles[name] == "weight":
            out[name] = first
        else:
            arrays = [part[name] for part in parts]
            out[name] = np.stack(arrays) if _by_itself(roles, name) else np.concatenate(arrays)
    return out


def one_by_one(method: Callable[..., dict[str, Array]]) -> Callable[..., dict[str, Array]]:
    """Let an op's method compute a batch sequence by sequence; its arguments are a workload and arrays."""

    @wraps(method)
    def whole(op: OpDef, workload: Workload, *arrays: Mapping[str, Array]) -> dict[str, Array]:
        p = op.full(workload)
        if pages.paged(p):
            roles = {a.name: a.role for a in op.args(workload)}
            return pooled.one_by_one(method, op, p, alone(workload), arrays, roles)
        if p["b"] == 1:
            return method(op, workload, *arrays)
        one, parts = alone(workload), (split(op, workload, a) for a in arrays)
        return join(op, workload, [method(op, one, *given) for given in zip(*parts, strict=True)])

    return whole


def _by_itself(roles: Mapping[str, str], name: str) -> bool:
    """Say whether an array has an extent for the sequences, rather than rows of each."""
    return roles[name] == "state" or name == "pos"


def several(
    one: Callable[..., Any],
    pos: Tensor,
    rows: Sequence[Tensor | None],
    states: Sequence[Tensor] = (),
) -> list[Any]:
    """Return what ``one(pos, *rows, *states)`` gives for each sequence.

    Args:
        one: Computes one sequence.
        pos: int32 ``[2]`` of a single sequence, whose tensors are passed as they are, or ``[B, 2]``.
        rows: Tensors of rows, those of the first sequence first; or None.
        states: Tensors with an entry for each sequence.
    """
    if pos.dim() == 1:
        return [one(pos, *rows, *states)]
    b = len(pos)
    parts = ([None] * b if given is None else given.chunk(b) for given in rows)
    return [one(at, *mine) for at, *mine in zip(pos, *parts, *states, strict=True)]
