"""What families with routed experts share: which layers have them, how many, and how tokens get to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mimo_compile.frontend.models.decoder import DecoderConfig
from mimo_compile.frontend.models.family import MOST, Fields

_OTHERS: dict[str, tuple[Any, ...]] = {
    "scoring_func": ("softmax",),
    "topk_method": ("greedy",),
    "n_group": (1,),
    "topk_group": (1,),
    "routed_scaling_factor": (1,),
    "n_shared_experts": (0,),
    "num_shared_experts": (0,),
    "shared_expert_intermediate_size": (0,),
}
"""Fields of routers and blocks that a family may not know, with what they say where it has none of it."""

EXPERTS = frozenset(
    "num_experts num_local_experts num_experts_per_tok moe_intermediate_size norm_topk_prob "
    "shared_expert_intermediate_size".split()
)
"""Fields of Qwen's experts: they say nothing where no layer has any."""


def plain_router(fields: Fields, *known: str) -> None:
    """Refuse what other families have: a router is softmax and the best scores, but for fields ``known``.

    Raises:
        InputError: a field asks for more; names it.
    """
    for name, allowed in _OTHERS.items():
        if name not in known:
            fields.require(name, allowed)


def number_of_experts(fields: Fields, *names: str) -> int:
    """Return the number of experts of a layer, which may stand under several names.

    Raises:
        InputError: it is missing, impossible, or given twice.
    """
    found = {n: fields.integer(n, high=MOST) for n in names if fields.get(n) is not None}
    if not found:
        raise fields.fail(f"{names[0]} is missing")
    if len(set(found.values())) > 1:
        raise fields.fail(f"the number of experts is not given once: {found}")
    return next(iter(found.values()))


def every_few(fields: Fields, count: int) -> list[bool]:
    """Say which layers have experts: each ``decoder_sparse_step``-th that ``mlp_only_layers`` does not name.

    Args:
        fields: The configuration.
        count: Layers of the model.
    """
    step, dense = fields.integer("decoder_sparse_step", 1), fields.get("mlp_only_layers", [])
    numbers = range(count)
    if not isinstance(dense, list) or any(type(i) is not int or i not in numbers for i in dense):
        raise fields.fail(
            f"mlp_only_layers must list numbers of the {count} layers, found {dense!r}"
        )
    return [i not in dense and (i + 1) % step == 0 for i in numbers]


def behind_dense(fields: Fields, count: int) -> list[bool]:
    """Say which layers have experts: behind ``first_k_dense_replace`` dense ones each ``moe_layer_freq``-th.

    Args:
        fields: The configuration.
        count: Layers of the model.
    """
    first = fields.integer("first_k_dense_replace", 0, low=0)
    step = fields.integer("moe_layer_freq", 1)
    return [i >= first and i % step == 0 for i in range(count)]


def deepseek_experts(
    fields: Fields, *, norm: bool, scoring: str = "softmax", bias: bool = False
) -> dict[str, Any]:
    """Return what a `LayerSpec` says of experts in DeepSeek's words, shared ones without a gate beside them.

    Arguments as for `routed`.

    Raises:
        InputError: a field is missing or impossible.
    """
    width = fields.integer("moe_intermediate_size")
    experts = number_of_experts(fields, "n_routed_experts", "num_local_experts")
    shared = fields.integer("n_shared_experts", 0, low=0, high=MOST)
    feed = routed(fields, experts, width, norm=norm, scoring=scoring, bias=bias)
    return {**feed, "shared_ffn": shared * width}


def routed(
    fields: Fields, experts: int, width: int, *, norm: bool, scoring: str = "softmax", bias: bool = False
) -> dict[str, Any]:  # fmt: skip
    """Return what a `LayerSpec` says of routed experts.

    Args:
        fields: ``num_experts_per_tok``, and where there are groups ``n_group`` and ``topk_group``.
        experts: Their number.
        width: Of one.
        norm: The weights of a token's experts are divided by their sum.
        scoring: ``softmax`` or ``sigmoid``.
        bias: A bias for each expert decides on the choice.

    Raises:
        InputError: so many cannot be chosen.
    """
    top_k, groups = fields.integer("num_experts_per_tok"), fields.integer("n_group", 1)
    top_groups = fields.integer("topk_group", 1)
    if experts % groups or top_groups > groups or top_k > experts // groups * top_groups:
        raise fields.fail(
            f"{top_k} of {experts} experts cannot be chosen from {top_groups} of {groups} groups"
        )
    return {
        "mlp": "moe",
        "ffn": 0,
        "experts": experts,
        "top_k": top_k,
        "moe_ffn": width,
        "scoring": scoring,
        "norm_topk": norm,
        "router_bias": bias,
        "factor": fields.number("routed_scaling_factor", 1.0),
        "groups": groups,
        "top_groups": top_groups,
    }


def with_experts(
    dense: DecoderConfig, sparse: Sequence[bool], feed: dict[str, Any]
) -> DecoderConfig:
    """Return a dense decoder whose layers of ``sparse`` have experts instead (`routed`)."""
    layers = zip(dense.layers, sparse, strict=True)
    return replace(dense, layers=tuple(replace(s, **feed) if m else s for s, m in layers))
