"""Gates that decide the built-in model's experts one layer earlier: "Pre-gated MoE" (arXiv 2308.12066).

    python -m mimo_compile.tiny.pregated pre-gates.safetensors

The gate of layer i reads what the layer's feed-forward block reads, and chooses the experts of layer i
+ 1 and their weights, by that layer's rule. Everything else stays as it is; the router of a layer that
is chosen for is not asked any more. A gate begins as the linear map that comes nearest to the logits of
the router whose place it takes (least squares), or as that router itself. Then all gates learn
together, by Adam: the loss is the Kullback-Leibler divergence from what the model as it was says of the
next token to what it says with them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

if __package__ in (None, ""):  # run as a plain file
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from mimo_compile.tiny import corpus as text
from mimo_compile.tiny.checkpoint import load
from mimo_compile.tiny.evaluate import perplexity
from mimo_compile.tiny.training_model import Experts, Layer, TinyModel
from mimo_compile.tiny.training_ops import choose

LENGTH = 512
"""Tokens of a window."""
RIDGE = 1e-3
"""Of least squares, as a part of the rows' mean square."""


class PreGated(TinyModel):
    """A model with experts whose gates stand one layer earlier; only these have gradients."""

    def __init__(self, model: TinyModel) -> None:
        """Copy a model; each gate begins as the router whose place it takes."""
        super().__init__(model.config, model.compute)
        self.load_state_dict(model.state_dict())
        self.requires_grad_(False)
        self.pre_gates = nn.ModuleDict()
        """By the number of the layer that has it; it chooses for the next one."""
        for i, layer in enumerate(self.layers[1:]):
            assert isinstance(layer, Layer)
            if isinstance(layer.mlp, Experts):
                gate = self.pre_gates[str(i)] = nn.Linear(*layer.mlp.router.T.shape)
                with torch.no_grad():
                    gate.weight.copy_(layer.mlp.router)
                    gate.bias.zero_()

    def hidden(
        self, ids: Tensor, windowed: tuple[Tensor, Tensor], full: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """As `TinyModel.hidden`, with experts that the layer before has chosen."""
        x = F.embedding(ids, self.embed_tokens).to(self.compute)
        loads: list[Tensor] = []
        decided: tuple[Tensor, Tensor] | None = None
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            rope = windowed if layer.windowed else full
            x = x + layer.self_attn(layer.input_layernorm(x), rope)
            y = layer.post_attention_layernorm(x)
            rows, mine, decided = y.flatten(0, 1), decided, None
            if str(i) in self.pre_gates:
                following = self.layers[i + 1].mlp
                assert isinstance(following, Experts)
                logits = self.pre_gates[str(i)](rows.float())
                decided = choose(logits, following.e_score_correction_bias, following.top_k)
            if isinstance(layer.mlp, Experts):
                out, load_ = layer.mlp(rows) if mine is None else layer.mlp.routed(rows, *mine)
                x = x + out.view_as(x)
                loads.append(load_)
            else:
                x = x + layer.mlp(y)
        return x, torch.stack(loads)

    def tensors(self) -> dict[str, Tensor]:
        """The gates' parameters by their names in a file."""
        out = {}
        for name, value in self.pre_gates.named_parameters():
            layer, part = name.split(".")
            out[f"model.layers.{layer}.mlp.pre_gate.{part}"] = value.detach()
        return out

    def save(self, path: Path, base: str) -> None:
        """Write the gates, float32, with the name of the model that they belong to."""
        save_file(self.tensors(), path, metadata={"format": "pt", "base": base})

    def read(self, path: Path) -> None:
        """Read gates that `save` wrote."""
        found = load_file(path)
        for name, value in self.tensors().items():
            value.copy_(found[name])


@torch.no_grad()
def fit(gated: PreGated, model: TinyModel, ids: Tensor) -> None:
    """Let each gate say what its router would say one layer later, as well as a linear map can.

    ids: [windows, time] int64 of texts that the model reads as it was.
    """
    seen: dict[int, list[Tensor]] = {}
    blocks: dict[int, nn.Module] = {}
    for i, layer in enumerate(model.layers):
        assert isinstance(layer, Layer)
        blocks[i] = layer.mlp

    def noted(number: int, args: tuple[Tensor, ...]) -> None:
        seen.setdefault(number, []).append(args[0].flatten(0, -2).float())

    hooks = [
        block.register_forward_pre_hook(lambda _, args, i=i: noted(i, args))
        for i, block in blocks.items()
    ]
    for window in ids:
        model(window[None])
    for hook in hooks:
        hook.remove()
    for name, gate in gated.pre_gates.items():
        following = blocks[int(name) + 1]
        assert isinstance(gate, nn.Linear) and isinstance(following, Experts)
        rows, after = torch.cat(seen[int(name)]), torch.cat(seen[int(name) + 1])
        x = torch.cat((rows, torch.ones(len(rows), 1)), 1).double()
        wanted = F.linear(after, following.router).double()
        square = x.T @ x
        square += RIDGE * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype)
        found = torch.linalg.solve(square, x.T @ wanted).T.float()
        gate.weight.copy_(found[:, :-1])
        gate.bias.copy_(found[:, -1])


def windows(tokens: text.Tokens, count: int, seed: int) -> Tensor:
    """Return int64 [count, LENGTH] from random places of a text."""
    places = np.random.default_rng(seed).integers(0, len(tokens) - LENGTH, count)
    return torch.from_numpy(np.stack([tokens[at : at + LENGTH] for at in places]).astype(np.int64))


def learn(
    gated: PreGated, model: TinyModel, ids: Tensor, batch: int, rate: float, seconds: float
) -> tuple[int, list[float]]:
    """Let the gates learn for so many steps or seconds; returns steps and the loss of each.

    ids: [windows, time] int64, of which each step takes the next `batch`.
    """
    optimiser = torch.optim.Adam(gated.pre_gates.parameters(), lr=rate, betas=(0.9, 0.98))
    begin, losses, steps = time.process_time(), [], len(ids) // batch
    for step in range(steps):
        done = max(step / steps, (time.process_time() - begin) / seconds)
        if done >= 1:
            break
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * done))
        window = ids[step * batch : (step + 1) * batch]
        with torch.no_grad():
            told = F.log_softmax(model.logits(model(window)[0]), -1)
        says = F.log_softmax(gated.logits(gated(window)[0]), -1)
        loss = (told.exp() * (told - says)).sum(-1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        if step % 20 == 0:
            print(f"step {step}: {loss.item():.4f}", file=sys.stderr, flush=True)
    return len(losses), losses


def main() -> None:
    """Command line; prints one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path, help="OUT.safetensors")
    parser.add_argument(
        "--init", type=Path, default=Path(__file__).parent, help="folder of the model"
    )
    parser.add_argument("--start", choices=("fitted", "routers"), default="fitted")
    parser.add_argument("--fit", type=int, default=40, help="windows of least squares")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=4, help="windows of a step")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seconds", type=float, default=240, help="of CPU time, at most")
    parser.add_argument("--judged", type=int, default=1 << 30, help="held-out tokens, at most")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    model = load(args.init)
    model.requires_grad_(False)
    tokenizer = Tokenizer.from_file(str(args.init / "tokenizer.json"))
    found = text.collect()
    train, held = (text.encode(tokenizer, files) for files in (found.train, found.held_out))
    held = held[: args.judged]
    gated = PreGated(model)
    judged = {"base": perplexity(model, held, LENGTH, LENGTH // 2)}
    judged["routers, early"] = perplexity(gated, held, LENGTH, LENGTH // 2)
    ids = windows(train, args.fit + args.steps * args.batch, args.seed)
    if args.start == "fitted":
        fit(gated, model, ids[: args.fit])
        judged["fitted"] = perplexity(gated, held, LENGTH, LENGTH // 2)
    print(json.dumps(judged), file=sys.stderr, flush=True)
    begin = time.process_time()
    steps, losses = learn(gated, model, ids[args.fit :], args.batch, args.rate, args.seconds)
    taken = time.process_time() - begin
    judged["trained"] = perplexity(gated, held, LENGTH, LENGTH // 2)
    gated.save(args.output, args.init.name)
    print(json.dumps({
        "perplexity": judged, "held_out_tokens": len(held), "steps": steps, "batch": args.batch,
        "cpu_seconds": taken, "loss": losses[:1] + losses[-1:],
    }, indent=2))  # fmt: skip


if __name__ == "__main__":
    main()
