"""MiMo-7B: a Qwen2 trunk, draft layers by the published formulas, texts that drafts leave alone."""

import shutil
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm

import mimo_compile as mc
from mimo_compile.errors import CheckpointWarning, InputError, UsageError
from mimo_compile.frontend.huggingface import load_checkpoint
from mimo_compile.frontend.models import get_family
from mimo_compile.frontend.models.build import Builder
from mimo_compile.frontend.models.calibrated import CalibratedBuilder
from mimo_compile.frontend.models.family import Fields
from mimo_compile.frontend.weights import open_checkpoint
from mimo_compile.ir.formats import QuantScheme, parse_scheme
from mimo_compile.quantize.calibration import Calibration
from mimo_compile.runtime import Speculation, Stats

pytestmark = pytest.mark.compile
NONE = parse_scheme("none")
HEADS = 2
LAYER = {
    **{f"{n}.weight": (64,) for n in ("token_layernorm", "hidden_layernorm", "final_layernorm")},
    **{f"{n}.weight": (64,) for n in ("input_layernorm", "post_attention_layernorm")},
    "input_proj.weight": (64, 128),
    "self_attn.q_proj.weight": (64, 64),
    "self_attn.k_proj.weight": (32, 64),
    "self_attn.v_proj.weight": (32, 64),
    "self_attn.o_proj.weight": (64, 64),
    **{f"self_attn.{c}_proj.bias": (n,) for c, n in (("q", 64), ("k", 32), ("v", 32))},
    "mlp.gate_proj.weight": (96, 64),
    "mlp.up_proj.weight": (96, 64),
    "mlp.down_proj.weight": (64, 96),
}


@pytest.fixture(scope="module")
def made(tools, tmp_path_factory):
    """A MiMo folder with two random draft layers, all its tensors, and transformers' model of the trunk."""
    folder = tmp_path_factory.mktemp("mimo")
    model = tools.make_model(
        "qwen2", num_hidden_layers=2, tie_word_embeddings=False, rms_norm_eps=1e-5
    )
    model.save_pretrained(folder)
    tools.edit_json(
        folder / "config.json",
        model_type="mimo",
        architectures=["MiMoForCausalLM"],
        attention_bias=True,
        num_nextn_predict_layers=HEADS,
    )
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for i in range(HEADS):
        for name, shape in LAYER.items():
            noise = torch.randn(shape, generator=generator)
            value = 1 + 0.2 * noise if "norm" in name else noise * (1.5 / shape[-1] ** 0.5)
            tensors[f"model.mtp_layers.{i}.{name}"] = 0.5 * noise if "bias" in name else value
    save_file(tensors, folder / "model.safetensors")
    return folder, tensors, model


@pytest.fixture
def copy(made, tmp_path):
    """A private copy of the folder, and a function that changes its tensors."""
    shutil.copytree(made[0], tmp_path / "copy")

    def change(how):
        tensors = dict(made[1])
        how(tensors)
        save_file(tensors, tmp_path / "copy" / "model.safetensors")

    return tmp_path / "copy", change


@torch.no_grad()
def published_draft(tensors, model, head, ids, tokens):
    """Logits ``[n, V]`` of a draft layer: transformers' own layer between what the report writes out."""
    prefix = f"model.mtp_layers.{head}."
    own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    layer = Qwen2DecoderLayer(model.config, 0).eval()
    layer.load_state_dict({k: v for k, v in own.items() if k in layer.state_dict()})

    def norm(name, x):
        module = Qwen2RMSNorm(64, 1e-5)
        module.weight.copy_(own[f"{name}.weight"])
        return module(x)

    hidden = model.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0]  # normed
    count = len(tokens)
    embedded = model.model.embed_tokens(torch.tensor(tokens))
    embedded[0] = 0
    pair = [norm("hidden_layernorm", hidden[:count]), norm("token_layernorm", embedded)]
    u = torch.nn.functional.linear(torch.cat(pair, -1), own["input_proj.weight"])[None]
    positions = torch.arange(count)[None]
    mask = torch.full((count, count), float("-inf")).triu(1)[None, None]
    z = layer(
        u,
        attention_mask=mask,
        position_ids=positions,
        position_embeddings=model.model.rotary_emb(u, positions),
    )
    z = z[0] if isinstance(z, tuple) else z
    return model.lm_head(norm("final_layernorm", z.reshape(count, 64)))


def relative(found, expected):
    assert expected.std() > 0.1, "the reference must not be trivial"
    return float((found - expected).abs().max() / expected.abs().max())


def drafted(decoder, head, ids):
    """Logits of a draft layer for all positions of a text, in two calls."""
    hidden, _ = decoder.prefill(ids)
    tokens = torch.tensor(ids[1 + head :])
    half = len(tokens) // 2
    parts = [(0, half), (half, len(tokens))]
    return torch.cat([decoder.draft(head, hidden[a:b], tokens[a:b], a) for a, b in parts])


def test_the_trunk_equals_transformers(made, tools):
    folder, _, model = made
    decoder = load_checkpoint(folder, NONE).decoder
    ids = tools.prompt(60)
    assert relative(decoder.prefill(ids)[1], tools.logits_of(model, ids)) < 1e-4
    assert decoder.generate_greedy(ids[:9], 32) == tools.greedy(model, ids[:9], 32)


@pytest.mark.parametrize("head", range(HEADS))
def test_draft_layers_follow_the_published_formulas(made, tools, head):
    folder, tensors, model = made
    decoder = load_checkpoint(folder, NONE).decoder
    ids = tools.prompt(30)
    want = published_draft(tensors, model, head, ids, ids[1 + head :])
    assert relative(drafted(decoder, head, ids), want) < 1e-4


def test_bfloat16_files(made, copy, tools):
    """As the models are published."""
    _, tensors, model = made
    folder, change = copy
    change(lambda t: t.update({name: value.bfloat16() for name, value in t.items()}))
    rounded = {name: value.bfloat16().float() for name, value in tensors.items()}
    trunk = deepcopy(model)
    trunk.load_state_dict({n: v for n, v in rounded.items() if "mtp_layers" not in n})
    decoder = load_checkpoint(folder, NONE).decoder
    assert decoder.config.dtype == "bf16"
    ids = tools.prompt(30)
    assert relative(decoder.prefill(ids)[1], tools.logits_of(trunk, ids)) < 1e-4
    want = published_draft(rounded, trunk, 0, ids, ids[1:])
    assert relative(drafted(decoder, 0, ids), want) < 1e-4


def test_the_hidden_state_stands_first(made, copy, tools):
    """With swapped halves of the projection the drafts are others; the embedding of position 0 is blank."""
    folder, change = copy
    ids = tools.prompt(20)
    plain = drafted(load_checkpoint(made[0], NONE).decoder, 0, ids)
    name = "model.mtp_layers.0.input_proj.weight"
    change(lambda t: t.update({name: torch.cat(t[name].chunk(2, 1)[::-1], 1).contiguous()}))
    assert relative(drafted(load_checkpoint(folder, NONE).decoder, 0, ids), plain) > 0.1
    decoder = load_checkpoint(made[0], NONE).decoder
    hidden, _ = decoder.prefill(ids)
    first = [decoder.draft(0, hidden[:1], torch.tensor([token]), 0) for token in (3, 200)]
    assert torch.equal(*first)
    decoder.reset()
    later = [decoder.draft(0, hidden[1:2], torch.tensor([token]), 1) for token in (3, 200)]
    assert not torch.equal(*later)


def knowing(tensors, swapped=False):
    """Make the next token depend on the last one alone, and head 0 know it: it says what the model says."""
    for name in tensors:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] = torch.zeros_like(tensors[name])
    prefix, none = "model.mtp_layers.0.", torch.zeros(64, 64)
    for norm in ("token_layernorm", "hidden_layernorm"):
        tensors[f"{prefix}{norm}.weight"] = torch.ones(64)
    tensors[f"{prefix}final_layernorm.weight"] = tensors["model.norm.weight"].clone()
    halves = [torch.eye(64), none] if swapped else [none, torch.eye(64)]
    tensors[f"{prefix}input_proj.weight"] = torch.cat(halves, 1)


def kept(decoder, start, count=60):
    """Share of the drafts of head 0 that the model says too, behind greedy tokens of its own."""
    ids = start + decoder.generate_greedy(start, count)
    assert len(set(ids[-20:])) > 1, "a text of one token would hide a wrong draft"
    said = decoder.prefill(ids)[1].argmax(-1)[1:]
    drafts = drafted(decoder, 0, ids).argmax(-1)
    return float((drafts == said).float()[len(start) :].mean())


def test_acceptance_tells_the_order_of_the_halves(copy, tools):
    folder, change = copy
    start = tools.prompt(8)
    change(knowing)
    assert kept(load_checkpoint(folder, NONE).decoder, start) == 1.0
    change(lambda t: knowing(t, swapped=True))
    assert kept(load_checkpoint(folder, NONE).decoder, start) < 0.2


def test_folding_leaves_drafts_as_they_were(made, tools):
    checkpoint = open_checkpoint(made[0])
    fields = Fields(checkpoint.config, checkpoint.config_file)
    family = get_family("mimo", fields.file)
    config = family.configure(fields, checkpoint).with_context(64)
    ids = torch.tensor([tools.prompt(40, seed) for seed in range(4)], dtype=torch.int32)
    awq = CalibratedBuilder(
        config, family, checkpoint, parse_scheme("w2g32"), Calibration("awq"), ids
    )
    changed, forget = {}, awq._folded.forget
    awq._folded.forget = lambda: (changed.update(awq._folded._changed), forget())
    awq.build()
    awq._folded._changed.update(changed)
    folded = Builder(config, family, awq._folded, QuantScheme(None)).build()
    assert "model.mtp_layers.0.input_proj.weight" in changed
    plain = load_checkpoint(made[0], NONE, 64).decoder
    text = tools.prompt(40)
    for head in range(HEADS):
        assert relative(drafted(folded, head, text), drafted(plain, head, text)) < 1e-5


def test_draft_layers_that_are_not_there_or_not_asked_for(made, copy, tools, recwarn):
    folder, change = copy
    ids = tools.prompt(20)
    want = load_checkpoint(made[0], NONE).decoder.prefill(ids)[1]
    tools.edit_json(folder / "config.json", num_nextn_predict_layers=None)
    assert len(load_checkpoint(folder, NONE).decoder.config.mtp) == HEADS
    assert not [w for w in recwarn.list if w.category is CheckpointWarning]
    for asked in (0, 1):
        tools.edit_json(folder / "config.json", num_nextn_predict_layers=asked)
        with pytest.warns(CheckpointWarning, match=f"={asked}: {HEADS - asked} of 2 stored"):
            loaded = load_checkpoint(folder, NONE)
        assert len(loaded.decoder.config.mtp) == asked
        assert len(loaded.report.unused) == len(LAYER) * (HEADS - asked)
        assert torch.equal(loaded.decoder.prefill(ids)[1], want)
    change(lambda t: [t.pop(n) for n in list(t) if "mtp_layers" in n])
    with pytest.warns(CheckpointWarning, match="=1, but no draft layer .* is stored"):
        loaded = load_checkpoint(folder, NONE)
    assert not loaded.decoder.config.mtp
    assert torch.equal(loaded.decoder.prefill(ids)[1], want)


WRONG = [
    ({"num_nextn_predict_layers": 3}, None, "=3, but 2 draft layers are stored.*Set it to 2"),
    ({"num_nextn_predict_layers": -1}, None, "num_nextn_predict_layers must be an integer"),
    ({"num_nextn_predict_layers": "1"}, None, "num_nextn_predict_layers must be an integer"),
    ({"use_mrope": True}, None, "use_mrope=True is not supported"),
    ({"use_sliding_window": True}, None, "use_sliding_window=True is not supported"),
    ({"layer_types": ["sliding_attention"] * 2, "sliding_window": 8}, None, "sliding windows"),
    ({"num_key_value_heads": 3}, None, "no multiple of num_key_value_heads"),
    ({}, "model.layers.1.self_attn.k_proj.bias", r"layers\.1\.self_attn\.k_proj\.bias is missing"),
    ({}, "model.mtp_layers.1.input_proj.weight", r"mtp_layers\.1\.input_proj\.weight is missing"),
    ({}, "model.mtp_layers.0.*", r"draft layers \[1\] are not numbered from 0"),
]


@pytest.mark.parametrize(("fields", "gone", "match"), WRONG)
def test_what_is_wrong_is_named(copy, tools, fields, gone, match):
    folder, change = copy
    tools.edit_json(folder / "config.json", **fields)
    if gone:
        change(lambda t: [t.pop(n) for n in list(t) if n.startswith(gone.removesuffix("*"))])
    with pytest.raises(InputError, match=match) as caught:
        load_checkpoint(folder, NONE)
    assert "\n" not in str(caught.value) and caught.value.where


def test_a_projection_of_another_width_is_named(copy):
    folder, change = copy
    name = "model.mtp_layers.0.input_proj.weight"
    change(lambda t: t.update({name: torch.zeros(64, 64)}))
    with pytest.raises(InputError, match=r"input_proj.weight has shape \[64, 64\].*\[64, 128\]"):
        load_checkpoint(folder, NONE)


@pytest.mark.slow
def test_compiled_texts_with_drafts_are_those_without(copy, tools):
    """Head 0 is right, head 1 random: both outcomes are common, at every depth."""
    folder, change = copy
    change(knowing)
    artifact = mc.compile(folder, db=folder / "records.db", max_context=60, threads=1)
    assert artifact.manifest.decoder.alike == (1, 4)
    module, eager = artifact.module(), load_checkpoint(folder, NONE, 60).decoder
    for length in (1, 9, 30):
        prompt = tools.prompt(length, seed=length)
        plain = list(module.generate_ids(prompt, None, stop_at_eos=False))
        assert plain == eager.generate_greedy(prompt, len(plain), stop=())
        for depth in (None, 1, 2):
            stats = Stats()
            found = module.generate_ids(
                prompt, None, speculative=Speculation(depth), stop_at_eos=False, stats=stats
            )
            assert list(found) == plain
            if depth is not None:
                first = stats.acceptance["heads"][0]
                assert first["judged"] > 5 and first["accepted"] >= first["judged"] - 1


@pytest.mark.slow
def test_a_compiled_model_without_draft_layers_says_so(copy, tools):
    folder, change = copy
    change(lambda t: [t.pop(n) for n in list(t) if "mtp_layers" in n])
    tools.edit_json(folder / "config.json", num_nextn_predict_layers=0)
    module = mc.compile(folder, db=folder / "records.db", max_context=32, threads=1).module()
    with pytest.raises(UsageError, match="draft heads"):
        list(module.generate_ids([1, 2, 3], 4, speculative=True))
