"""Keep descriptors of blocks of keys up to date: least and greatest key, mean, or all three.

After tokens ``start ... start + valid - 1`` (``pos = [start, valid]``) were written, entry e, which describes
positions ``e * stride ... e * stride + size - 1``, is made anew from those up to the last token, if it holds
any of the written ones. It is never merged with what it was: positions may have been overwritten
(rectified, rolled back), and a minimum cannot be taken back. Other entries keep their values. With ``whole``,
so do entries that are not complete yet: whoever scores only complete ones (`score_blocks`) has no use for
the running one, which would cost a pass over its keys at every step.

Kinds and their parts: ``bounds`` (least, greatest), ``mean``, ``peak`` (greatest magnitude), ``pool3``
(greatest, least, mean: what SeerAttention's gates compress).

``b`` sequences have a cache, descriptors and a ``pos`` each: see `batches`; or pages of a pool, which the
descriptors of their blocks lie in, too: see `pages`.
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
from mimo_compile.ir.ops import batches, pages, pooled
from mimo_compile.ir.ops.base import Arg, Array, OpDef, Param
from mimo_compile.ir.ops.block_lists import blocks_of
from mimo_compile.ir.ops.numerics import U32
from mimo_compile.ir.workload import Workload

PARTS = {"bounds": 2, "mean": 1, "peak": 1, "pool3": 3}
"""Kinds of descriptors and how many vectors each has."""


def entries_of(cap: int, size: int, stride: int) -> int:
    """Return how many entries describe a cache; the last one may be partial."""
    return blocks_of(max(cap - size, 0), stride) + 1


def describe(keys: Tensor, kind: str) -> Tensor:
    """Describe ``[n, KV, D]`` keys by ``[KV, parts, D]``."""
    if kind == "bounds":
        return torch.stack([keys.amin(0), keys.amax(0)], 1)
    if kind == "peak":
        return keys.abs().amax(0)[:, None]
    if kind == "mean":
        return keys.mean(0)[:, None]
    return torch.stack([keys.amax(0), keys.amin(0), keys.mean(0)], 1)


def touched(pos: Tensor, entries: int, size: int, stride: int, whole: bool = False) -> range:
    """Return the entries that hold a position that was written (``whole``: those that are complete)."""
    start, end = int(pos[0]), int(pos[0]) + int(pos[1])
    if end == start:
        return range(0)
    first, stop = max(0, (start - size) // stride + 1), min(entries, (end - 1) // stride + 1)
    return range(first, max(first, min(stop, (end - size) // stride + 1)) if whole else stop)


@torch.library.custom_op("mimo::describe_blocks", mutates_args=("desc",))
def describe_blocks(
    k_cache: Tensor, pos: Tensor, desc: Tensor, kind: str, size: int, stride: int,
    whole: bool = False, table: Tensor | None = None, cap: int = 0, page: int = 0,
) -> None:  # fmt: skip
    """Update descriptors in place.

    Args:
        k_cache: ``[cap, KV, D]``, which holds the new keys.
        pos: int32 [2], start and valid.
        desc: ``[entries, KV, parts, D]``.
        kind: See the module's text.
        size: Positions of an entry.
        stride: Positions from one entry to the next.
        whole: Leave entries alone until they are complete.
        table: Block tables, int32 ``[B, width]``, of pages that all caches and descriptors lie in; or None.
        cap: With them, most positions of a sequence.
        page: Likewise, positions in a page.

    Of B sequences: ``k_cache [B, cap, KV, D]``, ``pos [B, 2]``, ``desc [B, entries, KV, parts, D]``; in pages
    ``k_cache [slots, KV, D]``, ``desc [entries of the pool, KV, parts, D]``.
    """
    wide = torch.promote_types(desc.dtype, torch.float32)

    def one(at: Tensor, cache: Tensor, entries: Tensor) -> None:
        end = int(at[0]) + int(at[1])
        for e in touched(at, entries.shape[0], size, stride, whole):
            keys = cache[e * stride : min(e * stride + size, end)]
            entries[e] = describe(keys.to(wide), kind).to(entries.dtype)

    if table is None:
        batches.several(one, pos, (), (k_cache, desc))
    else:
        pooled.described(one, pos, k_cache, desc, table, page, size)


@describe_blocks.register_fake
def _(
    k_cache: Tensor, pos: Tensor, desc: Tensor, kind: str, size: int, stride: int,
    whole: bool = False, table: Any = None, cap: int = 0, page: int = 0,
) -> None:  # fmt: skip
    return None


class DescribeBlocks(OpDef):
    """``describe_blocks:t=1,kv=8,d=128,cap=65536,kind=bounds,size=16``; ``stride`` defaults to ``size``.

    ``c`` is the cache's format, ``e`` that of the entries: bfloat16 ones hold the least and greatest of
    bfloat16 keys as they are, and means rounded.
    """

    name = "describe_blocks"
    params = (
        Param("t", int, low=1),
        Param("kv", int, low=1),
        Param("d", int, low=1),
        Param("cap", int, low=1),
        Param("kind", str),
        Param("size", int, low=1),
        Param("stride", int, 0),
        Param("len", int, 0),
        Param("c", str, "f32"),
        Param("whole", int, 0),
        Param("e", str, "f32"),
        Param("b", int, 1, low=1),
        *pages.PARAMS,
    )

    def check(self, p: Mapping[str, Any]) -> None:
        """Refuse unknown kinds, lengths beyond the cache, and entries that pages cannot hold."""
        batches.check_batch(self.name, p)
        pages.check_entries(self.name, p)
        if parse_cache_format(p["e"]).bits < parse_cache_format(p["c"]).bits:
            raise UsageError(
                f"describe_blocks: e={p['e']} entries would round c={p['c']} keys: there are none",
                remedy="leave out e=, or keep keys in the same format",
            )
        if p["kind"] not in PARTS:
            raise UsageError(
                f"describe_blocks: no kind={p['kind']}", remedy=f"choose from {', '.join(PARTS)}"
            )
        if not p["t"] <= int(p["len"] or p["cap"]) <= p["cap"]:
            raise UsageError("describe_blocks: len (KV length) must lie between t and cap")
        apart = p["kind"] in ("bounds", "mean") and p["stride"] in (0, p["size"])
        if p["page"] and not (p["whole"] and apart):
            raise UsageError(
                f"describe_blocks: page={p['page']} is for bounds or means of complete blocks that are apart",
                remedy="use whole=1, kind=bounds or mean, and leave out stride",
            )

    def _sizes(self, workload: Workload) -> tuple[int, int, int]:
        """Return entries, size and stride."""
        p = self.full(workload)
        stride = p["stride"] or p["size"]
        return entries_of(p["cap"], p["size"], stride), p["size"], stride

    def args(self, workload: Workload) -> tuple[Arg, ...]:
        """Return pos, k_cache, desc (written)."""
        p = self.full(workload)
        shape = (self._sizes(workload)[0], p["kv"], PARTS[p["kind"]], p["d"])
        one = (
            Arg("pos", "input", (2,), "int32"),
            Arg("k_cache", "state", (p["cap"], p["kv"], p["d"]), parse_cache_format(p["c"]).dtype),
            Arg("desc", "state", shape, parse_cache_format(p["e"]).dtype, mutated=True),
        )
        return pages.paged_args(one, p) if pages.paged(p) else batches.batched(one, p["b"])

    def make_inputs(self, workload: Workload, rng: np.random.Generator) -> dict[str, Array]:
        """Draw keys, and wild descriptors that nothing may be merged with; later slots hold NaN.

        Of a batch some sequences complete an entry, see `batches.ended`.
        """
        p = self.full(workload)
        length = int(p["len"] or p["cap"])
        lengths = batches.lengths(length, p)
        if p["whole"] and p["b"] > 1:
            lengths = batches.ended(lengths, *self._sizes(workload)[1:], p["t"], rng)

        def wild(arg: Arg) -> Array:
            found = 100 * rng.standard_normal(arg.shape, dtype=np.float32)
            return parse_cache_format(p["e"]).encode(found)

        if p["b"] > 1 or pages.paged(p):
            fill = {"k_cache": pooled.poison, "desc": wild}
            return batches.drawn(self, workload, rng, lengths, lambda arg: fill[arg.name](arg))
        _, cache, desc = self.args(workload)
        keys = rng.standard_normal(cache.shape, dtype=np.float32)
        keys[length:] = np.nan
        keys = parse_cache_format(p["c"]).encode(keys)
        where = np.array([length - p["t"], p["t"]], np.int32)
        return {"pos": where, "k_cache": keys, "desc": wild(desc)}

    @batches.one_by_one
    def reference(self, workload: Workload, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute in float64; untouched entries keep their values."""
        p = self.full(workload)
        desc = torch.from_numpy(parse_cache_format(p["e"]).decode(inputs["desc"])).double()
        stored = parse_cache_format(p["c"]).decode(inputs["k_cache"])
        keys, pos = (torch.from_numpy(np.ascontiguousarray(a)) for a in (stored, inputs["pos"]))
        _, size, stride = self._sizes(workload)
        describe_blocks(keys, pos, desc, p["kind"], size, stride, bool(p["whole"]))
        return {"desc": desc.numpy()}

    @batches.one_by_one
    def bound(
        self, workload: Workload, inputs: Mapping[str, Array], expected: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Least and greatest are exact; a mean of n rounds n times, relative to the mean magnitude.

        16-bit entries round it once more.
        """
        p, out = self.full(workload), np.zeros(expected["desc"].shape)
        if p["kind"] in ("mean", "pool3"):
            pos, (entries, size, stride) = torch.from_numpy(inputs["pos"]), self._sizes(workload)
            end, stored = int(inputs["pos"].sum()), parse_cache_format(p["c"])
            for e in touched(pos, entries, size, stride, bool(p["whole"])):
                keys = stored.decode(inputs["k_cache"][e * stride : min(e * stride + size, end)])
                error = (len(keys) + 2) * U32 * np.abs(keys).mean(0)
                unit = parse_cache_format(p["e"]).unit
                out[e, :, -1] = error + unit * (np.abs(expected["desc"][e, :, -1]) + error)
        return {"desc": out}

    def counts(self, workload: Workload) -> Counts:
        """Keys of the touched entries are read once, these are written once."""
        p = self.full(workload)
        entries, size, stride = self._sizes(workload)
        length = int(p["len"] or p["cap"])
        if pages.paged(p):
            lengths = batches.lengths(length, p)
            each = batches.counted(self, workload, lengths)
            return pages.counted(p, each, [min(n, p["t"]) for n in lengths], 0.0)
        if p["b"] > 1:
            return batches.counted(self, workload, batches.lengths(length, p))
        pos = torch.tensor([length - p["t"], p["t"]])
        made = touched(pos, entries, size, stride, bool(p["whole"]))
        keys = min(length, made.stop * stride - stride + size) - made.start * stride if made else 0
        parts = PARTS[p["kind"]]
        row = float(p["kv"] * p["d"])
        read = parse_cache_format(p["c"]).bytes * keys
        written = parse_cache_format(p["e"]).bytes * len(made) * parts
        moved = row * (read + written) + 8.0  # and the two numbers that say whether there is work
        return Counts({"add_f32": keys * row * parts}, {"dram": moved})
