"""How many pages the caches of a batch have together (``--pages``)."""

from __future__ import annotations

import math
import re
from operator import index
from typing import TYPE_CHECKING

from mimo_compile.errors import UsageError
from mimo_compile.ir.caches import FORMATS
from mimo_compile.ir.kv_groups import GroupedFormat
from mimo_compile.ir.ops.pages import least_pool, pages_of
from mimo_compile.ir.policies import AttentionPolicy
from mimo_compile.runtime.sizes import parse_size

if TYPE_CHECKING:
    from mimo_compile.frontend.models.decoder import Decoder
    from mimo_compile.frontend.models.kv import Paging
    from mimo_compile.frontend.models.stages import LayerCore

POLICIES = ("model", "full", "window", "quest", "seer", "lessismore", "moba", "resa")
"""All of whose kernels find keys by block tables."""


def check_pages(asked: int | str | None, batch: int, policy: AttentionPolicy) -> int | str | None:
    """Refuse what cannot be, before a model is read; returns what was asked for, checked.

    Args:
        asked: Number of pages, or their memory in all layers (``"2GiB"``); None: there are none.
        batch: Sequences that are decoded together.
        policy: What layers attend to.

    Raises:
        UsageError: it is neither, or such caches have no pages.
    """
    from mimo_compile.frontend.models.kv import PAGE

    if asked is None:
        return None
    _parsed(asked)
    if batch == 1:
        raise UsageError(
            f"--pages {asked} is for several sequences, which share a pool",
            remedy="use --batch 2 or more, or leave out --pages",
        )
    if policy.name not in POLICIES or policy.arithmetic != "float":
        raise UsageError(
            f"--pages {asked} has no kernels for --attention {policy}",
            remedy=f"use {', '.join(POLICIES)}, or leave out --pages",
        )
    if policy.select is not None and PAGE % policy.block and policy.block % PAGE:
        raise UsageError(
            f"--pages {asked}: blocks of {policy.block} tokens (--attention {policy}) are neither parts of "
            f"a page of {PAGE} nor whole pages",
            remedy=f"use blocks that divide {PAGE} or are a multiple of it, or leave out --pages",
        )
    return asked


def _parsed(asked: int | str) -> tuple[int, bool]:
    """Return a number, and whether it counts bytes rather than pages.

    Raises:
        UsageError: it is neither a positive number of pages nor of bytes.
    """
    if isinstance(asked, str) and (size := parse_size(asked)) is not None:
        count, in_bytes = size, True
    elif isinstance(asked, str):
        count, in_bytes = int(asked) if re.fullmatch(r"[0-9]{1,15}", asked) else 0, False
    else:
        try:
            count, in_bytes = 0 if isinstance(asked, bool) else index(asked), False
        except TypeError:
            count, in_bytes = 0, False
    if count < 1:
        raise UsageError(
            f"{asked!r} is no number of pages and no size (--pages)",
            remedy="give a number such as 512, or memory such as 512MiB or 2GiB",
        )
    return count, in_bytes


def paging_of(decoder: Decoder, asked: int | str | None, batch: int) -> Paging | None:
    """Return the pages of a model's caches; more than all sequences can use are left out.

    Args:
        decoder: The model.
        asked: See `check_pages`.
        batch: Sequences that are decoded together.

    Raises:
        UsageError: no layer's caches can be pages, or they are too few, or too many to be indexed.
    """
    from mimo_compile.frontend.models.kv import PAGE, Paging

    if asked is None:
        return None
    layers, cap = _layers(decoder), decoder.config.max_context
    if not layers:
        raise UsageError(
            f"--pages {asked}: no layer of this model keeps its whole context",
            remedy="leave out --pages: rings of windows are small",
        )
    count, in_bytes = _parsed(asked)
    each = sum(bytes_of(layer, PAGE) for layer in layers.values())
    count = min(count // each if in_bytes else count, batch * pages_of(cap, PAGE))
    least = least_pool({"cap": cap, "page": PAGE, "b": batch, "t": 1})
    if count < least:
        raise UsageError(
            f"--pages {asked}: {count} pages of {PAGE} positions are too few for a text of {cap} beside "
            f"{batch - 1} others",
            remedy=f"use --pages {least} or more ({-(-least * each >> 20)}MiB), or a smaller --max-context",
        )
    _check_size(layers, count)
    return Paging(count, cap)


def bytes_of(layer: LayerCore, page: int) -> int:
    """Return the bytes of a page of a layer's keys, values and what describes them, as kernels keep them."""
    return int(sum(numbers * each for numbers, each in _numbers(layer, page)))


def _numbers(layer: LayerCore, page: int) -> list[tuple[int, float]]:
    """Return how many numbers of each state of a layer a page has, and the bytes of one."""
    from mimo_compile.frontend.models.kv import rows_of_page
    from mimo_compile.ir.ops.pages import CACHES
    from mimo_compile.schedules.attention import descriptors
    from mimo_compile.schedules.attention.group_layout import group_shapes
    from mimo_compile.schedules.attention.layout import cache_shapes

    (_, kv, d), dv, fmt = layer.k_cache.shape, layer.v_cache.shape[2], layer.caches
    sizes = {"cap": page, "kv": kv, "d": d, "dv": dv, "c": fmt.name, "lay": layer.attend.lay}
    if isinstance(fmt, GroupedFormat):
        shapes = group_shapes({**sizes, "tail": page}, fmt)
        kept = [n for n, rows in rows_of_page(layer, page).items() if rows]
        return [(math.prod(shapes[n]), 2.0 if n.endswith("scale") else 1.0) for n in kept]
    out = [(math.prod(shape), fmt.bits / 8) for shape in cache_shapes(sizes).values()]
    for name, rows in rows_of_page(layer, page).items():
        if name not in CACHES:
            state = layer.get_buffer(name)
            stored = next(f for f in FORMATS.values() if f.torch_dtype == state.dtype)
            _, kv, parts, d = state.shape
            shape = descriptors.shape(rows, kv, parts, d, stored, rows)
            out.append((math.prod(shape), stored.bytes))
    return out


def _layers(decoder: Decoder) -> dict[str, LayerCore]:
    """Return the layers whose caches can be pages, by the names of their stages."""
    from mimo_compile.frontend.models.stages import LayerCore
    from mimo_compile.pipeline.graphs import may_page

    found = {s.name: s.module for s in decoder.stages() if may_page(s)}
    return {name: module for name, module in found.items() if isinstance(module, LayerCore)}


def _check_size(layers: dict[str, LayerCore], count: int) -> None:
    """Refuse pools so large that kernels could not index them.

    Raises:
        UsageError: naming the layer.
    """
    from mimo_compile.frontend.models.kv import PAGE
    from mimo_compile.schedules.emit.build import MOST

    for name, layer in layers.items():
        each = max(numbers for numbers, _ in _numbers(layer, PAGE))
        if each * count > MOST:
            raise UsageError(
                f"--pages: {count} pages of {name} would have {each * count} numbers, and kernels index at "
                f"most {MOST}",
                remedy=f"use --pages {MOST // each}",
            )
