"""Stages, caches, draft layers and quantised weights of the decoder."""

import math
import re
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import mimo_compile as mc
from mimo_compile.errors import UsageError
from mimo_compile.frontend.huggingface import load_checkpoint, resolve_source
from mimo_compile.frontend.models.attend import READY, attending, with_attention
from mimo_compile.frontend.models.decoder import STEP_TOKENS, DecoderConfig, LayerSpec
from mimo_compile.frontend.models.rotary import inverse_frequencies
from mimo_compile.ir.formats import parse_scheme, parse_weight_format
from mimo_compile.ir.policies import get_policy, parse_policy
from mimo_compile.quantize import quantize
from mimo_compile.verify import verify_artifact

pytestmark = pytest.mark.compile
NONE = parse_scheme("none")
MTP_FFN = 40


@pytest.fixture(scope="module")
def flash(saved, tools, tmp_path_factory):
    """A MiMo-V2-Flash folder with two random draft layers, and all its tensors."""
    _, folder = saved("mimo_v2_flash")
    target = tmp_path_factory.mktemp("mtp")
    shutil.copytree(folder, target, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    shapes = {
        **{f"{n}.weight": (64,) for n in ("enorm", "hnorm", "input_layernorm")},
        **{f"{n}.weight": (64,) for n in ("pre_mlp_layernorm", "final_layernorm")},
        "eh_proj.weight": (64, 128),
        "self_attn.q_proj.weight": (96, 64),
        "self_attn.k_proj.weight": (48, 64),
        "self_attn.v_proj.weight": (32, 64),
        "self_attn.o_proj.weight": (64, 64),
        "self_attn.attention_sink_bias": (4,),
        "mlp.gate_proj.weight": (MTP_FFN, 64),
        "mlp.up_proj.weight": (MTP_FFN, 64),
        "mlp.down_proj.weight": (64, MTP_FFN),
    }
    for i in range(2):
        for name, shape in shapes.items():
            noise = torch.randn(shape, generator=generator)
            value = 1 + 0.2 * noise if "norm" in name else noise * (1.5 / shape[-1] ** 0.5)
            tensors[f"model.mtp.layers.{i}.{name}"] = value
    save_file(tensors, target / "model.safetensors")
    return target, tensors


def plain_draft(t, head, hidden, ids):
    """The published formulas of a draft layer, position by position, in float64."""
    t = {k: v.double() for k, v in t.items()}
    p = f"model.mtp.layers.{head}."

    def norm(x, name):
        return x / torch.sqrt((x * x).mean() + 1e-5) * t[p + name + ".weight"]

    def turn(x, position):  # 8 of 24 dimensions, dimension i with i + 4, base 10000
        out = x.clone()
        for i in range(4):
            angle = position * 10000.0 ** (-2 * i / 8)
            a, b = x[i], x[i + 4]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + 4] = b * math.cos(angle) + a * math.sin(angle)
        return out

    keys, values, results = [], [], []
    for n, token in enumerate(ids):
        row = t["model.embed_tokens.weight"][token]
        pair = torch.cat([norm(row, "enorm"), norm(hidden[n].double(), "hnorm")])
        x = t[p + "eh_proj.weight"] @ pair
        a = norm(x, "input_layernorm")
        q, k, v = (t[f"{p}self_attn.{c}_proj.weight"] @ a for c in "qkv")
        keys.append([turn(k[24 * g : 24 * g + 24], n) for g in range(2)])
        values.append([v[16 * g : 16 * g + 16] * 0.707 for g in range(2)])
        heads = []
        for h in range(4):
            query, g = turn(q[24 * h : 24 * h + 24], n), h // 2
            seen = range(max(0, n - 7), n + 1)
            scores = [math.exp(float(query @ keys[j][g]) / math.sqrt(24)) for j in seen]
            total = sum(scores) + math.exp(float(t[p + "self_attn.attention_sink_bias"][h]))
            mixed = [s / total * values[j][g] for s, j in zip(scores, seen, strict=True)]
            heads.append(torch.stack(mixed).sum(0))
        x = x + t[p + "self_attn.o_proj.weight"] @ torch.cat(heads)
        m = norm(x, "pre_mlp_layernorm")
        gate, up = (t[f"{p}mlp.{c}_proj.weight"] @ m for c in ("gate", "up"))
        x = x + t[p + "mlp.down_proj.weight"] @ (gate / (1 + torch.exp(-gate)) * up)
        results.append(t["lm_head.weight"] @ norm(x, "final_layernorm"))
    return torch.stack(results)


@pytest.mark.parametrize("head", [0, 1])
def test_draft_layers_follow_the_published_formulas(flash, tools, head):
    folder, tensors = flash
    decoder = load_checkpoint(folder, NONE).decoder
    assert [s.ffn for s in decoder.config.mtp] == [MTP_FFN] * 2
    ids = tools.prompt(30)
    hidden, _ = decoder.prefill(ids)
    tokens = ids[1 + head :]
    rows = len(tokens)
    expected = plain_draft(tensors, head, hidden, tokens)
    first = decoder.draft(head, hidden[:20], torch.tensor(tokens[:20]), 0)
    rest = decoder.draft(head, hidden[20:rows], torch.tensor(tokens[20:]), 20)
    found = torch.cat([first, rest])
    assert expected.std() > 0.1
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4


def test_the_hidden_state_is_the_one_before_the_final_norm(flash, tools):
    decoder = load_checkpoint(flash[0], NONE).decoder
    hidden, logits = decoder.prefill(tools.prompt(12))
    norm = decoder.stage("final_norm").module.weight
    normed = torch.nn.functional.rms_norm(hidden, (64,), norm, 1e-5)
    again = decoder.stage("head").module(normed)
    torch.testing.assert_close(again, logits)


@pytest.mark.parametrize("case", ["qwen3", "mimo_v2_flash"])
def test_chunks_and_padding_change_nothing(case, saved, tools):
    decoder = load_checkpoint(saved(case)[1], NONE).decoder
    ids = torch.tensor(tools.prompt(50))
    whole = decoder.prefill(ids.tolist())[1]
    decoder.reset()
    rows, at = [], 0
    for size in (1, 4, 16, 3, 8, 1, 17):
        padded = torch.full((16 if size < 16 else 32,), 256)
        padded[:size] = ids[at : at + size]
        rows.append(decoder.forward_step(padded, at, size)[1][:size])
        at += size
    torch.testing.assert_close(torch.cat(rows), whole, rtol=1e-4, atol=1e-4)


def test_a_window_ring_wraps(saved, tools, tmp_path):
    model, folder = saved("mimo_v2_flash")
    decoder = load_checkpoint(folder, NONE, max_context=512).decoder
    ids = tools.prompt(400)
    cap = decoder.stage("layers.1").module.k_cache.shape[0]
    assert 8 + STEP_TOKENS <= cap < 400
    expected = tools.logits_of(model, ids)
    assert float((decoder.prefill(ids)[1] - expected).abs().max() / expected.abs().max()) < 1e-3


def test_cache_sizes():
    full, ring = LayerSpec(4, 2, 8, 8), LayerSpec(4, 2, 8, 8, window=128)
    assert [full.capacity(n) for n in (1, 16, 17, 4096)] == [16, 16, 32, 4096]
    assert [ring.capacity(n) for n in (100, 384, 4096)] == [240, 384, 384]
    assert LayerSpec(4, 2, 8, 8, window=8).capacity(4096) == 272


def test_a_window_that_leaves_nothing_out_costs_no_more_than_a_full_cache():
    layers = tuple(LayerSpec(4, 2, 8, 8, window=n) for n in (0, 95, 96, 32768))
    config = DecoderConfig("m", 32, 257, layers, 1e-6, False, 65536, mtp=layers[-1:])
    short = config.with_context(96)
    assert [spec.window for spec in (*short.layers, *short.mtp)] == [0, 95, 0, 0, 0]
    assert short.layers[3].capacity(96) == 96
    for text in ("window:size=96,every=0", "stream:recent=96,sink=0", "stream:recent=92,sink=4"):
        under = with_attention(
            DecoderConfig("m", 32, 257, layers[:1] * 2, 1e-6, False, 96), parse_policy(text)
        )
        assert [spec.capacity(96) for spec in under.layers] == [96, 96]
        assert attending(under, "layers.0")[0].kind == ""
    some = with_attention(
        DecoderConfig("m", 32, 257, layers[:1], 1e-6, False, 97), parse_policy("stream:recent=92")
    )
    assert (some.layers[0].window, some.layers[0].first) == (92, 4)


def test_what_is_offered_in_place_of_shared_lists_works():
    layers = tuple(LayerSpec(4, 2, 8, 8, window=n) for n in (0, 0, 0, 8))
    config = DecoderConfig("m", 32, 257, layers, 1e-6, False, 4096)
    with pytest.raises(UsageError, match="share lists") as caught:
        with_attention(config, parse_policy("lessismore"))
    offered = re.findall(r"\w+", caught.value.remedy.removeprefix("choose "))
    assert set(offered) - {"or"} == {n for n in READY if get_policy(n).alone}
    for name in set(offered) - {"or"}:
        assert len(with_attention(config, parse_policy(name)).roles) == 4


def test_a_policy_that_runs_more_again_than_rings_hold_is_refused():
    layers = tuple(LayerSpec(4, 2, 8, 8, window=n) for n in (0, 8))
    config = DecoderConfig("m", 32, 257, layers, 1e-6, False, 4096)
    with pytest.raises(UsageError, match=r"window layers of this model.*257 tokens"):
        with_attention(config, parse_policy("resa:f=257"))
    assert with_attention(config, parse_policy("resa:f=256")).layers[1].window == 8
    whole = replace(config, layers=layers[:1])
    assert with_attention(whole, parse_policy("resa:f=300")).attention.rerun == 300


def test_stages_describe_themselves(flash):
    decoder = load_checkpoint(flash[0], parse_scheme("w4g64a8"), max_context=64).decoder
    kinds = {s.name: s.kind for s in decoder.stages()}
    assert kinds == {
        "embed": "embed",
        "rope.0": "rope.r8",
        "rope.1": "rope.r8",
        "layers.0": "first",
        "layers.1": "layer",
        "layers.2": "layer",
        "layers.3": "layer.1",
        "final_norm": "final_norm",
        "head": "head",
        "mtp.0": "mtp",
        "mtp.1": "mtp",
    }
    layer = decoder.stage("layers.2")
    assert layer.states == {"k_cache": "layers.2.k_cache", "v_cache": "layers.2.v_cache"}
    assert layer.inputs == ("x", "delta", "rope.1", "pos") and layer.outputs == ("x", "delta")
    assert decoder.stage("layers.3").inputs[2] == "rope.0"
    assert decoder.stage("mtp.1").inputs == ("hidden", "ids", "rope.1", "pos")
    assert layer.module.k_cache.is_meta, "no memory for caches before the first step"
    assert layer.module.k_cache.shape == (80, 2, 24) and layer.module.v_cache.shape == (80, 2, 16)
    assert layer.module.feed.router.weight.dtype == torch.float32


@pytest.mark.parametrize("scheme", ["none", "w4zg64a8"])
def test_every_kind_of_stage_exports_whole(flash, scheme):
    decoder = load_checkpoint(flash[0], parse_scheme(scheme), max_context=64).decoder
    tokens, seen = 4, {}
    values = {
        "ids": torch.zeros(tokens, dtype=torch.int32),
        "pos": torch.zeros(2, dtype=torch.int32),
        **{name: torch.zeros(tokens, 64) for name in ("x", "delta", "hidden", "normed")},
        **{name: torch.zeros(tokens, 2, 4) for name in ("rope.0", "rope.1")},
    }
    for stage in decoder.stages():
        if stage.kind in seen:
            continue
        if stage.name.startswith("rope."):
            stage.module.tokens = tokens
        args = tuple(values[name] for name in stage.inputs)
        program = torch.export.export(stage.module, args, strict=False)
        names = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
        seen[stage.kind] = names - {"<built-in function getitem>"}
    matmul = "mimo.linear.default" if scheme == "none" else "mimo.mpgemm.default"
    attention = {"mimo.kv_append.default", "mimo.cached_attention.default"}
    assert seen["layer"] == attention | {
        "mimo.add_rms_norm.default", matmul, "mimo.linear.default", "mimo.route.default",
        "mimo.moe.default", "aten.flatten.using_ints",
    }  # fmt: skip
    assert seen["first"] == attention | {
        "aten.rms_norm.default", "mimo.add_rms_norm.default", matmul, "mimo.swiglu.default",
        "aten.flatten.using_ints",
    }  # fmt: skip
    assert "aten.cat.default" in seen["mtp"] and "mimo.embed.default" in seen["mtp"]
    assert seen["head"] == {matmul} and seen["rope.r8"] == {"mimo.rope_table.default"}


@pytest.mark.parametrize("case", ["qwen2", "mimo_v2_flash"])
@pytest.mark.parametrize("scheme", ["w4g64", "w4zg32", "w8", "w1.58"])
def test_quantised_weights_are_what_the_quantiser_says(case, scheme, saved, tools, tmp_path):
    """The same model written with weights quantised and widened again computes the same."""
    _, folder = saved(case)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    fmt, head = parse_weight_format(scheme), parse_weight_format("w8")
    for name, value in tensors.items():
        if value.dim() == 2 and "_proj" in name:
            tensors[name] = torch.from_numpy(quantize(value, fmt).dequantize())
    tied = case == "qwen2"
    source = tensors["model.embed_tokens.weight" if tied else "lm_head.weight"]
    head = head if fmt.bits < 4 else fmt
    tensors["lm_head.weight"] = torch.from_numpy(quantize(source, head).dequantize())
    save_file(tensors, tmp_path / "model.safetensors")
    tools.edit_json(tmp_path / "config.json", tie_word_embeddings=False)
    ids = tools.prompt(40)
    found = load_checkpoint(folder, parse_scheme(scheme)).decoder.prefill(ids)[1]
    expected = load_checkpoint(tmp_path, NONE).decoder.prefill(ids)[1]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_int8_activations_stay_near_float_ones(saved, tools):
    _, folder = saved("llama")
    ids = tools.prompt(40)
    a16, a8 = (
        load_checkpoint(folder, parse_scheme(s)).decoder.prefill(ids)[1] for s in ("w8", "w8a8")
    )
    assert 0 < float((a8 - a16).abs().mean()) < 0.05 * float(a16.abs().mean())


def test_memory_of_caches_can_be_given_back(saved, tools):
    decoder = load_checkpoint(saved("llama")[1], NONE, max_context=64).decoder
    ids = tools.prompt(20)
    first = decoder.generate_greedy(ids, 5)
    decoder.release()
    assert decoder.stage("layers.1").module.v_cache.is_meta
    assert decoder.generate_greedy(ids, 5) == first


def test_generation_stops_at_eos(saved, tools):
    decoder = load_checkpoint(saved("qwen3")[1], NONE, max_context=64).decoder
    ids = tools.prompt(10)
    tokens = decoder.generate_greedy(ids, 8)
    stop = tokens[3]
    assert decoder.generate_greedy(ids, 8, stop=[stop]) == tokens[: tokens.index(stop) + 1]


def test_calls_that_do_not_fit_are_refused(saved):
    decoder = load_checkpoint(saved("llama")[1], NONE, max_context=64).decoder
    one = torch.zeros(1, dtype=torch.int32)
    for start, count in ((64, 1), (-1, 1), (60, 5)):
        with pytest.raises(UsageError, match="context of 64"):
            decoder.forward_step(torch.zeros(count), start)
    with pytest.raises(UsageError, match="1 to 256 tokens"):
        decoder.forward_step(torch.zeros(257), 0)
    with pytest.raises(UsageError, match="1 to 256 tokens"):
        decoder.forward_step(one, 0, 2)
    for wrong in (257, -1):
        with pytest.raises(UsageError, match="0 to 256"):
            decoder.forward_step(one + wrong, 0)
    with pytest.raises(UsageError, match="no token"):
        decoder.prefill([])
    with pytest.raises(UsageError, match="0 draft layers"):
        decoder.draft(0, torch.zeros(1, 64), one, 0)


def test_a_context_shorter_than_the_longest_draft_step_compiles(flash, tmp_path):
    artifact = mc.compile(flash[0], db=tmp_path / "records.db", max_context=8)
    path = artifact.save(tmp_path / "short.mimo")
    decoder = mc.load(path).manifest.decoder
    assert decoder.steps == decoder.mtp_steps == (1, 4)
    found = verify_artifact(path, source=flash[0])
    assert found.ok and found.end_to_end.rows == 8  # no more than the context


def test_frequencies_of_scaled_rotations():
    plain = inverse_frequencies(LayerSpec(1, 1, 64, 64, rotary_dim=64))
    assert plain[0] == 1 and plain.shape == (32,)
    torch.testing.assert_close(plain[16].item(), 0.01)
    linear = {"type": "linear", "factor": 4.0}
    spec = LayerSpec(1, 1, 64, 64, rotary_dim=64, rope_scaling=linear)
    torch.testing.assert_close(inverse_frequencies(spec), plain / 4)
    llama3 = {"type": "llama3", "factor": 8.0, "low": 1.0, "high": 4.0, "original": 64}
    scaled = inverse_frequencies(LayerSpec(1, 1, 64, 64, rotary_dim=64, rope_scaling=llama3))
    waves = 64 * plain / (2 * math.pi)
    torch.testing.assert_close(scaled[waves > 4], plain[waves > 4])
    torch.testing.assert_close(scaled[waves < 1], plain[waves < 1] / 8)
    between = (waves > 1) & (waves < 4)
    assert between.any()
    assert torch.all((scaled < plain)[between] & (scaled > plain / 8)[between])


def test_the_built_in_model_is_itself():
    """The product's definition against the one that trained the model, which shares no code with it."""
    from mimo_compile.tiny.checkpoint import load

    folder = resolve_source("tiny")
    trained = load(folder)
    ids = torch.randint(0, 4096, (300,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        normed, hidden, _ = trained(ids[None])
        expected = trained.logits(normed)[0]
        drafts = [
            trained.logits(trained.draft(s, hidden[:, :200], ids[None, 1 + s : 201 + s]))[0]
            for s in range(len(trained.mtp))
        ]
    decoder = load_checkpoint(folder, NONE).decoder
    found_hidden, found = decoder.prefill(ids.tolist())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert len(drafts) == len(decoder.config.mtp) == 3
    for s, draft in enumerate(drafts):
        out = decoder.draft(s, found_hidden[:200], ids[1 + s : 201 + s], 0)
        torch.testing.assert_close(out, draft, rtol=1e-3, atol=1e-3)
