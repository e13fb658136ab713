"""Damaged, incomplete and unsupported model folders: one clear line that names file, cause and remedy."""

import json
import os
import shutil
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mimo_compile.errors import InputError, MimoError, UsageError
from mimo_compile.frontend.huggingface import load_checkpoint, resolve_source
from mimo_compile.ir.formats import parse_scheme

pytestmark = pytest.mark.compile
NONE = parse_scheme("none")
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(saved, tmp_path):
    """A private copy of a good Llama folder."""
    shutil.copytree(saved("llama")[1], tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def flash(saved, tmp_path):
    """A private copy of a good MiMo-V2-Flash folder."""
    shutil.copytree(saved("mimo_v2_flash")[1], tmp_path / "flash")
    return tmp_path / "flash"


@pytest.fixture
def shards(saved, tmp_path):
    """A sharded Llama folder."""
    saved("llama")[0].save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    return tmp_path / "shards"


def refused(folder, match, **options):
    with pytest.raises(InputError, match=match) as caught:
        load_checkpoint(folder, options.pop("quant", NONE), **options)
    text = str(caught.value)
    assert "\n" not in text and caught.value.where, "one line that names the place"
    return text


def change_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_missing_pieces(folder, shards, tmp_path):
    refused(tmp_path / "nowhere", "no model folder")
    with pytest.raises(InputError, match="does not exist"):
        resolve_source(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is a file"):
        resolve_source(folder / "config.json")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "Save the model as safetensors" in refused(folder, r"no weights.*pytorch_model\.bin")
    (folder / "config.json").unlink()
    refused(folder, r"config\.json is missing")
    next(shards.glob("model-00002-*")).unlink()
    refused(shards, r"shard model-00002-of-\d+.safetensors is missing")


@pytest.mark.parametrize("keep", [0, 7, 100, 5000, -1])
def test_truncated_weights(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, "truncated")


def test_damaged_headers(folder, shards):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data + b"tail")
    refused(folder, "bytes after the data")
    path.write_bytes(struct.pack("<Q", 1 << 60) + data[8:])
    refused(folder, "truncated or no safetensors")
    path.write_bytes(data[:8] + b"x" + data[9:])
    refused(folder, "header of model.safetensors is damaged")
    for header in (b"[]", b'{"a":{"dtype":"F32"}}', b'{"a":3}'):
        path.write_bytes(struct.pack("<Q", len(header)) + header)
        refused(folder, "header of model.safetensors is damaged")
    index = shards / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    names = content["weight_map"]
    index.write_text(json.dumps({"weight_map": {**names, Q: "../evil.safetensors"}}))
    refused(shards, "outside the folder")
    index.write_text(json.dumps({"weight_map": {**names, "lm_head.weight": names[Q]}}))
    refused(shards, "tensor lm_head.weight is not in")
    index.write_text(json.dumps({"weight_map": {**names, Q: "x" * 300}}))
    refused(shards, "shard x+ is missing")
    index.write_text(json.dumps({"weight_map": [1]}))
    refused(shards, "no weight_map")


def test_hostile_json_is_refused(folder):
    path, config = folder / "model.safetensors", folder / "config.json"
    data, text = path.read_bytes(), config.read_text()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].decode()
    first = next(name for name in json.loads(header) if name != "__metadata__")
    shape = f'"shape":{json.dumps(json.loads(header)[first]["shape"], separators=(",", ":"))}'
    assert shape in header
    deep = '{"a":' * 100_000 + "1" + "}" * 100_000
    for bad in (
        deep,
        header.rstrip()[:-1] + f',"{first}":{json.dumps(json.loads(header)[first])}}}',
        header.replace(shape, '"shape":[1e400,4]'),
        header.replace(shape, f'"shape":[{"9" * 5000},4]'),
    ):
        path.write_bytes(struct.pack("<Q", len(bad)) + bad.encode() + data[8 + length :])
        refused(folder, "header of model.safetensors is damaged")
    path.write_bytes(data)
    for bad in (deep, text.replace("{", f'{{"a": {"9" * 5000}, ', 1)):
        config.write_text(bad)
        refused(folder, "not readable JSON")
    for name in ("num_hidden_layers", "vocab_size"):
        config.write_text(json.dumps({**json.loads(text), name: 10**12}))
        refused(folder, name if name == "num_hidden_layers" else "config.json says")
    config.write_text(json.dumps({**json.loads(text), "rope_scaling": {"rope_type": "odd"}}))
    refused(folder, "rope type 'odd' is not supported")  # though rope_parameters is good


@pytest.mark.parametrize("data", [b"{}", b"\xff\xfe", b"", b"[" * 100_000])
def test_damaged_tokenizers(folder, data):
    (folder / "tokenizer.json").write_bytes(data)
    refused(folder, r"tokenizer\.json cannot be read")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_pipes_are_not_waited_for(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refused(folder, "not a regular file")


@pytest.mark.fuzz
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(at=st.integers(0, 3000), value=st.integers(0, 255))
def test_any_flipped_header_byte_is_refused_or_harmless(saved, tmp_path, at, value):
    shutil.copytree(saved("llama")[1], tmp_path, dirs_exist_ok=True)
    path = tmp_path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[at] = value
    path.unlink()
    path.write_bytes(data)
    try:
        loaded = load_checkpoint(tmp_path, NONE)
    except InputError as error:
        assert "\n" not in str(error)
        return
    assert loaded.report.unused == ()


def test_tensors_that_do_not_fit_the_configuration(folder, tools):
    good = load_file(folder / "model.safetensors")
    change_tensors(folder, lambda t: t.pop(Q))
    refused(folder, rf"tensor {Q} is missing")
    change_tensors(folder, lambda t: [t.pop(n) for n in list(t) if "layers.2" in n])
    refused(folder, r"and 7 more are missing")
    save_file({**good, Q: good[Q][:32].contiguous()}, folder / "model.safetensors")
    refused(folder, rf"{Q} has shape \[32, 64\], config.json says \[64, 64\]")
    save_file({**good, "model.layers.0.mlp.extra": torch.ones(2)}, folder / "model.safetensors")
    refused(folder, "does not have: model.layers.0.mlp.extra")
    save_file({**good, Q: good[Q].to(torch.int32)}, folder / "model.safetensors")
    assert "convert" in refused(folder, rf"{Q} is stored as I32")
    save_file(good, folder / "model.safetensors")
    tools.edit_json(folder / "config.json", num_hidden_layers=2)
    refused(folder, "does not have: model.layers.2")


def test_nan_weights_are_found_by_quantisation(folder):
    change_tensors(folder, lambda t: t[Q].view(-1)[7].fill_(float("nan")))
    with pytest.raises(MimoError, match=f"{Q} holds NaN"):
        load_checkpoint(folder, parse_scheme("w4g64"))


ORIGINAL = "original_max_position_embeddings"
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    ORIGINAL: 64,
}
LLAMA_FIELDS = [
    (
        {"model_type": "mamba"},
        r"unknown architecture: model_type='mamba'.*Known: llama, qwen2, qwen3",
    ),
    ({"model_type": None}, "unknown architecture"),
    ({"attention_bias": True}, "attention_bias=True is not supported"),
    ({"mlp_bias": True}, "mlp_bias=True is not supported"),
    ({"hidden_act": "gelu"}, r"hidden_act='gelu' is not supported.*silu"),
    ({"hidden_size": None}, "hidden_size is missing"),
    ({"hidden_size": "64"}, "hidden_size must be an integer"),
    ({"num_hidden_layers": 0}, "at least 1"),
    ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads=3"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps must be a positive number"),
    ({"tie_word_embeddings": "no"}, "must be true or false"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, r"'yarn' is not supported.*llama3"),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor is missing"),
    ({"rope_parameters": 3}, "must be an object"),
    ({"rope_parameters": {"partial_rotary_factor": 0.35, "rope_theta": 1e4}}, "rotates"),
    ({"rope_scaling": {"factor": 4.0}}, "factor and no rope_type"),
    ({"rope_scaling": {"rope_type": "default", "type": "yarn"}}, "two kinds of rotary scaling"),
    (
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6, "rope_type": "default"}}},
        "settings of its own for full_attention, which are not read",
    ),
    ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "must be less than high_freq_factor"),
    ({"rope_scaling": {**LLAMA3, ORIGINAL: 10**400}}, f"{ORIGINAL}=10+ is beyond"),
    ({"layer_types": ["sliding_attention"] * 3}, "sliding windows, which no llama model has"),
    ({"use_sliding_window": True}, "use_sliding_window=True is not supported"),
    ({"bos_token_id": "x"}, "bos_token_id must be a token of 0 to 256 or null, found 'x'"),
    ({"bos_token_id": [1]}, "bos_token_id must be"),
    ({"bos_token_id": 257}, "bos_token_id must be"),
    ({"bos_token_id": True}, "bos_token_id must be"),
    ({"eos_token_id": True}, "eos_token_id must be"),
    ({"eos_token_id": [2, 257]}, "eos_token_id must be"),
    ({"eos_token_id": "end"}, "eos_token_id must be"),
    ({"quantization_config": {"quant_method": "gptq"}}, r"quantised \(gptq\), but no.*\.qweight"),
    ({"quantization_config": {"quant_method": "hqq"}}, r"already quantised.*hqq.*bfloat16"),
]


@pytest.mark.parametrize(("change", "match"), LLAMA_FIELDS)
def test_configurations_that_are_wrong_or_not_supported(folder, tools, change, match):
    tools.edit_json(folder / "config.json", **change)
    assert "config.json" in refused(folder, match)


FLASH_FIELDS = [
    ({"quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}}, r"\(fp8\), but no"),
    ({"layer_types": ["full_attention"] * 3}, "layer_types must list one entry for each of 4"),
    ({"layer_types": ["linear"] * 4}, r"layer_types holds 'linear'"),
    ({"layer_types": None}, "neither hybrid_layer_pattern nor layer_types"),
    ({"mlp_layer_types": None}, "mlp_layer_types is missing"),
    ({"topk_method": "greedy"}, r"topk_method='greedy' is not supported.*noaux_tc"),
    ({"n_shared_experts": 1}, "n_shared_experts=1 is not supported"),
    ({"attention_projection_layout": "fused_qkv"}, "fused_qkv.*not supported"),
    ({"num_experts_per_tok": 9}, "9 of 8 experts cannot be chosen"),
    ({"n_group": 3}, "cannot be chosen"),
    ({"num_key_value_heads": 3}, "no multiple of"),
    (
        {"hybrid_layer_pattern": [0, 1, 1], "moe_layer_freq": [0, 1, 1, 1]},
        "each of 4 layers, found 3",
    ),
]


@pytest.mark.parametrize(("change", "match"), FLASH_FIELDS)
def test_flash_configurations(flash, tools, change, match):
    tools.edit_json(flash / "config.json", **change)
    refused(flash, match)


def test_flash_tensors(flash):
    change_tensors(flash, lambda t: t.pop("model.layers.1.self_attn.attention_sink_bias"))
    refused(flash, r"layers\.1\.self_attn\.attention_sink_bias is missing")
    change_tensors(
        flash,
        lambda t: t.update(
            {
                "model.layers.1.self_attn.attention_sink_bias": torch.zeros(4),
                "model.layers.3.self_attn.attention_sink_bias": torch.zeros(4),
            }
        ),
    )
    refused(flash, "does not have: model.layers.3.self_attn.attention_sink_bias")
    change_tensors(flash, lambda t: t.pop("model.layers.3.self_attn.attention_sink_bias"))
    load_checkpoint(flash, NONE)
    change_tensors(flash, lambda t: t.update({"model.mtp.layers.1.enorm.weight": torch.ones(64)}))
    refused(flash, r"draft layers \[1\] are not numbered from 0")


def test_window_given_twice(flash, tools):
    content = tools.edit_json(flash / "config.json", layer_types=None)
    tools.edit_json(
        flash / "config.json",
        hybrid_layer_pattern=[0, 1, 1, 0],
        moe_layer_freq=[0, 1, 1, 1],
        rope_theta=5e6,
        partial_rotary_factor=0.334,
        swa_rope_theta=1e4,
        swa_num_key_value_heads=2,
        swa_head_dim=24,
        swa_v_head_dim=16,
        sliding_window_size=content["sliding_window"] + 1,
        rope_parameters=None,
    )
    refused(flash, "the window is not given once")


def test_json_that_is_none(folder):
    (folder / "config.json").write_text("[1]")
    refused(folder, "must hold a JSON object")
    (folder / "config.json").write_bytes(b'{"a": "\xff"}')
    refused(folder, "not readable JSON")
    (folder / "config.json").write_text("{")
    refused(folder, "not readable JSON")


def test_wrong_calls(folder):
    for size in (0, 513):
        with pytest.raises(UsageError, match="not between 1 and the model's 512"):
            load_checkpoint(folder, NONE, max_context=size)
    with pytest.raises(UsageError, match="trained with complex"):
        load_checkpoint(folder, parse_scheme("complex2"))


def test_generation_settings_and_tokenizer(folder, tools):
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [2, 5], "temperature": 0.6, "top_k": None, "do_sample": True})
    )
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE()).save(str(folder / "tokenizer.json"))
    loaded = load_checkpoint(folder, NONE)
    assert loaded.decoder.config.eos == (2, 5)
    assert loaded.generation == {"do_sample": True, "temperature": 0.6}
    assert loaded.tokenizer == (folder / "tokenizer.json").read_bytes()
    (folder / "generation_config.json").write_text('{"eos_token_id": "x"}')
    refused(folder, "eos_token_id must be")
