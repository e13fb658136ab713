"""Reading and writing the built-in model as a Hugging Face folder of a MiMo-V2-Flash model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mimo_compile.tiny.corpus import END_OF_TEXT
from mimo_compile.tiny.quantised import StraightThrough
from mimo_compile.tiny.training_config import TinyConfig, read_config
from mimo_compile.tiny.training_model import TinyModel

_EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj")
_KEPT_IN_F32 = ("mlp.gate.weight", "e_score_correction_bias")


def to_tensors(model: TinyModel) -> dict[str, Tensor]:
    """The model's tensors under the published names: bf16, the routers in f32."""
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if name == "embed_tokens":
            tensors["model.embed_tokens.weight"] = value
        elif name.endswith("mlp.router"):
            tensors["model." + name.replace("mlp.router", "mlp.gate.weight")] = value
        elif name.endswith("e_score_correction_bias"):
            tensors["model." + name.replace("mlp.", "mlp.gate.")] = value
        elif name.startswith("mtp."):
            tensors["model.mtp.layers." + name.removeprefix("mtp.")] = value
        elif value.ndim == 3:
            stem, part = name.rsplit(".", 1)
            for i, expert in enumerate(value):
                tensors[f"model.{stem}.experts.{i}.{part}.weight"] = expert
        else:
            tensors["model." + name] = value
    return {
        name: value.detach()
        .to(torch.float32 if name.endswith(_KEPT_IN_F32) else torch.bfloat16)
        .contiguous()
        .clone()
        for name, value in sorted(tensors.items())
    }


def from_tensors(model: TinyModel, tensors: dict[str, Tensor]) -> None:
    """Fill `model` from tensors under the published names; raises KeyError on a missing one."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name == "embed_tokens":
                source = tensors["model.embed_tokens.weight"]
            elif name.endswith("mlp.router"):
                source = tensors["model." + name.replace("mlp.router", "mlp.gate.weight")]
            elif name.endswith("e_score_correction_bias"):
                source = tensors["model." + name.replace("mlp.", "mlp.gate.")]
            elif name.startswith("mtp."):
                source = tensors["model.mtp.layers." + name.removeprefix("mtp.")]
            elif value.ndim == 3:
                stem, part = name.rsplit(".", 1)
                source = torch.stack(
                    [
                        tensors[f"model.{stem}.experts.{i}.{part}.weight"]
                        for i in range(value.shape[0])
                    ]
                )
            else:
                source = tensors["model." + name]
            value.copy_(source)


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def export(
    model: TinyModel,
    tokenizer_json: str,
    folder: Path,
    through: StraightThrough | None = None,
    fields: Mapping[str, Any] | None = None,
) -> None:
    """Write config, weights and tokenizer into `folder`, replacing what is there.

    With `through`, the matrices that were trained through a quantiser are stored as its codes. `fields` of
    `config.json` go beside those of the shape, or in their place.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config, tensors = model.config.to_json() | dict(fields or {}), to_tensors(model)
    if through is not None:
        packed, config["quantization_config"] = through.packed()
        for stack in through.stacks:
            for name in stack.names:
                del tensors[f"{name}.weight"]
        tensors |= {name: tensor.contiguous() for name, tensor in packed.items()}
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "generation_config.json",
        {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "do_sample": False},
    )
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "pad_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
            "model_max_length": model.config.max_position_embeddings,
        },
    )
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    part = folder / "model.safetensors.part"
    save_file(tensors, part, metadata={"format": "pt"})
    part.chmod(0o644)
    part.replace(folder / "model.safetensors")


def load(folder: Path, compute: torch.dtype = torch.float32) -> TinyModel:
    """Load the folder's model; weights as stored, computing in `compute`."""
    tensors = load_file(folder / "model.safetensors")
    prefix = "model.mtp.layers."
    heads = {name[len(prefix) :].split(".")[0] for name in tensors if name.startswith(prefix)}
    config: TinyConfig = read_config(folder, mtp_layers=len(heads))
    model = TinyModel(config, compute)
    from_tensors(model, tensors)
    return model
