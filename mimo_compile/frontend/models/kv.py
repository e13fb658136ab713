"""The KV cache of a layer: which arrays it keeps, appending to them, attending to all that they hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mimo_compile.frontend.models.decoder import STEP_TOKENS, DecoderConfig, LayerSpec
from mimo_compile.ir.caches import SCALED, CacheFormat, window_cache_format
from mimo_compile.ir.kv_groups import GROUPED, STATES, GroupedFormat, state_shapes
from mimo_compile.ir.kv_groups import spans as group_spans
from mimo_compile.ir.ops.pages import CACHES, rows_in_page, width_of

if TYPE_CHECKING:
    from mimo_compile.frontend.models.stages import LayerCore

Caches = CacheFormat | GroupedFormat
PAGE = 64
"""Positions in a page: whole blocks of kernels, and what few positions leave unused of their last page."""


def asked_format(config: DecoderConfig, name: str, caches: Caches) -> Caches:
    """Return the format of a layer's cache before its window has a say: the model's, or its policy's own.

    Args:
        config: The decoder.
        name: Of the layer's stage.
        caches: Format of the model's caches.
    """
    part, _, number = name.partition(".")
    if part == "layers" and config.roles and config.roles[int(number)].kind == "quantised":
        return GROUPED[config.attention.quantised_cache]
    return caches


def format_of(spec: LayerSpec, caches: Caches) -> Caches:
    """Return the format of a layer's cache in a model with these: rings of windows have no groups."""
    return window_cache_format(caches) if spec.window else caches


def extent(spec: LayerSpec, caches: Caches, max_context: int) -> tuple[int, int]:
    """Return the slots of a layer's cache, whole groups of them, and those of its tail, if it has one."""
    cap = spec.capacity(max_context)
    if caches.name in SCALED:  # blocks of 16 slots are no whole lines of memory: those of four are
        return -(-cap // 64) * 64, 0
    if isinstance(caches, CacheFormat):
        return cap, 0
    cap = caches.slots(cap)
    return cap, caches.tail(min(STEP_TOKENS, max_context), cap)


def cache_arrays(spec: LayerSpec, caches: Caches, max_context: int) -> dict[str, Tensor]:
    """Return the arrays of a layer's cache by name, on the meta device."""
    cap, tail = extent(spec, caches, max_context)
    if isinstance(caches, CacheFormat):
        return {
            name: torch.empty((cap, spec.kv_heads, width), dtype=caches.torch_dtype, device="meta")
            for name, width in (("k_cache", spec.d), ("v_cache", spec.dv))
        }
    shapes = state_shapes(caches, cap, tail, spec.kv_heads, spec.d, spec.dv)
    return {
        name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for name, (shape, dtype) in shapes.items()
    }


def _named(layer: LayerCore) -> str:
    """Return the name of the layer's format where the type of its arrays does not say it."""
    return layer.caches.name if layer.caches.name in SCALED else ""


@dataclass(frozen=True, slots=True)
class Paging:
    """Pages that sequences take from a pool."""

    pages: int
    cap: int
    """Positions of a sequence at most."""
    page: int = PAGE
    """Positions in a page."""


def may_page(layer: LayerCore) -> bool:
    """Say whether a layer's caches can be pages: those of whole contexts, read by tables."""
    return layer.attend.in_pages and not layer.spec.window


def tables(layer: LayerCore) -> tuple[Tensor | None, int, int] | tuple[()]:
    """Return what ops over pages take last: tables, positions of a sequence at most, positions of a page."""
    if layer.paging is None:
        return ()
    return layer.pages, positions(layer), layer.paging.page


def positions(layer: LayerCore) -> int:
    """Return how many positions of a sequence a layer's cache holds, whole groups of them."""
    if layer.paging is None:
        return layer.k_cache.shape[-3]
    cap = layer.paging.cap
    return cap if isinstance(layer.caches, CacheFormat) else layer.caches.slots(cap)


def rows_of_page(layer: LayerCore, page: int) -> dict[str, int]:
    """Return how many rows of each state of a layer are in a page of so many positions; 0: none are."""
    spans = dict.fromkeys(layer.states, layer.attend.block) | dict.fromkeys(CACHES, 1)
    if layer.caches.name in GROUPED:
        spans |= zip(STATES, group_spans(layer.caches.name), strict=True)
    return {name: rows_in_page(page, span) if span else 0 for name, span in spans.items()}


@contextmanager
def paged(layer: LayerCore, paging: Paging, sequences: int) -> Iterator[None]:
    """Let a layer have the states of a pool, ``[rows, ...]``, and the tables of its sequences, on meta."""
    own = {name: layer.get_buffer(name) for name in layer.states}
    each = rows_of_page(layer, paging.page)
    try:
        for name, state in own.items():
            shape = (paging.pages * each[name], *state.shape[1:])
            if not each[name]:
                shape = (sequences, *state.shape) if sequences > 1 else state.shape
            setattr(layer, name, torch.empty(shape, dtype=state.dtype, device="meta"))
        table = (sequences, width_of(paging.cap, paging.page))
        layer.pages, layer.paging = torch.empty(table, dtype=torch.int32, device="meta"), paging
        yield
    finally:
        layer.pages = layer.paging = None
        for name, state in own.items():
            setattr(layer, name, state)


def project(layer: LayerCore, normed: Tensor, adapter: Tensor | None = None) -> Tensor:
    """Return a step's q, k and v rows, before norms of single heads: ``normed [T, D]`` -> ``[T, ...]``."""
    s, a = layer.spec, layer.attention
    qkv: Tensor = a.qkv(normed, adapter)
    if s.qk_norm == "all":
        assert a.q_norm is not None and a.k_norm is not None
        norm, first = torch.nn.functional.rms_norm, s.heads * s.d
        both = first + s.kv_heads * s.d
        q = norm(qkv[:, :first], (first,), a.q_norm, layer.eps)
        k = norm(qkv[:, first:both], (both - first,), a.k_norm, layer.eps)
        qkv = torch.cat([q, k, qkv[:, both:]], dim=-1)
    return qkv.clamp(-s.clip_qkv, s.clip_qkv) if s.clip_qkv else qkv


def _head_norms(layer: LayerCore) -> tuple[Tensor | None, Tensor | None]:
    """Return the norms ``[D]`` of each query and each key head."""
    a = layer.attention
    return (a.q_norm, a.k_norm) if layer.spec.qk_norm == "head" else (None, None)


def append(layer: LayerCore, qkv: Tensor, table: Tensor, pos: Tensor) -> Tensor:
    """Append a step's keys and values: ``qkv [T, H*D + KV*D + KV*DV]`` -> rotated q ``[T, H, D]``."""
    s, norms = layer.spec, _head_norms(layer)
    if layer.caches.name in GROUPED:
        q: Tensor = torch.ops.mimo.kv_append_groups(
            qkv, table, pos, *norms, *(layer.get_buffer(n) for n in STATES), s.heads,
            layer.eps, s.v_scale, layer.caches.name, *tables(layer),
        )  # fmt: skip
        return q
    if layer.paging is not None:
        made: Tensor = torch.ops.mimo.kv_append_pages(
            qkv, table, pos, *norms, layer.k_cache, layer.v_cache, layer.pages, s.heads,
            layer.eps, s.v_scale, layer.paging.cap, layer.paging.page, _named(layer),
        )  # fmt: skip
        return made
    plain: Tensor = torch.ops.mimo.kv_append(
        qkv,
        table,
        pos,
        *norms,
        layer.k_cache,
        layer.v_cache,
        s.heads,
        layer.eps,
        s.v_scale,
        s.stays,
        _named(layer),
    )
    return plain


def attend_all(layer: LayerCore, q: Tensor, pos: Tensor) -> Tensor:
    """Attend to all that the spec's window leaves: ``q [T, H, D]`` -> ``[T, H, DV]``."""
    s, sink = layer.spec, layer.attention.sink
    if layer.caches.name in GROUPED:
        out: Tensor = torch.ops.mimo.grouped_attention(
            q, *(layer.get_buffer(n) for n in STATES), pos, sink, s.d**-0.5, layer.caches.name,
            *tables(layer),
        )  # fmt: skip
        return out
    if layer.paging is not None:
        seen: Tensor = torch.ops.mimo.paged_attention(
            q, layer.k_cache, layer.v_cache, layer.pages, pos, sink, s.d**-0.5, layer.paging.cap,
            layer.paging.page, _named(layer),
        )  # fmt: skip
        return seen
    plain: Tensor = torch.ops.mimo.cached_attention(
        q, layer.k_cache, layer.v_cache, pos, sink, s.d**-0.5, s.window, _named(layer)
    )
    return plain
