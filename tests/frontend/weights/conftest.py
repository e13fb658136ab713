"""A small Llama with random codes, and writers that place every bit with Python integers."""

import json
import struct
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import mimo_compile as mc
from mimo_compile.frontend.huggingface import load_checkpoint
from mimo_compile.ir.formats import parse_scheme

sys.path.insert(0, str(Path(__file__).parent))  # for gguf_blocks, which tests share

HIDDEN, FFN, HEADS, KV, VOCAB, LAYERS = 256, 512, 4, 2, 96, 2
CONFIG = {
    "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": FFN,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV,
    "vocab_size": VOCAB, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
WIDTH = HIDDEN // HEADS
IDS = [1, 7, 23, 90, 4, 55, 31, 8, 2, 64, 17]


def matrix_shapes():
    """Return name -> (N, K) of every matrix of the layers."""
    parts = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KV * WIDTH, HIDDEN),
        "self_attn.v_proj": (KV * WIDTH, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (FFN, HIDDEN), "mlp.up_proj": (FFN, HIDDEN), "mlp.down_proj": (HIDDEN, FFN),
    }  # fmt: skip
    return {f"model.layers.{i}.{p}.weight": s for i in range(LAYERS) for p, s in parts.items()}


def plain_tensors(rng):
    """Return the tensors that stay floats."""
    out = {
        "model.embed_tokens.weight": rng.standard_normal((VOCAB, HIDDEN)),
        "lm_head.weight": rng.standard_normal((VOCAB, HIDDEN)) / 16,
        "model.norm.weight": 1 + rng.standard_normal(HIDDEN) / 10,
    }
    for i in range(LAYERS):
        for part in ("input_layernorm", "post_attention_layernorm"):
            out[f"model.layers.{i}.{part}.weight"] = 1 + rng.standard_normal(HIDDEN) / 10
    return {name: torch.from_numpy(t.astype(np.float32)) for name, t in out.items()}


def halves(rng, shape, size):
    """Draw scales that float16 holds, of both signs where ``size`` is negative."""
    values = (rng.random(shape) + 0.5) * abs(size)
    if size < 0:
        values *= rng.choice([-1, 1], shape)
    return values.astype(np.float16).astype(np.float32)


def words_of(codes, bits):
    """Return the int32 words of a little-endian stream of codes."""
    stream = 0
    for i, code in enumerate(codes):
        stream |= int(code) << (bits * i)
    return [
        w - (1 << 32) if w >= 1 << 31 else w
        for w in ((stream >> (32 * i)) & 0xFFFFFFFF for i in range(len(codes) * bits // 32))
    ]


def write_folder(folder, tensors, **settings):
    """Write a folder with these tensors and this ``quantization_config``."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, "quantization_config": settings} if settings else CONFIG
    (folder / "config.json").write_text(json.dumps(config))
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    return folder


# -- GGUF ----------------------------------------------------------------------------------------

U32, F32, STRING, ARRAY = 4, 6, 8, 9


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def value_bytes(value):
    """Return type and bytes of a metadata value."""
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", U32, value)
    if isinstance(value, float):
        return struct.pack("<If", F32, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + text(value)
    if value and isinstance(value[0], str | bytes):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(text, value))
    kind, letter = (F32, "f") if isinstance(value[0], float) else (5, "i")
    head = struct.pack("<IIQ", ARRAY, kind, len(value))
    return head + struct.pack(f"<{len(value)}{letter}", *value)


def write_gguf(path, metadata, tensors, *, align=32, version=3):
    """Write a file; ``tensors``: name -> (shape outermost first, number of the type, bytes)."""
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, value in metadata.items():
        out += text(key) + value_bytes(value)
    at, data = 0, b""
    for name, (shape, kind, raw) in tensors.items():
        out += text(name) + struct.pack("<I", len(shape))
        out += struct.pack(f"<{len(shape)}Q", *reversed(shape)) + struct.pack("<IQ", kind, at)
        data += raw + b"\0" * (-len(raw) % align)
        at = len(data)
    out += b"\0" * (-len(out) % align)
    Path(path).write_bytes(out + data)
    return path


GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(name):
    stem, kind = name.removeprefix("model.layers.").rsplit(".", 1)
    if name.startswith("model.layers."):
        layer, _, part = stem.partition(".")
        return f"blk.{layer}.{GGUF_NAMES[part]}.{kind}"
    return f"{GGUF_NAMES[name.rsplit('.', 1)[0]]}.{kind}"


def gguf_metadata(**more):
    return {
        "general.architecture": "llama", "llama.context_length": 64,
        "llama.embedding_length": HIDDEN, "llama.block_count": LAYERS,
        "llama.feed_forward_length": FFN, "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV, "llama.rope.dimension_count": WIDTH,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 10000.0, **more,
    }  # fmt: skip


def paired_rows(rows, heads):
    """Reorder the rows of a matrix as writers of Llama do: ``i`` and ``i + d/2`` side by side."""
    d = len(rows) // heads
    order = [
        h * d + half * (d // 2) + i for h in range(heads) for i in range(d // 2) for half in (0, 1)
    ]
    return [rows[r] for r in order]


def floats_of(tensor):
    return (tuple(tensor.shape), 0, tensor.numpy().astype("<f4").tobytes())


# -- whole models --------------------------------------------------------------------------------


def logits(folder, quant="none"):
    """Return the eager logits of a checkpoint, and what it loaded as."""
    loaded = load_checkpoint(folder, parse_scheme(quant))
    return loaded.decoder.prefill(IDS)[1], loaded


def same_model(folder, real, plain, tmp_path, tolerance=0.0):
    """Compare a checkpoint with the floats that its codes stand for; returns what it loaded as."""
    twin = tmp_path / "twin"
    write_folder(twin, {**plain, **{n: torch.from_numpy(w) for n, w in real.items()}})
    found, loaded = logits(folder)
    if loaded.scheme.act == "8":  # activations as in training: compared without them
        module = "mimo_compile.frontend.huggingface"
        with patch(f"{module}._check_stored_formats", lambda _, __, quant: quant):
            found, _ = logits(folder)
    expected, _ = logits(twin)
    assert expected.std() > 0.05, "the reference must not be trivial"
    error = (found - expected).abs().max() / expected.abs().max()
    assert float(error) <= tolerance
    return loaded


def same_tokens(folder, tmp_path, quant, count=12):
    """Compile a checkpoint and compare greedy tokens with the eager decoder's."""
    decoder = load_checkpoint(folder, parse_scheme(quant)).decoder
    expected = decoder.generate_greedy(IDS, count, stop=())
    artifact = mc.compile(folder, quant=quant, db=tmp_path / "records.db", max_context=32)
    module = mc.load(artifact.save(tmp_path / "model.mimo"))
    assert list(module.generate_ids(IDS, count, stop_at_eos=False)) == expected
    return artifact


@pytest.fixture(scope="session")
def kit():
    """The helpers above, for test modules."""

    class Kit:
        pass

    for name, helper in list(globals().items()):
        if not name.startswith("_"):
            setattr(Kit, name, staticmethod(helper) if callable(helper) else helper)
    return Kit
