"""Attention of policies written plainly: positions, masks and sorted lists, none of the project's ops."""

from __future__ import annotations

import math

import pytest
import torch

PROMPT = 41
"""Tokens that are read as a prompt; those behind are decoded."""


def run(model, ids):
    """Read a prompt, then the other tokens as if they had been generated; logits ``[T, V]``."""
    rows = [model.prefill(ids[:PROMPT])[1]]
    rows += [model.decode(ids[: at + 1], PROMPT) for at in range(PROMPT, len(ids))]
    return torch.cat(rows)


def turn(x, positions, back=False):
    """Rotate ``x [n, D]`` as Llama does with its usual base."""
    half = x.shape[-1] // 2
    angle = torch.as_tensor(positions, dtype=torch.float64)[:, None] / 10000 ** (
        torch.arange(half, dtype=torch.float64) / half
    )
    phase = torch.polar(torch.ones_like(angle), -angle if back else angle)
    z = torch.complex(x[:, :half].double(), x[:, half:].double()) * phase
    return torch.cat([z.real, z.imag], -1)


class Plain:
    """Attention of one policy, query by query, in float64."""

    def __init__(self, policy, layers, heads, kv):
        self.p, self.layers, self.heads, self.kv = policy, layers, heads, kv
        self.shared = None

    def __call__(self, module, query, key, value, attention_mask, scaling, **_):
        layer, tokens, length = module.layer_idx, query.shape[2], key.shape[2]
        out = torch.zeros(1, tokens, self.heads, value.shape[3], dtype=torch.float64)
        for t in range(tokens):
            p = length - tokens + t
            q, k, v = query[0, :, t].double(), key[0].double(), value[0].double()
            for h, seen in enumerate(self.seen(layer, q, k, p, decoding=tokens == 1)):
                own = h * self.kv // self.heads
                out[0, t, h] = self.attend(q[h], k[own, seen], v[own, seen], seen, p, scaling)
        return out.to(query.dtype), None

    def attend(self, q, k, v, seen, p, scaling):
        if self.p.name == "stream" and self.p.rolling:  # encoded anew by their places in the cache
            k = turn(turn(k, seen, back=True), range(len(seen)))
            q = turn(turn(q[None], [p], back=True), [len(seen) - 1])[0]
        return torch.softmax(k @ q * scaling, 0) @ v

    def seen(self, layer, q, k, p, decoding):
        """Return the positions that each head sees."""
        name, every = self.p.name, list(range(p + 1))
        if name == "window":
            dense = self.p.every and (layer == 0 or (layer + 1) % self.p.every == 0)
            return [every if dense else every[-self.p.size :]] * self.heads
        if name == "stream":
            return [sorted({*every[: self.p.sink], *every[-self.p.recent :]})] * self.heads
        if name == "lessismore" and decoding:
            return self.lessismore(layer, q, k, p)
        if name == "full" or (name != "moba" and not decoding):
            return [every] * self.heads
        if name == "tailorkv":
            return [self.retrieved(h, q, k, p) for h in range(self.heads)]
        if name == "quest" and layer < self.p.dense:
            return [every] * self.heads
        return [self.blocks(h, q, k, p) for h in range(self.heads)]

    def blocks(self, h, q, k, p):
        """Return what one head sees of whole blocks, and its own running one."""
        size, group = self.p.block, self.heads // self.kv
        own, at = p // size, h * self.kv // self.heads
        mates = q[at * group : at * group + group]
        queries = {"moba": q[h][None], "quest": mates, "resa": mates}[self.p.name]
        if getattr(self.p, "per", "") == "head":
            queries = q[h][None]
        if getattr(self.p, "heads", "") == "mean":
            queries = mates.mean(0, keepdim=True)

        def score(b):
            keys = k[at, b * size : (b + 1) * size]
            if self.p.name == "moba":
                return float(queries[0] @ keys.mean(0))
            low, high = keys.amin(0), keys.amax(0)
            return float(torch.maximum(queries * low, queries * high).sum(-1).max())

        shares = {
            "moba": lambda: self.p.k,
            "quest": lambda: max(self.p.least, math.ceil(self.p.budget / size)),
        }
        shares["resa"] = lambda: max(self.p.least, math.ceil(self.p.p * (own + 1)))
        most = shares[self.p.name]()
        forced = set(range(max(0, own - getattr(self.p, "local", 1) + 1), own + 1))
        others = [b for b in range(p // size + (p % size == size - 1)) if b not in forced]
        best = sorted(others, key=score, reverse=True)[: max(0, most - len(forced))]
        return [
            j for b in sorted({*forced, *best}) for j in range(b * size, (b + 1) * size) if j <= p
        ]

    def retrieved(self, h, q, k, p):
        """Return the sinks, the last tokens and those that a few channels score best."""
        group, at = self.heads // self.kv, h * self.kv // self.heads
        mean = q[at * group : at * group + group].mean(0)
        whole = (p + 1) // self.p.span * self.p.span
        peak = k[at, :whole].abs().amax(0) if whole else torch.ones_like(mean)
        important = (mean.abs() * peak).tolist()
        chosen = sorted(range(len(mean)), key=lambda c: -important[c])[: self.p.channels]
        score = (k[at][:, chosen] @ mean[chosen]).tolist()
        every = range(p + 1)
        sure = {*every[: self.p.sink], *every[max(0, p + 1 - self.p.recent) :]}
        best = sorted(set(every) - sure, key=lambda j: -score[j])
        return sorted({*sure, *best[: max(0, self.p.budget - len(sure))]})

    def lessismore(self, layer, q, k, p):
        every = list(range(p + 1))
        if layer < 2:
            return [every] * self.heads
        if layer in (2, self.p.correct):
            kept = int(self.p.budget * self.p.recent)
            sink = self.p.sink if kept > self.p.sink else 0
            sure = {*every[:sink], *every[len(every) - (kept - sink) :]}
            order = []
            for h in range(self.heads):
                logits = k[h * self.kv // self.heads] @ q[h]
                order.append(sorted(set(every) - sure, key=lambda j: -float(logits[j])))
            for rank in range(len(order[0])):
                for h in range(self.heads):
                    if len(sure) < self.p.budget:
                        sure.add(order[h][rank])
            self.shared = sorted(sure)
            return [every] * self.heads
        return [self.shared] * self.heads


def oracle(model, policy, ids, plain=None):
    """Return the logits of `run`, by transformers with the attention above (``plain``: another form)."""
    config = model.config
    transformers = pytest.importorskip("transformers")
    plain = plain or Plain(
        policy, config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads
    )
    transformers.AttentionInterface.register("plain", plain)
    model.set_attn_implementation("plain")
    try:
        with torch.no_grad():
            found = model(torch.tensor([ids[:PROMPT]]), use_cache=True)
            cache, rows = found.past_key_values, [found.logits[0]]
            for at in range(PROMPT, len(ids)):
                rows.append(
                    model(torch.tensor([ids[at : at + 1]]), past_key_values=cache).logits[0]
                )
                every = getattr(policy, "f", 0)
                if every and (at + 1 - PROMPT) % every == 0:
                    cache.crop(-every)
                    model(torch.tensor([ids[at + 1 - every : at + 1]]), past_key_values=cache)
    finally:
        model.set_attn_implementation("eager")
    return torch.cat(rows).float()
