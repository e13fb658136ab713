"""A 1B-class Llama at a long context: decode speed and memory by KV format and attention policy.

Every variant is compiled once and runs in a process of its own, which reads a random prompt and then decodes
in turns with the others, some tokens at a time, so that ratios hold on a busy machine. `planned` is what
`inspect` says before it runs: weights, states, the largest arena. `held` is the most that was ever resident
while the prompt was read and tokens were decoded, less what the process held before it loaded the artifact.

    python benchmarks/long_context.py FOLDER --prepare              # checkpoint and artifacts
    python benchmarks/long_context.py FOLDER                        # all variants, the prompt read to the end
    python benchmarks/long_context.py FOLDER --context 8192 --only kv16 kv8

A prompt of 32,768 tokens takes minutes for each variant.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import subprocess
import sys
import time
from pathlib import Path

from end_to_end import cli, make_checkpoint

VARIANTS = {
    "kv16": ("kv16", "model"),
    "kv8": ("kv8", "model"),
    "kv4": ("kv4", "model"),
    "window": ("kv16", "window:size=128,every=6"),
    "quest": ("kv16", "quest:budget={tenth},dense=0"),
}
"""Name to the cache's format and the policy; ``{tenth}`` is a tenth of the context."""


def compile_variant(folder, name, settings):
    """Return the artifact of a variant, made now unless it is there."""
    out = folder / f"long-{name}-{settings.context}-{settings.threads}.mimo"
    if not out.exists():
        cache, policy = VARIANTS[name]
        policy = policy.format(tenth=settings.context // 10)
        command = [
            "compile", make_checkpoint(folder, "llama1b"), "--quant", settings.quant + cache,
            "--attention", policy, "--max-context", settings.context, "--threads", settings.threads,
            "-o", out, *(["--db", settings.db] if settings.db else []),
        ]  # fmt: skip
        subprocess.run([sys.executable, "-m", "mimo_compile.cli", *map(str, command)], check=True)
    return out


def serve(artifact, threads, pipe):
    """Run one variant as the parent says: ``prompt N``, ``decode N``, ``memory``."""
    import numpy as np

    import mimo_compile
    from mimo_compile import _tvm
    from mimo_compile.bench.contest import settle
    from mimo_compile.bench.models.worker import memory

    _tvm.runtime()
    base = memory()["rss_bytes"]
    module = mimo_compile.load(artifact, threads=threads)
    session, rng = module.session(), np.random.default_rng(0)
    while (ask := pipe.recv()) is not None:
        what, count = ask
        begin = time.perf_counter()
        if what == "memory":
            pipe.send({"base": base, **memory()})
            continue
        ids = rng.integers(0, module.manifest.decoder.vocab, count)
        if what == "prompt":
            session.append(ids)
        else:
            for token in ids:
                next(session.logits(session.append([token], decode=True)))
        took = (time.perf_counter() - begin) / count
        settle()  # threads that look for more work would take the cores of whoever comes next
        pipe.send(took)


def show(found, first):
    """Print the table of the results; ratios are to the first variant, turn by turn."""
    print("| variant | prompt tok/s | decode tok/s | of the first | planned MB | held MB |")
    print("|---|---|---|---|---|---|")
    for name, row in found.items():
        ratios = sorted(a / b for a, b in zip(found[first]["turns_s"], row["turns_s"], strict=True))
        spread = f"{statistics.median(ratios):.2f}x ({ratios[0]:.2f}..{ratios[-1]:.2f})"
        planned, held = sum(row["planned"].values()), row["held_bytes"]
        parts = ", ".join(f"{what} {n / 1e6:.0f}" for what, n in row["planned"].items())
        print(
            f"| {name} | {1 / row['prompt_s']:.0f} | {1 / statistics.median(row['turns_s']):.1f} | "
            f"{spread} | {planned / 1e6:.0f} ({parts}) | "
            f"{held / 1e6:.0f}, {100 * held / planned - 100:+.1f} % |"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--context", type=int, default=32768, help="tokens, prompt and decoded")
    parser.add_argument("--quant", default="w4g64a8", help="of the weights")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--rounds", type=int, default=12, help="turns of each variant")
    parser.add_argument("--tokens", type=int, default=4, help="decoded in a turn")
    parser.add_argument("--db", type=Path, help="tuning records; default: the user's")
    parser.add_argument("--prepare", action="store_true", help="make all files, measure nothing")
    parser.add_argument("--out", type=Path, help="append the results as a line of JSON")
    settings = parser.parse_args()
    settings.folder.mkdir(parents=True, exist_ok=True)
    made = {n: compile_variant(settings.folder, n, settings) for n in settings.only}
    if settings.prepare:
        return
    spawn, workers = multiprocessing.get_context("spawn"), {}
    for name, artifact in made.items():
        ours, theirs = spawn.Pipe()
        process = spawn.Process(
            target=serve, args=(artifact, settings.threads, theirs), daemon=True
        )
        process.start()
        theirs.close()
        workers[name] = ours

    def ask(name, *what):
        workers[name].send(what)
        return workers[name].recv()

    prompt = settings.context - settings.rounds * settings.tokens - 1
    found = {}
    for name in workers:
        found[name] = {
            "planned": cli(["inspect", made[name]])["planned_bytes"],
            "prompt_s": ask(name, "prompt", prompt),
        }
        print(
            f"{name}: {1 / found[name]['prompt_s']:.0f} tokens/s read", file=sys.stderr, flush=True
        )
    turns = [
        {n: ask(n, "decode", settings.tokens) for n in workers} for _ in range(settings.rounds)
    ]
    for name, worker in workers.items():
        held = ask(name, "memory", 0)
        found[name]["held_bytes"] = held["peak_bytes"] - held["base"]
        found[name]["turns_s"] = [turn[name] for turn in turns]
        worker.send(None)
    show(found, settings.only[0])
    if settings.out:
        with settings.out.open("a") as lines:
            lines.write(json.dumps({"context": settings.context, "quant": settings.quant,
                                    "threads": settings.threads, **found}) + "\n")  # fmt: skip


if __name__ == "__main__":
    main()
