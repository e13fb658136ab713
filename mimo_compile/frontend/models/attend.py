"""What one layer does between appending keys and its output projection: dense, windowed, or by a policy.

A policy (`ir.policies`) says what each layer is; `with_attention` puts that into a decoder's shape, and
`attending` returns the behaviour of one layer. Behaviours emit ops, whose kernels know no policy, and name
the states that a layer keeps beside its caches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mimo_compile.errors import UsageError
from mimo_compile.frontend.models import kv
from mimo_compile.frontend.models.classes import classified
from mimo_compile.frontend.models.decoder import (
    STEP_TOKENS,
    DecoderConfig,
    LayerSpec,
)
from mimo_compile.frontend.models.thresholds import prepared
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.describe_blocks import PARTS, entries_of
from mimo_compile.ir.policies import AttentionPolicy, Geometry, LayerRole
from mimo_compile.ir.policies.dsa import Dsa
from mimo_compile.ir.policies.sale import Sale
from mimo_compile.ir.policies.seer import Seer
from mimo_compile.ir.policies.stream import Stream
from mimo_compile.ir.policies.tailorkv import TailorKV
from mimo_compile.ir.workload import Workload

if TYPE_CHECKING:
    from mimo_compile.frontend.models.stages import LayerCore

Lists = tuple[Tensor, Tensor]
"""``idx`` int32 ``[T, HS, kmax]`` and ``cnt`` int32 ``[T, HS]``, see `ir.ops.block_lists`."""
DESCRIBED = {"quest": "bounds", "mean": "mean"}
"""Source of scores -> kind of the descriptors that it reads."""
READY = (
    "model", "full", "window", "stream", "quest", "seer", "lessismore", "moba", "resa", "sale", "tailorkv",
    "dsa",
)  # fmt: skip
"""Policies that layers can follow here; the others are data so far."""
WHOLE = ("model", "full", "window")
"""Policies without lists, whose attention can be computed in int8."""
RETRAINED = {
    "window": "layers that were trained with windows",
    "moba": "training with block attention",
}
"""What a model should have been trained with; without it the text gets worse, but nothing is missing."""


def with_attention(config: DecoderConfig, policy: AttentionPolicy) -> DecoderConfig:
    """Return a decoder's shape under a policy; a model that was trained with one keeps it.

    Raises:
        UsageError: the policy needs weights that no checkpoint brings, has no kernels yet, shares lists in
            a model some of whose layers have windows, or runs more tokens again than their rings hold; or
            the model was trained with another one.
        InputError: a file that the policy names is missing, malformed or of another model.
    """
    if config.roles:
        if policy == config.attention or str(policy) == "model":
            return config
        raise UsageError(
            f"--attention {policy}: the layers of this model were trained with {config.attention}, and "
            "attend in no other way",
            remedy="leave out --attention",
        )
    if policy.arithmetic != "float" and policy.name not in WHOLE:
        raise UsageError(
            f"--attention {policy}: +{policy.arithmetic} is for {', '.join(WHOLE)} in this version",
            remedy=f"use --attention {policy.name}, or full+{policy.arithmetic}",
        )
    if policy.name not in READY:
        raise UsageError(
            f"--attention {policy.name} needs {' and '.join(policy.needs)}, which this model does not have",
            remedy=f"use one of {', '.join(READY)}",
        )
    windows = [spec.window for spec in config.layers]
    if isinstance(policy, TailorKV):
        policy = classified(policy, config)
    roles = policy.plan(len(windows), windows if any(windows) else ())
    if isinstance(policy, Sale):
        policy = prepared(policy, config, roles)
    layers = tuple(
        replace(spec, window=role.window, first=_stays(policy, spec))
        if role.kind == "window"
        else spec
        for spec, role in zip(config.layers, roles, strict=True)
    )
    if policy.rerun > STEP_TOKENS and any(spec.window for spec in layers):
        raise UsageError(
            f"--attention {policy}: window layers of this model have forgotten what {policy.rerun} tokens "
            "need to run again",
            remedy=f"run them again after {STEP_TOKENS} or less",
        )
    # a ring for a window that leaves nothing out would hold more than a full cache
    return replace(config, layers=layers, attention=policy, roles=roles).with_context(
        config.max_context
    )


def _stays(policy: AttentionPolicy, spec: LayerSpec) -> int:
    """Return how many leading positions a layer sees beside its window, if this is the policy's."""
    return policy.sink if isinstance(policy, Stream) and not spec.window else 0


class Attending:
    """Attention to everything, or to the spec's window: nothing is chosen."""

    kind = ""
    """What a layer's graph depends on, beside its spec."""
    lay = ""
    """Order of the layer's caches (`ir.caches.CACHE_ORDERS`)."""
    in_pages = True
    """Its ops have kernels over pages of a pool."""
    block = 1
    """Positions that a row of each of its `states` stands for."""

    def states(self, spec: LayerSpec, cap: int, cache: torch.dtype) -> dict[str, Tensor]:
        """Return what the layer keeps beside its caches, on the meta device.

        Args:
            spec: The layer's.
            cap: Slots of its caches.
            cache: Their element type.
        """
        return {}

    def constants(self, spec: LayerSpec) -> dict[str, Tensor]:
        """Return tensors that the layer's graph reads, by name."""
        return {}

    def look(self, layer: LayerCore, normed: Tensor, table: Tensor, pos: Tensor) -> Lists | None:
        """Return lists that are chosen by the layer's normed input ``[T, hidden]`` and its angles, if any."""
        return None

    def __call__(
        self, layer: LayerCore, q: Tensor, pos: Tensor, lists: Lists | None
    ) -> tuple[Tensor, Lists | None]:
        """Attend: ``q [T, H, D]``, rotated, whose keys are in the cache.

        Args:
            layer: Its weights and caches; ``layer.chooses`` is false where even choosing layers are dense.
            q: Queries.
            pos: int32 [2], start and valid.
            lists: Those that `look` gave, or of the layer that this one follows.

        Returns:
            ``[T, H, DV]``, and the lists that later layers follow.
        """
        return dense(layer, q, pos), None


def dense(layer: LayerCore, q: Tensor, pos: Tensor) -> Tensor:
    """Attend to everything that the spec's window leaves."""
    return kv.attend_all(layer, q, pos)


def listed(
    layer: LayerCore,
    q: Tensor,
    pos: Tensor,
    lists: Lists,
    block: int,
    window: int,
    sink: bool = True,
    rows: int = 1,
) -> Lists:
    """Attend to listed blocks and a window: ``out [T, H, DV]`` and its lse ``[T, H]``.

    ``rows`` tokens share a list.
    """
    out: Lists = torch.ops.mimo.sparse_attention(
        q, layer.k_cache, layer.v_cache, pos, *lists, layer.attention.sink if sink else None, block,
        rows, layer.spec.d**-0.5, window, layer.spec.stays, *kv.tables(layer),
    )  # fmt: skip
    return out


@dataclass(frozen=True)
class Int8(Attending):
    """Attention to everything, or to the spec's window, in int8 arithmetic."""

    arith: str
    """``int8`` or ``int8half``."""
    in_pages = False

    @property
    def kind(self) -> str:  # type: ignore[override]
        """The arithmetic."""
        return self.arith

    def __call__(
        self, layer: LayerCore, q: Tensor, pos: Tensor, lists: Lists | None
    ) -> tuple[Tensor, Lists | None]:
        """Quantise queries, keys and (``int8``) weights and values, as `ir.ops.int8_attention` says."""
        s = layer.spec
        out: Tensor = torch.ops.mimo.int8_attention(
            q,
            layer.k_cache,
            layer.v_cache,
            pos,
            layer.attention.sink,
            s.d**-0.5,
            s.window,
            self.arith,
        )
        return out, None


@dataclass(frozen=True)
class Selecting(Attending):
    """Describe, score, select, and attend to the lists, or (``role.dense``) only make them for others."""

    policy: AttentionPolicy
    role: LayerRole
    lends: bool
    """Later layers follow the lists."""

    @property
    def block(self) -> int:  # type: ignore[override]
        """Positions of a block."""
        return self.policy.block

    @property
    def kind(self) -> str:  # type: ignore[override]
        """The policy's text and the role, without the layer's number."""
        return f"{self.policy} select {self.role.dense} {self.lends}"

    @property
    def described(self) -> str:
        """Kind of the descriptors; empty where keys themselves are scored."""
        source = self.policy.score
        return DESCRIBED[source.source] if source and source.op == "score_blocks" else ""

    def describing(
        self, spec: LayerSpec, cap: int, tokens: int, cache: str
    ) -> tuple[Workload, ...]:
        """Return the workloads that make what is scored beside keys, for caches of a format."""
        if not self.described:
            return ()
        entries = cache if self.described == "bounds" else "f32"
        describe = get_op("describe_blocks").workload(
            t=tokens, kv=spec.kv_heads, d=spec.d, cap=cap, kind=self.described,
            size=self.policy.block, whole=1, c=cache, e=entries,
        )  # fmt: skip
        return (describe,)

    def states(self, spec: LayerSpec, cap: int, cache: torch.dtype) -> dict[str, Tensor]:
        """Descriptors of blocks; bounds of 16-bit keys are exact in 16 bits, means are not."""
        if not self.described:
            return {}
        entries = entries_of(cap, self.policy.block, self.policy.block)
        shape = (entries, spec.kv_heads, PARTS[self.described], spec.d)
        dtype = cache if self.described == "bounds" else torch.float32
        return {"desc": torch.empty(shape, dtype=dtype, device="meta")}

    def __call__(
        self, layer: LayerCore, q: Tensor, pos: Tensor, lists: Lists | None
    ) -> tuple[Tensor, Lists | None]:
        """Keep descriptors up to date always, choose where layers choose."""
        self.describe(layer, pos)
        if not layer.chooses or (self.role.dense and not self.lends):
            return dense(layer, q, pos), None
        lists = self.choose(layer, q, pos)
        if self.role.dense:
            out = dense(layer, q, pos)
        else:
            out = listed(layer, q, pos, lists, self.policy.block, self.policy.kept_window)[0]
        return out, lists if self.lends else None

    def describe(self, layer: LayerCore, pos: Tensor) -> None:
        """Keep descriptors up to date: a block is scored once it is complete, and forced before."""
        block = self.policy.block
        if self.described:
            torch.ops.mimo.describe_blocks(
                layer.k_cache, pos, layer.get_buffer("desc"), self.described, block, block, True,
                *kv.tables(layer),
            )  # fmt: skip

    def choose(self, layer: LayerCore, q: Tensor, pos: Tensor) -> Lists:
        """Score blocks and make lists."""
        return self.lists(layer, self.score(layer, q, pos), pos)

    def score(self, layer: LayerCore, q: Tensor, pos: Tensor) -> Tensor:
        """Score blocks: ``q [T, H, D]`` -> ``[T, HS, blocks]``."""
        p, s, cap, where = self.policy, layer.spec, kv.positions(layer), kv.tables(layer)
        source = p.score
        assert source is not None
        out: Tensor
        if source.op == "score_keys":
            out = torch.ops.mimo.score_keys(
                q, layer.k_cache, pos, None, None, source.source, source.agg, p.block, 0, s.d**-0.5,
                0, *where,
            )  # fmt: skip
        else:
            out = torch.ops.mimo.score_blocks(
                q, layer.get_buffer("desc"), None, pos, source.source, source.agg, False, p.block,
                1, -(-cap // p.block), p.block, p.block, s.d**-0.5, *where,
            )  # fmt: skip
        return out

    def lists(self, layer: LayerCore, score: Tensor, pos: Tensor) -> Lists:
        """Make lists of scores ``[R, HS, NB]``."""
        p, rule = self.policy, self.policy.select
        assert rule is not None
        level = layer.get_buffer("level") if rule.rule == "threshold" else None
        length = list_length(p, layer.spec, kv.positions(layer))
        out: Lists = torch.ops.mimo.select_blocks(
            score, pos, level, rule.rule, rule.k, rule.share, p.block, 1, rule.first, rule.last,
            rule.merge, length, rule.positive,
        )  # fmt: skip
        return out


def list_length(policy: AttentionPolicy, spec: LayerSpec, cap: int) -> int:
    """Return the most blocks that a policy lists in a cache of so many slots."""
    g = Geometry(1, spec.heads, spec.kv_heads, spec.d, spec.dv, cap)
    select = policy.workloads(g).select
    assert select is not None
    return next(a.shape[2] for a in get_op("select_blocks").args(select) if a.name == "idx")


def order_of(policy: AttentionPolicy) -> str:
    """Return the order of caches read by lists: by keys where blocks are less than a vector's 16 slots."""
    return "rows" if policy.block < 16 else ""


@dataclass(frozen=True)
class Following(Attending):
    """Attend to the lists of a layer before, in the layer's own cache."""

    policy: AttentionPolicy

    @property
    def kind(self) -> str:  # type: ignore[override]
        """The policy's text."""
        return f"{self.policy} follow"

    @property
    def lay(self) -> str:  # type: ignore[override]
        """The order that lists are read in."""
        return order_of(self.policy)

    def __call__(
        self, layer: LayerCore, q: Tensor, pos: Tensor, lists: Lists | None
    ) -> tuple[Tensor, Lists | None]:
        """Follow the lists where there are any."""
        if not layer.chooses:
            return dense(layer, q, pos), None
        assert lists is not None
        return listed(layer, q, pos, lists, self.policy.block, self.policy.kept_window)[0], None


def attending(config: DecoderConfig, name: str) -> tuple[Attending, str, str]:
    """Return the behaviour of a layer's stage, and whose lists it follows and lends (stages; or empty)."""
    part, _, number = name.partition(".")
    if part != "layers" or not config.roles:
        return Attending(), "", ""
    at = int(number)
    role, policy = config.roles[at], config.attention
    from mimo_compile.frontend.models.branches import Branches, Oracle
    from mimo_compile.frontend.models.estimate import Estimating
    from mimo_compile.frontend.models.gated import Gated
    from mimo_compile.frontend.models.indexed import Indexed
    from mimo_compile.frontend.models.retrieving import Retrieving
    from mimo_compile.frontend.models.streaming import Streaming

    if role.kind == "reuse" and policy.branch_window:
        lender, source = config.layers[role.cache_of], f"layers.{role.list_of}"
        cap = lender.capacity(config.max_context)
        return Branches(policy, lender, role.cache_of, cap), source, ""
    if role.kind == "reuse":
        return Following(policy), f"layers.{role.list_of}", ""
    own: dict[type, type[Selecting]]
    own = {Seer: Gated, Sale: Estimating, TailorKV: Retrieving, Dsa: Indexed}
    if role.kind == "select" and type(policy) in own:
        return own[type(policy)](policy, role, False), "", ""
    if role.kind == "select":
        lends = any(r.kind == "reuse" and r.list_of == at for r in config.roles)
        read = any(r.cache_of == at for r in config.roles[at + 1 :])
        return (Oracle if read else Selecting)(policy, role, lends), "", name if lends else ""
    if isinstance(policy, Stream) and config.layers[at].first:
        return Streaming(policy), "", ""
    return Attending() if policy.arithmetic == "float" else Int8(policy.arithmetic), "", ""
