"""Compressed keys of SeerAttention-R's gates: one for each complete block and KV head.

After tokens ``start ... start + valid - 1`` (``pos = [start, valid]``) were written, the entry of each block
that they complete is made anew from the block's cached keys: turned back by the angles of their positions,
pooled (greatest, least, mean), projected, normalised where the gates have a norm, and rotated at the block's
first position, or its last one (see `seer_gates`). Nothing is kept of a running block, since its keys are in
the cache; so after going back, a block that is completed again gets the entry of its new keys. Other entries
keep their values.

``b`` sequences have a cache, entries and a ``pos`` each: see `batches`; or both lie in pages: see `pages`.
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
from mimo_compile.ir.ops import batches, pages, pooled, seer_gates
from mimo_compile.ir.ops.base import Arg, Array, OpDef, Param
from mimo_compile.ir.ops.describe_blocks import describe, entries_of, touched
from mimo_compile.ir.ops.kv_append import turn_back
from mimo_compile.ir.ops.numerics import U32
from mimo_compile.ir.workload import Workload


def made(pos: Tensor, entries: int, size: int) -> range:
    """Return the blocks that the tokens of ``pos`` complete."""
    return touched(pos, entries, size, size, whole=True)


def _block(k_cache: Tensor, e: int, size: int, inv_freq: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the keys ``[size, KV, D]`` of a block as they were before rotation."""
    at = torch.arange(e * size, (e + 1) * size)
    keys = k_cache[e * size : (e + 1) * size].to(dtype)
    return turn_back(keys, seer_gates.angles(at, inv_freq, dtype))


@torch.library.custom_op("mimo::gate_keys", mutates_args=("desc",))
def gate_keys(
    k_cache: Tensor, pos: Tensor, inv_freq: Tensor, gate_freq: Tensor, weight: Tensor,
    norm: Tensor | None, desc: Tensor, size: int, last: bool, eps: float,
    table: Tensor | None = None, cap: int = 0, page: int = 0,
) -> None:  # fmt: skip
    """Update compressed keys in place.

    Args:
        k_cache: ``[cap, KV, D]``, rotated, which holds the new keys.
        pos: int32 [2], start and valid.
        inv_freq: ``[R/2]``, what keys were rotated with.
        gate_freq: ``[r/2]``, what gates are rotated with.
        weight: ``[KV, 3 * D, G]``, float32 or bfloat16.
        norm: ``[G]`` or None.
        desc: ``[entries, KV, 1, G]``, float32 (or wider).
        size: Positions of a block.
        last: Rotate at a block's last position instead of its first.
        eps: Of the norm.
        table: Block tables, int32 ``[B, width]``, of pages that all caches and entries lie in; or None.
        cap: With them, most positions of a sequence.
        page: Likewise, positions in a page.

    Of B sequences: ``k_cache [B, cap, KV, D]``, ``pos [B, 2]``, ``desc [B, entries, KV, 1, G]``; in pages
    ``k_cache [slots, KV, D]``, ``desc [entries of the pool, KV, 1, G]``.
    """
    dtype = desc.dtype

    def one(where: Tensor, cache: Tensor, entries: Tensor) -> None:
        for e in made(where, entries.shape[0], size):
            pools = describe(_block(cache, e, size, inv_freq, dtype), "pool3")
            at = torch.tensor([e * size + (size - 1) * last])
            turned = seer_gates.angles(at, gate_freq, dtype)
            key = seer_gates.gate_keys(pools[None], weight.to(dtype), norm, turned, eps)
            entries[e] = key[0][:, None]

    if table is None:
        batches.several(one, pos, (), (k_cache, desc))
    else:
        pooled.described(one, pos, k_cache, desc, table, page, size)


@gate_keys.register_fake
def _(
    k_cache: Tensor, pos: Tensor, inv_freq: Tensor, gate_freq: Tensor, weight: Tensor, norm: Any,
    desc: Tensor, size: int, last: bool, eps: float,
    table: Any = None, cap: int = 0, page: int = 0,
) -> None:  # fmt: skip
    return None


class GateKeys(OpDef):
    """``gate_keys:t=1,kv=8,d=128,cap=65536,size=64,g=128,rot=128,grot=128,norm=1,w=bf16,c=bf16``.

    ``c`` is the cache's format, ``w`` that of the projection, ``last=1`` rotates at a block's last position.
    """

    name = "gate_keys"
    params = (
        Param("t", int, low=1),
        Param("kv", int, low=1),
        Param("d", int, low=1),
        Param("cap", int, low=1),
        Param("size", int, low=1),
        Param("g", int, low=1),
        Param("rot", int, low=2),
        Param("grot", int, low=2),
        Param("norm", int, 0),
        Param("last", int, 0),
        Param("eps", float, 1e-6),
        Param("len", int, 0),
        Param("c", str, "f32"),
        Param("w", str, "f32"),
        Param("b", int, 1, low=1),
        *pages.PARAMS,
    )

    def check(self, p: Mapping[str, Any]) -> None:
        """Refuse lengths beyond the cache, unknown formats, and what `check_gates` does."""
        parse_cache_format(p["c"])
        seer_gates.check_gates(self.name, p)
        batches.check_batch(self.name, p)
        pages.check_entries(self.name, p)
        if not p["t"] <= int(p["len"] or p["cap"]) <= p["cap"]:
            raise UsageError("gate_keys: len (KV length) must lie between t and cap")

    def args(self, workload: Workload) -> tuple[Arg, ...]:
        """Return pos, frequencies, projection, norm (if any), k_cache, desc (written)."""
        p = self.full(workload)
        entries = entries_of(p["cap"], p["size"], p["size"])
        one = (
            Arg("pos", "input", (2,), "int32"),
            *seer_gates.weight_args(p, 3 * p["d"]),
            Arg("k_cache", "state", (p["cap"], p["kv"], p["d"]), parse_cache_format(p["c"]).dtype),
            Arg("desc", "state", (entries, p["kv"], 1, p["g"]), "float32", mutated=True),
        )
        return pages.paged_args(one, p) if pages.paged(p) else batches.batched(one, p["b"])

    def make_inputs(self, workload: Workload, rng: np.random.Generator) -> dict[str, Array]:
        """Draw keys, and wild entries that none may be merged with; later slots hold NaN.

        Of a batch some sequences complete a block, see `batches.ended`.
        """
        p = self.full(workload)
        length = int(p["len"] or p["cap"])
        lengths = batches.lengths(length, p)
        if p["b"] > 1:
            lengths = batches.ended(lengths, p["size"], p["size"], p["t"], rng)

        def wild(arg: Arg) -> Array:
            return 100 * rng.standard_normal(arg.shape, dtype=np.float32)

        if p["b"] > 1 or pages.paged(p):
            fill = {"k_cache": pooled.poison, "desc": wild}
            return batches.drawn(self, workload, rng, lengths, lambda arg: fill[arg.name](arg))
        *_, cache, desc = self.args(workload)
        keys = rng.standard_normal(cache.shape, dtype=np.float32)
        keys[length:] = np.nan
        return {
            "pos": np.array([length - p["t"], p["t"]], np.int32),
            **seer_gates.draw_weights(p, 3 * p["d"], rng),
            "k_cache": parse_cache_format(p["c"]).encode(keys),
            "desc": wild(desc),
        }

    @batches.one_by_one
    def reference(self, workload: Workload, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute in float64, from float32 angles; entries of other blocks keep their values."""
        p, w = self.full(workload), seer_gates.real_weights(inputs)
        desc = torch.from_numpy(inputs["desc"]).double()
        keys = torch.from_numpy(parse_cache_format(p["c"]).decode(inputs["k_cache"]))
        gate_keys(
            keys, torch.from_numpy(inputs["pos"]), w["inv_freq"], w["gate_freq"], w["weight"],
            w.get("norm"), desc, p["size"], bool(p["last"]), p["eps"],
        )  # fmt: skip
        return {"desc": desc.numpy()}

    @batches.one_by_one
    def bound(
        self, workload: Workload, inputs: Mapping[str, Array], expected: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Follow the arithmetic: see `seer_gates`. Entries that are not made are exact.

        A greatest or least number is off by no more than any of its numbers; a mean of n by
        theirs, and rounds n times.
        """
        p, w = self.full(workload), seer_gates.real_weights(inputs)
        keys = torch.from_numpy(parse_cache_format(p["c"]).decode(inputs["k_cache"]))
        out = torch.zeros(expected["desc"].shape, dtype=torch.float64)
        for e in made(torch.from_numpy(inputs["pos"]), out.shape[0], p["size"]):
            raw = _block(keys, e, p["size"], w["inv_freq"], torch.float64)
            stored = keys[e * p["size"] : (e + 1) * p["size"]].double()
            off = seer_gates.turned_bound(stored, p["rot"] // 2)
            mean = off.mean(0) + (p["size"] + 2) * U32 * (raw.abs() + off).mean(0)
            moved = torch.stack([off.amax(0), off.amax(0), mean], 1)
            x, off = (part.reshape(1, p["kv"], -1) for part in (describe(raw, "pool3"), moved))
            out[e, :, 0] = seer_gates.finished_bound(
                x, off, w["weight"], w.get("norm"), p["grot"] // 2, p["eps"]
            )[0]
        return {"desc": out.numpy()}

    def counts(self, workload: Workload) -> Counts:
        """Keys of the blocks that are completed and the weights once; nothing where none is."""
        p = self.full(workload)
        entries = entries_of(p["cap"], p["size"], p["size"])
        places = [[n - p["t"], p["t"]] for n in batches.lengths(int(p["len"] or p["cap"]), p)]
        blocks = sum(len(made(at, entries, p["size"])) for at in torch.tensor(places))
        rows, outs = float(blocks * p["size"] * p["kv"]), float(blocks * p["kv"])
        weights = p["kv"] * 3.0 * p["d"] * p["g"] * (4 if p["w"] == "f32" else 2) * bool(blocks)
        moved = rows * p["d"] * parse_cache_format(p["c"]).bytes + weights + 4.0 * outs * p["g"]
        ops = {
            "fma_f32": 2 * rows * p["rot"] + outs * (3 * p["d"] * p["g"] + 2 * p["grot"]),
            "add_f32": 3 * rows * p["d"],
            "exp_f32": float(blocks * (p["size"] * p["rot"] + p["grot"])),
        }
        found = Counts(ops, {"dram": moved + 8.0 * p["b"]})
        tokens = [min(p["t"], p["cap"])] * p["b"]
        return pages.counted(p, found, tokens, 0.0) if pages.paged(p) else found
