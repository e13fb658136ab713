"""Batches of sequences in ops over KV caches: ``b`` sequences, each with ``t`` tokens and a cache of its own.

Rows of inputs and outputs are those of the first sequence, then those of the second: ``[b * t, ...]``. States
are one for each sequence, ``[b, ...]``, and so is ``pos`` int32 ``[b, 2]``: start and valid of each sequence,
none of which counts where valid is 0. Weights are shared. So a batch is defined by its sequences alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from typing import Any

import numpy as np

from mimo_compile.errors import UsageError
from mimo_compile.ir.caches import FORMATS
from mimo_compile.ir.ops.base import Arg, Array, OpDef
from mimo_compile.ir.workload import Value, Workload

OWN = ("b", "even")
"""Parameters that a sequence by itself does not have."""


def check_batch(op: str, p: Mapping[str, Any]) -> None:
    """Refuse batches over caches that no kernel reads several of, and equal lengths of one sequence.

    Raises:
        UsageError: naming the op.
    """
    if p.get("even", 0) not in (0, int(p["b"] > 1)):
        raise UsageError(
            f"{op}: even={p['even']} is 1, for several sequences (b) of one length, or 0"
        )
    if p["b"] == 1:
        return
    if p["c"] not in FORMATS or p["lay"] or p.get("arith", "float") != "float":
        raise UsageError(
            f"{op}: b={p['b']} is for caches of float numbers in their usual order, and float arithmetic",
            remedy="leave out c, lay and arith, or use c=bf16",
        )


def batched(args: Sequence[Arg], b: int, t: int) -> tuple[Arg, ...]:
    """Return the arguments of ``b`` sequences from those of one with ``t`` tokens."""
    if b == 1:
        return tuple(args)
    return tuple(Arg(a.name, a.role, _shape(a, b, t), a.dtype, a.mutated) for a in args)


def _shape(arg: Arg, b: int, t: int) -> tuple[int, ...]:
    if arg.role == "weight":
        return arg.shape
    if arg.role == "state" or arg.name == "pos":
        return (b, *arg.shape)
    return (b * t, *arg.shape[1:])


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
    for i in range(p["b"]):
        rows = slice(i * p["t"], (i + 1) * p["t"])
        yield {
            name: a if roles[name] == "weight" else a[i if _by_itself(roles, name) else rows]
            for name, a in arrays.items()
        }


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
        if op.full(workload)["b"] == 1:
            return method(op, workload, *arrays)
        one, parts = alone(workload), (split(op, workload, a) for a in arrays)
        return join(op, workload, [method(op, one, *given) for given in zip(*parts, strict=True)])

    return whole


def _by_itself(roles: Mapping[str, str], name: str) -> bool:
    """Say whether an array has an extent for the sequences, rather than rows of each."""
    return roles[name] == "state" or name == "pos"
