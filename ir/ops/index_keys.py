"""An index of keys by their channels: what is read where a few channels of all keys are scored.

Where single tokens are listed, caches keep each key by itself (``lay=rows``), and a channel of all keys is
spread over the whole cache. The index is a second copy of the keys, in which a channel of neighbouring slots
is one line of memory, and for each ``span`` positions the greatest magnitude of every channel. After tokens
``start ... start + valid - 1`` (``pos = [start, valid]``) were appended to the cache, their keys are copied,
and spans that hold one of them and are complete get their peaks from the cache. All else keeps its values, so
that whoever goes back and writes positions again finds what those before them left.

`score_keys` with ``kind=channels`` reads both. With ``b`` sequences each has keys and an index of its own:
see `batches`.
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
from mimo_compile.ir.ops.block_lists import blocks_of
from mimo_compile.ir.ops.describe_blocks import touched
from mimo_compile.ir.workload import Workload


@torch.library.custom_op("mimo::index_keys", mutates_args=("k_copy", "peak"))
def index_keys(k_cache: Tensor, pos: Tensor, k_copy: Tensor, peak: Tensor, span: int) -> None:
    """Take in the keys of the newest tokens.

    Args:
        k_cache: ``[cap, KV, D]``, which holds them.
        pos: int32 [2], start and valid.
        k_copy: ``[cap, KV, D]`` of the same type, written in place.
        peak: ``[ceil(cap / span), KV, D]`` of the same type, written in place.
        span: Positions of an entry of peaks.

    Of B sequences: arrays ``[B, ...]``, ``pos [B, 2]``.
    """

    def one(at: Tensor, keys: Tensor, copy: Tensor, peaks: Tensor) -> None:
        start, end = int(at[0]), int(at[0]) + int(at[1])
        copy[start:end] = keys[start:end]
        for e in touched(at, peaks.shape[0], span, span, whole=True):
            peaks[e] = keys[e * span : e * span + span].abs().amax(0)

    batches.several(one, pos, (), (k_cache, k_copy, peak))


@index_keys.register_fake
def _(k_cache: Tensor, pos: Tensor, k_copy: Tensor, peak: Tensor, span: int) -> None:
    return None


class IndexKeys(OpDef):
    """``index_keys:t=1,kv=8,d=128,cap=65536,span=256``; ``c`` is the format of all arrays."""

    name = "index_keys"
    params = (
        Param("t", int, low=1),
        Param("kv", int, low=1),
        Param("d", int, low=1),
        Param("cap", int, low=1),
        Param("span", int, low=1),
        Param("c", str, "f32"),
        Param("b", int, 1, low=1),
    )

    def check(self, p: Mapping[str, Any]) -> None:
        """Refuse formats without single numbers, and more tokens than slots."""
        parse_cache_format(p["c"])
        batches.check_batch(self.name, p)
        if p["t"] > p["cap"]:
            raise UsageError(f"index_keys: t={p['t']} tokens do not fit cap={p['cap']} slots")

    def args(self, workload: Workload) -> tuple[Arg, ...]:
        """Return pos, k_cache, k_copy and peak (both written)."""
        p = self.full(workload)
        shape, stored = (p["cap"], p["kv"], p["d"]), parse_cache_format(p["c"]).dtype
        spans = blocks_of(p["cap"], p["span"])
        one = (
            Arg("pos", "input", (2,), "int32"),
            Arg("k_cache", "state", shape, stored),
            Arg("k_copy", "state", shape, stored, mutated=True),
            Arg("peak", "state", (spans, *shape[1:]), stored, mutated=True),
        )
        return batches.batched(one, p["b"])

    def make_inputs(self, workload: Workload, rng: np.random.Generator) -> dict[str, Array]:
        """Draw keys up to the newest token, NaN in later slots, and another index.

        In half of the draws the newest tokens end where a span does, if one fits before: else spans of
        many positions would be completed seldom. Of a batch see `batches.at_ends`.
        """
        p = self.full(workload)
        if p["b"] == 1:
            return self._drawn(workload, rng, whole=bool(rng.integers(2)))
        one, ends = batches.alone(workload), batches.at_ends(p["b"], rng)
        return batches.join(self, workload, [self._drawn(one, rng, whole=end) for end in ends])

    def _drawn(
        self, workload: Workload, rng: np.random.Generator, *, whole: bool
    ) -> dict[str, Array]:
        """Draw inputs of one sequence; ``whole``: whose newest token ends a span, if one fits."""
        p = self.full(workload)
        fmt = parse_cache_format(p["c"])
        _, cache, _, peak = self.args(workload)
        end = int(rng.integers(p["t"], p["cap"] + 1))
        if whole:
            least = -(-p["t"] // p["span"]) * p["span"]
            end = max(end // p["span"] * p["span"], least if least <= p["cap"] else p["t"])
        keys = rng.standard_normal(cache.shape, dtype=np.float32)
        keys[end:] = np.nan
        copy, peaks = (
            100 * rng.standard_normal(shape, dtype=np.float32)
            for shape in (cache.shape, peak.shape)
        )
        arrays = {"k_cache": keys, "k_copy": copy, "peak": peaks}
        pos = np.array([end - p["t"], p["t"]], np.int32)
        return {"pos": pos, **{name: fmt.encode(array) for name, array in arrays.items()}}

    @batches.one_by_one
    def reference(self, workload: Workload, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the whole index in float64."""
        p = self.full(workload)
        fmt, names = parse_cache_format(p["c"]), ("k_cache", "k_copy", "peak")
        keys, copy, peak = (
            torch.from_numpy(np.array(fmt.decode(inputs[n]), np.float64)) for n in names
        )
        index_keys(keys, torch.from_numpy(inputs["pos"]), copy, peak, p["span"])
        return {"k_copy": copy.numpy(), "peak": peak.numpy()}

    def bound(
        self, workload: Workload, inputs: Mapping[str, Array], expected: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Copies and maxima are exact."""
        return {name: np.zeros(array.shape) for name, array in expected.items()}

    def counts(self, workload: Workload) -> Counts:
        """New keys are read and written once; those of a span once more when it is complete."""
        p = self.full(workload)
        numbers = float(p["b"] * p["t"] * p["kv"] * p["d"])
        moved = parse_cache_format(p["c"]).bytes * numbers * (3 + 1 / p["span"]) + 8.0 * p["b"]
        return Counts({"int_op": numbers, "add_f32": numbers}, {"dram": moved})
