"""Tokens per second of several texts decoded together, beside the same texts one after the other, in one run.

A cell is a value of `--quant`, and behind a slash one of `--attention`. Each is compiled with kernels from
records or defaults; both ways go on from the same prompts and take turns. Rates count all texts; ratios are
pair by pair, medians with [smallest..largest].

    python benchmarks/batches.py                                  # the built-in model
    python benchmarks/batches.py my-llama --context 4096 --prompt 2048 --cells w8a8kv16/quest:budget=512
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import mimo_compile as mc
from mimo_compile.runtime.batch import append_each

CELLS = (
    "w4g64a8", "w4g64a8kv16", "w4g64a8kvfp8", "w4g64a8kv8", "w4g64a8kv4", "w4g64a8kv2", "w4g64a8kv1",
    "w4g64a8kv16/quest:budget=64,page=16,dense=0", "w4g64a8kv16/moba:block=64,k=2",
    "w4g64a8kv16/resa:p=0.1", "w4g64a8kv16/lessismore:budget=64,correct=3",
    "w4g64a8kv16/stream:sink=4,recent=124",
)  # fmt: skip
"""Caches of every format, and policies that the built-in model may use."""


def seconds(decode: Callable[[Any], Any], sessions: Sequence[Any], tokens: Any) -> float:
    """Return the time of decoding tokens ``[n, B]``; the sessions end where they were."""
    places = [session.position for session in sessions]
    begin = time.perf_counter()
    for row in tokens.tolist():
        decode(row)
    took = time.perf_counter() - begin
    for session, place in zip(sessions, places, strict=True):
        session.rewind(place)
    return took


def measure(module: Any, args: argparse.Namespace) -> tuple[Any, Any]:
    """Return the seconds of each round, together and one after the other."""
    rng, vocab = np.random.default_rng(0), module.manifest.decoder.vocab
    sessions = [module.session(slot=slot) for slot in range(args.batch)]
    for session in sessions:
        session.append(rng.integers(0, vocab, args.prompt))
    tokens = rng.integers(0, vocab, (args.tokens, args.batch))

    def logits(hidden: Any) -> None:
        for _ in sessions[0].logits(hidden):
            pass

    def together(row: list[int]) -> None:
        logits(append_each(module, sessions, row))

    def apart(row: list[int]) -> None:
        for session, token in zip(sessions, row, strict=True):
            logits(session.append([token], decode=True))

    for decode in (together, apart):
        seconds(decode, sessions, tokens[:2])
    rounds = [[seconds(d, sessions, tokens) for d in (together, apart)] for _ in range(args.rounds)]
    return np.array(rounds).T


def main() -> None:
    """Compile and measure every cell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", nargs="?", default="tiny", help="a model folder")
    parser.add_argument("--cells", nargs="*", default=CELLS, metavar="QUANT[/ATTENTION]")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=16, help="that each text gets in a round")
    parser.add_argument("--context", type=int, default=None, help="default: prompt and tokens")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    most = args.context or args.prompt + args.tokens
    for cell in args.cells:
        quant, _, attention = cell.partition("/")
        with tempfile.TemporaryDirectory() as scratch:
            artifact = mc.compile(
                args.source, quant=quant, attention=attention or "model", max_context=most,
                batch=args.batch, threads=args.threads, db=Path(scratch) / "records.db",
            )  # fmt: skip
            module = mc.load(artifact.save(Path(scratch) / "m.mimo"), threads=args.threads)
            together, apart = measure(module, args)
        count = args.batch * args.tokens
        ratio = np.sort(apart / together)
        print(
            f"{cell}: {count / np.median(together):.1f} tokens/s together, "
            f"{count / np.median(apart):.1f} one after the other: {np.median(ratio):.2f}x "
            f"[{ratio[0]:.2f}..{ratio[-1]:.2f}]",
            flush=True,
        )


if __name__ == "__main__":
    main()
