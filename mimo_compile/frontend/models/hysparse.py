"""HySparse: full layers that choose, and sparse layers behind them that follow (arXiv 2602.03560).

No weights were published, so the dialect is the project's own: the ``config.json`` and tensor names of
MiMo-V2-Flash, whose window layers (1 in ``hybrid_layer_pattern``) are the sparse ones. Beside them stand

- in ``config.json``: ``model_type`` ``hysparse``, and ``hysparse``, an object with ``block`` (tokens of a
  block), ``budget`` (tokens of the chosen blocks) and ``gate`` (``element``, the default, or ``head``);
- in each sparse layer: ``self_attn.listed_sink_bias [H]``, the sink of the branch over chosen blocks
  (``self_attn.attention_sink_bias`` is that of the window), and the branches' gates
  ``self_attn.listed_gate.weight`` and ``self_attn.window_gate.weight``, ``[H * DV, hidden]`` each (``head``:
  ``[H, hidden]``), without biases.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from mimo_compile.frontend.models import mimo_v2_flash
from mimo_compile.frontend.models.decoder import DecoderConfig, LayerSpec
from mimo_compile.frontend.models.family import Fields, Names
from mimo_compile.frontend.weights.checkpoint import Checkpoint
from mimo_compile.ir.policies.base import MOST
from mimo_compile.ir.policies.hysparse import HySparse

__all__ = ["configure", "layer_names"]

GATES = ("element", "head")


def configure(fields: Fields, checkpoint: Checkpoint) -> DecoderConfig:
    """Translate a ``config.json``; there are no draft layers."""
    hybrid = mimo_v2_flash.configure(fields, checkpoint)
    windows = [spec.window for spec in hybrid.layers]
    policy = _policy(fields, max(windows))
    if windows[0] or not any(windows):
        what = "sparse: it has no full layer before it" if windows[0] else "full, as are all others"
        raise fields.fail(
            f"the first layer is {what}", "The first layer of a HySparse model is full"
        )
    roles = policy.following([bool(window) for window in windows])
    for i, (spec, role) in enumerate(zip(hybrid.layers, roles, strict=True)):
        lender = hybrid.layers[role.cache_of]
        own, lent = ((s.heads, s.d, s.dv) for s in (spec, lender))
        if own != lent:
            raise fields.fail(
                f"sparse layer {i} has {own[0]} query heads of {own[1]} and values of {own[2]}, the full "
                f"layer that it follows {lent[0]} of {lent[1]} and {lent[2]}",
                "Query heads and widths of both kinds of layers are equal",
            )
    gate: Literal["element", "head"] = "head" if policy.gate == "head" else "element"
    layers = tuple(replace(spec, gate=gate) if spec.window else spec for spec in hybrid.layers)
    return replace(hybrid, name="hysparse", layers=layers, mtp=(), attention=policy, roles=roles)


def _policy(fields: Fields, window: int) -> HySparse:
    """Read what the sparse layers follow."""
    given = fields.get("hysparse")
    if not isinstance(given, dict):
        raise fields.fail(
            f"hysparse must be an object with block and budget, found {given!r}"
            if given is not None
            else "hysparse is missing",
            'For example "hysparse": {"block": 64, "budget": 1024}',
        )
    if unknown := sorted(set(given) - {"block", "budget", "gate"}):
        raise fields.fail(f"hysparse holds {unknown[0]!r}", "Known: block, budget, gate")
    inner = Fields({f"hysparse.{name}": value for name, value in given.items()}, fields.file)
    inner.require("hysparse.gate", GATES)
    block, budget = (inner.integer(f"hysparse.{n}", high=MOST) for n in ("block", "budget"))
    if budget < block:
        raise fields.fail(f"hysparse.budget={budget} does not hold a block of {block} tokens")
    if budget % block:
        raise fields.fail(
            f"hysparse.budget={budget} is not a whole number of blocks of {block} tokens",
            f"{budget // block * block} tokens are {budget // block} blocks",
        )
    gate = inner.get("hysparse.gate", "element")
    return HySparse(block=block, budget=budget, window=max(1, window), gate=gate)


def layer_names(spec: LayerSpec, prefix: str, checkpoint: Checkpoint) -> Names:
    """Return the names of a layer: those of MiMo-V2-Flash, and the second branch's."""
    names = mimo_v2_flash.layer_names(spec, prefix, checkpoint)
    if spec.gate:
        names["listed_sink"] = f"{prefix}self_attn.listed_sink_bias"
        names["listed_gate"] = f"{prefix}self_attn.listed_gate.weight"
        names["window_gate"] = f"{prefix}self_attn.window_gate.weight"
    return names
