"""Every family against transformers: logits and greedy tokens of random checkpoints."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mimo_compile.frontend.huggingface import load_checkpoint
from mimo_compile.ir.formats import parse_scheme

pytestmark = pytest.mark.compile
NONE = parse_scheme("none")
ALL = (
    "llama", "llama-tied-llama3", "llama-linear-mha", "qwen2", "qwen2-window", "qwen3",
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe-clipped", "dots1", "mimo_v2_flash", "mimo_v2_flash-groups",
)  # fmt: skip
MORE = ("mixtral-window", "qwen3_moe-window", "olmoe", "glm4_moe")


def relative(found, expected):
    assert expected.std() > 0.1, "the reference must not be trivial"
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("case", [*ALL, *(pytest.param(c, marks=pytest.mark.slow) for c in MORE)])
def test_logits_and_greedy_tokens_equal_transformers(case, saved, tools):
    model, folder = saved(case)
    decoder = load_checkpoint(folder, NONE).decoder
    ids = tools.prompt(90)
    assert relative(decoder.prefill(ids)[1], tools.logits_of(model, ids)) < 1e-4
    start = ids[:21]
    assert decoder.generate_greedy(start, 32) == tools.greedy(model, start, 32)


@pytest.mark.parametrize("case", ["llama-tied-llama3", "qwen3", "mimo_v2_flash"])
def test_shards_equal_the_single_file(case, saved, tools, tmp_path):
    model, folder = saved(case)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    ids = tools.prompt(40)
    whole, shards = (load_checkpoint(f, NONE).decoder.prefill(ids)[1] for f in (folder, tmp_path))
    assert torch.equal(whole, shards)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_are_widened_exactly(dtype, tools, tmp_path):
    tools.make_model("mimo_v2_flash").to(dtype).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    loaded = load_checkpoint(tmp_path, NONE)
    ids = tools.prompt(40)
    assert relative(loaded.decoder.prefill(ids)[1], tools.logits_of(model, ids)) < 1e-4
    assert loaded.decoder.config.dtype == ("bf16" if dtype == torch.bfloat16 else "f32")
    assert loaded.report.dtypes[{torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]] > 100_000


def published(folder, target, **changes):
    """Rewrite a transformers config of MiMo-V2-Flash in the published dialect."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    c = json.loads((target / "config.json").read_text())
    hub = {
        "model_type": "mimo_v2_flash",
        "hybrid_layer_pattern": [int(t == "sliding_attention") for t in c["layer_types"]],
        "moe_layer_freq": [int(t == "sparse") for t in c["mlp_layer_types"]],
        "swa_num_attention_heads": c["num_attention_heads"],
        "swa_num_key_value_heads": 2 * c["num_key_value_heads"],
        "swa_head_dim": c["head_dim"],
        "swa_v_head_dim": c["v_head_dim"],
        "rope_theta": c["rope_parameters"]["full_attention"]["rope_theta"],
        "swa_rope_theta": c["rope_parameters"]["sliding_attention"]["rope_theta"],
        "partial_rotary_factor": c["rope_parameters"]["full_attention"]["partial_rotary_factor"],
        "rope_scaling": None,
        "layernorm_epsilon": c["rms_norm_eps"],
        "sliding_window_size": c["sliding_window"],
        "attention_chunk_size": c["sliding_window"],
        "add_full_attention_sink_bias": False,
        "add_swa_attention_sink_bias": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "n_shared_experts": None,
        "routed_scaling_factor": None,
    }
    dropped = (
        "layer_types", "mlp_layer_types", "rope_parameters", "rms_norm_eps", "model_type",
        "routed_scaling_factor",
    )  # fmt: skip
    kept = {k: v for k, v in c.items() if k not in dropped}
    (target / "config.json").write_text(json.dumps({**kept, **hub, **changes}))
    return target


def test_both_dialects_of_mimo_v2_flash_are_one_model(saved, tools, tmp_path):
    model, folder = saved("mimo_v2_flash")
    native = load_checkpoint(folder, NONE).decoder
    hub = load_checkpoint(published(folder, tmp_path), NONE).decoder
    assert hub.config == native.config
    ids = tools.prompt(60)
    assert relative(hub.prefill(ids)[1], tools.logits_of(model, ids)) < 1e-4


def test_names_of_transformers_own_modules_are_read(saved, tools, tmp_path):
    model, folder = saved("mimo_v2_flash")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    own = {k: v.contiguous() for k, v in model.state_dict().items()}
    assert any(k.endswith("experts.gate_up_proj") for k in own)
    assert any(k.endswith("self_attn.sinks") for k in own)
    save_file(own, tmp_path / "model.safetensors")
    ids = tools.prompt(40)
    for scheme in ("none", "w4g64", "w1.58"):
        a, b = (
            load_checkpoint(f, parse_scheme(scheme)).decoder.prefill(ids)[1]
            for f in (folder, tmp_path)
        )
        assert torch.equal(a, b)


def test_old_spelling_of_rotary_settings(saved, tools, tmp_path):
    model, folder = saved("llama-tied-llama3")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    content = tools.edit_json(tmp_path / "config.json")
    scaling = content["rope_parameters"]
    theta = scaling.pop("rope_theta")
    tools.edit_json(
        tmp_path / "config.json", rope_parameters=None, rope_theta=theta, rope_scaling=scaling
    )
    loaded, native = (load_checkpoint(f, NONE).decoder for f in (tmp_path, folder))
    assert loaded.config == native.config
    ids = tools.prompt(90)
    assert relative(loaded.prefill(ids)[1], tools.logits_of(model, ids)) < 1e-4


def test_old_spelling_of_sliding_windows(saved, tools, tmp_path):
    _, folder = saved("qwen2-window")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tools.edit_json(tmp_path / "config.json", layer_types=None)
    old, new = (load_checkpoint(f, NONE).decoder.config for f in (tmp_path, folder))
    assert [layer.window for layer in new.layers] == [0, 8, 8] and old == new
    tools.edit_json(tmp_path / "config.json", use_sliding_window=False)
    assert not any(layer.window for layer in load_checkpoint(tmp_path, NONE).decoder.config.layers)


def test_tied_copy_in_the_file_is_left_out(saved, tools, tmp_path):
    _, folder = saved("qwen2")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.zeros_like(tensors["model.embed_tokens.weight"])
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = load_checkpoint(tmp_path, NONE)
    assert set(loaded.report.unused) == {
        "lm_head.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
    }
    ids = tools.prompt(20)
    expected = load_checkpoint(folder, NONE).decoder.prefill(ids)[1]
    assert torch.equal(loaded.decoder.prefill(ids)[1], expected)
