"""Write one entry for each new token where `score_blocks` reads descriptors: keys of an indexer (DSA).

Rows of tokens ``start ... start + valid - 1`` (``pos = [start, valid]``) become the entries of these
positions, rounded to the entries' format, half to even. All other entries keep their values, so that whoever
goes back and writes positions again finds what those before them left. Rows of padding are not looked at.

``b`` sequences have entries and a ``pos`` each: see `batches`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimo_compile.errors import UsageError
from mimo_compile.ir.caches import parse_cache_format
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.ops import batches
from mimo_compile.ir.ops.base import Arg, Array, OpDef, Param
from mimo_compile.ir.workload import Workload


@torch.library.custom_op("mimo::append_entries", mutates_args=("desc",))
def append_entries(rows: Tensor, pos: Tensor, desc: Tensor) -> None:
    """Write the entries of new tokens in place.

    Args:
        rows: ``[T, KV, D]``.
        pos: int32 [2], start and valid.
        desc: ``[cap, KV, 1, D]``.

    Of B sequences: ``rows [B * T, KV, D]``, ``pos [B, 2]``, ``desc [B, cap, KV, 1, D]``.
    """

    def one(at: Tensor, new: Tensor, entries: Tensor) -> None:
        start, valid = int(at[0]), int(at[1])
        entries[start : start + valid, :, 0] = new[:valid].to(entries.dtype)

    batches.several(one, pos, (rows,), (desc,))


@append_entries.register_fake
def _(rows: Tensor, pos: Tensor, desc: Tensor) -> None:
    return None


class AppendEntries(OpDef):
    """``append_entries:t=1,kv=1,d=128,cap=65536``; ``e`` is the format of the entries."""

    name = "append_entries"
    params = (
        Param("t", int, low=1),
        Param("kv", int, low=1),
        Param("d", int, low=1),
        Param("cap", int, low=1),
        Param("e", str, "f32"),
        Param("b", int, 1, low=1),
    )

    def check(self, p: Mapping[str, Any]) -> None:
        """Refuse formats without single numbers, and more tokens than entries."""
        parse_cache_format(p["e"])
        batches.check_batch(self.name, p)
        if p["t"] > p["cap"]:
            raise UsageError(f"append_entries: t={p['t']} tokens do not fit cap={p['cap']} entries")

    def args(self, workload: Workload) -> tuple[Arg, ...]:
        """Return rows, pos, desc (written)."""
        p = self.full(workload)
        stored = parse_cache_format(p["e"]).dtype
        one = (
            Arg("rows", "input", (p["t"], p["kv"], p["d"]), "float32"),
            Arg("pos", "input", (2,), "int32"),
            Arg("desc", "state", (p["cap"], p["kv"], 1, p["d"]), stored, mutated=True),
        )
        return batches.batched(one, p["b"])

    def make_inputs(self, workload: Workload, rng: np.random.Generator) -> dict[str, Array]:
        """Draw rows, ties of 16-bit rounding among them, other entries, and where the rows belong."""
        p = self.full(workload)
        if p["b"] > 1:
            one = batches.alone(workload)
            return batches.join(self, workload, [self.make_inputs(one, rng) for _ in range(p["b"])])
        rows, _, desc = self.args(workload)
        new = rng.standard_normal(rows.shape, dtype=np.float32)
        ties = rng.random(rows.shape) < 0.1  # half-way between two bfloat16 numbers
        new[ties] = (1 + rng.integers(0, 128, rows.shape)[ties] / 128 + 1 / 256).astype(np.float32)
        held = 100 * rng.standard_normal(desc.shape, dtype=np.float32)
        start = int(rng.integers(0, p["cap"] - p["t"] + 1))
        return {
            "rows": new,
            "pos": np.array([start, p["t"]], np.int32),
            "desc": parse_cache_format(p["e"]).encode(held),
        }

    @batches.one_by_one
    def reference(self, workload: Workload, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return all entries in float64, new ones as their format holds them."""
        fmt = parse_cache_format(self.full(workload)["e"])
        out = np.array(fmt.decode(inputs["desc"]), np.float64)
        start, valid = (int(n) for n in inputs["pos"])
        out[start : start + valid, :, 0] = fmt.decode(fmt.encode(inputs["rows"][:valid]))
        return {"desc": out}

    def bound(
        self, workload: Workload, inputs: Mapping[str, Array], expected: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Copies are exact, and so is the one rounding."""
        return {name: np.zeros(array.shape) for name, array in expected.items()}

    def counts(self, workload: Workload) -> Counts:
        """Rows are read and written once."""
        p = self.full(workload)
        numbers = float(p["b"] * p["t"] * p["kv"] * p["d"])
        moved = (4.0 + parse_cache_format(p["e"]).bytes) * numbers + 8.0 * p["b"]
        return Counts({"int_op": numbers}, {"dram": moved})
