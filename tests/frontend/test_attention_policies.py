"""Decoders under attention policies against transformers' models whose attention is written down plainly.

The oracle knows positions, masks and sorted lists only: none of the project's ops.
"""

from __future__ import annotations

import math

import pytest
import torch

import mimo_compile as mc
from mimo_compile.errors import CheckpointWarning, UsageError
from mimo_compile.frontend.huggingface import load_checkpoint
from mimo_compile.ir.formats import parse_scheme
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.policies import parse_policy

NONE = parse_scheme("none")
CONTEXT, PROMPT, LENGTH = 96, 41, 60
PLENTY = [
    "full", "window:size=96", "stream:recent=96", "stream:sink=2,recent=96,rolling=0",
    "quest:budget=96,page=4", "lessismore:budget=96,correct=3", "moba:block=8,k=12", "resa:p=1,block=4",
]  # fmt: skip
"""Every policy that can be compiled, with nothing to drop."""
FEW = [
    "window:size=7,every=3", "window:size=9,every=0", "stream:sink=3,recent=8", "stream:sink=0,recent=8",
    "stream:sink=3,recent=8,rolling=0", "quest:budget=12,page=4,dense=1",
    "quest:budget=12,page=4,dense=0,per=head", "lessismore:budget=12,sink=2,correct=4",
    "moba:block=8,k=2", "resa:p=0.2,block=4,least=2,local=2,f=0",
    "resa:p=0.1,block=4,least=2,f=6,heads=max",
]  # fmt: skip


@pytest.fixture(scope="module")
def deep(tools, tmp_path_factory):
    """A Llama of six layers, and its folder."""
    folder = tmp_path_factory.mktemp("deep")
    model = tools.make_model("llama", num_hidden_layers=6)
    model.save_pretrained(folder)
    return model, folder


def decoder(folder, text, quant=NONE):
    return load_checkpoint(folder, quant, CONTEXT, attention=parse_policy(text)).decoder


def run(model, ids):
    """Read a prompt, then the other tokens as if they had been generated; logits ``[T, V]``."""
    rows = [model.prefill(ids[:PROMPT])[1]]
    rows += [model.decode(ids[: at + 1], PROMPT) for at in range(PROMPT, len(ids))]
    return torch.cat(rows)


# -- the oracle ------------------------------------------------------------------------------------


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


def oracle(model, policy, ids):
    """Return the logits of `run`, by transformers with the attention above."""
    config = model.config
    transformers = pytest.importorskip("transformers")
    plain = Plain(
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


# -- tests -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", FEW)
def test_eager_decoders_do_what_the_policy_says(deep, tools, text):
    model, folder = deep
    ids = tools.prompt(LENGTH)
    got = run(decoder(folder, text), ids)
    torch.testing.assert_close(got, oracle(model, parse_policy(text), ids), rtol=2e-3, atol=2e-3)
    assert not torch.allclose(got, run(decoder(folder, "model"), ids), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("text", ["stream:sink=3,recent=8", "stream:sink=3,recent=8,rolling=0"])
def test_sinks_stay_while_the_ring_turns(tools, tmp_path, text):
    model = tools.make_model("llama", num_hidden_layers=2)
    model.save_pretrained(tmp_path)
    eager = load_checkpoint(tmp_path, NONE, 400, attention=parse_policy(text)).decoder
    ids = tools.prompt(306)
    got = [eager.prefill(ids[:300])[1][-9:]]
    got += [eager.decode(ids[: at + 1], 300) for at in range(300, 306)]
    caches = [b for s in eager.stages() for n, b in s.module.named_buffers() if n == "k_cache"]
    assert {len(b) for b in caches} == {16 + 272}
    transformers = pytest.importorskip("transformers")
    config = model.config
    plain = Plain(parse_policy(text), 2, config.num_attention_heads, config.num_key_value_heads)
    transformers.AttentionInterface.register("plain", plain)
    model.set_attn_implementation("plain")
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits[0, -15:]
    torch.testing.assert_close(torch.cat(got), want.float(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("text", PLENTY)
def test_enough_budget_is_full_attention(deep, tools, text):
    ids = tools.prompt(LENGTH)
    got, want = (run(decoder(deep[1], t), ids) for t in (text, "model"))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "text", ["quest:budget=96,page=4", "stream:recent=96", "moba:block=8,k=12"]
)
def test_layers_with_windows_of_the_model_keep_them(saved, tools, text):
    folder, ids = saved("mimo_v2_flash")[1], tools.prompt(LENGTH)
    other = decoder(folder, text)
    torch.testing.assert_close(
        run(other, ids), run(decoder(folder, "full"), ids), rtol=1e-4, atol=1e-4
    )
    roles = [role.kind for role in other.config.roles]
    assert roles[1:3] == ["window"] * 2
    assert [spec.window for spec in other.config.layers] == [0, 8, 8, 0]


def test_sixteen_bit_caches_have_sixteen_bit_bounds(deep, tools):
    model = decoder(deep[1], "quest:budget=96,page=4", parse_scheme("kv16"))
    states = {n: b for s in model.stages() for n, b in s.module.named_buffers() if n in s.states}
    assert {n: b.dtype for n, b in states.items()} == dict.fromkeys(
        ("k_cache", "v_cache", "desc"), torch.bfloat16
    )
    ids = tools.prompt(LENGTH)
    want = run(decoder(deep[1], "model", parse_scheme("kv16")), ids)
    torch.testing.assert_close(run(model, ids), want, rtol=1e-4, atol=1e-4)


def test_generation_decodes_and_makes_exact(deep, tools):
    """A greedy text is that of single steps, and rectified keys are those of a prompt."""
    ids = tools.prompt(PROMPT)
    model = decoder(deep[1], "resa:p=0.1,block=4,least=1,f=4")
    out = model.generate_greedy(ids, 9)
    assert len(out) == 9
    every = [*ids, *out]
    keys = model.stage("layers.5").module.k_cache[: PROMPT + 8].clone()
    model.prefill(every[: PROMPT + 8])
    torch.testing.assert_close(keys, model.stage("layers.5").module.k_cache[: PROMPT + 8])
    approximate = decoder(deep[1], "resa:p=0.1,block=4,least=1,f=0")
    approximate.generate_greedy(ids, 9)
    other = approximate.stage("layers.5").module.k_cache[: PROMPT + 8]
    assert not torch.allclose(keys, other, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quset", "unknown attention 'quset'"),
        ("seer", "needs gates, which this model does not have.*use one of model, full"),
        ("hysparse", "needs trained sparse layers and branch gates"),
        ("dsa", "needs indexer"),
        ("nsa", "needs trained branches and branch gates and compression weights"),
        ("tailorkv", "tailorkv has no kernels in this version"),
        ("quest+int8", r"\+int8 is for model, full, window.*use --attention quest, or full\+int8"),
    ],
)
def test_what_cannot_be_is_said_once(saved, text, message):
    with pytest.raises(UsageError, match=message):
        mc.compile(saved("llama")[1], attention=text)


def test_streams_keep_rings_of_16_bits_beside_groups(saved):
    policy = parse_policy("stream:recent=64")
    loaded = load_checkpoint(
        saved("llama")[1], parse_scheme("kv4"), attention=policy, hardware=local_cpu()
    )
    layers = [s.module for s in loaded.decoder.stages() if hasattr(s.module, "caches")]
    assert {m.caches.name for m in layers} == {"bf16"}


@pytest.mark.parametrize("text", ["quest", "full+int8"])
def test_caches_in_groups_have_no_single_positions(saved, text):
    with pytest.raises(
        UsageError, match=r"reads keys of single positions, which \w+ caches .*kv16"
    ):
        mc.compile(saved("llama")[1], attention=text, quant="kv4")


@pytest.mark.parametrize("text", ["lessismore", "window"])
def test_hybrid_models_refuse_policies_for_all_layers(saved, text):
    with pytest.raises(UsageError, match="layer 1 of this model has a window"):
        mc.compile(saved("mimo_v2_flash")[1], attention=text)


def test_modules_keep_their_attention():
    with pytest.raises(UsageError, match="--attention full is for model folders"):
        mc.compile(torch.nn.Linear(4, 4), example_inputs=(torch.zeros(1, 4),), attention="full")


@pytest.mark.slow
def test_a_policy_that_wants_training_is_noted(saved):
    from mimo_compile.pipeline.source import open_source

    with pytest.warns(CheckpointWarning, match="--attention window is made for layers"):
        open_source(saved("llama")[1], attention="window:size=8", max_context=16)
