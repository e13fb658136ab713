"""Batches in kernels over KV caches: whose turn it is, and which part of each array belongs to a sequence.

Packed states of a batch are those of its sequences, one after the other: the first extent is that many times
as long. Rows of inputs and outputs follow one another in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from mimo_compile.ir.ops import batches, get_op
from mimo_compile.ir.ops.base import Array
from mimo_compile.ir.ops.pages import TABLE, in_pool, paged
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.emit.build import Part, bind, loop

Packing = Callable[[Workload, Mapping[str, Array]], dict[str, Array]]


@contextmanager
def turns(batch: int, tasks: int, *, parallel: bool = False) -> Iterator[tuple[Any | None, Any]]:
    """Loop over the tasks of all sequences; yields sequence (None: there is one) and task.

    Sequences differ in length and take turns, so that threads, which take runs of tasks, get a part of each.
    """
    with loop(batch * tasks, parallel=parallel) as at:
        yield (None, at) if batch == 1 else (bind(at % batch), bind(at // batch))


def place_of(pos: Any, sequence: Any | None) -> Any:
    """Return start and valid of a sequence."""
    return pos if sequence is None else (pos[sequence, 0], pos[sequence, 1])


def part_of(buffer: Any, sequence: Any | None, batch: int) -> Any:
    """Return what belongs to a sequence of a buffer, whose first extent all ``batch`` of them share."""
    if sequence is None or buffer is None:
        return buffer
    return Part(buffer, bind(sequence * (int(buffer.shape[0]) // batch)))


def parts_of(
    workload: Workload, buffers: Mapping[str, Any], sequence: Any | None
) -> dict[str, Any]:
    """Return a kernel's buffers by name as one sequence has them; weights and pools are those of all.

    What is empty, as the angles are where nothing is rotated, has no parts, and is passed as it is.
    """
    op = get_op(workload.op)
    p, args = op.full(workload), {a.name: a for a in op.args(workload)}
    out = {}
    for name, buffer in buffers.items():
        role = args[name].role
        together = name == TABLE or (role == "state" and in_pool(p, name))
        if name == "pos":
            out[name] = place_of(buffer, sequence)
        else:
            whole = together or role == "weight" or not all(args[name].shape)
            out[name] = buffer if whole else part_of(buffer, sequence, int(p["b"]))
    return out


def pack_each(workload: Workload, arrays: Mapping[str, Array], pack: Packing) -> dict[str, Array]:
    """Lay out canonical arrays, those of each sequence by ``pack``, which knows one alone, or a pool."""
    op = get_op(workload.op)
    p = op.full(workload)
    if p.get("b", 1) == 1 or paged(p):
        return pack(workload, arrays)
    one, states = batches.alone(workload), _states(workload)
    parts = [pack(one, part) for part in batches.split(op, workload, arrays)]
    return {
        name: np.concatenate([part[name] for part in parts]) if name in states else first
        for name, first in parts[0].items()
    }


def unpack_each(
    workload: Workload, arrays: Mapping[str, Array], unpack: Packing
) -> dict[str, Array]:
    """Inverse of `pack_each`, for states; other arrays are those of all."""
    p = get_op(workload.op).full(workload)
    b = p.get("b", 1)
    if b == 1 or paged(p):
        return unpack(workload, arrays)
    one, states = batches.alone(workload), _states(workload)
    parts = [
        unpack(one, {n: np.split(a, b)[i] if n in states else a for n, a in arrays.items()})
        for i in range(b)
    ]
    return {
        name: np.stack([part[name] for part in parts]) if name in states else first
        for name, first in parts[0].items()
    }


def _states(workload: Workload) -> frozenset[str]:
    """Return the names of a workload's states."""
    args = get_op(workload.op).args(workload)
    return frozenset(a.name for a in args if a.role == "state")
