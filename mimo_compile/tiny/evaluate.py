"""Judge a trained folder: perplexity, acceptance of the MTP heads, a sample of text.

    python -m mimo_compile.tiny.evaluate mimo_compile/tiny

Everything is measured on the weights as stored (bf16), computed in float32, on the held-out
modules of the running interpreter's standard library. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a plain file
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from mimo_compile.tiny import corpus as text
from mimo_compile.tiny.checkpoint import load
from mimo_compile.tiny.ngram import KneserNeyTrigram
from mimo_compile.tiny.training_model import TinyModel


@torch.no_grad()
def perplexity(model: TinyModel, tokens: text.Tokens, length: int, stride: int) -> float:
    """Perplexity per token over tokens[1:], in windows of `length` that advance by `stride`.

    Each token is scored once, by the first window that holds it, so all but the first window's
    have at least `length - stride` tokens of context.
    """
    total, scored = 0.0, 1
    for start in range(0, len(tokens) - 1, stride):
        ids = _ids(tokens[start : start + length + 1])[None]
        losses = F.cross_entropy(
            model.logits(model(ids[:, :-1])[0])[0], ids[0, 1:], reduction="none"
        )
        first = scored - start - 1
        total += losses[first:].double().sum().item()
        scored = start + ids.shape[1]
        if scored >= len(tokens):
            break
    return float(np.exp(total / (len(tokens) - 1)))


def _ids(tokens: text.Tokens) -> Tensor:
    return torch.from_numpy(tokens.astype(np.int64))


@torch.no_grad()
def guesses(model: TinyModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What the model and its heads would say at each position of a known text.

    ids: [time] → (main [time], heads [heads, time]): `main[i]` is the model's choice for
    position i + 1; `heads[s, i]` is head s's choice for position i + 2 + s, from the hidden
    state of i and the true token i + 1 + s. Entries whose token lies past the end repeat it.
    """
    normed, hidden, _ = model(ids[None])
    main = model.logits(normed)[0].argmax(-1)
    heads = []
    for s in range(len(model.mtp)):
        token = torch.cat((ids[1 + s :], ids[-1:].expand(1 + s)))
        heads.append(model.logits(model.draft(s, hidden, token[None]))[0].argmax(-1))
    return main, torch.stack(heads)


@dataclass(frozen=True, slots=True)
class Acceptance:
    """How often drafts hold.

    `head_rates`: share of positions where the head agrees with the model's own choice there.
    `chain_rates`: share of drafting steps in which drafts 1..s were all accepted.
    `mean_length`: tokens emitted per pass of the model, between 1 and heads + 1.
    """

    head_rates: list[float]
    chain_rates: list[float]
    mean_length: float


def teacher_forced(model: TinyModel, tokens: text.Tokens, length: int = 512) -> list[float]:
    """Per head, the share of positions of a true text where it agrees with the model."""
    agree = np.zeros(len(model.mtp))
    count = np.zeros(len(model.mtp))
    for start in range(0, len(tokens) - length + 1, length):
        main, heads = guesses(model, _ids(tokens[start : start + length]))
        for s, head in enumerate(heads):
            equal = head[: length - 1 - s] == main[1 + s :]
            agree[s] += equal.sum().item()
            count[s] += equal.numel()
    return [float(x) for x in agree / count]


@torch.no_grad()
def continue_text(
    model: TinyModel,
    ids: Tensor,
    count: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`ids` [time] followed by up to `count` new tokens; greedy when the temperature is 0."""
    for _ in range(count):
        normed, _, _ = model(ids[None])
        logits = model.logits(normed[:, -1])[0]
        if temperature > 0.0:
            chances = torch.softmax(logits / temperature, dim=-1)
            new = torch.multinomial(chances, 1, generator=generator)
        else:
            new = logits.argmax(keepdim=True)
        ids = torch.cat((ids, new))
        if new.item() == 0:
            break
    return ids


def greedy_chain(
    model: TinyModel, tokens: text.Tokens, prompts: int = 16, prompt: int = 128, count: int = 64
) -> Acceptance:
    """Greedy speculative decoding after `prompts` prompts cut from `tokens`.

    Its output is the model's greedy text, and a draft only matters while all drafts before it
    were right, so one pass over the finished text tells what each step would have accepted.
    """
    lengths: list[int] = []
    agree = np.zeros(len(model.mtp))
    total = 0
    for i in range(prompts):
        start = i * (len(tokens) - prompt) // prompts
        ids = continue_text(model, _ids(tokens[start : start + prompt]), count)
        _, heads = guesses(model, ids)
        at, end = prompt - 1, len(ids) - len(model.mtp) - 2
        for position in range(prompt - 1, end):
            agree += [
                heads[s, position].item() == ids[position + 2 + s].item()
                for s in range(len(model.mtp))
            ]
            total += 1
        while at < end:
            held = 0
            while held < len(heads) and heads[held, at] == ids[at + 2 + held]:
                held += 1
            lengths.append(held + 1)
            at += held + 1
    chain = [float(np.mean([n > s + 1 for n in lengths])) for s in range(len(model.mtp))]
    return Acceptance([float(x) for x in agree / total], chain, float(np.mean(lengths)))


def report(folder: Path, quick: bool = False) -> dict[str, object]:
    """Measure everything about the model in `folder`; `quick` takes an eighth of the text."""
    model = load(folder, torch.float32)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    corpus = text.collect()
    library, tests, held_out = (
        text.encode(tokenizer, files) for files in (corpus.train, corpus.tests, corpus.held_out)
    )
    judged = held_out[: len(held_out) // 8] if quick else held_out
    size = sum(len(f.text.encode()) for f in corpus.held_out)
    ngram = KneserNeyTrigram([library], model.config.vocab_size)
    ngram_all = KneserNeyTrigram([library, tests], model.config.vocab_size)
    main = perplexity(model, judged, 512, 256)
    generator = torch.Generator().manual_seed(0)
    prompt = tokenizer.encode("def ", add_special_tokens=False).ids
    sample = continue_text(model, torch.tensor([0, *prompt]), 120, 0.7, generator)
    chain = greedy_chain(model, held_out, prompts=4 if quick else 16)
    return {
        "tokens": {"library": len(library), "tests": len(tests), "held_out": len(held_out)},
        "perplexity": main,
        "bits_per_byte": float(np.log2(main)) * len(held_out) / size,
        "perplexity_train": perplexity(model, library[: len(judged)], 512, 256),
        "perplexity_by_length": {
            str(n): perplexity(model, judged[: 32 * 1024], n, n // 2)
            for n in (128, 512, 1024, 2048)
        },
        "perplexity_trigram": ngram.perplexity(judged),
        "perplexity_trigram_with_tests": ngram_all.perplexity(judged),
        "teacher_forced": teacher_forced(model, judged),
        "greedy_head_rates": chain.head_rates,
        "greedy_chain_rates": chain.chain_rates,
        "greedy_mean_length": chain.mean_length,
        "sample": tokenizer.decode(sample.tolist(), skip_special_tokens=True),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="an eighth of the text")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(json.dumps(report(args.folder, args.quick), indent=2))


if __name__ == "__main__":
    main()
