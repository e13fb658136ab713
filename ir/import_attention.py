"""Converters of attention by lists: describe, score, select, attend (see `importer`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mimo_compile.errors import UsageError
from mimo_compile.ir.caches import FORMATS
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.pages import rows_in_page
from mimo_compile.ir.workload import Value

MEASURED_KV = 16384
"""KV length that kernels of long contexts are measured at (or the cache, if shorter)."""

DENSE_KV = 1024
"""Likewise for attention to everything, as in `importer`."""


def extents(var: Any) -> list[int]:
    """Return the static shape of a Relax value."""
    return [int(d) for d in var.ty.shape.values]


def sequences(pos: Any) -> int:
    """Return how many sequences there are: of a batch ``pos`` is ``[B, 2]``."""
    shape = extents(pos)
    return shape[0] if len(shape) == 2 else 1


def measured(cap: int, t: int) -> int:
    """Return the parameter ``len`` of a workload over a cache; 0 is the whole cache."""
    length = min(cap, max(t, MEASURED_KV))
    return 0 if length == cap else length


def factor(scale: float, d: int) -> float:
    """Return the parameter ``scale``; 0 is ``1/sqrt(d)``."""
    return 0.0 if abs(float(scale) * d**0.5 - 1) < 1e-6 else float(scale)


def in_pages(table: Any, cap: int, page: int, slots: int) -> dict[str, int]:
    """Return the parameters of a workload over pages of a pool of so many slots; none without tables."""
    if table is None:
        return {}
    return {"cap": cap, "b": extents(table)[0], "page": page, "pool": slots // page}


class ListConverters:
    """Converters that emit one workload each by ``call`` (see `importer._Converters.call`)."""

    def __init__(
        self, call: Callable[..., Any], cache_format: Callable[..., str], lay: str = ""
    ) -> None:
        """Serve one import, whose caches have an order."""
        self.call, self.cache_format, self.lay = call, cache_format, lay
        self.appended: dict[Any, int] = {}
        """Cache -> tokens that the call appended to it, which is what descriptors are made anew for."""
        self.effects: list[Any] = []
        """Stand for calls that give nothing but what they write: kept alive as results of the function."""

    @property
    def table(self) -> dict[str, Callable[[Any, Any], Any]]:
        """The converters by ATen name."""
        return {
            "describe_blocks.default": self.describe_blocks,
            "index_keys.default": self.index_keys,
            "append_entries.default": self.append_entries,
            "gate_queries.default": self.gate_queries,
            "gate_keys.default": self.gate_keys,
            "score_blocks.default": self.score_blocks,
            "score_keys.default": self.score_keys,
            "score_lowbit.default": self.score_lowbit,
            "key_mean.default": self.key_mean,
            "select_blocks.default": self.select_blocks,
            "sparse_attention.default": self.sparse_attention,
            "int8_attention.default": self.int8_attention,
            "oracle_attention.default": self.oracle_attention,
        }

    def _refuse_order(self, op: str) -> None:
        """Refuse an op in a layer whose caches have an order that its kernels do not read."""
        if self.lay:
            raise UsageError(
                f"{op} does not read caches with lay={self.lay}, which other ops of the layer use",
                remedy="leave out lay in the whole layer",
            )

    def describe_blocks(self, node: Any, imp: Any) -> None:
        """Update descriptors of the tokens that the call appended."""
        self._refuse_order("describe_blocks")
        k_cache, pos, desc, kind, size, stride, *more = imp.retrieve_args(node)
        whole, *where = more or [False]
        table, most, page = where or (None, 0, 0)
        (cap, kv, d), t = extents(k_cache)[-3:], self.appended[k_cache]
        p = {"cap": cap, "b": sequences(pos)} | in_pages(table, most, page, cap)
        done = self.call(
            imp, "describe_blocks", [pos, table, k_cache, desc], [([1], "int32")], t=t, kv=kv, d=d,
            kind=kind, size=size, stride=0 if stride == size else stride, len=measured(p["cap"], t),
            c=self.cache_format(k_cache), whole=int(bool(whole)), e=_format(desc), **p,
        )  # fmt: skip
        self.effects.append(done)

    def index_keys(self, node: Any, imp: Any) -> None:
        """Take the keys that the call appended into an index by channels."""
        if self.lay != "rows":
            raise UsageError(
                f"index_keys reads caches with lay=rows, not lay={self.lay}",
                remedy="use lay=rows in the whole layer",
            )
        k_cache, pos, copy, peak, span = imp.retrieve_args(node)
        (cap, kv, d), t = extents(k_cache)[-3:], self.appended[k_cache]
        done = self.call(
            imp, "index_keys", [pos, k_cache, copy, peak], [([1], "int32")], t=t, kv=kv, d=d, cap=cap,
            span=span, c=self.cache_format(k_cache, copy), b=sequences(pos),
        )  # fmt: skip
        self.effects.append(done)

    def append_entries(self, node: Any, imp: Any) -> None:
        """Write the entries of the call's tokens."""
        rows, pos, desc = imp.retrieve_args(node)
        (tokens, kv, d), cap, b = extents(rows), extents(desc)[-4], sequences(pos)
        done = self.call(
            imp, "append_entries", [rows, pos, desc], [([1], "int32")], t=tokens // b, kv=kv, d=d,
            cap=cap, e=_format(desc), b=b,
        )  # fmt: skip
        self.effects.append(done)

    def gate_queries(self, node: Any, imp: Any) -> Any:
        """Project queries for gates."""
        q, pos, inv_freq, gate_freq, weight, norm, eps = imp.retrieve_args(node)
        (rows, h, d), (kv, _, g), b = extents(q), extents(weight), sequences(pos)
        return self.call(
            imp, "gate_queries", [q, pos, inv_freq, gate_freq, weight, norm],
            [([rows, kv, g], "float32")], t=rows // b, h=h, kv=kv, d=d, g=g, rot=2 * extents(inv_freq)[0],
            grot=2 * extents(gate_freq)[0], norm=int(norm is not None), eps=float(eps), w=_format(weight),
            b=b,
        )  # fmt: skip

    def gate_keys(self, node: Any, imp: Any) -> None:
        """Compress the blocks that the tokens of the call complete."""
        self._refuse_order("gate_keys")
        k_cache, pos, inv_freq, gate_freq, weight, norm, desc, size, last, eps, *where = (
            imp.retrieve_args(node)
        )
        table, most, page = where or (None, 0, 0)
        (cap, kv, d), t = extents(k_cache)[-3:], self.appended[k_cache]
        p = {"cap": cap, "b": sequences(pos)} | in_pages(table, most, page, cap)
        done = self.call(
            imp, "gate_keys", [pos, inv_freq, gate_freq, weight, norm, table, k_cache, desc],
            [([1], "int32")], t=t, kv=kv, d=d, size=size, g=extents(weight)[2],
            rot=2 * extents(inv_freq)[0], grot=2 * extents(gate_freq)[0], norm=int(norm is not None),
            last=int(last), eps=float(eps), len=measured(p["cap"], t), c=self.cache_format(k_cache),
            w=_format(weight), **p,
        )  # fmt: skip
        self.effects.append(done)

    def score_blocks(self, node: Any, imp: Any) -> Any:
        """Score blocks by descriptors."""
        q, desc, weight, pos, kind, agg, soft, block, rows, blocks, size, stride, scale, *where = (
            imp.retrieve_args(node)
        )
        table, most, page = where or (None, 0, 0)
        (r, h, d), kv = extents(q), extents(desc)[-3]
        p = {"cap": blocks * block, "b": sequences(pos)}
        if table is not None:
            p |= in_pages(table, most, page, extents(desc)[0] // rows_in_page(page, size) * page)
        t = r // p["b"] * rows
        heads = h if agg == "none" else kv
        sizes: dict[str, Value] = {"size": size, "stride": stride} if kind == "compressed" else {}
        ones = kind == "indexer"
        return self.call(
            imp, "score_blocks", [q, pos, weight, table, desc], [([r, heads, blocks], "float32")], t=t,
            h=h, kv=kv, d=d, kind=kind, agg=agg, block=block, rows=rows, soft=int(soft),
            scale=0.0 if ones and scale == 1 else factor(scale, d), len=measured(p["cap"], t),
            e=_format(desc), **sizes, **p,
        )  # fmt: skip

    def score_keys(self, node: Any, imp: Any) -> Any:
        """Score blocks by their keys."""
        q, k_cache, pos, peak, guess, kind, agg, block, channels, scale, *more = imp.retrieve_args(
            node
        )
        (r, h, d), (cap, kv, _) = extents(q), extents(k_cache)[-3:]
        span, *where = more or [0]
        table, most, page = where or (None, 0, 0)
        p = {"cap": cap, "b": sequences(pos)} | in_pages(table, most, page, cap)
        t, out = r // p["b"], [r, h if agg == "none" else kv, -(-p["cap"] // block)]
        return self.call(
            imp, "score_keys", [q, pos, guess, peak, table, k_cache], [(out, "float32")], t=t, h=h,
            kv=kv, d=d, kind=kind, agg=agg, block=block, channels=channels, guess=int(guess is not None),
            scale=factor(scale, d), len=measured(p["cap"], t), c=self.cache_format(k_cache),
            lay="" if kind == "channels" else self.lay, span=span, **p,
        )  # fmt: skip

    def key_mean(self, node: Any, imp: Any) -> Any:
        """Average the keys."""
        self._refuse_order("key_mean")
        k_cache, pos = imp.retrieve_args(node)
        (cap, kv, d), t = extents(k_cache), self.appended[k_cache]
        return self.call(
            imp, "key_mean", [pos, k_cache], [([kv, d], "float32")], t=t, kv=kv, d=d, cap=cap,
            len=measured(cap, t), c=self.cache_format(k_cache),
        )  # fmt: skip

    def score_lowbit(self, node: Any, imp: Any) -> Any:
        """Estimate blocks for tiles of a prompt."""
        self._refuse_order("score_lowbit")
        q, k_cache, pos, q_mean, k_mean, bits, block, rows, first, last, scale, *more = (
            imp.retrieve_args(node)
        )
        least, every = more[0] if more else 0, more[1] if len(more) > 1 else 1
        (t, h, d), (cap, kv, _) = extents(q), extents(k_cache)
        return self.call(
            imp, "score_lowbit", [q, pos, q_mean, k_mean, k_cache],
            [([-(-t // rows), h, -(-cap // block)], "float32")], t=t, h=h, kv=kv, d=d, cap=cap,
            block=block, rows=rows, first=first, last=last, bits=bits, scale=factor(scale, d),
            least=least, every=every, len=measured(cap, t), c=self.cache_format(k_cache),
        )  # fmt: skip

    def select_blocks(self, node: Any, imp: Any) -> Any:
        """Make lists."""
        score, pos, value, rule, k, share, block, rows, first, last, merge, kmax, *more = (
            imp.retrieve_args(node)
        )
        (r, hs, blocks), b = extents(score), sequences(pos)
        t, cap = r // b * rows, blocks * block
        p: dict[str, Value] = {
            "t": t, "hs": hs, "cap": cap, "block": block, "k": k, "rule": rule, "share": float(share),
            "rows": rows, "first": first, "last": last, "merge": merge, "len": measured(cap, t),
            "positive": int(bool(more and more[0])), "b": b,
        }  # fmt: skip
        op: Any = get_op("select_blocks")
        p["kmax"] = 0 if op.list_length(op.full(op.workload(**p))) == kmax else kmax
        lists = [r, 1 if merge == "rank" else hs]
        outs = [([*lists, kmax], "int32"), (lists, "int32")]
        return self.call(imp, "select_blocks", [score, pos, value], outs, **p)

    def sparse_attention(self, node: Any, imp: Any) -> Any:
        """Attend to lists."""
        q, k_cache, v_cache, pos, idx, cnt, sink, block, rows, scale, window, *more = (
            imp.retrieve_args(node)
        )
        first, *where = more or [0]
        table, most, page = where or (None, 0, 0)
        (r, h, d), (cap, kv, _), dv = extents(q), extents(k_cache)[-3:], extents(v_cache)[-1]
        _, hs, kmax = extents(idx)
        p = {"cap": cap, "b": sequences(pos)} | in_pages(table, most, page, cap)
        t = r // p["b"]
        return self.call(
            imp, "sparse_attention", [q, pos, idx, cnt, sink, table, k_cache, v_cache],
            [([r, h, dv], "float32"), ([r, h], "float32")], t=t, h=h, kv=kv, d=d, dv=dv, hs=hs,
            block=block, kmax=kmax, rows=rows, window=window, sink=int(sink is not None),
            scale=factor(scale, d), len=0 if first else measured(p["cap"], t), first=first,
            c=self.cache_format(k_cache, v_cache), lay=self.lay, **p,
        )  # fmt: skip

    def int8_attention(self, node: Any, imp: Any) -> Any:
        """Attend to a cache, or a window of it, in int8 arithmetic."""
        self._refuse_order("int8_attention")
        q, k_cache, v_cache, pos, sink, scale, window, arith = imp.retrieve_args(node)
        (t, h, d), (cap, kv, _), dv = extents(q), extents(k_cache), extents(v_cache)[2]
        return self.call(
            imp, "cached_attention", [q, pos, sink, k_cache, v_cache], [([t, h, dv], "float32")],
            t=t, h=h, kv=kv, d=d, dv=dv, cap=cap, window=window, sink=int(sink is not None),
            scale=factor(scale, d), len=0 if window else min(cap, max(t, DENSE_KV)),
            c=self.cache_format(k_cache, v_cache), arith=arith,
        )  # fmt: skip

    def oracle_attention(self, node: Any, imp: Any) -> Any:
        """Attend to a cache, and score its blocks."""
        self._refuse_order("oracle_attention")
        q, k_cache, v_cache, pos, block, scale = imp.retrieve_args(node)
        (t, h, d), (cap, kv, _), dv = extents(q), extents(k_cache), extents(v_cache)[2]
        outs = [([t, h, dv], "float32"), ([t, kv, -(-cap // block)], "float32")]
        return self.call(
            imp, "oracle_attention", [q, pos, k_cache, v_cache], outs, t=t, h=h, kv=kv, d=d, dv=dv, cap=cap,
            block=block, scale=factor(scale, d), len=min(cap, max(t, DENSE_KV)),
            c=self.cache_format(k_cache, v_cache),
        )  # fmt: skip


def _format(array: Any) -> str:
    """Return the name of the format of descriptors or weights."""
    kind = str(array.ty.dtype)
    return next(f.name for f in FORMATS.values() if f.dtype == kind)
