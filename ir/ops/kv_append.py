"""Prepare one step of attention from fused QKV rows: normalise, rotate, scale, append to the cache.

Input rows are ``[q heads | k heads | v heads]``. q and k are RMS-normalised per head when norms are given
(Qwen3), the first ``2 * table.shape[2]`` dimensions are rotated (half-split pairing: dimension i pairs with
i + r/2), v is multiplied by ``v_scale``; k and v rows go to slot ``(start + i) % cap`` for ``i < valid``;
with ``first`` that many leading positions have slots of their own, before a ring (`caches.slot_of`). Returns
the rotated q.

Rows are rounded to the caches' format (``c``), half to even; those of caches in groups (``c=i8``, ``i4``,
``i2``, ``i1``) go into a float32 tail and are quantised when a group fills up: see `ir.kv_groups`. In torch
these have an op of their own, ``kv_append_groups``, since a schema fixes the tensors that an op changes; both
are workloads of `KvAppend`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimo_compile.errors import UsageError
from mimo_compile.ir import float8, kv_bounds, kv_groups
from mimo_compile.ir.caches import (
    SCALED,
    check_cache_format,
    check_cache_order,
    check_first,
    single_format,
    slot_of,
)
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.ops import batches, pages, pooled
from mimo_compile.ir.ops.base import Arg, Array, OpDef, Param
from mimo_compile.ir.ops.numerics import U32
from mimo_compile.ir.workload import Workload


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the first dimensions of each head: ``x [T, H, D]``, ``table [T, 2, R/2]`` (cos, sin)."""
    half = table.shape[2]
    cos, sin = table[:, None, 0], table[:, None, 1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def turn_back(x: Tensor, table: Tensor) -> Tensor:
    """Undo `rotate`: ``x [T, H, D]``, ``table [T, 2, R/2]`` (cos, sin)."""
    half = table.shape[2]
    cos, sin = table[:, None, 0], table[:, None, 1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos + b * sin, b * cos - a * sin, rest], dim=-1)


def _norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)


def prepare(
    qkv: Tensor, table: Tensor, pos: Tensor, q_norm: Tensor | None, k_norm: Tensor | None,
    heads: int, kv_heads: int, d: int, dv: int, eps: float, v_scale: float, cap: int, first: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return rotated q ``[T, H, D]``, rows for the caches and their slots (valid tokens only)."""
    t = qkv.shape[0]
    table = table.to(qkv.dtype)
    q, k, v = qkv.split([heads * d, kv_heads * d, kv_heads * dv], dim=-1)
    q = rotate(_norm(q.reshape(t, heads, d), q_norm, eps), table)
    k = rotate(_norm(k.reshape(t, kv_heads, d), k_norm, eps), table)
    start, valid = int(pos[0]), int(pos[1])
    slots = slot_of(start + torch.arange(valid), cap, first)
    return q, k[:valid], v.reshape(t, kv_heads, dv)[:valid] * v_scale, slots


@torch.library.custom_op("mimo::kv_append", mutates_args=("k_cache", "v_cache"))
def kv_append(
    qkv: Tensor, table: Tensor, pos: Tensor, q_norm: Tensor | None, k_norm: Tensor | None,
    k_cache: Tensor, v_cache: Tensor, heads: int, eps: float, v_scale: float, first: int = 0, c: str = "",
) -> Tensor:  # fmt: skip
    """Append: ``qkv [T, H*D + KV*D + KV*DV]``, caches ``[cap, KV, D/DV]`` -> q ``[T, H, D]``.

    Of B sequences: ``qkv [B * T, ...]``, ``table [B * T, 2, R/2]``, ``pos [B, 2]``, caches
    ``[B, cap, KV, D/DV]`` -> q ``[B * T, H, D]``. ``c`` names the caches' format where their type does not: a
    scaled one, whose numbers are float32 here.
    """
    (cap, kv_heads, d), dv = k_cache.shape[-3:], v_cache.shape[-1]

    def one(at: Tensor, mine: Tensor, angles: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q, k, v, slots = prepare(
            mine, angles, at, q_norm, k_norm, heads, kv_heads, d, dv, eps, v_scale, cap, first
        )
        if c in SCALED:
            k, v = float8.rounded(k), float8.rounded(v)
        keys[slots] = k.to(keys.dtype)
        values[slots] = v.to(values.dtype)
        return q

    return torch.cat(batches.several(one, pos, (qkv, table), (k_cache, v_cache)))


@kv_append.register_fake
def _(
    qkv: Tensor, table: Tensor, pos: Tensor, q_norm: Any, k_norm: Any, k_cache: Tensor, v_cache: Tensor,
    heads: int, eps: float, v_scale: float, first: int = 0, c: str = "",
) -> Tensor:  # fmt: skip
    return qkv.new_empty((qkv.shape[0], heads, k_cache.shape[-1]))


@torch.library.custom_op("mimo::kv_append_groups", mutates_args=kv_groups.STATES)
def kv_append_groups(
    qkv: Tensor, table: Tensor, pos: Tensor, q_norm: Tensor | None, k_norm: Tensor | None,
    k_cache: Tensor, k_scale: Tensor, k_tail: Tensor, v_cache: Tensor, v_scale: Tensor, v_tail: Tensor,
    heads: int, eps: float, gain: float, c: str, pages: Tensor | None = None, cap: int = 0, page: int = 0,
) -> Tensor:  # fmt: skip
    """Append to a cache in groups (`ir.kv_groups`, format ``c``): ``qkv [T, ...]`` -> q ``[T, H, D]``.

    ``gain`` multiplies the values. Several sequences: as for `kv_append`. ``pages``: block tables int32
    ``[B, width]`` of sequences of up to ``cap`` positions, whose codes and scales lie in pages of a pool.
    """
    (slots, kv_heads, d), dv = k_cache.shape[-3:], v_cache.shape[-1]

    def one(at: Tensor, mine: Tensor, angles: Tensor, *states: Tensor) -> Tensor:
        q, k, v, _ = prepare(
            mine, angles, at, q_norm, k_norm, heads, kv_heads, d, dv, eps, gain, cap or slots
        )
        named = dict(zip(kv_groups.STATES, states, strict=True))
        kv_groups.append_rows(named, k, v, int(at[0]), kv_groups.GROUPED[c])
        return q

    held = (k_cache, k_scale, k_tail, v_cache, v_scale, v_tail)
    if pages is None:
        return torch.cat(batches.several(one, pos, (qkv, table), held))
    own = pooled.of_each(pos, held, kv_groups.spans(c), pages, page, cap)
    made = torch.cat(batches.several(one, pos, (qkv, table), own))
    pooled.keep_each(pos, held, own, kv_groups.spans(c), pages, page)
    return made


@kv_append_groups.register_fake
def _(
    qkv: Tensor, table: Tensor, pos: Tensor, q_norm: Any, k_norm: Any, k_cache: Tensor, k_scale: Tensor,
    k_tail: Tensor, v_cache: Tensor, v_scale: Tensor, v_tail: Tensor, heads: int, eps: float, gain: float,
    c: str, pages: Any = None, cap: int = 0, page: int = 0,
) -> Tensor:  # fmt: skip
    return qkv.new_empty((qkv.shape[0], heads, k_cache.shape[-1]))


class KvAppend(OpDef):
    """``kv_append:t=1,h=32,kv=8,d=128,dv=128,cap=4096,rot=128``; ``norm=1`` for QK-norm.

    ``b`` sequences have T tokens and a cache each: see `batches`; or pages of a pool: see `pages`.
    """

    name = "kv_append"
    params = (
        Param("t", int, low=1),
        Param("h", int, low=1),
        Param("kv", int, low=1),
        Param("d", int, low=1),
        Param("dv", int, low=1),
        Param("cap", int, low=1),
        Param("rot", int, 0),
        Param("norm", int, 0),
        Param("eps", float, 1e-6),
        Param("vscale", float, 1.0),
        Param("c", str, "f32"),
        Param("tail", int, 0),
        Param("lay", str, ""),
        Param("first", int, 0),
        Param("b", int, 1, low=1),
        *pages.PARAMS,
    )

    def check(self, p: Mapping[str, Any]) -> None:
        """Refuse odd or too wide rotations, calls longer than the cache, unknown cache formats."""
        check_cache_format(p["c"])
        check_cache_order(self.name, p)
        check_first(self.name, p)
        if p["rot"] % 2 or p["rot"] > p["d"] or p["t"] > p["cap"] - p["first"]:
            raise UsageError("kv_append: rot must be even and at most d, and t at most cap - first")
        kv_groups.check_groups(self.name, p)
        batches.check_batch(self.name, p)
        pages.check_pages(self.name, p, ring=p["first"])

    def args(self, workload: Workload) -> tuple[Arg, ...]:
        """Return qkv, table, pos, norms, the caches' arrays (all written), q."""
        p = self.full(workload)
        width = (p["h"] + p["kv"]) * p["d"] + p["kv"] * p["dv"]
        out = [
            Arg("qkv", "input", (p["t"], width), "float32"),
            Arg("table", "input", (p["t"], 2, p["rot"] // 2), "float32"),
            Arg("pos", "input", (2,), "int32"),
        ]
        if p["norm"]:
            out += [Arg(n, "weight", (p["d"],), "float32") for n in ("q_norm", "k_norm")]
        if fmt := kv_groups.grouped(p):
            states = kv_groups.states_of(p, fmt, mutated=True)
        else:
            stored = single_format(p["c"]).dtype
            states = (
                Arg("k_cache", "state", (p["cap"], p["kv"], p["d"]), stored, mutated=True),
                Arg("v_cache", "state", (p["cap"], p["kv"], p["dv"]), stored, mutated=True),
            )
        out += [*states, Arg("q", "output", (p["t"], p["h"], p["d"]), "float32")]
        if pages.paged(p):
            return pages.paged_args(out, p)
        return batches.batched(out, p["b"])

    def make_inputs(self, workload: Workload, rng: np.random.Generator) -> dict[str, Array]:
        """Draw rows, angles and a start that makes the call wrap around the end of the cache.

        A cache in groups never wraps; there one is to fill up, if the call is long enough for it. Of a batch
        see `_apart`; over pages calls cross from page to page, but for some that fill up a group.
        """
        p = self.full(workload)
        if pages.paged(p):
            parts = [self.make_inputs(batches.alone(workload), rng) for _ in range(p["b"])]
            fmt = kv_groups.grouped(p)
            filling = batches.at_ends(p["b"], rng) if fmt and p["b"] > 1 else [bool(fmt)] * p["b"]
            for one, fills in zip(parts, filling, strict=True):
                if not fills:
                    one["pos"] = pages.drawn_place(p, int(one["pos"][1]), rng)

            def fill(arg: Arg) -> Array:
                if fmt and arg.dtype == "uint8":
                    return rng.integers(0, fmt.levels + 1, arg.shape, np.uint8)
                drawn = rng.standard_normal(arg.shape, dtype=np.float32)
                return drawn.astype(np.float16) if fmt else single_format(p["c"]).encode(drawn)

            return pooled.together(self, workload, parts, rng, fill)
        if p["b"] > 1:
            each = [self.make_inputs(batches.alone(workload), rng) for _ in range(p["b"])]
            self._apart(p, each, rng)
            return batches.join(self, workload, each)
        fmt = kv_groups.grouped(p)
        out: dict[str, Array] = {
            a.name: rng.standard_normal(a.shape, dtype=np.float32)
            for a in self.args(workload)
            if a.role != "output" and a.name not in ("pos", "table")
        }
        angle = rng.random((p["t"], p["rot"] // 2)) * 6.28
        out["table"] = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
        valid = int(rng.integers(1, p["t"] + 1))
        if fmt:
            full = fmt.group * int(rng.integers(1, p["cap"] // fmt.group + 1))
            start = min(full - int(rng.integers(1, valid + 1)), p["cap"] - valid)
            out["pos"] = np.array([max(start, 0), valid], np.int32)
            for name in ("k_cache", "v_cache"):
                out[name] = rng.integers(0, fmt.levels + 1, out[name].shape, np.uint8)
            for name in ("k_scale", "v_scale"):
                out[name] = out[name].astype(np.float16)
            return out
        turn = 2 * p["cap"] - p["first"]
        if p["first"] and rng.integers(2):  # where the ring begins
            turn = p["first"]
        out["pos"] = np.array([max(0, turn - valid // 2 - 1), valid], np.int32)
        for name in ("k_cache", "v_cache"):
            out[name] = single_format(p["c"]).encode(out[name])
        return out

    @staticmethod
    def _apart(
        p: Mapping[str, Any], each: Sequence[Mapping[str, Array]], rng: np.random.Generator
    ) -> None:
        """Move sequences to different positions; in place.

        Some fill up a group, see `batches.at_ends`, and another may have its first token.
        """
        fmt, ends = kv_groups.grouped(p), batches.at_ends(p["b"], rng)
        for i, one in enumerate(each):
            away = i
            if fmt:
                away = 0 if ends[i] else int(rng.integers(1, fmt.group))
            one["pos"][0] = max(int(one["pos"][0]) - away, 0)
        others = [i for i, end in enumerate(ends) if not end]
        if others and rng.integers(2):
            each[others[int(rng.integers(len(others)))]]["pos"][:] = 0, 1

    @batches.one_by_one
    def reference(self, workload: Workload, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute in float64, unrounded but for codes and scales; unwritten slots keep their values."""
        p = self.full(workload)
        fmt = kv_groups.grouped(p)
        states = kv_groups.STATES if fmt else ("k_cache", "v_cache")
        decode = (lambda x: x) if fmt else single_format(p["c"]).decode
        arrays = {k: decode(v) if k in states else v for k, v in inputs.items()}
        arr = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in arrays.items()}
        q, k, v, slots = prepare(
            arr["qkv"].double(), arr["table"], arr["pos"], arr.get("q_norm"), arr.get("k_norm"),
            p["h"], p["kv"], p["d"], p["dv"], p["eps"], p["vscale"], p["cap"], p["first"],
        )  # fmt: skip
        if fmt:
            held = {n: arr[n].double() if n.endswith("tail") else arr[n].clone() for n in states}
            kv_groups.append_rows(held, k, v, int(arr["pos"][0]), fmt)
            return {n: a.numpy() for n, a in held.items()} | {"q": q.numpy()}
        k_cache, v_cache = arr["k_cache"].double(), arr["v_cache"].double()
        k_cache[slots], v_cache[slots] = k, v
        return {"k_cache": k_cache.numpy(), "v_cache": v_cache.numpy(), "q": q.numpy()}

    @batches.one_by_one
    def bound(
        self, workload: Workload, inputs: Mapping[str, Array], expected: Mapping[str, Array]
    ) -> dict[str, Array]:
        """A few roundings of each product, one more to the cache's format; kept slots must be exact.

        The reference is not rounded: a float32 product next to a tie may round to either neighbour, and each
        lies within half a step of it. Codes and scales of a group may be those of any rows within a few
        roundings (`kv_bounds.allowed`).
        """
        p = self.full(workload)
        biggest = float(np.abs(inputs["qkv"]).max()) * (
            max(np.abs(inputs["q_norm"]).max(), np.abs(inputs["k_norm"]).max()) * p["d"] ** 0.5
            if p["norm"]
            else 1.0
        )
        tol = (8 + p["d"] ** 0.5 * p["norm"]) * U32 * max(biggest, 1.0) * max(abs(p["vscale"]), 1.0)
        out: dict[str, Array] = {"q": np.full(expected["q"].shape, 2 * tol)}
        if fmt := kv_groups.grouped(p):
            start, valid = (int(n) for n in inputs["pos"])
            return out | kv_bounds.allowed(expected, start, valid, 2 * tol, fmt)
        stored = single_format(p["c"])
        for name in ("k_cache", "v_cache"):
            same = expected[name] == stored.decode(inputs[name])
            allowed = 2 * tol + stored.unit * (np.abs(expected[name]) + 2 * tol)
            if p["c"] in SCALED:
                allowed = float8.most_off(expected[name], 2 * tol)
            out[name] = np.where(same, 0.0, allowed)
        return out

    def counts(self, workload: Workload) -> Counts:
        """Rows read once, rotated once, written once."""
        p = self.full(workload)
        width = (p["h"] + p["kv"]) * p["d"] + p["kv"] * p["dv"]
        if fmt := kv_groups.grouped(p):  # into the tail, and from there into codes, once in a group
            codes = fmt.bytes_of(p["d"], keys=True) + fmt.bytes_of(p["dv"], keys=False)
            saved = -codes * p["kv"]
        else:
            saved = (4.0 - single_format(p["c"]).bytes) * p["kv"] * (p["d"] + p["dv"])
        tokens = p["b"] * p["t"]
        found = Counts(
            {"fma_f32": 2.0 * tokens * (p["h"] + p["kv"]) * p["rot"]},
            {"dram": tokens * (8.0 * width - saved)},
        )
        return pages.counted(p, found, [p["t"]] * p["b"], 0.0) if pages.paged(p) else found
