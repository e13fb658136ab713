"""Argument sets of one contestant: how many there are, and what inputs they take in turn.

Weights come from memory if all sets together read more than caches hold. Most ops read all of their weights,
so that sets are copies of them. A token's experts are some of many: sets over the same weights hit other
experts, as one token after the other does, and there are copies only where that is not enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mimo_compile import _tvm
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.base import Array
from mimo_compile.ir.workload import Workload


@dataclass(frozen=True, slots=True)
class Draws:
    """Inputs that argument sets over one copy of the weights take in turn."""

    inputs: tuple[Mapping[str, Array], ...] = ({},)
    """What of the inputs differs, in memory that kernels can use; of the first set: nothing, or the same."""
    share: float = 1.0
    """Part of the weights that one call reads."""

    def place(self, number: int) -> tuple[int, Mapping[str, Array]]:
        """Return which copy of the weights an argument set has, and what its inputs are."""
        copy, turn = divmod(number, len(self.inputs))
        return copy, self.inputs[turn]


def draws_of(workload: Workload, inputs: Mapping[str, Array]) -> Draws:
    """Return what argument sets of a workload take in turn.

    Experts that are hit are renamed: each draw has as many slots in as many experts, none of which is in
    another draw.
    """
    if workload.op != "moe":
        return Draws()
    experts = get_op("moe").full(workload)["e"]
    ids = inputs["ids"]
    hit = np.unique(ids)
    others = np.setdiff1d(np.arange(experts), hit)
    found = [{"ids": _tvm.as_aligned(ids.copy())}]
    for at in range(0, len(others) - len(hit) + 1, len(hit)):
        names = np.arange(experts, dtype=ids.dtype)
        names[hit] = others[at : at + len(hit)]
        found.append({"ids": _tvm.as_aligned(names[ids])})
    return Draws(tuple(found), len(hit) / experts)


def copies(each: int, wanted_bytes: int, memory_bytes: int) -> int:
    """Return how many argument sets of ``each`` bytes exceed the caches, within a limit of memory."""
    if not each or not wanted_bytes:
        return 1
    if each >= wanted_bytes:  # a pass over one of them leaves nothing of it in the caches
        return 1
    return max(1, min(-(-wanted_bytes // each) + 1, 512, memory_bytes // each))
