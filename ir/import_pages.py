"""Converters of ops over caches in pages of a pool (see `importer`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mimo_compile.ir.import_attention import DENSE_KV, extents, factor


class PageConverters:
    """Converters that emit one workload each by ``call`` (see `importer._Converters.call`)."""

    def __init__(
        self,
        call: Callable[..., Any],
        cache_format: Callable[..., str],
        appended: dict[Any, int],
        lay: str = "",
    ) -> None:
        """Serve one import, whose caches have an order; ``appended`` is that of its `ListConverters`."""
        self.call, self.cache_format, self.appended, self.lay = call, cache_format, appended, lay

    @property
    def table(self) -> dict[str, Callable[[Any, Any], Any]]:
        """The converters by ATen name."""
        return {
            "kv_append_pages.default": self.kv_append_pages,
            "paged_attention.default": self.paged_attention,
        }

    def kv_append_pages(self, node: Any, imp: Any) -> Any:
        """Append to a pool."""
        qkv, table, pos, q_norm, k_norm, k_cache, v_cache, pages, heads, eps, v_scale, *where = (
            imp.retrieve_args(node)
        )
        cap, page, *named = where
        rows, b, (slots, kv, d) = extents(qkv)[0], extents(pages)[0], extents(k_cache)
        self.appended[k_cache] = rows // b
        norm = {"norm": 1, "eps": float(eps)} if q_norm is not None else {}
        return self.call(
            imp, "kv_append", [qkv, table, pos, q_norm, k_norm, pages, k_cache, v_cache],
            [([rows, heads, d], "float32")], t=rows // b, h=heads, kv=kv, d=d,
            dv=extents(v_cache)[2], cap=cap, b=b, rot=2 * extents(table)[2], vscale=float(v_scale),
            c=_named(named) or self.cache_format(k_cache, v_cache), page=page, pool=slots // page,
            lay=self.lay, **norm,
        )  # fmt: skip

    def paged_attention(self, node: Any, imp: Any) -> Any:
        """Attend over a pool."""
        q, k_cache, v_cache, pages, pos, sink, scale, cap, page, *named = imp.retrieve_args(node)
        (rows, h, d), (slots, kv, _), dv = extents(q), extents(k_cache), extents(v_cache)[2]
        b = extents(pages)[0]
        return self.call(
            imp, "cached_attention", [q, pos, sink, pages, k_cache, v_cache],
            [([rows, h, dv], "float32")], t=rows // b, h=h, kv=kv, d=d, dv=dv, cap=cap, b=b,
            sink=int(sink is not None), scale=factor(scale, d),
            len=min(cap, max(rows // b, DENSE_KV)), page=page, pool=slots // page, lay=self.lay,
            c=_named(named) or self.cache_format(k_cache, v_cache),
        )  # fmt: skip


def _named(c: list[str]) -> str:
    """Return the name of a format that the type of caches does not say; empty: it does."""
    return c[0] if c else ""
