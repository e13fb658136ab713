"""Train the built-in model on CPython's standard library, on a CPU, for a given time.

    python -m mimo_compile.tiny.train --out tiny --minutes 100 --state tiny.state

Text, tokenizer and split come from `corpus.py`; the model from `training_model.py`. The schedule
follows the clock: a short warm-up, a constant rate, then a linear decay to zero. Stop it at any
time: with `--state` it goes on where it was, with `--init` it starts from a finished folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
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
from mimo_compile.tiny.quantised import StraightThrough
from mimo_compile.tiny.training_config import TinyConfig
from mimo_compile.tiny.training_loop import Loop, Settings, mean_loss, run_or_stop
from mimo_compile.tiny.training_model import TinyModel
from mimo_compile.tiny.training_ops import linear_cross_entropy

HEADS_AHEAD = 3  # extra tokens a training window needs for the targets of the MTP heads


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


class Trainer(Loop):
    """Trains decoder and MTP heads, on request through a quantiser."""

    def __init__(
        self,
        model: TinyModel,
        library: text.Tokens,
        tests: text.Tokens,
        settings: Settings,
        tokenizer_json: str = "",
    ) -> None:
        super().__init__(model, settings, tokenizer_json)
        scheme = parse_scheme(settings.quant)
        self.through = StraightThrough(model, scheme) if scheme.weight is not None else None
        self._library, self._tests = library, tests
        self.new_data(settings.seed)
        self._hidden: Callable[..., tuple[Tensor, Tensor]] = model.hidden
        self._draft: Callable[..., Tensor] = _draft
        if settings.compiled:
            self._hidden = torch.compile(model.hidden)
            self._draft = torch.compile(_draft)

    def new_data(self, seed: int) -> None:
        """Draw windows in the order of `seed`."""
        self.batches = Batches(self._library, self._tests, self.settings, seed)

    def before_gradients(self) -> None:
        """Put quantised values into the parameters."""
        if self.through:
            self.through.hide()

    def after_gradients(self) -> None:
        """Put the float masters back."""
        if self.through:
            self.through.reveal()

    def micro_step(self) -> tuple[dict[str, Tensor], Tensor]:
        """Losses of the next token and of the MTP heads (`mtp0`, ...), in nats per token."""
        s, m, ids = self.settings, self.model, self.batches.take()
        time_ = ids.shape[1] - 1 - HEADS_AHEAD
        narrow, full = m.rope(time_, True), m.rope(time_, False)
        hidden, loads = self._hidden(ids[:, :time_], narrow, full)
        normed = m.norm(hidden).flatten(0, 1)
        total = self._cross_entropy(normed, ids[:, 1 : time_ + 1])
        losses = {"loss": total.detach()}
        for head, layer in enumerate(m.mtp):
            rows = slice(0, s.mtp_sequences)
            token = F.embedding(ids[rows, 1 + head : time_ + 1 + head], m.embed_tokens)
            out = self._draft(layer, hidden[rows], token.to(hidden.dtype), narrow)
            target = ids[rows, 2 + head : time_ + 2 + head]
            draft = self._cross_entropy(out.flatten(0, 1), target)
            losses[f"mtp{head}"] = draft.detach()
            total = total + s.mtp_weight * draft
        (total / s.accumulate).backward()
        return losses, loads

    def _cross_entropy(self, x: Tensor, target: Tensor) -> Tensor:
        table, compiled = self.model.embed_tokens, self.settings.compiled
        return linear_cross_entropy(x, table, target.flatten(), compiled=compiled)

    def test(self, tokens: text.Tokens) -> float:
        """Cross-entropy in nats per token of the model as it will be stored."""
        self.before_gradients()
        loss = mean_loss(self.model, tokens)
        self.after_gradients()
        return loss


def _draft(
    layer: torch.nn.Module, hidden: Tensor, token: Tensor, rope: tuple[Tensor, Tensor]
) -> Tensor:
    out: Tensor = layer(hidden, token, rope)
    return out


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
    fixed = held_out[: 32 * 512 + 1]
    run_or_stop(trainer, lambda: {"held_out": trainer.test(fixed)}, args.state)
    export(model, tokenizer.to_str(), args.out, trainer.through)


if __name__ == "__main__":
    main()
