"""SeerAttention-R's gates for the built-in model's global layers, distilled from the frozen model.

A gate predicts how much attention each block of keys gets. Its target is the model's own: the
largest exact probability in each block, maximum over the heads of a group, normalised over blocks.
The loss is the Kullback-Leibler divergence from target to gate. Queries and keys are those before
rotation (`mimo_compile/ir/ops/seer_gates.py` holds the mathematics that kernels are checked with);
a block that is not complete yet has the logit 0, as where the gates are used.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mimo_compile.ir.ops.score_blocks import block_scores
from mimo_compile.ir.ops.score_keys import block_max, bring_together, dots
from mimo_compile.ir.ops.seer_gates import gate_keys, gate_queries
from mimo_compile.tiny.training_config import TinyConfig
from mimo_compile.tiny.training_model import Layer, TinyModel, rotary_tables, rotate

_PARTS = ("attngate_linear_q", "attngate_linear_k", "attngate_qnorm", "attngate_knorm")


@dataclass(frozen=True, slots=True)
class GateShape:
    """Shape of all gates of a model."""

    block: int = 32
    """Tokens of a block."""
    width: int = 64
    """Of a gate's query and key."""


@dataclass(frozen=True, slots=True)
class Observed:
    """What one layer's attention starts from, before rotation, f32.

    q: queries [tokens, heads, dim]; k: keys [tokens, kv, dim]; y: its input [tokens, hidden], normed.
    """

    q: Tensor
    k: Tensor
    y: Tensor


class Chooser(nn.Module, ABC):
    """What is distilled from one layer to choose for it: scores of blocks, and what they should say."""

    block: int
    """Tokens of a block."""

    @abstractmethod
    def told(self, seen: Observed, rows: range, soft: bool) -> Tensor:
        """Scores [rows, heads of scores, blocks up to the last row's] (soft: their softmax over blocks)."""

    @abstractmethod
    def wanted(self, seen: Observed, rope: tuple[Tensor, Tensor], rows: range) -> Tensor:
        """The target, of the same shape: sums of 1. rope: tables [tokens, rotary / 2] of the layer."""


class Gate(Chooser):
    """The gate of one layer: a projection of each group's queries and of each block's pooled keys."""

    def __init__(self, config: TinyConfig, shape: GateShape) -> None:
        super().__init__()
        kv, d = config.num_key_value_heads, config.head_dim
        group = config.num_attention_heads // kv
        self.shape, self.config, self.block = shape, config, shape.block
        self.attngate_linear_q = nn.Parameter(torch.empty(kv, group * d, shape.width))
        self.attngate_linear_k = nn.Parameter(torch.empty(kv, 3 * d, shape.width))
        self.attngate_qnorm = nn.Parameter(torch.ones(shape.width))
        self.attngate_knorm = nn.Parameter(torch.ones(shape.width))

    def table(self, positions: int) -> Tensor:
        """Cosines and sines [positions, 2, rotary / 2] of the layer's own rotation."""
        dims = self.config.rotary_dims(self.shape.width)
        return torch.stack(rotary_tables(positions, dims, self.config.rope_theta), 1)

    def queries(self, q: Tensor, start: int) -> Tensor:
        """q: [tokens, heads, dim], not rotated, from position `start` on → [tokens, kv, width]."""
        table = self.table(start + q.shape[0])[start:]
        return gate_queries(q, self.attngate_linear_q, self.attngate_qnorm, table)

    def keys(self, k: Tensor) -> Tensor:
        """k: [tokens, kv, dim], not rotated → [complete blocks, kv, width], at their first token."""
        block = self.shape.block
        count = k.shape[0] // block
        blocks = k[: count * block].unflatten(0, (count, block))
        pools = torch.stack([blocks.amax(1), blocks.amin(1), blocks.mean(1)], 2)
        table = self.table(max(1, count * block))[::block][:count]
        return gate_keys(pools, self.attngate_linear_k, self.attngate_knorm, table)

    def scores(self, q: Tensor, keys: Tensor, start: int, soft: bool) -> Tensor:
        """Scores [tokens, kv, blocks] of blocks up to each token's own; see the op `score_blocks`."""
        blocks = -(-(start + q.shape[0]) // self.shape.block)
        keys = keys[:blocks]
        missing = blocks - keys.shape[0]
        desc = torch.cat([keys, keys.new_zeros(missing, *keys.shape[1:])])[:, :, None]
        pos = torch.tensor([start, q.shape[0]], dtype=torch.int32)
        size = self.shape.block
        return block_scores(
            self.queries(q, start), desc, None, pos, "gate", "none", soft, size, 1, blocks, size,
            size, self.shape.width**-0.5,
        )  # fmt: skip

    def told(self, seen: Observed, rows: range, soft: bool) -> Tensor:
        """See `Chooser`."""
        return self.scores(seen.q[rows.start : rows.stop], self.keys(seen.k), rows.start, soft)

    def wanted(self, seen: Observed, rope: tuple[Tensor, Tensor], rows: range) -> Tensor:
        """See `Chooser`."""
        return target(seen, rope, rows, self.block)


def new_gates(model: TinyModel, shape: GateShape, seed: int) -> dict[int, Gate]:
    """Untrained gates of the model's global layers, by layer."""
    generator = torch.Generator().manual_seed(seed)
    gates = {}
    for i, windowed in enumerate(model.config.hybrid_layer_pattern):
        if windowed:
            continue
        gate = gates[i] = Gate(model.config, shape)
        with torch.no_grad():
            for matrix in (gate.attngate_linear_q, gate.attngate_linear_k):
                matrix.normal_(0.0, matrix.shape[1] ** -0.5, generator=generator)
    return gates


@torch.no_grad()
def observe(model: TinyModel, ids: Tensor, layers: Iterable[int]) -> dict[int, Observed]:
    """Run the model densely on ids [tokens]; return what the layers' attention starts from, f32."""
    wanted, found = set(layers), {}
    time = ids.shape[0]
    x = nn.functional.embedding(ids[None], model.embed_tokens).to(model.compute)
    for i, layer in enumerate(model.layers):
        assert isinstance(layer, Layer)
        if i in wanted:
            y = layer.input_layernorm(x)
            q, k = (z[0].transpose(0, 1).float() for z in layer.self_attn.project(y)[:2])
            found[i] = Observed(q, k, y[0].float())
        x, _ = layer(x, model.rope(time, layer.windowed))
    return found


@torch.no_grad()
def target(seen: Observed, rope: tuple[Tensor, Tensor], rows: range, block: int) -> Tensor:
    """What a gate should say of the tokens `rows`: [tokens, kv, blocks], sums of 1.

    rope: tables [all tokens, rotary / 2] of the layer.
    """
    best = block_max(exact_weights(seen, rope, rows), block)
    best = bring_together(best, seen.k.shape[1], "max")
    return best / best.sum(-1, keepdim=True)


@torch.no_grad()
def exact_weights(seen: Observed, rope: tuple[Tensor, Tensor], rows: range) -> Tensor:
    """The layer's own attention of the tokens `rows`: [tokens, heads, keys up to the last row]."""
    q, k = (rotate(x.transpose(0, 1), *rope).transpose(0, 1) for x in (seen.q, seen.k))
    end = rows.stop
    logits = dots(q[rows.start : end], k[:end]) * q.shape[-1] ** -0.5
    later = torch.arange(end)[None] > torch.arange(rows.start, end)[:, None]
    return torch.softmax(logits.masked_fill(later[:, None], -torch.inf), -1)


def divergence(gate: Chooser, seen: Observed, rope: tuple[Tensor, Tensor], rows: range) -> Tensor:
    """Mean Kullback-Leibler divergence (nats) of a gate from its target over the tokens `rows`."""
    wanted, scored = gate.wanted(seen, rope, rows), gate.told(seen, rows, soft=True)
    told = torch.log(scored.clamp(min=1e-30))
    return (torch.xlogy(wanted, wanted) - wanted * told).sum(-1).mean()


@torch.no_grad()
def coverage(
    gate: Chooser, seen: Observed, rope: tuple[Tensor, Tensor], rows: range, count: int
) -> tuple[float, float]:
    """Share of the target that the gate's `count` best blocks (the running one among them) hold.

    Returns (of the gate's choice, of the best possible one), means over the tokens `rows`.
    """
    wanted, scored = gate.wanted(seen, rope, rows), gate.told(seen, rows, soft=False)
    own = torch.arange(rows.start, rows.stop)[:, None, None] // gate.block
    scored = scored.scatter(-1, own.expand(-1, scored.shape[1], 1), torch.inf)
    most = min(count, wanted.shape[-1])
    chosen = wanted.gather(-1, scored.topk(most, -1).indices).sum(-1).mean()
    return float(chosen), float(wanted.topk(most, -1).values.sum(-1).mean())


def save_gates(gates: dict[int, Gate], path: Path, base: str) -> None:
    """Write gates as bf16, with their shape and the name of the model that they belong to."""
    tensors = {
        f"model.layers.{i}.self_attn.attn_gate.{part}.weight": getattr(gate, part)
        .detach()
        .bfloat16()
        .contiguous()
        for i, gate in gates.items()
        for part in _PARTS
    }
    shape = next(iter(gates.values())).shape
    meta = {"format": "pt", "base": base, "gates": json.dumps(asdict(shape))}
    part_file = path.with_suffix(".part")
    save_file(tensors, part_file, metadata=meta)
    part_file.replace(path)


def load_gates(config: TinyConfig, path: Path) -> dict[int, Gate]:
    """Read gates that `save_gates` wrote, by layer."""
    with safe_open(path, framework="pt") as file:
        shape = GateShape(**json.loads(file.metadata()["gates"]))
    tensors = load_file(path)
    gates: dict[int, Gate] = {}
    with torch.no_grad():
        for name, value in tensors.items():
            _, _, layer, _, _, part, _ = name.split(".")
            gate = gates.setdefault(int(layer), Gate(config, shape))
            getattr(gate, part).copy_(value)
    return gates
