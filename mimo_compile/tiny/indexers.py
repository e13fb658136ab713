"""DSA's indexers for the built-in model's global layers, distilled from the frozen model.

An indexer scores single tokens for all heads of a layer. Its target, as in the first stage of
DeepSeek-V3.2's training, is the model's own attention: probabilities summed over the heads, normalised
over the keys. The loss is the Kullback-Leibler divergence from target to the softmax of the scores. The
second stage, in which the model itself learns to live with its lists, is left out: its weights stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mimo_compile.ir.ops.kv_append import rotate
from mimo_compile.ir.ops.score_blocks import block_scores
from mimo_compile.tiny.gates import Chooser, Observed, exact_weights
from mimo_compile.tiny.training_config import TinyConfig
from mimo_compile.tiny.training_model import TinyModel, rotary_tables

EPS = 1e-6
"""Of the norm of keys."""
_MATRICES = ("wq", "wk", "weights_proj")
_NORM = ("weight", "bias")


@dataclass(frozen=True, slots=True)
class IndexerShape:
    """Shape of all indexers of a model."""

    heads: int = 4
    width: int = 64
    """Of a head; no less than the dims that the layer rotates."""


class Indexer(Chooser):
    """The indexer of one layer; it reads what attention reads."""

    block = 1

    def __init__(self, config: TinyConfig, shape: IndexerShape) -> None:
        super().__init__()
        hidden, heads, width = config.hidden_size, shape.heads, shape.width
        self.shape, self.config = shape, config
        self.wq = nn.Parameter(torch.empty(heads * width, hidden))
        self.wk = nn.Parameter(torch.empty(width, hidden))
        self.weights_proj = nn.Parameter(torch.empty(heads, hidden))
        self.k_norm = nn.LayerNorm(width, EPS)

    def scores(self, y: Tensor, rows: range) -> Tensor:
        """y: [tokens, hidden], normed → scores of the tokens `rows`: [rows, 1, keys up to the last row]."""
        end, shape = rows.stop, self.shape
        dims = self.config.rotary_dims(self.config.head_dim)
        table = torch.stack(rotary_tables(end, dims, self.config.rope_theta), 1)
        y, own = y[:end], y[rows.start : end]
        keys = rotate(self.k_norm(F.linear(y, self.wk))[:, None], table)
        q = F.linear(own, self.wq).unflatten(1, (shape.heads, shape.width))
        weight = F.linear(own, self.weights_proj) * (shape.heads * shape.width) ** -0.5
        pos = torch.tensor([rows.start, len(rows)], dtype=torch.int32)
        return block_scores(
            rotate(q, table[rows.start :]), keys[:, :, None], weight, pos, "indexer", "sum", False,
            1, 1, end, 1, 1, 1.0,
        )  # fmt: skip

    def told(self, seen: Observed, rows: range, soft: bool) -> Tensor:
        """See `Chooser`."""
        scores = self.scores(seen.y, rows)
        return torch.softmax(scores, -1) if soft else scores

    def wanted(self, seen: Observed, rope: tuple[Tensor, Tensor], rows: range) -> Tensor:
        """See `Chooser`."""
        return exact_weights(seen, rope, rows).mean(1, keepdim=True)


def new_indexers(model: TinyModel, shape: IndexerShape, seed: int) -> dict[int, Indexer]:
    """Untrained indexers of the model's global layers, by layer."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for i, windowed in enumerate(model.config.hybrid_layer_pattern):
        if windowed:
            continue
        indexer = made[i] = Indexer(model.config, shape)
        with torch.no_grad():
            for part in _MATRICES:
                matrix = getattr(indexer, part)
                matrix.normal_(0.0, matrix.shape[1] ** -0.5, generator=generator)
    return made


def save_indexers(indexers: dict[int, Indexer], path: Path, base: str) -> None:
    """Write indexers, matrices as bf16, with the name of the model that they belong to."""
    tensors = {}
    for i, indexer in indexers.items():
        prefix = f"model.layers.{i}.self_attn.indexer."
        for part in _MATRICES:
            matrix = getattr(indexer, part).detach()
            tensors[f"{prefix}{part}.weight"] = matrix.bfloat16().contiguous()
        for part in _NORM:
            tensors[f"{prefix}k_norm.{part}"] = getattr(indexer.k_norm, part).detach().clone()
    part_file = path.with_suffix(".part")
    save_file(tensors, part_file, metadata={"format": "pt", "base": base})
    part_file.replace(path)


def load_indexers(config: TinyConfig, path: Path) -> dict[int, Indexer]:
    """Read indexers that `save_indexers` wrote, by layer."""
    tensors = load_file(path)
    found: dict[int, Indexer] = {}
    for name, value in tensors.items():
        _, _, layer, _, _, part, kind = name.split(".")
        if int(layer) not in found:
            prefix = f"model.layers.{layer}.self_attn.indexer."
            extents = (len(tensors[f"{prefix}{p}.weight"]) for p in ("weights_proj", "wk"))
            found[int(layer)] = Indexer(config, IndexerShape(*extents))
        own = getattr(found[int(layer)], part)
        with torch.no_grad():
            (getattr(own, kind) if part == "k_norm" else own).copy_(value)
    return found
