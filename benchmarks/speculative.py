"""Tokens per second with and without drafts, beside each other in one run; acceptance of each head.

Each text is decoded in every way, in turns; ratios are text by text, medians with [smallest..largest]. Greedy
texts with drafts are compared with those without. Then what entry points take, and how many bytes of weights
they read for it; beside it what one order of sums costs: the same model compiled with `--reproducible none`.

    python benchmarks/speculative.py                         # the built-in model
    python benchmarks/speculative.py --shape dense --threads 1 --keep FOLDER --write docs/speculative.md
    python benchmarks/speculative.py tiny --quant w4g64a8 --texts 16 --tokens 256 --threads 1
    python benchmarks/speculative.py path/to/checkpoint --file prompts.txt

The built-in model is so small that its weights stay in the processor's caches. `--shape` makes a larger one
of it that says the same (`wide.py`), and counts the texts that are the small one's.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from expert_memory import around, put
from wide import SHAPES, widened

import mimo_compile as mc
from mimo_compile.ir import functions
from mimo_compile.ir.hardware import resolve_target
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.ir.workload import Workload
from mimo_compile.runtime import Speculation, Stats
from mimo_compile.runtime.routing import recording
from mimo_compile.runtime.speculate import doubt
from mimo_compile.search.calibrate import load as known_rates

ENTRIES = ("step_1", "head_1", "step_4", "head_4", "mtp0_1")
ROUND = 0.4
"""Seconds of calls of one entry point before it is another one's turn."""


def prompts_of(module: Any, args: argparse.Namespace) -> list[list[int]]:
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


@dataclass
class Told:
    """What was measured of one way to decode."""

    rates: list[float] = field(default_factory=list)
    """Tokens per second, text by text."""
    total: Stats = field(default_factory=Stats)

    def add(self, rate: float, stats: Stats) -> None:
        """Take note of one text."""
        self.rates.append(rate)
        self.total.passes += stats.passes
        for kind in ("drafted", "judged", "accepted"):
            before = getattr(self.total, kind) or [0] * len(getattr(stats, kind))
            added = [a + b for a, b in zip(before, getattr(stats, kind), strict=True)]
            setattr(self.total, kind, added)


def compare(
    module: Any, prompts: Sequence[list[int]], args: argparse.Namespace
) -> tuple[dict[str, Told], list[dict[str, list[int]]]]:
    """Decode all texts in all ways; returns what was measured of each, and each text's tokens."""
    found, clock = {name: Told() for name in ways(module)}, clock_of(module)
    texts: list[dict[str, list[int]]] = []
    for number, prompt in enumerate(prompts):
        order, made = list(ways(module).items()), {}
        for name, how in order[number % len(order) :] + order[: number % len(order)]:
            stats = Stats()
            ids = module.generate_ids(
                prompt, args.tokens, stop_at_eos=False, speculative=how, stats=stats,
                temperature=args.temperature, seed=1,
            )  # fmt: skip
            made[name] = [next(ids)]
            begin = clock()
            made[name] += ids
            found[name].add((len(made[name]) - 1) / (clock() - begin), stats)
        texts.append(made)
    return found, texts


def rates_table(found: dict[str, Told]) -> str:
    """Return tokens per second and acceptance as a table in Markdown."""
    lines = [
        "| drafts of a pass | tokens/s | times plain | tokens for each pass | kept of each head's drafts |",
        "|---|---|---|---|---|",
    ]
    for name, told in found.items():
        times = np.array(told.rates) / np.array(found["plain"].rates)
        line = f"| {name} | {np.median(told.rates):.1f} | {np.median(times):.2f} "
        line += f"[{times.min():.2f}..{times.max():.2f}] |"
        if facts := told.total.acceptance:
            heads = ("–" if h["rate"] is None else f"{h['rate']:.2f}" for h in facts["heads"])
            line += f" {facts['tokens_per_pass']:.2f} | {', '.join(heads)} |"
        else:
            line += " 1 | – |"
        lines.append(line)
    return "\n".join(lines)


class Timed:
    """The entry points of one artifact, called as when text is decoded: each call appends the next tokens."""

    def __init__(self, module: Any, text: Sequence[int]) -> None:
        """Fill the states with half of a text, which calls go on with."""
        self.module, self._text, self._clock = module, text, clock_of(module)
        self._states = np.random.default_rng(0).standard_normal((4, module.manifest.decoder.hidden))
        self._session = module.session()
        self._start = len(text) // 2
        self._session.append(text[: self._start])
        self.seconds: dict[str, list[float]] = {name: [] for name in ENTRIES}

    def call(self, entry: str) -> None:
        """Call an entry point for a while, and keep the median time of a call."""
        at, times, end = self._start, [], time.perf_counter() + ROUND
        count = int(entry.rpartition("_")[2])
        while len(times) < 3 or time.perf_counter() < end:
            if not entry.startswith("step"):  # heads come when the caches hold the steps' weights
                self._ready("step_1", at).run()
            at = at + count if at + 2 * count <= len(self._text) else self._start
            bound = self._ready(entry, at)
            begin = self._clock()
            bound.run()
            times.append(self._clock() - begin)
        self.seconds[entry].append(float(np.median(times[1:])))

    def _ready(self, entry: str, at: int) -> Any:
        """Return an entry point whose inputs are the tokens from a position on, or some hidden states."""
        bound, count = self.module.bind(entry), int(entry.rpartition("_")[2])
        for name, array in bound.inputs.items():
            if name == "pos":
                array[...] = at, count
            else:
                array[...] = self._text[at : at + count] if name == "ids" else self._states[:count]
        return bound

    @property
    def least(self) -> dict[str, float]:
        """The least time of a call, in seconds, of each entry point."""
        return {name: min(found) for name, found in self.seconds.items()}


def hit(module: Any, prompt: list[int], args: argparse.Namespace) -> dict[int, float]:
    """Return how many experts of a layer 1 and 4 tokens that follow each other get; empty without any."""
    if not any(c.workload.startswith("moe:") for c in module.manifest.plan):
        return {}
    with recording(module) as recorder:
        list(module.generate_ids(prompt, args.tokens, stop_at_eos=False))
    ids = recorder.log().ids[len(prompt) :]  # [tokens, layers, k]
    out = {}
    for count in (1, 4):
        whole = ids[: len(ids) // count * count].reshape(-1, count, *ids.shape[1:])
        sets = whole.transpose(0, 2, 1, 3).reshape(-1, count * ids.shape[2])
        out[count] = float(np.mean([len(set(row)) for row in sets.tolist()]))
    return out


def weight_bytes(module: Any, entry: str, experts: dict[int, float]) -> float:
    """Return the bytes of weights that no kernel of an entry point can avoid to read, once each."""
    total = 0.0
    for choice in module.manifest.plan:
        if not choice.calls.get(entry):
            continue
        if Workload.parse(choice.workload).op in (functions.OP, "embed"):
            continue  # little weights, or a row of them
        workload = parse_workload(choice.workload)
        op = get_op(workload.op)
        if not any(arg.role == "weight" for arg in op.args(workload)):
            continue
        if workload.op == "moe":
            one, two = (op.counts_of(workload, {"ids": np.arange(n)}).bytes["dram"] for n in (1, 2))
            each = two - one
            moved = one + each * (experts[int(entry.rpartition("_")[2])] - 1)
        else:
            moved = op.counts(workload).bytes.get("dram", 0.0)
        total += choice.calls[entry] * moved
    return total


def steps_table(alike: Timed, free: Timed, experts: dict[int, float]) -> str:
    """Return what entry points take and read, and what one order of sums costs, as a table in Markdown."""
    lines = [
        "| entry point | ms | MB of weights | GB/s | kernels free to differ, ms | one order of sums |",
        "|---|---|---|---|---|---|",
    ]
    one, other = alike.least, free.least
    for name in ENTRIES:
        size = weight_bytes(alike.module, name, experts)
        lines.append(
            f"| `{name}` | {1e3 * one[name]:.3g} | {size / 1e6:.1f} | {size / one[name] / 1e9:.1f} "
            f"| {1e3 * other[name]:.3g} | {100 * (one[name] / other[name] - 1):+.1f} % |"
        )
    return "\n".join(lines)


def gains(alike: Timed, most: Told, experts: dict[int, float]) -> str:
    """Return what a pass over four tokens and a draft cost beside a token, and what they give by that."""
    took = alike.least
    token = took["step_1"] + took["head_1"]
    verify, draft = (
        (took["step_4"] + took["head_4"]) / token,
        (took["mtp0_1"] + took["head_1"]) / token,
    )
    size = {
        t: sum(weight_bytes(alike.module, f"{k}_{t}", experts) for k in ("step", "head"))
        for t in (1, 4)
    }
    facts = most.total.acceptance
    assert facts is not None
    heads, expected = len(facts["heads"]), facts["tokens_per_pass"]
    text = (
        f"A pass over four tokens takes {verify:.2f} times one over a token, whose weights are "
        f"{size[4] / size[1]:.2f} times the bytes; a draft takes {draft:.2f} of it. "
        f"By these times all heads give {expected:.2f} / ({verify:.2f} + {heads} x {draft:.2f}) = "
        f"{expected / (verify + heads * draft):.2f} times."
    )
    if experts:
        text += (
            f" Experts of a layer that one token gets: {experts[1]:.1f}, four: {experts[4]:.1f}."
        )
    return text


def artifact(source: Any, name: str, scope: str, folder: Path, args: argparse.Namespace) -> Path:
    """Return an artifact in a folder, compiled unless it is there."""
    threads = resolve_target("cpu", args.threads).threads
    path = folder / f"{name}-{args.quant}-{scope}-{threads}.mimo"
    if not path.exists():
        made = mc.compile(
            source(), quant=args.quant, threads=args.threads, reproducible=scope, db=args.db
        )
        made.save(path)
    return path


def artifacts(folder: Path, args: argparse.Namespace) -> dict[str, Path]:
    """Return the model with one order of sums and without, and with `--shape` the one that it is made of."""
    with tempfile.TemporaryDirectory() as checkpoint:
        made: list[Path] = []

        def larger() -> Path:
            if not made:
                made.append(widened(Path(checkpoint), SHAPES[args.shape]))
            return made[0]

        name = args.shape or Path(args.source).name
        source = larger if args.shape else lambda: args.source
        found = {scope: artifact(source, name, scope, folder, args) for scope in ("drafts", "none")}
        if args.shape:
            found["tiny"] = artifact(lambda: "tiny", "tiny", "drafts", folder, args)
    return found


def head_line(module: Any, texts: list[dict[str, list[int]]], args: argparse.Namespace) -> str:
    """Return what was decoded where, and which texts are equal."""
    hardware = resolve_target("cpu", module.threads)
    rates = known_rates(hardware)
    different = sum(text != made["plain"] for made in texts for text in made.values())
    why = doubt(module.manifest.decoder)
    line = f"{len(texts)} texts of {args.prompt} tokens and {args.tokens} more, `{args.quant}`, "
    line += f"{module.threads} thread{'s' * (module.threads > 1)} of {hardware.name}"
    if rates is not None:
        steps = rates.bytes_per_s["dram"]
        line += f" (from memory: {steps[min(module.threads, len(steps)) - 1] / 1e9:.0f} GB/s)"
    line += (
        f". Load average of the minute before: {args.load:.1f}. Texts unlike the plain one: {different}"
        + (f" ({why})." if why else ".")
    )
    return line


def same_as(small: Any, prompts: Sequence[list[int]], texts: list[dict[str, list[int]]]) -> str:
    """Return how many plain texts are those of the small model, and where others part from them."""
    count = len(texts[0]["plain"])
    parted = []
    for prompt, made in zip(prompts, texts, strict=True):
        own = list(small.generate_ids(prompt, count, stop_at_eos=False))
        if own != made["plain"]:
            parted.append(
                next(i for i, (a, b) in enumerate(zip(own, made["plain"], strict=True)) if a != b)
            )
    line = f" Texts that are the built-in model's: {len(texts) - len(parted)} of {len(texts)}"
    return line + (f"; others part behind {', '.join(map(str, parted))} tokens." if parted else ".")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", nargs="?", default="tiny")
    parser.add_argument(
        "--shape", choices=SHAPES, help="a larger model that says what the built-in one does"
    )
    parser.add_argument("--quant", default="w8a8")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5, help="times that entry points are timed")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--file", type=Path, help="a prompt in each line")
    parser.add_argument("--db", type=Path, help="records of kernels that were tuned before")
    parser.add_argument(
        "--keep", type=Path, help="folder for artifacts; those that are there are used again"
    )
    parser.add_argument("--write", type=Path, help="put the tables between the marks of this page")
    args = parser.parse_args()
    if args.shape and args.source != "tiny":
        parser.error("--shape makes a larger model of tiny: leave the source out")
    if args.shape and args.temperature > 0:
        parser.error(
            "--shape has copies of words, which change what is drawn: leave --temperature out"
        )
    return args


def main() -> None:
    """Compile, compare, print, write."""
    args = arguments()
    mark = f"speculation {args.shape or args.source}"
    args.load = os.getloadavg()[0]
    if args.write:
        around(args.write, mark)  # before all the measuring
    with tempfile.TemporaryDirectory() as folder:
        if args.keep:
            args.keep.mkdir(parents=True, exist_ok=True)
        modules = {
            name: mc.load(path, threads=args.threads)
            for name, path in artifacts(args.keep or Path(folder), args).items()
        }
        module = modules["drafts"]
        prompts = prompts_of(module, args)
        found, texts = compare(module, prompts, args)
        experts = hit(module, prompts[0], args)
        text = [*prompts[0], *texts[0]["plain"]]
        timed = [Timed(modules[name], text) for name in ("drafts", "none")]
        for number in range(args.rounds):
            for entry in ENTRIES:
                for one in timed[:: -1 if number % 2 else 1]:
                    one.call(entry)
        line = head_line(module, texts, args)
        if args.shape:
            line += same_as(modules["tiny"], prompts, texts)
    most = found[list(found)[-1]]
    parts = [line, rates_table(found), gains(timed[0], most, experts), steps_table(*timed, experts)]
    print("\n\n".join(parts))
    if args.write:
        put(args.write, mark, "\n\n".join(parts))


if __name__ == "__main__":
    main()
