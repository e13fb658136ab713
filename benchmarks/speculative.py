"""Tokens per second with and without drafts, beside each other in one run; acceptance of each head.

Each text is decoded in every way, in turns; ratios are text by text, medians with [smallest..largest]. Greedy
texts with drafts are compared with those without. Then what one order of sums costs: the same model compiled
with `--reproducible none`, plain decoding and the step that verifies, beside the usual artifact.

    python benchmarks/speculative.py                         # the built-in model
    python benchmarks/speculative.py tiny --quant w4g64a8 --texts 16 --tokens 256 --threads 1
    python benchmarks/speculative.py path/to/checkpoint --file prompts.txt
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import mimo_compile as mc
from mimo_compile.runtime import Speculation, Stats
from mimo_compile.runtime.speculate import doubt


def prompts_of(module: Any, args: argparse.Namespace) -> list[Any]:
    """Return the first tokens of texts: of a file's lines, or of held-out modules of the standard library."""
    if args.file is not None:
        texts = [line for line in args.file.read_text().splitlines() if line.strip()]
    else:
        from mimo_compile.tiny import corpus

        texts = [file.text for file in corpus.collect().held_out]
    ids = (module.tokenizer.encode(text).ids[: args.prompt] for text in texts)
    return [found for found in ids if args.file or len(found) == args.prompt][: args.texts]


def ways(module: Any) -> dict[str, Any]:
    """Return the ways to decode by their names."""
    most = module.manifest.decoder.mtp
    return {
        "plain": False,
        "adaptive": True,
        **{f"{k} draft{'s' * (k > 1)}": Speculation(k) for k in range(1, most + 1)},
    }


def clock_of(module: Any) -> Any:
    """Return what tells the time: for one thread its CPU time, which does not count the work of others."""
    return time.process_time if module.threads == 1 else time.perf_counter


def compare(module: Any, args: argparse.Namespace) -> None:
    """Decode all texts in all ways and print rates, ratios and acceptance."""
    prompts = prompts_of(module, args)
    rates: dict[str, list[float]] = {name: [] for name in ways(module)}
    totals: dict[str, Stats] = {}
    different, clock = 0, clock_of(module)
    for prompt in prompts:
        texts = {}
        for name, how in ways(module).items():
            stats = Stats()
            ids = module.generate_ids(
                prompt, args.tokens, stop_at_eos=False, speculative=how, stats=stats,
                temperature=args.temperature, seed=1,
            )  # fmt: skip
            texts[name] = [next(ids)]
            begin = clock()
            texts[name] += ids
            rates[name].append((len(texts[name]) - 1) / (clock() - begin))
            total = totals.setdefault(name, Stats())
            total.passes += stats.passes
            for kind in ("drafted", "judged", "accepted"):
                before = getattr(total, kind) or [0] * len(getattr(stats, kind))
                added = [a + b for a, b in zip(before, getattr(stats, kind), strict=True)]
                setattr(total, kind, added)
        different += sum(text != texts["plain"] for text in texts.values())
    why = doubt(module.manifest.decoder)
    print(
        f"{len(prompts)} texts of {args.prompt} tokens and {args.tokens} more, {module.threads} threads"
    )
    print(f"texts unlike the plain one: {different}" + (f" ({why})" if why else ""))
    for name, found in rates.items():
        times = np.array(found) / np.array(rates["plain"])
        line = f"{name:10} {np.median(found):8.0f} tokens/s  x {np.median(times):.2f}"
        line += f" [{times.min():.2f}..{times.max():.2f}]"
        if told := totals[name].acceptance:
            heads = " ".join(
                "-" if h["rate"] is None else f"{h['rate']:.3f}" for h in told["heads"]
            )
            line += f"  {told['tokens_per_pass']:.2f} tokens/pass, accepted {heads}"
        print(line)


def steps(module: Any, entries: tuple[str, ...], rounds: int) -> dict[str, float]:
    """Return the least of the medians of rounds of calls, in microseconds, of each entry point."""
    out: dict[str, list[float]] = {name: [] for name in entries}
    clock = clock_of(module)
    session = module.session()
    session.append(np.arange(200) % module.manifest.decoder.vocab)
    for _ in range(rounds):
        for name in entries:
            bound = module.bind(name)
            if "pos" in bound.inputs:
                bound.inputs["pos"][...] = session.position, 1 if name.endswith("_1") else 4
            times = []
            for _ in range(50):
                begin = clock()
                bound.run()
                times.append(clock() - begin)
            out[name].append(float(np.median(times)) * 1e6)
    return {name: min(found) for name, found in out.items()}


def cost(alike: Any, free: Any, rounds: int = 9) -> None:
    """Print what entry points take in both artifacts."""
    entries = ("step_1", "step_4", "head_1", "head_4")
    print("one order of sums, beside kernels that are free to differ:")
    one, other = steps(alike, entries, rounds), steps(free, entries, rounds)
    for name in entries:
        share = 100 * (one[name] / other[name] - 1)
        print(f"  {name:7} {one[name]:9.1f} us, free {other[name]:9.1f} us ({share:+.1f} %)")


def main() -> None:
    """Compile, compare, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", nargs="?", default="tiny")
    parser.add_argument("--quant", default="w8a8")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--file", type=Path, help="a prompt in each line")
    parser.add_argument("--db", type=Path, help="records of kernels that were tuned before")
    args = parser.parse_args()
    made = {}
    with tempfile.TemporaryDirectory() as folder:
        for scope in ("drafts", "none"):
            artifact = mc.compile(
                args.source, quant=args.quant, threads=args.threads, reproducible=scope, db=args.db
            )
            made[scope] = mc.load(artifact.save(Path(folder) / f"{scope}.mimo"))
        compare(made["drafts"], args)
        cost(made["drafts"], made["none"])


if __name__ == "__main__":
    main()
