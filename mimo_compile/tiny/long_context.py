"""Train the built-in model on to a context of 4,096 tokens, and the variants that start from there.

    python -m mimo_compile.tiny.long_context base --out tiny-4k --work work
    python -m mimo_compile.tiny.long_context gates --init tiny-4k --out gates.safetensors --work work
    python -m mimo_compile.tiny.long_context indexers --init tiny-4k --out indexers.safetensors --work work
    python -m mimo_compile.tiny.long_context hysparse --init tiny-4k --out hysparse.safetensors \
        --work work

Texts are code and tasks of recall (`recall.py`), at lengths that grow along the way. The schedule
follows the number of tokens, not the clock, so a run may be paused at any time. The state is saved
every few minutes in the folder `--work`; started again with `--resume`, a run goes on from there.

`base` leaves the draft layers out, because they would have to be trained along. The bases of the
rotation stay: at 4,096 the slowest frequency of the global layers (base 100,000) has turned by a
twelfth of a radian, half of every head is not rotated at all, and the frequencies between meet
their new angles in training.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

if __package__ in (None, ""):  # run as a plain file
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from mimo_compile.tiny import corpus as text
from mimo_compile.tiny.checkpoint import export, from_tensors, load, to_tensors
from mimo_compile.tiny.gates import (
    Chooser,
    GateShape,
    coverage,
    divergence,
    new_gates,
    observe,
    save_gates,
)
from mimo_compile.tiny.hysparse import HySparseShape, from_hybrid, save_hysparse
from mimo_compile.tiny.indexers import IndexerShape, new_indexers, save_indexers
from mimo_compile.tiny.recall import ANSWER, CODE, Mixture, Sample, Writer
from mimo_compile.tiny.training_loop import Loop, Progress, Settings, mean_loss, run_or_stop, show
from mimo_compile.tiny.training_model import TinyModel
from mimo_compile.tiny.training_ops import weighted_cross_entropy

SHARES = {"code": 0.4, "needles": 0.25, "pairs": 0.25, "copy": 0.1}
"""How often each kind of text is drawn."""
STAGES = ((0.0, 1024), (0.25, 2048), (0.55, 4096))
"""From which share of the run on texts have how many tokens."""
CHUNK, PIECE = 512, 256
"""Tokens whose scores exist at a time while gates, or indexers, learn."""


@dataclass(frozen=True, slots=True)
class LongSettings(Settings):
    """How to train on long texts; `minutes`, `length`, `micro_batch`, `accumulate` have no effect."""

    budget: int = 4_500_000
    """Tokens of the whole run."""
    stages: tuple[tuple[float, int], ...] = STAGES
    tokens_per_step: int = 8192
    tokens_at_once: int = 2048
    """Of a micro-batch, where texts are shorter."""
    answer_weight: float = 2.0
    """Weight of a token that has to be looked up; others have 1."""
    warm_up: float = 0.02
    decay_from: float = 0.5


class LongTrainer(Loop):
    """Trains a decoder without draft layers on a mixture of long texts."""

    def __init__(
        self, model: TinyModel, writer: Callable[[int], Writer], settings: LongSettings,
        tokenizer_json: str = "", shares: dict[str, float] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model, settings, tokenizer_json)
        self.long = settings
        self._writer, self._shares = writer, shares or SHARES
        self.new_data(settings.seed)
        self._weights = torch.zeros(3)
        self._weights[CODE], self._weights[ANSWER] = 1.0, settings.answer_weight
        self._hidden: Callable[..., tuple[Tensor, Tensor]] = model.hidden
        if settings.compiled:
            self._hidden = torch.compile(model.hidden, dynamic=False)

    def new_data(self, seed: int) -> None:
        """Draw texts as `seed` says."""
        self.mixture = Mixture(self._writer(seed), self._shares)

    def done(self) -> float:
        """The share of the tokens that are used up."""
        return self.progress.tokens / self.long.budget

    def length(self) -> int:
        """Tokens of a text at this stage."""
        done = self.done()
        return next(n for start, n in reversed(self.long.stages) if done >= start)

    def _at_once(self) -> int:
        return max(1, self.long.tokens_at_once // self.length())

    def accumulate(self) -> int:
        """Micro-batches of a step."""
        return max(1, self.long.tokens_per_step // (self._at_once() * self.length()))

    def step_tokens(self) -> int:
        """Tokens of a step."""
        return self.accumulate() * self._at_once() * self.length()

    def micro_step(self) -> tuple[dict[str, Tensor], Tensor]:
        """Losses of all learned tokens, of code, and of the answers of each kind (nats per token)."""
        m, batch = self.model, self.mixture.take(self._at_once(), self.length() + 1)
        n = batch.ids.shape[1] - 1
        hidden, loads = self._hidden(batch.ids[:, :n], m.rope(n, True), m.rope(n, False))
        labels = batch.labels[:, 1:].long()
        mean, losses = weighted_cross_entropy(
            m.norm(hidden).flatten(0, 1), m.embed_tokens, batch.ids[:, 1:].flatten(),
            self._weights[labels].flatten(), compiled=self.long.compiled,
        )  # fmt: skip
        (mean / self.accumulate()).backward()
        found = {"loss": mean.detach()}
        for kind, row, label in zip(batch.kinds, losses.view(labels.shape), labels, strict=True):
            name, of = ("code", CODE) if kind == "code" else (kind, ANSWER)
            if bool((label == of).any()):
                found[name] = row[label == of].mean()
        return found, loads


@torch.no_grad()
def recall(model: TinyModel, samples: list[Sample]) -> list[list[bool]]:
    """Whether each answer of each sample would be given by greedy decoding.

    An answer counts if all its tokens are the model's first choice, given the ones before.
    """
    found = []
    for sample in samples:
        ids = torch.from_numpy(sample.ids.astype(np.int64))
        normed = model(ids[None, :-1])[0][0]
        right = []
        for answer in sample.answers:
            said = model.logits(normed[answer.start - 1 : answer.stop - 1]).argmax(-1)
            right.append(bool((said == ids[answer.start : answer.stop]).all()))
        found.append(right)
    return found


def judge(
    model: TinyModel, writer: Writer, lengths: tuple[int, ...] = (1024, 4096)
) -> dict[str, float]:
    """A quick look: held-out loss and recall at each length, over few samples of `writer`."""
    found = {}
    for n in lengths:
        code = np.concatenate([writer.code_ids(n + 1)[:n] for _ in range(max(1, 4096 // n))])
        found[f"code_{n}"] = mean_loss(model, code, n)
        for kind, facts in (("needles", 16), ("pairs", n // 64)):
            make = getattr(writer, kind)
            samples = [make(n, facts, at_end=True, separator=1) for _ in range(max(1, 4096 // n))]
            right = [r for rs in recall(model, samples) for r in rs]
            found[f"{kind}_{n}"] = sum(right) / len(right)
    return found


def writers(tokenizer: Tokenizer) -> tuple[Callable[[int], Writer], Callable[[int], Writer]]:
    """What makes training texts and held-out texts, each from a seed; half library, half tests."""
    corpus = text.collect()
    library, tests, held_out = (
        text.encode(tokenizer, files) for files in (corpus.train, corpus.tests, corpus.held_out)
    )
    print(json.dumps({**text.provenance(corpus), "held_out_files": len(corpus.held_out)}))
    streams, shares = ([library, tests], [0.5, 0.5]) if len(tests) else ([library], [1.0])
    return (
        lambda seed: Writer(tokenizer, streams, shares, seed),
        lambda seed: Writer(tokenizer, [held_out], [1.0], seed),
    )


def train_decoder(
    model: TinyModel, tokenizer: Tokenizer, settings: LongSettings, state: Path, resume: bool
) -> LongTrainer:
    """Train `model` to the end of its schedule or until stopped; return the trainer."""
    learn, held_out = writers(tokenizer)
    trainer = LongTrainer(model, learn, settings, tokenizer.to_str())
    if resume and state.exists():
        trainer.resume(state)
    run_or_stop(trainer, lambda: judge(model, held_out(7)), state, every=5.0)
    return trainer


def second_half(n: int, step: int) -> list[range]:
    """What gates learn from: of a text of `n` tokens those that are far enough from its begin."""
    return [range(at, min(n, at + CHUNK)) for at in range(n // 2, n, CHUNK)]


def two_pieces(n: int, step: int) -> list[range]:
    """What indexers learn from, which choose for prompts, too: pieces anywhere, others in each step."""
    draw = np.random.default_rng(step).permutation(-(-n // PIECE))[:2]
    return [range(at, min(n, at + PIECE)) for at in (PIECE * draw).tolist()]


def train_gates(
    model: TinyModel, gates: Mapping[int, Chooser], writer: Writer, progress: Progress, steps: int,
    n: int, rate: float, save: Callable[[], None],
    pick: Callable[[int, int], Sequence[range]] = second_half,
) -> None:  # fmt: skip
    """Distil gates or indexers from the frozen `model` on texts of `n` tokens, of which `pick` says some.

    The rate falls to zero along a line. Every twentieth step is logged and `save` called.
    """
    mixture = Mixture(writer, SHARES)
    parameters = [p for gate in gates.values() for p in gate.parameters()]
    adam = torch.optim.AdamW(parameters, rate, weight_decay=0.0)
    rope = model.rope(n, False)
    while progress.steps < steps:
        for group in adam.param_groups:
            group["lr"] = rate * (1.0 - progress.steps / steps)
        seen = observe(model, mixture.take(1, n).ids[0], gates)
        row: dict[str, float] = {"step": progress.steps}
        pieces = pick(n, progress.steps)
        for i, gate in gates.items():
            for rows in pieces:
                loss = divergence(gate, seen[i], rope, rows)
                (loss / len(pieces)).backward()
                row[f"kl{i}"] = row.get(f"kl{i}", 0.0) + loss.item() / len(pieces)
        adam.step()
        adam.zero_grad(set_to_none=True)
        progress.steps += 1
        progress.tokens += n
        if progress.steps % 20 == 0 or progress.steps == steps:
            for i, gate in gates.items():
                for share in (16, 4):
                    count = n // gate.block // share
                    kept = coverage(gate, seen[i], rope, range(n - 256, n), count)
                    row[f"kept{i}_{share}"], row[f"best{i}_{share}"] = kept
            progress.log.append(row)
            show(row)
            save()


def _base(args: argparse.Namespace, settings: LongSettings) -> None:
    init = args.init or Path(__file__).parent
    tokenizer = Tokenizer.from_file(str(init / "tokenizer.json"))
    start = load(init)
    model = TinyModel(replace(start.config, mtp_layers=0))
    from_tensors(model, to_tensors(start))
    state = args.work / "base.state"
    trainer = train_decoder(model, tokenizer, settings, state, args.resume)
    export(model, trainer.tokenizer_json, args.out)


def _hysparse(args: argparse.Namespace, settings: LongSettings) -> None:
    tokenizer = Tokenizer.from_file(str(args.init / "tokenizer.json"))
    shape = HySparseShape(args.block, args.budget)
    model = from_hybrid(load(args.init), shape)
    settings = replace(settings, bias_rate=0.0, router_rate=0.0)
    train_decoder(model, tokenizer, settings, args.work / "hysparse.state", args.resume)
    save_hysparse(model, args.out, args.init.name)


def _gates(args: argparse.Namespace) -> None:
    """Distil gates, or indexers."""
    tokenizer = Tokenizer.from_file(str(args.init / "tokenizer.json"))
    model = load(args.init)
    learn, _ = writers(tokenizer)
    gates: Mapping[int, Chooser]
    if args.what == "indexers":
        made = new_indexers(model, IndexerShape(args.heads, args.width), args.seed)
        gates, pick, write = made, two_pieces, partial(save_indexers, made)
    else:
        own = new_gates(model, GateShape(args.block, args.width), args.seed)
        gates, pick, write = own, second_half, partial(save_gates, own)
    progress, state = Progress(), args.work / f"{args.what}.state"

    def save() -> None:
        part = state.with_suffix(".part")
        torch.save(
            {"gates": {i: g.state_dict() for i, g in gates.items()}, "steps": progress.steps}, part
        )
        part.replace(state)

    if args.resume and state.exists():
        kept = torch.load(state, weights_only=True)
        for i, gate in gates.items():
            gate.load_state_dict(kept["gates"][i])
        progress.steps = kept["steps"]
    writer = learn(args.seed + 1000 + progress.steps)
    train_gates(model, gates, writer, progress, args.steps, args.length, args.gate_rate, save, pick)
    write(args.out, args.init.name)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="example: python -m mimo_compile.tiny.long_context base --out tiny-4k --work work",
    )
    parser.add_argument("what", choices=("base", "gates", "indexers", "hysparse"))
    parser.add_argument("--out", type=Path, required=True, help="folder (base) or file to write")
    parser.add_argument("--work", type=Path, required=True, help="folder for the state")
    parser.add_argument("--init", type=Path, help="model folder to start from (base: tiny)")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --work")
    parser.add_argument(
        "--tokens", type=int, default=LongSettings().budget, help="of the whole run"
    )
    parser.add_argument("--rate", type=float, default=0.5, help="factor on tiny's learning rates")
    parser.add_argument(
        "--gate-rate", type=float, default=3e-3, help="first learning rate of gates and indexers"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true", help="run without torch.compile")
    parser.add_argument("--block", type=int, default=32, help="tokens of a block (gates, hysparse)")
    parser.add_argument("--width", type=int, default=64, help="of a gate's or an indexer's head")
    parser.add_argument("--heads", type=int, default=4, help="of an indexer")
    parser.add_argument("--steps", type=int, default=200, help="texts to distil from")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a text for them")
    parser.add_argument("--budget", type=int, default=256, help="tokens of hysparse's lists")
    args = parser.parse_args()
    if args.what != "base" and args.init is None:
        parser.error(f"{args.what} needs --init, the folder of the trained base")
    if args.what == "hysparse":
        try:
            HySparseShape(args.block, args.budget)
        except ValueError as error:
            parser.error(f"--block and --budget: {error}")
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    start = Settings()
    settings = LongSettings(
        budget=args.tokens,
        matrix_rate=start.matrix_rate * args.rate,
        rest_rate=start.rest_rate * args.rate,
        router_rate=start.router_rate * args.rate,
        bias_rate=start.bias_rate * args.rate,
        seed=args.seed,
        compiled=not args.no_compile,
    )
    if args.what in ("gates", "indexers"):
        _gates(args)
    else:
        (_base if args.what == "base" else _hysparse)(args, settings)


if __name__ == "__main__":
    main()
