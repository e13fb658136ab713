"""Small random checkpoints in the published layouts, written tensor by tensor, and plans of one."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mimo_compile.ir.hardware import local_cpu
from mimo_compile.pipeline.plans import problem_of_model
from mimo_compile.pipeline.source import open_source
from mimo_compile.search.database import Database
from mimo_compile.search.space import JointSpace

sys.path.insert(0, str(Path(__file__).parent))

from planned import records_of

HIDDEN, FFN, VOCAB, HEADS, KV, HEAD = 64, 96, 211, 4, 2, 32


def write_llama(folder: Path, layers: int = 2, seed: int = 0) -> Path:
    """Write a Llama folder with random float32 weights."""
    torch.manual_seed(seed)

    def matrix(n: int, k: int) -> torch.Tensor:
        return torch.randn(n, k) * k**-0.5

    tensors = {
        "model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN) * 0.1,
        "model.norm.weight": 1 + 0.1 * torch.randn(HIDDEN),
        "lm_head.weight": matrix(VOCAB, HIDDEN) * 4,
    }
    for i in range(layers):
        base = f"model.layers.{i}"
        tensors |= {
            f"{base}.input_layernorm.weight": 1 + 0.1 * torch.randn(HIDDEN),
            f"{base}.post_attention_layernorm.weight": 1 + 0.1 * torch.randn(HIDDEN),
            f"{base}.self_attn.q_proj.weight": matrix(HEADS * HEAD, HIDDEN),
            f"{base}.self_attn.k_proj.weight": matrix(KV * HEAD, HIDDEN),
            f"{base}.self_attn.v_proj.weight": matrix(KV * HEAD, HIDDEN),
            f"{base}.self_attn.o_proj.weight": matrix(HIDDEN, HEADS * HEAD),
            f"{base}.mlp.gate_proj.weight": matrix(FFN, HIDDEN),
            f"{base}.mlp.up_proj.weight": matrix(FFN, HIDDEN),
            f"{base}.mlp.down_proj.weight": matrix(HIDDEN, FFN),
        }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": FFN, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "num_key_value_heads": KV, "head_dim": HEAD, "vocab_size": VOCAB, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256, "rope_theta": 10000.0, "tie_word_embeddings": False,
        "hidden_act": "silu",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama checkpoint."""
    return write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def model(llama_folder: Path):
    """Its graphs, of few positions."""
    return open_source(str(llama_folder), quant="w4g32a8", max_context=4).graphs


@pytest.fixture
def two_plans(model, tmp_path: Path):
    """A workload of the model, and a database by which its fastest and its frugal kernel differ."""
    workload = next(w for w in problem_of_model(model, local_cpu()).calls if w.op == "mpgemm")
    space = JointSpace(workload, local_cpu())
    first = space.defaults()[0]
    second = next(
        c for c in space if c.schedule == first.schedule and c != first
    )  # every kernel of a format reads the same packed weights
    with Database(tmp_path / "r.db") as db:
        db.add(*records_of(workload, first, second))
        yield workload, second, db
