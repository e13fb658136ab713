"""Which models can decode several sequences together (``--batch``)."""

from __future__ import annotations

import math
from operator import index
from typing import TYPE_CHECKING

from mimo_compile.errors import UsageError
from mimo_compile.ir.caches import FORMATS, scheme_cache_format
from mimo_compile.ir.formats import QuantScheme
from mimo_compile.ir.policies import AttentionPolicy

if TYPE_CHECKING:
    from mimo_compile.frontend.models.decoder import Decoder

MOST_SEQUENCES = 256
"""Of a batch: as many rows as the longest step has."""
POLICIES = ("model", "full", "window")
"""Whose layers attend to all that their windows leave, which kernels of batches do."""


def check_batch(batch: int, scheme: QuantScheme, policy: AttentionPolicy) -> int:
    """Refuse what cannot be, before a model is read; returns the number of sequences.

    Args:
        batch: Sequences to decode together; 1 asks for nothing.
        scheme: How weights and caches are stored.
        policy: What layers attend to.

    Raises:
        UsageError: so many sequences, or batches over such caches or with such a policy, have no kernels.
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
    if count == 1:
        return count
    if scheme_cache_format(scheme.kv).name not in FORMATS:
        have = " and ".join(f"kv{f.scheme}" for f in FORMATS.values() if f.scheme)
        raise UsageError(
            f"--batch {batch} has no kernels for caches in kv{scheme.kv}",
            remedy=f"use {have}, or leave kv... out of --quant for float32 caches",
        )
    if policy.name not in POLICIES or policy.arithmetic != "float":
        raise UsageError(
            f"--batch {batch} has no kernels for --attention {policy}",
            remedy=f"use {', '.join(POLICIES)}, or leave out --batch",
        )
    return count


def check_layers(decoder: Decoder, batch: int, *, pages: bool = False) -> None:
    """Refuse a model some of whose layers choose by themselves what they attend to, or with too large caches.

    ``pages``: caches that can be pages are (see `pages.paging_of`, which says how many there may be).

    Raises:
        UsageError: naming the first of them.
    """
    from mimo_compile.frontend.models.stages import LayerCore

    if batch == 1:
        return
    _check_size(decoder, batch, pages)
    for stage in decoder.stages():
        module = stage.module
        if isinstance(module, LayerCore) and (
            module.attend.kind or module.attend.lay or module.caches.name not in FORMATS
        ):
            raise UsageError(
                f"--batch {batch} has no kernels for the attention of {stage.name}",
                remedy="leave out --batch",
            )


def _check_size(decoder: Decoder, batch: int, pages: bool) -> None:
    """Refuse caches that are so large together that kernels could not index them.

    Raises:
        UsageError: naming the layer.
    """
    from mimo_compile.frontend.models.stages import LayerCore
    from mimo_compile.pipeline.graphs import may_page
    from mimo_compile.schedules.attention.layout import cache_shapes
    from mimo_compile.schedules.emit.build import MOST

    for stage in decoder.stages():
        module = stage.module
        if not isinstance(module, LayerCore) or module.caches.name not in FORMATS:
            continue
        if pages and may_page(stage):
            continue
        (cap, kv, d), dv = module.k_cache.shape, module.v_cache.shape[2]
        sizes = {"cap": cap, "kv": kv, "d": d, "dv": dv, "c": module.caches.name}
        each = max(math.prod(shape) for shape in cache_shapes(sizes).values())
        if each * batch > MOST:
            raise UsageError(
                f"--batch {batch}: caches of {stage.name} would have {each * batch} numbers, and kernels "
                f"index at most {MOST}",
                remedy=f"use --batch {MOST // each}, or a smaller --max-context"
                if each <= MOST
                else "use a smaller --max-context",
            )
