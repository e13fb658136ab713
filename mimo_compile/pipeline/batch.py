"""Which models can decode several sequences together (``--batch``)."""

from __future__ import annotations

import math
from operator import index
from typing import TYPE_CHECKING

from mimo_compile.errors import UsageError
from mimo_compile.ir.kv_groups import GROUPED
from mimo_compile.ir.policies import AttentionPolicy

if TYPE_CHECKING:
    from mimo_compile.frontend.models.decoder import Decoder
    from mimo_compile.frontend.models.stages import LayerCore

MOST_SEQUENCES = 256
"""Of a batch: as many rows as the longest step has."""
POLICIES = (
    "model", "full", "window", "stream", "quest", "seer", "lessismore", "moba", "resa", "sale",
    "tailorkv", "dsa",
)  # fmt: skip
"""All of whose operations on one token have kernels for several sequences, in float arithmetic."""


def check_batch(batch: int, policy: AttentionPolicy) -> int:
    """Refuse what cannot be, before a model is read; returns the number of sequences.

    Args:
        batch: Sequences to decode together; 1 asks for nothing.
        policy: What layers attend to.

    Raises:
        UsageError: so many sequences, or batches with such a policy, have no kernels.
    """
    try:
        count = 0 if isinstance(batch, bool) else index(batch)
    except TypeError:
        count = 0
    if not 1 <= count <= MOST_SEQUENCES:
        raise UsageError(
            f"{batch!r} sequences cannot be decoded together (--batch)",
            remedy=f"use 1 to {MOST_SEQUENCES}",
        )
    if count > 1 and (policy.name not in POLICIES or policy.arithmetic != "float"):
        raise UsageError(
            f"--batch {batch} has no kernels for --attention {policy}",
            remedy=f"use {', '.join(POLICIES)}, or leave out --batch",
        )
    return count


def check_layers(decoder: Decoder, batch: int, *, pages: bool = False) -> None:
    """Refuse a model that was trained with a policy of which there are no batches, or with too large caches.

    ``pages``: caches that can be pages are (see `pages.paging_of`, which says how many there may be).

    Raises:
        UsageError: naming the policy or the layer.
    """
    from mimo_compile.frontend.models.stages import LayerCore
    from mimo_compile.pipeline.graphs import may_page

    if batch == 1:
        return
    policy = decoder.config.attention
    if policy.name not in POLICIES or policy.arithmetic != "float":
        raise UsageError(
            f"--batch {batch} has no kernels for a model whose layers attend by {policy}",
            remedy="leave out --batch",
        )
    for stage in decoder.stages():
        if isinstance(stage.module, LayerCore) and not (pages and may_page(stage)):
            _check_size(stage.name, stage.module, batch)


def _check_size(name: str, layer: LayerCore, batch: int) -> None:
    """Refuse states that are so large together that kernels could not index them.

    Raises:
        UsageError: naming the layer.
    """
    from mimo_compile.schedules.attention.group_layout import group_shapes
    from mimo_compile.schedules.attention.layout import cache_shapes
    from mimo_compile.schedules.emit.build import MOST

    (cap, kv, d), dv, c = layer.k_cache.shape, layer.v_cache.shape[2], layer.caches.name
    sizes = {"cap": cap, "kv": kv, "d": d, "dv": dv, "c": c, "lay": layer.attend.lay}
    if c in GROUPED:
        tail = layer.get_buffer("k_tail").shape[0]
        shapes = group_shapes({**sizes, "tail": tail}, GROUPED[c])
    else:
        shapes = cache_shapes(sizes)
    each = max(math.prod(shape) for shape in shapes.values())
    if each * batch > MOST:
        raise UsageError(
            f"--batch {batch}: caches of {name} would have {each * batch} numbers, and kernels "
            f"index at most {MOST}",
            remedy=f"use --batch {MOST // each}, or a smaller --max-context"
            if each <= MOST
            else "use a smaller --max-context",
        )
