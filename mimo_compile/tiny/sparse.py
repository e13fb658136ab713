"""Attention policies on the built-in model, as their definitions say, in float32.

Scores, choices and roles are those of `mimo_compile.ir`: the functions that kernels are checked
with. A policy that is sparse at decode only starts from caches that a dense pass filled with the
prompt; the tokens behind the prompt then run as if they were decoded one by one: each row attends
to what the policy chooses for it, and its keys and values, which later rows read, come from hidden
states that sparse attention made. ReSA's rectification is followed too: a row reads exact keys and
values of the tokens before its period.

Only global layers follow the policy; layers that the model was trained with a window for keep it.
Two policies share lists across layers and are meant for models whose layers are all global; here
their rule is applied to the global layers alone: with `lessismore` the first one sees everything
and chooses for those behind it, with `window` all of them have the window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from mimo_compile.errors import UsageError
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.block_lists import blocks_of
from mimo_compile.ir.ops.score_blocks import block_scores
from mimo_compile.ir.ops.score_keys import dots, key_scores
from mimo_compile.ir.ops.score_lowbit import lowbit_scores
from mimo_compile.ir.ops.select_blocks import choose
from mimo_compile.ir.policies import AttentionPolicy, Geometry, LayerRole
from mimo_compile.ir.policies.hysparse import HySparse
from mimo_compile.ir.policies.lessismore import LessIsMore
from mimo_compile.ir.policies.resa import Resa
from mimo_compile.ir.policies.sale import Sale
from mimo_compile.ir.policies.stream import Stream
from mimo_compile.ir.policies.tailorkv import TailorKV
from mimo_compile.ir.policies.window import Window
from mimo_compile.tiny.gates import Gate
from mimo_compile.tiny.hysparse import HySparseModel, SparseAttention
from mimo_compile.tiny.indexers import Indexer
from mimo_compile.tiny.training_model import Attention, Layer, TinyModel, rotate, sink_softmax

CHUNK = 512
"""Rows whose scores exist at a time."""


@dataclass(frozen=True, slots=True)
class Cache:
    """Keys and values of one layer, one row a position.

    raw, k: [tokens, kv, dim], before and after rotation; v: [tokens, kv, v_dim].
    """

    raw: Tensor
    k: Tensor
    v: Tensor

    def to(self, end: int, start: int = 0) -> Cache:
        """Positions ``start ... end - 1``."""
        return Cache(self.raw[start:end], self.k[start:end], self.v[start:end])

    def then(self, other: Cache) -> Cache:
        """These positions, then those of `other`."""
        pairs = ((self.raw, other.raw), (self.k, other.k), (self.v, other.v))
        return Cache(*(torch.cat(pair) for pair in pairs))


@dataclass(frozen=True, slots=True)
class Queries:
    """Queries of one layer: raw and q (rotated) [rows, heads, dim]; positions start at `start`."""

    raw: Tensor
    q: Tensor
    start: int


def _by_token(x: Tensor) -> Tensor:
    return x[0].transpose(0, 1)


def project(
    attention: Attention, y: Tensor, rope: tuple[Tensor, Tensor], start: int
) -> tuple[Queries, Cache]:
    """Queries, keys and values of y: [1, rows, hidden] at positions ``start ...``."""
    q, k, v = attention.project(y)
    here = (rope[0][start : start + y.shape[1]], rope[1][start : start + y.shape[1]])
    queries = Queries(_by_token(q), _by_token(rotate(q, *here)), start)
    return queries, Cache(_by_token(k), _by_token(rotate(k, *here)), _by_token(v))


@torch.no_grad()
def dense_caches(model: TinyModel, ids: Tensor) -> list[Cache]:
    """What all layers cache of ids [tokens] when every layer does what it was trained to."""
    x, found = F.embedding(ids[None], model.embed_tokens), []
    for layer in model.layers:
        assert isinstance(layer, Layer)
        rope = model.rope(len(ids), layer.windowed)
        found.append(project(layer.self_attn, layer.input_layernorm(x), rope, 0)[1])
        x, _ = layer(x, rope)
    return found


def roles_of(policy: AttentionPolicy, model: TinyModel) -> tuple[LayerRole, ...]:
    """What each layer does; see the module's text for policies that share lists.

    Raises UsageError if the model lacks what the policy needs, or the policy has no reference here.
    """
    c = model.config
    windows = [c.sliding_window * windowed for windowed in c.hybrid_layer_pattern]
    glob = [i for i, window in enumerate(windows) if not window]
    if isinstance(model, HySparseModel) != isinstance(policy, HySparse):
        raise UsageError(f"--attention {policy.name}: this model was trained for another one")
    if isinstance(policy, HySparse):
        roles = policy.plan(len(windows))
        if [role.dense for role in roles] != [not window for window in windows]:
            raise UsageError("--attention hysparse: its full layers are not the model's")
        return roles
    if isinstance(policy, TailorKV) and policy.quantised:
        raise UsageError("--attention tailorkv: there is no reference of low-bit caches here")
    if len(policy.branches) > 1 or policy.name == "hysparse2":
        raise UsageError(f"--attention {policy.name} needs a model that was trained with it")
    own = {i: LayerRole("window", False, None, i, w) for i, w in enumerate(windows) if w}
    if isinstance(policy, Window | Stream):
        shared = {i: LayerRole("window", False, None, i, policy.kept_window) for i in glob}
    elif isinstance(policy, LessIsMore):
        shared = {i: LayerRole("reuse", False, glob[0], i) for i in glob[1:]}
        shared[glob[0]] = LayerRole("select", True, glob[0], glob[0])
    else:
        planned = policy.plan(len(windows), windows)
        shared = {i: planned[i] for i in glob}
    return tuple((own | shared)[i] for i in range(len(windows)))


def attend_rows(
    q: Tensor, own: Cache, allowed: Tensor, scale: float, sink: Tensor | None,
    exact: Cache | None = None, before: Tensor | None = None, logits: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of q: [rows, heads, dim] to the allowed keys, bool [rows, heads or 1, tokens].

    Keys and values below `before` [rows] are read from `exact`, the others from `own`; `logits`
    stand in for the products with `own` if given. Returns [rows, heads, v_dim].
    """
    logits = dots(q, own.k) * scale if logits is None else logits
    early = None
    if exact is not None and before is not None:
        early = (torch.arange(own.k.shape[0]) < before[:, None])[:, None]
        logits = torch.where(early, dots(q, exact.k) * scale, logits)
    weights = sink_softmax(logits, allowed, None if sink is None else sink[None, :, None])
    weights = weights.masked_fill(~allowed, 0.0)  # a row that sees nothing

    def mix(part: Tensor, v: Tensor) -> Tensor:
        per = part.unflatten(1, (v.shape[1], -1))
        return torch.einsum("tugs,sud->tugd", per, v).flatten(1, 2)

    if early is None or exact is None:
        return mix(weights, own.v)
    return mix(weights * early, exact.v) + mix(weights * ~early, own.v)


def _descriptors(k: Tensor, kind: str, block: int, count: int) -> Tensor:
    """Bounds, means or peaks of blocks of k: [tokens, kv, dim] → [count, kv, parts, dim]; partial ones 0."""
    whole = k.shape[0] // block
    blocks = k[: whole * block].unflatten(0, (whole, block))
    if kind == "quest":
        found = torch.stack([blocks.amin(1), blocks.amax(1)], 2)
    elif kind == "peak":
        found = blocks.abs().amax(1)[:, :, None]
    else:
        found = blocks.mean(1)[:, :, None]
    return torch.cat([found, found.new_zeros(count - whole, *found.shape[1:])])


@dataclass(slots=True)
class Run:
    """One policy on one text. `seen` and `visible` count keys of rows that attended sparsely."""

    model: TinyModel
    policy: AttentionPolicy
    prompt: int
    gates: Mapping[int, Gate] = field(default_factory=dict)
    indexers: Mapping[int, Indexer] = field(default_factory=dict)
    seen: float = 0.0
    visible: float = 0.0
    _lists: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _input: Tensor = field(default_factory=lambda: torch.empty(0))
    """Of the layer that runs, normed: [tokens, hidden]."""

    @property
    def share(self) -> float:
        """Mean share of the visible keys that sparse rows attended to (1 if no row was sparse)."""
        return self.seen / self.visible if self.visible else 1.0

    @torch.no_grad()
    def rows(self, ids: Tensor, dense: list[Cache] | None = None) -> Tensor:
        """Run the text ids [tokens]; return the normed hidden states behind the prompt [rows, hidden].

        `dense` are its caches by `dense_caches`, which may be kept between policies.
        """
        model, policy = self.model, self.policy
        roles = roles_of(policy, model)
        for what, found in (("gates", self.gates), ("an indexer", self.indexers)):
            if what in policy.needs and not found:
                raise UsageError(f"--attention {policy.name} needs {what}")
        first = 0 if "prefill" in policy.phases else self.prompt
        dense = dense_caches(model, ids) if dense is None and first else dense or []
        x = F.embedding(ids[None, first:], model.embed_tokens)
        caches: list[Cache] = []
        for i, layer in enumerate(model.layers):
            assert isinstance(layer, Layer)
            attention = layer.self_attn
            y = layer.input_layernorm(x)
            self._input = y[0]
            queries, new = project(attention, y, model.rope(len(ids), layer.windowed), first)
            caches.append(dense[i].to(first).then(new) if first else new)
            parts = []
            edges = [*range(first, self.prompt, CHUNK), *range(self.prompt, len(ids), CHUNK)]
            for start, end in zip(edges, [*edges[1:], len(ids)], strict=True):
                rows = slice(start - first, end - first)
                part = Queries(queries.raw[rows], queries.q[rows], start)
                exact = dense[i].to(end) if first else None
                if isinstance(attention, SparseAttention):
                    out = self._branches(attention, part, y[:, rows], caches[i], roles[i], caches)
                elif layer.windowed:
                    out = self._window(attention, part, caches[i], exact)
                else:
                    out = self._global(i, attention, part, caches[i].to(end), exact, roles[i])
                parts.append(out)
            out = attention.merge(torch.cat(parts).transpose(0, 1)[None])
            x, _ = layer.feed(x + out)
        normed: Tensor = model.norm(x)[0, self.prompt - first :]
        return normed

    def _exact_before(self, start: int, count: int) -> Tensor | None:
        """Of each row, the positions below which keys and values have been made exact."""
        if not isinstance(self.policy, Resa) or not self.policy.f:
            return None
        behind = torch.arange(start, start + count) - self.prompt
        return self.prompt + behind // self.policy.f * self.policy.f

    def _window(
        self, attention: Attention, rows: Queries, own: Cache, exact: Cache | None
    ) -> Tensor:
        """A layer's own window."""
        assert attention.window is not None
        start, count = rows.start, rows.q.shape[0]
        low = max(0, start - attention.window + 1)
        own = own.to(start + count, low)
        at, key = torch.arange(start, start + count)[:, None], torch.arange(low, start + count)
        allowed = (key <= at) & (key > at - attention.window)
        before = self._exact_before(start, count)
        return attend_rows(
            rows.q, own, allowed[:, None], attention.dim**-0.5, attention.attention_sink_bias,
            None if exact is None else exact.to(start + count, low),
            None if before is None else before - low,
        )  # fmt: skip

    def _global(
        self, i: int, attention: Attention, rows: Queries, own: Cache, exact: Cache | None,
        role: LayerRole,
    ) -> Tensor:  # fmt: skip
        """A global layer, under the policy; `own` and `exact` end with the rows' last token."""
        policy, scale = self.policy, attention.dim**-0.5
        start, count, end = rows.start, rows.q.shape[0], rows.start + rows.q.shape[0]
        at, key = torch.arange(start, end)[:, None], torch.arange(end)
        causal = (key <= at)[:, None]
        before = self._exact_before(start, count)
        phase = "prefill" if start < self.prompt else "decode"
        sparse = phase in policy.phases and not (isinstance(policy, Sale) and end <= policy.least)
        logits = None
        allowed = causal
        if not sparse or role.kind == "full":
            return attend_rows(rows.q, own, causal, scale, None, exact, before)
        if role.kind == "window":
            allowed = causal & (key > at - role.window)[:, None]
            if isinstance(policy, Stream) and policy.sink:
                allowed = causal & ((key > at - role.window) | (key < policy.sink))[:, None]
                logits = self._rolled(attention, rows, own) if policy.rolling else None
        elif role.kind == "reuse":
            assert role.list_of is not None
            allowed = self._lists[role.list_of, start] & causal
        else:
            chosen = self._chosen(i, rows, own, exact, before, scale)
            self._lists[i, start] = chosen
            allowed = causal if role.dense else chosen & causal
        if not role.dense:
            self.seen += float(allowed.expand(count, rows.q.shape[1], end).float().mean(1).sum())
            self.visible += float(causal.sum())
        return attend_rows(rows.q, own, allowed, scale, None, exact, before, logits)

    def _rolled(self, attention: Attention, rows: Queries, own: Cache) -> Tensor:
        """Logits where queries see the first positions from their place in a full cache."""
        policy, scale = self.policy, attention.dim**-0.5
        assert isinstance(policy, Stream)
        logits: Tensor = dots(rows.q, own.k) * scale
        at = torch.arange(rows.start, rows.start + rows.q.shape[0])
        place = at.clamp(max=policy.sink + policy.recent - 1)
        cos, sin = self.model.rope(own.k.shape[0], False)
        turned = rotate(rows.raw.transpose(0, 1)[None], cos[place], sin[place])
        sinks = min(policy.sink, own.k.shape[0])
        logits[..., :sinks] = dots(_by_token(turned), own.k[:sinks]) * scale
        return logits

    def _chosen(
        self, i: int, rows: Queries, own: Cache, exact: Cache | None, before: Tensor | None,
        scale: float,
    ) -> Tensor:  # fmt: skip
        """The policy's choice as a mask of keys, bool [rows, heads, tokens]; may include later keys."""
        policy = self.policy
        (count, heads, dim), (end, kv, v_dim) = rows.q.shape, own.v.shape
        steps = policy.workloads(Geometry(count, heads, kv, dim, v_dim, end))
        assert steps.score is not None and steps.select is not None and policy.select is not None
        p = get_op(steps.score.op).full(steps.score)
        pos = torch.tensor([rows.start, count], dtype=torch.int32)
        block = policy.block
        if steps.score.op == "score_keys":
            peaks = None
            if span := p["span"]:
                peaks = _descriptors(own.k, "peak", span, blocks_of(end, span))[:, :, 0]
            parts = p["kind"], p["agg"], block, p["channels"], scale, span
            score = key_scores(rows.q, own.k, pos, peaks, None, *parts)
        elif steps.score.op == "score_lowbit":
            means = rows.q.mean(0), own.k.mean(0)
            score = lowbit_scores(
                rows.q,
                own.k,
                pos,
                *means,
                p["bits"],
                block,
                p["rows"],
                p["first"],
                p["last"],
                scale,
                p["least"],
                p["every"],
            )
        elif p["kind"] == "gate":
            gate = self.gates[i]
            score = gate.scores(rows.raw, gate.keys(own.raw), rows.start, bool(p["soft"]))
        elif p["kind"] == "indexer":
            score = self.indexers[i].scores(self._input, range(rows.start, rows.start + count))
        else:
            blocks = blocks_of(end, block)

            def by(cache: Cache) -> Tensor:
                desc = _descriptors(cache.k, p["kind"], block, blocks)
                return block_scores(
                    rows.q, desc, None, pos, p["kind"], p["agg"], False, block, 1, blocks, block,
                    block, scale,
                )  # fmt: skip

            score = by(own)
            if exact is not None and before is not None:
                early = torch.arange(blocks) * block < before[:, None]
                score = torch.where(early[:, None], by(exact), score)
        chooser = get_op("select_blocks")
        s = chooser.full(steps.select)
        value = torch.full((score.shape[1],), policy.select.value, dtype=score.dtype)
        chosen = choose(
            score, pos, value, s["rule"], s["k"], s["share"], block, policy.rows, s["first"], s["last"],
            s["merge"], chooser.list_length(s), bool(s["positive"]),  # type: ignore[attr-defined]
        )  # fmt: skip
        chosen = chosen.repeat_interleave(policy.rows, 0)[:count]
        chosen = chosen.repeat_interleave(block, -1)[..., :end]
        return chosen.repeat_interleave(heads // chosen.shape[1], 1)

    def _branches(
        self, attention: SparseAttention, rows: Queries, y: Tensor, own: Cache, role: LayerRole,
        caches: list[Cache],
    ) -> Tensor:  # fmt: skip
        """A HySparse layer: its own window, and the blocks that its full layer chose."""
        assert role.list_of is not None
        near = self._window(attention, rows, own, None)
        start, end = rows.start, rows.start + rows.q.shape[0]
        cos, sin = (table[start:end] for table in self.model.rope(caches[0].k.shape[0], False))
        turned = _by_token(rotate(rows.raw.transpose(0, 1)[None], cos, sin))
        causal = (torch.arange(end) <= torch.arange(start, end)[:, None])[:, None]
        allowed = self._lists[role.list_of, start] & causal
        self.seen += float(allowed.float().mean(1).sum())
        self.visible += float(causal.sum())
        far = attend_rows(
            turned, caches[role.cache_of].to(end), allowed, attention.dim**-0.5,
            attention.listed_sink_bias,
        )  # fmt: skip
        listed, window = (_by_token(g) for g in attention.gates(y))
        return listed * far + window * near
