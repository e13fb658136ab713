"""Decoders under attention policies against transformers' models whose attention is written down plainly.

The oracle is `plain_attention`, which knows none of the project's ops.
"""

from __future__ import annotations

import pytest
import torch
from plain_attention import PROMPT, Plain, oracle, run

import mimo_compile as mc
from mimo_compile.errors import CheckpointWarning, UsageError
from mimo_compile.frontend.huggingface import load_checkpoint
from mimo_compile.ir.formats import parse_scheme
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.policies import parse_policy
from mimo_compile.pipeline.build import _layers
from mimo_compile.runtime.check import _check_layers
from mimo_compile.runtime.program import Decoder

NONE = parse_scheme("none")
CONTEXT, LENGTH = 96, 60
PLENTY = [
    "full", "window:size=96", "stream:recent=96", "stream:sink=2,recent=96,rolling=0",
    "quest:budget=96,page=4", "lessismore:budget=96,correct=3", "moba:block=8,k=12", "resa:p=1,block=4",
    "tailorkv:budget=96,quantised=0",
]  # fmt: skip
"""Every policy that can be compiled, with nothing to drop."""
FEW = [
    "window:size=7,every=3", "window:size=9,every=0", "stream:sink=3,recent=8", "stream:sink=0,recent=8",
    "stream:sink=3,recent=8,rolling=0", "quest:budget=12,page=4,dense=1",
    "quest:budget=12,page=4,dense=0,per=head", "lessismore:budget=12,sink=2,correct=4",
    "moba:block=8,k=2", "resa:p=0.2,block=4,least=2,local=2,f=0",
    "resa:p=0.1,block=4,least=2,f=6,heads=max",
    "tailorkv:channels=4,budget=12,sink=2,recent=3,quantised=0,span=8",
    "tailorkv:channels=16,budget=12,sink=2,recent=3,quantised=0,span=8",
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
        (
            "seer",
            "seer needs gates, which this model does not have.*--gates FILE.safetensors, or use one",
        ),
        ("hysparse", "needs trained sparse layers and branch gates"),
        (
            "dsa",
            "dsa needs an indexer, which this model does not have.*--gates FILE.safetensors, or use",
        ),
        ("nsa", "needs trained branches and branch gates and compression weights"),
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


@pytest.mark.parametrize("quant", ["none", "kv4"])
@pytest.mark.parametrize("text", ["window:size=300,every=0", "stream", "stream:sink=4,recent=124"])
def test_layers_whose_window_leaves_nothing_out_are_full(saved, text, quant):
    decoder = load_checkpoint(
        saved("llama")[1], parse_scheme(quant), 128, attention=parse_policy(text),
        hardware=local_cpu(),
    ).decoder  # fmt: skip
    layers = tuple(_layers(decoder, {}))
    assert {(n.role, n.window, n.first) for n in layers} == {("full", 0, 0)}
    _check_layers(Decoder((1,), (1,), 64, 96, 128, layers=layers), {}, "artifact")


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
