"""The built-in model made larger, so that it says the same and reads more bytes for it.

    python benchmarks/wide.py FOLDER --shape dense

Kernels of `tiny` find its weights in the processor's caches. Here its matrices get rows and columns that
add nothing, so that texts, routing and acceptance of drafts are those of the trained model, and the time of
a token is that of a model whose weights have to come from memory. What is added:

- hidden: the residual stream is padded with zeros. A mean of squares is over so many more channels, so that
  norms divide by less: their weights are divided by the root of the factor, a power of two, and epsilon by
  the factor;
- inner rows of feed-forward blocks, of experts and of draft heads: those that there are once more, for which
  the projection down has columns of zeros;
- layers behind the others: the window layers' attention and a dense block, whose projections back to the
  stream are zeros;
- words: the rows of the table once more. A copy's logit is that of its word, and of equal ones the first is
  taken, so that greedy texts do not change; drawn ones would.

In exact numbers nothing changes; in those of kernels sums have other orders, so that tokens that nearly tie
may.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

STORED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


@dataclass(frozen=True)
class Widths:
    """What a model gets more of."""

    hidden: int = 1
    """Factor of the residual stream: 1, 4, 16, 64."""
    layers: int = 0
    """Further layers, dense ones."""
    inner: int = 0
    """Rows of dense blocks; 0: as many as there are."""
    experts: int = 1
    """Factor of the inner rows of an expert."""
    vocab: int = 1
    """Factor of the number of words."""
    drafts: int = 1
    """Factor of the inner rows of a draft head."""

    def __post_init__(self) -> None:
        """Refuse what would not say the same."""
        for name in ("hidden", "experts", "vocab", "drafts"):
            if getattr(self, name) < 1:
                raise SystemExit(f"{name}={getattr(self, name)}: it is a factor, of 1 or more")
        if isqrt(self.hidden) ** 2 != self.hidden or self.hidden & (self.hidden - 1):
            raise SystemExit(f"hidden={self.hidden}: take a power of 4, whose root is one of 2")


SHAPES = {
    "dense": Widths(hidden=4, layers=12, inner=8192, vocab=8, drafts=45),
    "experts": Widths(hidden=4, inner=6656, experts=26, drafts=4),
}
"""Models whose parts weigh, beside each other, about what those of a published one do.

`dense`: MiMo-7B (36 layers, a table of 3.5 of them, a draft head of 1.2), `experts`: MiMo-V2-Flash, whose
tokens read a part of all experts, and whose draft heads are small."""


def widened(folder: Path, widths: Widths) -> Path:
    """Write a checkpoint of the built-in model with these widths into a folder; returns it."""
    from safetensors.torch import load_file, save_file

    from mimo_compile.frontend.huggingface import resolve_source

    source = resolve_source("tiny")
    for name in STORED:
        shutil.copy(source / name, folder / name)
    config = json.loads((source / "config.json").read_text())
    inner = widths.inner or config["intermediate_size"]
    if inner < config["intermediate_size"]:
        raise SystemExit(f"inner={inner}: the model has {config['intermediate_size']} rows already")
    tensors = load_file(source / "model.safetensors")
    tensors |= _further_layers(tensors, config, widths.layers)
    made = {name: _wider(name, tensor, config, widths, inner) for name, tensor in tensors.items()}
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_described(config, widths, inner), indent=2))
    return folder


def _described(config: dict[str, Any], widths: Widths, inner: int) -> dict[str, Any]:
    """Return the configuration of the larger model."""
    more = widths.layers
    return config | {
        "hidden_size": config["hidden_size"] * widths.hidden,
        "layernorm_epsilon": config["layernorm_epsilon"] / widths.hidden,
        "num_hidden_layers": config["num_hidden_layers"] + more,
        "hybrid_layer_pattern": [*config["hybrid_layer_pattern"], *[1] * more],
        "moe_layer_freq": [*config["moe_layer_freq"], *[0] * more],
        "intermediate_size": inner,
        "moe_intermediate_size": config["moe_intermediate_size"] * widths.experts,
        "mtp_intermediate_size": config["mtp_intermediate_size"] * widths.drafts,
        "vocab_size": config["vocab_size"] * widths.vocab,
    }


def _further_layers(tensors: dict[str, Any], config: dict[str, Any], count: int) -> dict[str, Any]:
    """Return layers that add zeros: attention of the first window layer, the block of the first dense one."""
    import torch

    attends = config["hybrid_layer_pattern"].index(1)
    feeds = config["moe_layer_freq"].index(0)
    parts = {}
    for name, tensor in tensors.items():
        _, _, mine = name.partition(f"model.layers.{attends}.")
        if mine and not mine.startswith("mlp."):
            parts[mine] = tensor
        _, _, mine = name.partition(f"model.layers.{feeds}.mlp.")
        if mine:
            parts[f"mlp.{mine}"] = tensor
    for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
        parts[name] = torch.zeros_like(parts[name])
    first = config["num_hidden_layers"]
    return {
        f"model.layers.{first + i}.{name}": tensor
        for i in range(count)
        for name, tensor in parts.items()
    }


def _wider(name: str, tensor: Any, config: dict[str, Any], widths: Widths, inner: int) -> Any:
    """Return one tensor of the larger model."""
    import torch

    hidden, stream = config["hidden_size"], config["hidden_size"] * widths.hidden
    if "norm" in name:
        return torch.nn.functional.pad(tensor / isqrt(widths.hidden), (0, stream - hidden))
    rows = _inner_rows(name, config, widths, inner)
    if name == "model.embed_tokens.weight":
        rows = len(tensor) * widths.vocab
    if name.endswith("down_proj.weight"):  # [D, F]: from inner rows to the stream
        return torch.nn.functional.pad(tensor, (0, rows - tensor.shape[1], 0, stream - hidden))
    if name.endswith(("o_proj.weight", "eh_proj.weight")):  # to the stream
        tensor = torch.nn.functional.pad(tensor, (0, 0, 0, stream - hidden))
    if name.endswith("eh_proj.weight"):  # [D, 2 D]: from two of them
        halves = tensor.unflatten(1, (2, hidden))
        return torch.nn.functional.pad(halves, (0, stream - hidden)).flatten(1)
    if tensor.ndim == 2 and not name.endswith("o_proj.weight"):  # [..., D]: from the stream
        again = -(-rows // len(tensor)) if rows else 1
        tensor = torch.nn.functional.pad(tensor, (0, stream - hidden)).repeat(again, 1)
        tensor = tensor[: rows or len(tensor)]
    return tensor.contiguous().clone()  # a file holds no two tensors in one memory


def _inner_rows(name: str, config: dict[str, Any], widths: Widths, inner: int) -> int:
    """Return how many inner rows the block has that a tensor is of; 0: it is of none."""
    if not name.endswith(("gate_proj.weight", "up_proj.weight", "down_proj.weight")):
        return 0
    if ".mtp." in name:
        return int(config["mtp_intermediate_size"] * widths.drafts)
    if ".experts." in name:
        return int(config["moe_intermediate_size"] * widths.experts)
    return inner


def main() -> None:
    """Write a folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "folder", type=Path, help="where to write the checkpoint to; made if it is not there"
    )
    parser.add_argument("--shape", choices=SHAPES, default="dense")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    print(widened(args.folder, SHAPES[args.shape]))


if __name__ == "__main__":
    main()
