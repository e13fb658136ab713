"""The built-in model in the shape of HySparse: its window layers follow the first global layer.

The pattern of the built-in model (global, window x 4, global) becomes full, sparse x 4, full. A
sparse layer keeps its window branch with its own keys, values and sink; a second branch reads the
keys and values of the full layer before it, at the blocks that the full layer gave the most
attention (the largest exact probability in a block, maximum over the heads of a group). Both
branches share the layer's queries, have their own softmax and sink and are weighed by sigmoid
gates of the layer's input, elementwise. If the layers rotate with different bases, queries are
rotated once for each branch: the full layer's keys are cached as that layer rotated them.

Started from a trained hybrid model, gates are 1/2 everywhere, the output projection is doubled in
return, and a large sink keeps the new branch quiet: the first step computes nearly what the model
computed before.

A trained one is kept as what differs from the model that it was made from. As a command, this makes a folder
of both that `mimo-compile compile` reads:

    python -m mimo_compile.tiny.hysparse --base tiny-4k --delta hysparse.safetensors --out tiny-hysparse
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mimo_compile.ir.ops.score_keys import block_max, bring_together
from mimo_compile.ir.ops.select_blocks import LEAST_POSITIVE
from mimo_compile.tiny.checkpoint import export, load
from mimo_compile.tiny.training_config import TinyConfig
from mimo_compile.tiny.training_model import (
    Attention,
    Layer,
    Linear,
    TinyModel,
    attend,
    rotate,
    sink_softmax,
)

QUIET_SINK = 6.0
"""Logit of the new branch's sink at the start."""
_NEW = ("listed_sink_bias", "listed_gate", "window_gate")


@dataclass(frozen=True, slots=True)
class HySparseShape:
    """What the sparse layers select."""

    block: int = 32
    """Tokens of a block."""
    budget: int = 256
    """Tokens of the chosen blocks, a whole number of them."""

    def __post_init__(self) -> None:
        if not all(type(n) is int and n > 0 for n in (self.block, self.budget)):
            raise ValueError(
                f"block={self.block} and budget={self.budget} must be counts of tokens"
            )
        if self.budget % self.block:
            raise ValueError(f"budget={self.budget} is no whole number of blocks of {self.block}")


@dataclass(frozen=True, slots=True)
class Shared:
    """What a full layer hands on: rotated keys, values and the positions each token may see.

    k: [batch, kv, time, dim]; v: [batch, kv, time, v_dim]; seen: bool [batch, kv, time, time].
    """

    k: Tensor
    v: Tensor
    seen: Tensor


def chosen_blocks(weights: Tensor, kv_heads: int, block: int, count: int) -> Tensor:
    """The blocks a full layer selects for the tokens of one sequence.

    weights: attention probabilities [rows, heads, keys], 0 where a key may not be seen. Returns a
    mask [rows, kv, blocks] of the `count` best; blocks whose probability underflowed are never chosen.
    """
    score = bring_together(block_max(weights, block), kv_heads, "max")
    best = score.topk(min(count, score.shape[-1]), dim=-1).indices
    chosen = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, best, True)
    return chosen & (score >= LEAST_POSITIVE)


@torch.no_grad()
def select(q: Tensor, k: Tensor, shape: HySparseShape, rows: int = 256) -> Tensor:
    """Positions that sparse layers may see behind a full layer: bool [batch, kv, time, time].

    q: [batch, heads, time, dim], rotated and scaled; k: [batch, kv, time, dim], rotated. Scores
    exist for `rows` tokens at a time.
    """
    batch, heads, time, _ = q.shape
    kv = k.shape[1]
    wide = k.repeat_interleave(heads // kv, dim=1)
    key = torch.arange(time)
    parts = []
    for start in range(0, time, rows):
        part = q[:, :, start : start + rows]
        scores = (part @ wide.transpose(-1, -2)).float()
        later = key[None] > key[start : start + rows, None]
        weights = torch.softmax(scores.masked_fill(later, -math.inf), -1)
        flat = weights.transpose(1, 2).flatten(0, 1)  # [batch * rows, heads, keys]
        chosen = chosen_blocks(flat, kv, shape.block, max(1, shape.budget // shape.block))
        wanted = chosen.repeat_interleave(shape.block, -1)[..., :time]
        parts.append(wanted.unflatten(0, (batch, -1)).transpose(1, 2) & ~later)
    return torch.cat(parts, 2)


class SparseAttention(Attention):
    """A window layer's attention with a second branch over what the full layer chose."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__(config, windowed=True)
        c = config
        if (self.heads, self.dim, self.v_dim) != (c.num_attention_heads, c.head_dim, c.v_head_dim):
            raise ValueError("sparse layers need heads of the full layers' shape")
        if self.heads % c.num_key_value_heads:
            raise ValueError("the full layers' key heads do not divide the sparse layers' heads")
        self.listed_sink_bias = nn.Parameter(torch.full((self.heads,), QUIET_SINK))
        self.listed_gate = Linear(c.hidden_size, self.heads * self.v_dim)
        self.window_gate = Linear(c.hidden_size, self.heads * self.v_dim)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: [batch, time, hidden], normed → factors of both branches [batch, heads, time, v_dim]."""
        both = (self.listed_gate(x), self.window_gate(x))
        listed, window = (
            torch.sigmoid(g.float()).unflatten(-1, (self.heads, -1)).transpose(1, 2) for g in both
        )
        return listed.to(x.dtype), window.to(x.dtype)

    def listed(self, q: Tensor, shared: Shared) -> Tensor:
        """q: [batch, heads, time, dim], rotated as the full layer and scaled → [..., v_dim]."""
        group = self.heads // shared.k.shape[1]
        k, v, seen = (x.repeat_interleave(group, dim=1) for x in (shared.k, shared.v, shared.seen))
        sink = self.listed_sink_bias.view(1, -1, 1, 1)
        return sink_softmax(q @ k.transpose(-1, -2), seen, sink) @ v

    def branches(
        self,
        x: Tensor,
        window_rope: tuple[Tensor, Tensor],
        full_rope: tuple[Tensor, Tensor],
        shared: Shared,
    ) -> Tensor:
        """x: [batch, time, hidden], normed → the same shape."""
        q, k, v = self.project(x)
        q = q * (1.0 / math.sqrt(self.dim))
        near = attend(
            rotate(q, *window_rope), rotate(k, *window_rope), v, self.window,
            self.attention_sink_bias,
        )  # fmt: skip
        far = self.listed(rotate(q, *full_rope), shared)
        listed, window = self.gates(x)
        return self.merge(listed * far + window * near)


class SparseLayer(Layer):
    """A decoder layer with `SparseAttention`."""

    def __init__(self, config: TinyConfig, index: int) -> None:
        super().__init__(config, index)
        self.self_attn = SparseAttention(config)


class HySparseModel(TinyModel):
    """`TinyModel` whose window layers follow the full layer before them."""

    def __init__(
        self, config: TinyConfig, shape: HySparseShape, compute: torch.dtype = torch.bfloat16
    ) -> None:
        super().__init__(config, compute)
        self.shape = shape
        if config.hybrid_layer_pattern[0] or config.mtp_layers:
            raise ValueError("the first layer must be global, and there are no draft layers")
        self.layers = nn.ModuleList(
            SparseLayer(config, i) if windowed else Layer(config, i)
            for i, windowed in enumerate(config.hybrid_layer_pattern)
        )

    def hidden(
        self, ids: Tensor, windowed: tuple[Tensor, Tensor], full: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """As `TinyModel.hidden`."""
        x = F.embedding(ids, self.embed_tokens).to(self.compute)
        loads: list[Tensor] = []
        shared: Shared | None = None
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            y = layer.input_layernorm(x)
            attention = layer.self_attn
            if isinstance(attention, SparseAttention):
                assert shared is not None
                out = attention.branches(y, windowed, full, shared)
            else:
                q, k, v = attention.project(y)
                q = rotate(q, *full) * (1.0 / math.sqrt(attention.dim))
                k = rotate(k, *full)
                if i < last:
                    shared = Shared(k, v, select(q, k, self.shape))
                out = attention.merge(attend(q, k, v, None, None))
            x, load = layer.feed(x + out)
            if load is not None:
                loads.append(load)
        return x, torch.stack(loads) if loads else torch.zeros(0, 0)


def from_hybrid(
    model: TinyModel, shape: HySparseShape, compute: torch.dtype = torch.bfloat16
) -> HySparseModel:
    """A HySparse model that computes nearly what the hybrid `model` (without draft layers) does.

    Only attention learns, that of all layers but a last one that is full: no layer follows it.
    """
    made = HySparseModel(model.config, shape, compute)
    missing, unexpected = made.load_state_dict(model.state_dict(), strict=False)
    if unexpected or any(not name.rpartition("self_attn.")[2].startswith(_NEW) for name in missing):
        raise ValueError(f"{unexpected or missing} does not fit")
    with torch.no_grad():
        for layer in made.layers:
            attention = layer.self_attn
            if isinstance(attention, SparseAttention):
                attention.o_proj.weight.mul_(2.0)
                for gate in (attention.listed_gate, attention.window_gate):
                    gate.weight.zero_()
    full = not model.config.hybrid_layer_pattern[-1]
    last = f"layers.{len(made.layers) - 1}."
    for name, parameter in made.named_parameters():
        unfollowed = full and name.startswith(last)
        parameter.requires_grad = ".self_attn." in name and not unfollowed
    return made


def changed(model: HySparseModel) -> dict[str, Tensor]:
    """What differs from the model that it was made from, under the published names, as bf16."""
    return {
        f"model.{name}": value.detach().bfloat16().contiguous()
        for name, value in model.named_parameters()
        if value.requires_grad
    }


def save_hysparse(model: HySparseModel, path: Path, base: str) -> None:
    """Write what differs from `base`, the folder of the model that it was made from."""
    meta = {"format": "pt", "base": base, "hysparse": json.dumps(asdict(model.shape))}
    part = path.with_suffix(".part")
    save_file(changed(model), part, metadata=meta)
    part.replace(path)


def load_hysparse(
    base: TinyModel, path: Path, compute: torch.dtype = torch.float32
) -> HySparseModel:
    """Read what `save_hysparse` wrote, on top of `base`.

    Raises:
        ValueError: `path` was not written by `save_hysparse`, or for a model of another shape.
    """
    model = from_hybrid(base, _stored_shape(path), compute)
    stored = load_file(path)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if not value.requires_grad:
                continue
            found = stored.get(f"model.{name}")
            if found is None:
                raise ValueError(f"{path}: model.{name} is missing")
            if found.shape != value.shape:
                raise ValueError(
                    f"{path}: model.{name} has shape {list(found.shape)}, the base model needs "
                    f"{list(value.shape)}"
                )
            value.copy_(found)
    return model


def _stored_shape(path: Path) -> HySparseShape:
    """What `save_hysparse` noted of the lists; raises ValueError where it did not."""
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get("hysparse")
    known = {f.name for f in fields(HySparseShape)}
    given = None if text is None else json.loads(text)
    if not isinstance(given, dict) or set(given) != known:
        wanted = " and ".join(sorted(known))
        raise ValueError(f"{path}: its metadata hold no 'hysparse' of {wanted}: {text!r}")
    try:
        return HySparseShape(**given)
    except ValueError as error:
        raise ValueError(f"{path}: 'hysparse' of its metadata: {error}") from None


def export_hysparse(model: HySparseModel, tokenizer_json: str, folder: Path) -> None:
    """Write a Hugging Face folder of the whole model, in the dialect of `frontend.models.hysparse`."""
    names = {"architectures": ["HySparseForCausalLM"], "model_type": "hysparse"}
    shape = {**asdict(model.shape), "gate": "element"}
    export(model, tokenizer_json, folder, fields={**names, "hysparse": shape})


def _require_base(folder: Path) -> None:
    """Raise ValueError where `folder` is not that of a model without sparse layers."""
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind != "mimo_v2_flash":
        raise ValueError(f"{folder}: the base's model_type is {kind!r}, not 'mimo_v2_flash'")


def main() -> None:
    """Make a folder of a base model and what was trained on top of it."""
    parser = argparse.ArgumentParser(
        prog="python -m mimo_compile.tiny.hysparse", description=main.__doc__
    )
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--delta", type=Path, required=True, help="file of `save_hysparse`")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    if args.out.resolve() == args.base.resolve():
        parser.error(f"--out {args.out} is the base model's folder: name another one")
    try:
        _require_base(args.base)
        tokenizer = (args.base / "tokenizer.json").read_text(encoding="utf-8")
        model = load_hysparse(load(args.base), args.delta)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        parser.error(f"{args.base} and {args.delta} give no model: {error}")
    export_hysparse(model, tokenizer, args.out)


if __name__ == "__main__":
    main()
