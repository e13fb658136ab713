"""Train the built-in model on CPython's standard library, on a CPU, for a given time.

    python -m mimo_compile.tiny.train --out tiny --minutes 100 --state tiny.state

Text, tokenizer and split come from `corpus.py`; the model from `training_model.py`. The schedule
follows the clock: a short warm-up, a constant rate, then a linear decay to zero. Stop it at any
time: with `--state` it goes on where it was, with `--init` it starts from a finished folder.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

if __package__ in (None, ""):  # run as a plain file
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from mimo_compile.ir.formats import parse_scheme
from mimo_compile.tiny import corpus as text
from mimo_compile.tiny.checkpoint import export, from_tensors, load, to_tensors
from mimo_compile.tiny.optimizer import Muon, split_parameters
from mimo_compile.tiny.quantised import StraightThrough
from mimo_compile.tiny.training_config import TinyConfig
from mimo_compile.tiny.training_model import Experts, TinyModel
from mimo_compile.tiny.training_ops import linear_cross_entropy

HEADS_AHEAD = 3  # extra tokens a training window needs for the targets of the MTP heads


@dataclass(frozen=True, slots=True)
class Settings:
    """How to train. Times in minutes, sizes in tokens or sequences."""

    minutes: float = 100.0
    length: int = 512
    micro_batch: int = 4
    accumulate: int = 4
    mtp_sequences: int = 1
    mtp_weight: float = 0.1
    tests_share: float = 0.5
    matrix_rate: float = 0.02
    matrix_decay: float = 0.05
    rest_rate: float = 3e-3
    router_rate: float = 5e-4
    bias_rate: float = 5e-3
    warm_up: float = 0.01
    decay_from: float = 0.55
    compiled: bool = True
    seed: int = 0
    quant: str = "none"


class Windows:
    """Endless random windows of one token stream, each pass in a new order and phase."""

    def __init__(self, tokens: text.Tokens, length: int, seed: int) -> None:
        self._tokens = tokens
        self._length = length
        self._rng = np.random.default_rng(seed)
        self._starts: list[int] = []
        if len(tokens) < 2 * length:
            raise ValueError(f"the text has {len(tokens)} tokens, need at least {2 * length}")

    def take(self) -> text.Tokens:
        """The next window: [length] uint16."""
        if not self._starts:
            phase = int(self._rng.integers(self._length))
            count = (len(self._tokens) - phase) // self._length
            self._starts = [phase + self._length * int(i) for i in self._rng.permutation(count)]
        start = self._starts.pop()
        return self._tokens[start : start + self._length]


class Batches:
    """Micro-batches mixed from the library and from its tests at a fixed share."""

    def __init__(
        self, library: text.Tokens, tests: text.Tokens, settings: Settings, seed: int
    ) -> None:
        length = settings.length + 1 + HEADS_AHEAD
        self._library = Windows(library, length, seed)
        enough = settings.tests_share > 0 and len(tests) >= 2 * length
        self._tests = Windows(tests, length, seed + 1) if enough else None
        self._share = settings.tests_share
        self._size = settings.micro_batch
        self._rng = np.random.default_rng(seed + 2)

    def take(self) -> Tensor:
        """[micro_batch, length + 4] int64."""
        rows = []
        for _ in range(self._size):
            from_tests = self._tests is not None and self._rng.random() < self._share
            source = self._tests if from_tests and self._tests is not None else self._library
            rows.append(source.take().astype(np.int64))
        return torch.from_numpy(np.stack(rows))


@dataclass(slots=True)
class Progress:
    """What has been done so far; kept in the state file."""

    minutes: float = 0.0
    steps: int = 0
    tokens: int = 0
    log: list[dict[str, float]] = field(default_factory=list)


class Trainer:
    """Model, optimisers and data of one run."""

    def __init__(
        self,
        model: TinyModel,
        library: text.Tokens,
        tests: text.Tokens,
        settings: Settings,
        tokenizer_json: str = "",
    ) -> None:
        self.model = model
        scheme = parse_scheme(settings.quant)
        self.through = StraightThrough(model, scheme) if scheme.weight is not None else None
        self.settings = settings
        self.progress = Progress()
        self.tokenizer_json = tokenizer_json
        matrices, rest, routers = split_parameters(model)
        self.muon = Muon(matrices, settings.matrix_rate, weight_decay=settings.matrix_decay)
        self.adam = torch.optim.AdamW(
            [{"params": rest}, {"params": routers}],
            settings.rest_rate,
            betas=(0.9, 0.95),
            weight_decay=0.0,
            foreach=True,
        )
        self._library, self._tests = library, tests
        self.batches = Batches(library, tests, settings, settings.seed)
        self._hidden: Callable[..., tuple[Tensor, Tensor]] = model.hidden
        self._draft: Callable[..., Tensor] = _draft
        if settings.compiled:
            self._hidden = torch.compile(model.hidden)
            self._draft = torch.compile(_draft)

    def rate(self) -> float:
        """The factor on the learning rates at this moment, 0 to 1."""
        s = self.settings
        done = min(1.0, self.progress.minutes / s.minutes)
        if done < s.warm_up:
            return max(done / s.warm_up, 0.02)
        if done < s.decay_from:
            return 1.0
        return (1.0 - done) / (1.0 - s.decay_from)

    def micro_step(self, ids: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """Losses of one micro-batch, backpropagated.

        ids: [micro_batch, length + 4] → (loss of the next token, losses of the MTP heads,
        tokens per expert [MoE layers, experts]), losses in nats per token, detached.
        """
        s, m = self.settings, self.model
        time_ = ids.shape[1] - 1 - HEADS_AHEAD
        narrow, full = m.rope(time_, True), m.rope(time_, False)
        hidden, loads = self._hidden(ids[:, :time_], narrow, full)
        normed = m.norm(hidden).flatten(0, 1)
        loss = self._cross_entropy(normed, ids[:, 1 : time_ + 1])
        total, drafts = loss, []
        for head, layer in enumerate(m.mtp):
            rows = slice(0, s.mtp_sequences)
            token = F.embedding(ids[rows, 1 + head : time_ + 1 + head], m.embed_tokens)
            out = self._draft(layer, hidden[rows], token.to(hidden.dtype), narrow)
            target = ids[rows, 2 + head : time_ + 2 + head]
            drafts.append(self._cross_entropy(out.flatten(0, 1), target))
            total = total + s.mtp_weight * drafts[-1]
        (total / s.accumulate).backward()
        return loss.detach(), [d.detach() for d in drafts], loads

    def _cross_entropy(self, x: Tensor, target: Tensor) -> Tensor:
        table, compiled = self.model.embed_tokens, self.settings.compiled
        return linear_cross_entropy(x, table, target.flatten(), compiled=compiled)

    def step(self) -> dict[str, float]:
        """One optimiser step; returns what to log (losses in nats per token)."""
        s = self.settings
        rate = self.rate()
        sums = torch.zeros(1 + len(self.model.mtp))
        load = torch.zeros(())
        if self.through:
            self.through.hide()
        for _ in range(s.accumulate):
            loss, drafts, loads = self.micro_step(self.batches.take())
            sums += torch.stack([loss, *drafts])
            load = load + loads
        if self.through:
            self.through.reveal()
        for group in self.muon.param_groups:
            group["lr"] = s.matrix_rate * rate
            group["momentum"] = min(0.95, 0.85 + 0.1 * self.progress.steps / 300)
        for group, most in zip(self.adam.param_groups, (s.rest_rate, s.router_rate), strict=True):
            group["lr"] = most * rate
        self.muon.step()
        self.adam.step()
        self.muon.zero_grad(set_to_none=True)
        self.adam.zero_grad(set_to_none=True)
        self._balance(load, s.bias_rate * rate)
        self.progress.steps += 1
        self.progress.tokens += s.accumulate * s.micro_batch * s.length
        losses = (sums / s.accumulate).tolist()
        worst = (load.amax(-1) / load.mean(-1)).max().item() if load.ndim == 2 else 1.0
        heads = {f"mtp{i}": x for i, x in enumerate(losses[1:])}
        return {"loss": losses[0], **heads, "worst_load": worst, "rate": rate}

    def test(self, tokens: text.Tokens) -> float:
        """Cross-entropy in nats per token of the model as it will be stored."""
        if self.through:
            self.through.hide()
        loss = mean_loss(self.model, tokens)
        if self.through:
            self.through.reveal()
        return loss

    @torch.no_grad()
    def _balance(self, load: Tensor, amount: float) -> None:
        """Move each expert's selection bias towards an even load, by the sign of its error."""
        experts = [m for m in self.model.modules() if isinstance(m, Experts)]
        for module, counts in zip(experts, load, strict=True):
            module.e_score_correction_bias += amount * torch.sign(counts.mean() - counts)

    def save(self, path: Path) -> None:
        """Write the state file, whole or not at all."""
        part = path.with_suffix(path.suffix + ".part")
        torch.save(
            {
                "model": self.model.state_dict(),
                "muon": self.muon.state_dict(),
                "adam": self.adam.state_dict(),
                "progress": vars_of(self.progress),
                "tokenizer": self.tokenizer_json,
            },
            part,
        )
        part.replace(path)

    def resume(self, path: Path) -> None:
        """Read a state file written by `save`."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        self.progress = Progress(**state["progress"])
        seed = self.settings.seed + 1000 + self.progress.steps
        self.batches = Batches(self._library, self._tests, self.settings, seed)


def vars_of(progress: Progress) -> dict[str, object]:
    """The fields of `progress` as plain data."""
    return {name: getattr(progress, name) for name in Progress.__slots__}


def _draft(
    layer: torch.nn.Module, hidden: Tensor, token: Tensor, rope: tuple[Tensor, Tensor]
) -> Tensor:
    out: Tensor = layer(hidden, token, rope)
    return out


@torch.no_grad()
def mean_loss(model: TinyModel, tokens: text.Tokens, length: int = 512) -> float:
    """Cross-entropy in nats per token over consecutive windows of `tokens`."""
    total, count = 0.0, 0
    for start in range(0, len(tokens) - 1, length):
        ids = torch.from_numpy(tokens[start : start + length + 1].astype(np.int64))[None]
        if ids.shape[1] < 2:
            break
        logits = model.logits(model(ids[:, :-1])[0])
        total += F.cross_entropy(logits[0], ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return total / count


def train(trainer: Trainer, held_out: text.Tokens, state: Path | None, every: float = 5.0) -> None:
    """Train until the clock says stop; log each minute, test and save every `every` minutes."""
    p = trainer.progress
    last = time.monotonic()
    logged, saved, tokens_then = p.minutes, p.minutes, p.tokens
    fixed = held_out[: 32 * 512 + 1]
    recent: list[dict[str, float]] = []
    while p.minutes < trainer.settings.minutes:
        recent.append(trainer.step())
        now = time.monotonic()
        p.minutes += (now - last) / 60.0
        last = now
        if p.minutes - logged < 1.0 and p.minutes < trainer.settings.minutes:
            continue
        row = {key: sum(r[key] for r in recent) / len(recent) for key in recent[0]}
        row["tokens_per_s"] = (p.tokens - tokens_then) / (p.minutes - logged) / 60.0
        row.update(minutes=p.minutes, step=p.steps, tokens=p.tokens)
        if p.minutes - saved >= every or p.minutes >= trainer.settings.minutes:
            row["held_out"] = trainer.test(fixed)
            saved = p.minutes
            if state is not None:
                trainer.save(state)
        p.log.append(row)
        print(
            json.dumps({k: float(f"{v:.4g}") if v < 1e4 else int(v) for k, v in row.items()}),
            flush=True,
        )
        recent, logged, tokens_then = [], p.minutes, p.tokens
        if not math.isfinite(row["loss"]):
            raise RuntimeError("the loss is not finite; lower --matrix-rate and resume")


def prepare(state: Path | None, init: Path | None) -> tuple[Tokenizer, text.Corpus]:
    """Read the corpus; take the tokenizer from the state or the folder, or train a new one."""
    corpus = text.collect()
    if state is not None and state.exists():
        return Tokenizer.from_str(torch.load(state, weights_only=True)["tokenizer"]), corpus
    if init is not None:
        return Tokenizer.from_file(str(init / "tokenizer.json")), corpus
    return text.train_tokenizer([f.text for f in corpus.train + corpus.tests[::4]]), corpus


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--minutes", type=float, default=Settings().minutes)
    parser.add_argument("--state", type=Path, help="file to keep the state in, and to go on from")
    parser.add_argument("--init", type=Path, help="start from the weights of this model folder")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true", help="run without torch.compile")
    parser.add_argument("--no-tests", action="store_true", help="leave the test packages out")
    parser.add_argument(
        "--quant", default="none", help="train through this quantiser, e.g. w1.58a8, complex2wl2a8"
    )
    parser.add_argument(
        "--rate", type=float, default=1.0, help="factor on all learning rates, e.g. with --init"
    )
    parser.add_argument(
        "--decay-from",
        type=float,
        default=Settings().decay_from,
        help="share of the time after which the rates decay",
    )
    parser.add_argument(
        "--accumulate", type=int, default=Settings().accumulate, help="2048 tokens each, a step"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = Settings()
    settings = Settings(
        minutes=args.minutes,
        matrix_rate=start.matrix_rate * args.rate,
        rest_rate=start.rest_rate * args.rate,
        router_rate=start.router_rate * args.rate,
        decay_from=args.decay_from,
        accumulate=args.accumulate,
        quant=args.quant,
        seed=args.seed,
        compiled=not args.no_compile,
        tests_share=0.0 if args.no_tests else Settings().tests_share,
    )
    tokenizer, corpus = prepare(args.state, args.init)
    library, tests, held_out = (
        text.encode(tokenizer, files) for files in (corpus.train, corpus.tests, corpus.held_out)
    )
    print(json.dumps({**text.provenance(corpus), "held_out_files": len(corpus.held_out)}))
    print(f"tokens: library {len(library)}, tests {len(tests)}, held out {len(held_out)}")
    model = TinyModel(TinyConfig())
    model.initialise(args.seed)
    if args.init:
        from_tensors(model, to_tensors(load(args.init)))
    trainer = Trainer(model, library, tests, settings, tokenizer.to_str())
    if args.state and args.state.exists():
        trainer.resume(args.state)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        train(trainer, held_out, args.state)
    except KeyboardInterrupt:
        print("stopped; writing the model as it is", file=sys.stderr)
        if trainer.through:
            trainer.through.reveal()
        if args.state:
            trainer.save(args.state)
    export(model, tokenizer.to_str(), args.out, trainer.through)


if __name__ == "__main__":
    main()
