"""The mean of all keys of a cache, of each KV head: what low-bit estimates take off first.

Made anew in each call from the keys up to its last token (``pos = [start, valid]``), so that it needs no
state and knows nothing of positions that were dropped.
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
from mimo_compile.ir.ops.base import Arg, Array, OpDef, Param
from mimo_compile.ir.ops.numerics import U32
from mimo_compile.ir.workload import Workload

PARTS = 16
"""A kernel adds up at least so many parts of the keys by themselves, and then those."""


def mean_key(k_cache: Tensor, pos: Tensor) -> Tensor:
    """Return the mean ``[KV, D]`` of the first ``start + valid`` keys (of at least one)."""
    return k_cache[: max(1, int(pos.sum()))].mean(0)


@torch.library.custom_op("mimo::key_mean", mutates_args=())
def key_mean(k_cache: Tensor, pos: Tensor) -> Tensor:
    """Average keys.

    Args:
        k_cache: ``[cap, KV, D]``.
        pos: int32 [2], start and valid: there are ``start + valid`` keys.

    Returns:
        ``[KV, D]``, float32 (float64 of float64 keys).
    """
    return mean_key(k_cache.to(torch.promote_types(k_cache.dtype, torch.float32)), pos)


@key_mean.register_fake
def _(k_cache: Tensor, pos: Tensor) -> Tensor:
    return k_cache.new_empty(
        k_cache.shape[1:], dtype=torch.promote_types(k_cache.dtype, torch.float32)
    )


class KeyMean(OpDef):
    """``key_mean:t=256,kv=8,d=128,cap=65536``; ``t`` tokens were appended last."""

    name = "key_mean"
    params = (
        Param("t", int, low=1),
        Param("kv", int, low=1),
        Param("d", int, low=1),
        Param("cap", int, low=1),
        Param("len", int, 0),
        Param("c", str, "f32"),
    )

    def check(self, p: Mapping[str, Any]) -> None:
        """Refuse formats without single numbers, and lengths beyond the cache."""
        parse_cache_format(p["c"])
        if not p["t"] <= int(p["len"] or p["cap"]) <= p["cap"]:
            raise UsageError("key_mean: len (KV length) must lie between t and cap")

    def args(self, workload: Workload) -> tuple[Arg, ...]:
        """Return pos, k_cache, mean."""
        p = self.full(workload)
        return (
            Arg("pos", "input", (2,), "int32"),
            Arg("k_cache", "state", (p["cap"], p["kv"], p["d"]), parse_cache_format(p["c"]).dtype),
            Arg("mean", "output", (p["kv"], p["d"]), "float32"),
        )

    def make_inputs(self, workload: Workload, rng: np.random.Generator) -> dict[str, Array]:
        """Draw normal keys around means of some size; later slots hold NaN.

        Keys at both ends, in the middle and where vectors of slots begin and end are so large that leaving
        out any of them, or taking it twice, exceeds the bound: one of size K moves the mean by K / n, and the
        bound is about n / 16 * U32 * (1 + 7 K / n).
        """
        p = self.full(workload)
        length = int(p["len"] or p["cap"])
        keys = rng.standard_normal((p["cap"], p["kv"], p["d"]), dtype=np.float32)
        keys += rng.standard_normal((p["kv"], p["d"]), dtype=np.float32)
        whole = length // PARTS * PARTS
        places = {0, PARTS - 1, PARTS, length // 2, whole - 1, whole, length - 1}
        large = 8 + length * length * U32 / 4
        for at in sorted(place for place in places if 0 <= place < length):
            keys[at] += np.copysign(np.float32(large), keys[at])
        keys[length:] = np.nan
        pos = np.array([length - p["t"], p["t"]], np.int32)
        return {"pos": pos, "k_cache": parse_cache_format(p["c"]).encode(keys)}

    def reference(self, workload: Workload, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Average in float64."""
        stored = parse_cache_format(self.full(workload)["c"]).decode(inputs["k_cache"])
        length = max(1, int(inputs["pos"].sum()))
        mean: Array = stored[:length].astype(np.float64).mean(0)
        return {"mean": mean}

    def bound(
        self, workload: Workload, inputs: Mapping[str, Array], expected: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Bound a sum in parts by how many roundings a number goes through, each U32 of what it rounds.

        Of n numbers a part has ceil(n / 16), and one addition less; the parts are added by a tree of 4 steps;
        n, the division and the result round once each. Together r roundings are off by r U / (1 - r U).
        """
        stored = parse_cache_format(self.full(workload)["c"]).decode(inputs["k_cache"])
        length = max(1, int(inputs["pos"].sum()))
        size = np.abs(stored[:length]).astype(np.float64).mean(0)
        rounded = (-(-length // PARTS) + 6) * U32
        return {"mean": rounded / (1 - rounded) * size}

    def counts(self, workload: Workload) -> Counts:
        """Keys are read and added once."""
        p = self.full(workload)
        numbers = float(int(p["len"] or p["cap"]) * p["kv"] * p["d"])
        moved = parse_cache_format(p["c"]).bytes * numbers + 4.0 * p["kv"] * p["d"] + 8.0
        return Counts({"add_f32": numbers}, {"dram": moved})
