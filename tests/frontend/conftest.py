"""Checkpoints of every family with random weights, written by transformers."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for `from plain_attention import ...`
os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
}
FLASH = {
    **SMALL,
    "num_key_value_heads": 1,
    "num_hidden_layers": 4,
    "head_dim": 24,
    "v_head_dim": 16,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
    "layer_types": ["full_attention", *["sliding_attention"] * 2, "full_attention"],
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    "pad_token_id": None,
}
ROUTED = {"num_hidden_layers": 3, "num_experts_per_tok": 2, "pad_token_id": None}
SHARED = {
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES = {
    "llama": ("Llama", {**SMALL, "num_hidden_layers": 3, "rms_norm_eps": 1e-5}),
    "llama-tied-llama3": (
        "Llama",
        {**SMALL, "num_hidden_layers": 2, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
    ),
    "llama-linear-mha": (
        "Llama",
        {
            **SMALL,
            "num_hidden_layers": 2,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
        },
    ),
    "qwen2": ("Qwen2", {**SMALL, "num_hidden_layers": 3, "tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2",
        {
            **SMALL,
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 1,
        },
    ),
    "qwen3": ("Qwen3", {**SMALL, "num_hidden_layers": 3, "head_dim": 32}),
    "mixtral": ("Mixtral", {**SMALL, **ROUTED, "num_local_experts": 4}),
    "mixtral-window": ("Mixtral", {**SMALL, **ROUTED, "num_local_experts": 4, "sliding_window": 8}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            **SMALL,
            **ROUTED,
            "head_dim": 32,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3_moe-window": (
        "Qwen3Moe",
        {
            **SMALL,
            **ROUTED,
            "num_experts": 8,
            "moe_intermediate_size": 32,
            "decoder_sparse_step": 2,
            "use_sliding_window": True,
            "sliding_window": 8,
        },
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            **SMALL,
            **ROUTED,
            "num_experts": 8,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 80,
            "mlp_only_layers": [0],
        },
    ),
    "olmoe": ("Olmoe", {**SMALL, **ROUTED, "num_experts": 8, "num_experts_per_tok": 3}),
    "olmoe-clipped": (
        "Olmoe",
        {**SMALL, **ROUTED, "num_experts": 8, "norm_topk_prob": True, "clip_qkv": 0.8},
    ),
    "dots1": ("Dots1", {**SMALL, **ROUTED, **SHARED, "sliding_window": None}),
    "glm4_moe": (
        "Glm4Moe",
        {**SMALL, **ROUTED, **SHARED, "n_group": 1, "attention_bias": True, "use_qk_norm": True},
    ),
    "mimo_v2_flash": ("MiMoV2Flash", FLASH),
    "mimo_v2_flash-groups": (
        "MiMoV2Flash",
        {
            **FLASH,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
            "attention_bias": True,
        },
    ),
}


def randomise(model, seed=0):
    """Give every weight a spread that makes attention, sinks, biases and routing matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in name:
                continue
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("norm.weight"):
                value.copy_(1 + 0.2 * noise)
            elif value.dim() == 1:
                value.copy_((0.1 if "correction" in name else 0.5) * noise)
            elif "embed" in name:
                value.copy_(noise)
            else:
                value.copy_(noise * (1.5 / value.shape[-1] ** 0.5))
    return model.eval()


def make_model(case, **changes):
    """Build the transformers model of a case, eager attention, float32."""
    family, shape = CASES[case]
    config = getattr(transformers, f"{family}Config")(**{**shape, **changes})
    config._attn_implementation = "eager"
    model = randomise(getattr(transformers, f"{family}ForCausalLM")(config))
    if getattr(config, "tie_word_embeddings", False):
        model.tie_weights()
    return model


def logits_of(model, ids):
    """Return the float32 logits ``[T, V]`` of a whole prompt."""
    with torch.no_grad():
        return model(torch.tensor([list(ids)]), use_cache=False).logits[0].float()


def greedy(model, ids, count):
    """Continue a prompt by full forward passes (no cache of any kind)."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(logits_of(model, ids)[-1].argmax()))
    return ids[-count:]


def prompt(length, seed=1):
    """Return random token ids."""
    return torch.randint(0, 257, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def edit_json(path: Path, **changes):
    """Change fields of a JSON file; None removes one."""
    content = json.loads(path.read_text())
    for name, value in changes.items():
        if value is None:
            content.pop(name, None)
        else:
            content[name] = value
    path.write_text(json.dumps(content))
    return content


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny models: splitting their operations between threads only costs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tools():
    """The helpers above, for test modules."""

    class Tools:
        pass

    for helper in (make_model, logits_of, greedy, prompt, edit_json, randomise):
        setattr(Tools, helper.__name__, staticmethod(helper))
    return Tools


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Return a function: case -> (transformers model, its single-file folder), made once."""
    made = {}

    def get(case):
        if case not in made:
            folder = tmp_path_factory.mktemp(case)
            model = make_model(case)
            model.save_pretrained(folder)
            made[case] = model, folder
        return made[case]

    return get


@pytest.fixture(scope="session")
def windowed(saved, tmp_path_factory):
    """An artifact whose layers 1 and 2 see 8 positions, in rings of 272, for three sequences at a time."""
    import mimo_compile as mc

    db = tmp_path_factory.mktemp("windowed") / "records.db"
    return mc.compile(saved("qwen2-window")[1], db=db, max_context=320, threads=1, batch=3)
