"""Run a policy as its workloads say, with the references of the ops, on small random layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from contract import Case

from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.describe_blocks import entries_of
from mimo_compile.ir.policies import AttentionPolicy, Geometry, parse_policy

SMALL = [
    "quest:budget=8,page=4,least=1", "quest:budget=8,page=4,per=head", "seer:budget=8,block=4,gate=6",
    "seer:threshold=0.15,block=4,gate=6,sink=1", "lessismore:budget=10,sink=2", "resa:p=0.3,block=4,least=2",
    "resa:p=0.3,block=4,least=2,heads=max,local=2",
    "sale:tau=0.3,bq=4,bk=2,sink=2,local=2,bits=8,least=0",
    "hysparse:block=4,budget=8,window=5", "hysparse2:tokens=6,window=3",
    "tailorkv:channels=3,budget=9,sink=2,recent=3,span=4",
    "nsa:block=8,n=3,local=1,window=6,compress=4,stride=2",
    "moba:block=4,k=2", "dsa:k=6,heads=4,width=5",
]  # fmt: skip
"""Every system that chooses, small enough for 40 positions."""
PLENTY = [
    "quest:budget=64,page=4", "seer:budget=64,block=4,gate=6", "seer:threshold=0,block=4,gate=6",
    "lessismore:budget=64,sink=2", "resa:p=1,block=4", "sale:tau=0,bq=4,bk=2,sink=2,local=2,least=0",
    "hysparse:block=4,budget=64", "hysparse2:tokens=64,window=3", "dsa:k=64,heads=4,width=5",
    "tailorkv:channels=3,budget=64", "nsa:block=8,n=9,compress=4,stride=2", "moba:block=4,k=16",
    "seer:threshold=1e-30,block=4,gate=6",
]  # fmt: skip
"""The same with nothing to drop."""


@dataclass(frozen=True)
class Layer:
    """Random activations and parameters of one layer."""

    g: Geometry
    arrays: dict[str, Any]

    def changed_behind(self, position: int) -> Layer:
        """Return the layer with other keys and values behind a position."""
        arrays = dict(self.arrays)
        for name in ("k", "v"):
            arrays[name] = arrays[name].copy()
            arrays[name][position + 1 :] = 5 - 3 * arrays[name][position + 1 :]
        return Layer(self.g, arrays)


def layer(t: int, length: int, seed: int, *, kv: int = 2, group: int = 2, sink: int = 0) -> Layer:
    """Draw a layer of d = 6, dv = 5 whose cache is a little longer than its content."""
    rng = np.random.default_rng(seed)
    g = Geometry(t, kv * group, kv, 6, 5, length + 3, length, sink)
    normal = lambda *shape: rng.standard_normal(shape, dtype=np.float32)  # noqa: E731
    arrays = {"q": normal(t, g.h, 6), "k": normal(g.cap, kv, 6), "v": normal(g.cap, kv, 5)}
    arrays["sink"], arrays["mix"] = normal(g.h), normal(6, 6)
    arrays["weight"] = normal(t, 4)
    return Layer(g, arrays)


def descriptors(keys: np.ndarray, length: int, kind: str, size: int, stride: int) -> np.ndarray:
    """Describe a filled cache by the op."""
    parts = {"bounds": 2, "mean": 1, "peak": 1}[kind]
    shape = (entries_of(keys.shape[0], size, stride), keys.shape[1], parts, keys.shape[2])
    desc = torch.zeros(shape)
    pos = torch.tensor([0, length], dtype=torch.int32)
    torch.ops.mimo.describe_blocks(torch.from_numpy(keys), pos, desc, kind, size, stride)
    return desc.numpy()


def score_inputs(op: Any, p: dict[str, Any], layer: Layer) -> dict[str, np.ndarray]:
    """Make what a score op reads; gates and indexers get projections of q and k as theirs."""
    a, g = layer.arrays, layer.g
    start = g.length - g.t
    pos = np.array([start, g.t], np.int32)
    if op.name == "score_keys":
        peak = np.abs(a["k"][: g.length]).max(0)
        if span := p["span"]:
            peak = descriptors(a["k"], g.length, "peak", span, span)[:, :, 0]
        return {"q": a["q"], "pos": pos, "k_cache": a["k"], "peak": peak}
    if op.name == "score_lowbit":
        means = {"q_mean": a["q"].mean(0), "k_mean": a["k"][: g.length].mean(0)}
        return {"q": a["q"], "pos": pos, "k_cache": a["k"], **means}
    kind, (size, stride) = p["kind"], op.sizes(p)
    if kind == "gate":
        keys = descriptors(a["k"], g.length, "mean", size, stride) @ a["mix"]
        return {"q": a["q"][:, : g.kv] @ a["mix"], "pos": pos, "desc": keys}
    if kind == "indexer":
        q = np.repeat(a["q"][:, :1], p["h"], 1) * np.arange(1, p["h"] + 1)[:, None]
        q, keys = q[..., : p["d"]].astype(np.float32), a["k"][:, :1, None, : p["d"]]
        return {"q": q, "pos": pos, "desc": keys, "weight": a["weight"]}
    described = descriptors(a["k"], g.length, "bounds" if kind == "quest" else "mean", size, stride)
    return {"q": a["q"], "pos": pos, "desc": described}


def choose(policy: AttentionPolicy, layer: Layer) -> dict[str, np.ndarray]:
    """Return the lists that a policy makes, and the score behind them."""
    steps = policy.workloads(layer.g)
    op = get_op(steps.score.op)
    inputs = score_inputs(op, op.full(steps.score), layer)
    scored = op.reference(steps.score, inputs)["score"]
    value = np.full(scored.shape[1], policy.select.value, np.float32)
    given = {"score": scored.astype(np.float32), "pos": inputs["pos"], "value": value}
    return {"score": scored, **get_op("select_blocks").reference(steps.select, given)}


def case(text: str, layer: Layer) -> Case:
    """Return the attention that a policy's lists lead to."""
    policy, a, g = parse_policy(text), layer.arrays, layer.g
    lists = choose(policy, layer)
    pos = np.array([g.length - g.t, g.t], np.int32)
    inputs = {"q": a["q"], "pos": pos, "idx": lists["idx"], "cnt": lists["cnt"], "sink": a["sink"]}
    inputs |= {"k_cache": a["k"], "v_cache": a["v"]}
    return Case(policy.workloads(g).attend, inputs)
