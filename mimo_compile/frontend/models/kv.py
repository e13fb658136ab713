"""The KV cache of a layer: which arrays it keeps, appending to them, attending to all that they hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mimo_compile.frontend.models.decoder import STEP_TOKENS, LayerSpec
from mimo_compile.ir.caches import SCALED, CacheFormat, window_cache_format
from mimo_compile.ir.kv_groups import GROUPED, STATES, GroupedFormat, state_shapes

if TYPE_CHECKING:
    from mimo_compile.frontend.models.stages import LayerCore

Caches = CacheFormat | GroupedFormat


def format_of(spec: LayerSpec, caches: Caches) -> Caches:
    """Return the format of a layer's cache in a model with these: rings of windows have no groups."""
    return window_cache_format(caches) if spec.window else caches


def extent(spec: LayerSpec, caches: Caches, max_context: int) -> tuple[int, int]:
    """Return the slots of a layer's cache, whole groups of them, and those of its tail, if it has one."""
    cap = spec.capacity(max_context)
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


def append(layer: LayerCore, qkv: Tensor, table: Tensor, pos: Tensor) -> Tensor:
    """Append a step's keys and values: ``qkv [T, H*D + KV*D + KV*DV]`` -> rotated q ``[T, H, D]``."""
    s, a = layer.spec, layer.attention
    if layer.caches.name in GROUPED:
        q: Tensor = torch.ops.mimo.kv_append_groups(
            qkv, table, pos, a.q_norm, a.k_norm, *(layer.get_buffer(n) for n in STATES), s.heads,
            layer.eps, s.v_scale, layer.caches.name,
        )  # fmt: skip
        return q
    plain: Tensor = torch.ops.mimo.kv_append(
        qkv,
        table,
        pos,
        a.q_norm,
        a.k_norm,
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
            q, *(layer.get_buffer(n) for n in STATES), pos, sink, s.d**-0.5, layer.caches.name
        )
        return out
    plain: Tensor = torch.ops.mimo.cached_attention(
        q, layer.k_cache, layer.v_cache, pos, sink, s.d**-0.5, s.window, _named(layer)
    )
    return plain
