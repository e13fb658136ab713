"""What it costs that experts stay in the artifact's file: beside all of them in memory, in turn, in one run.

    python benchmarks/expert_memory.py --model wide.mimo --gates gates.safetensors --out memory.jsonl

The model is the built-in one whose experts are made `--factor` times as wide (`wide.py`), and its
first layer, which has none, as wide as a token's experts: it computes the same and routes the same text
alike, while its experts have the bytes, and take the time, of larger ones. Tokens of held-out text are
appended one at a time. Of each token and way the median of `--repeat` runs counts, and their sum is the
way's time. Each run begins with nothing in the slots, so that a token finds the same experts there in every
run but for what comes ahead. Counts are those of the timed tokens of all runs.

The file lies in the system's cache. What a slower one would do is a limit on reading: its bytes are copied,
and whoever reads then waits until a link of that rate would have brought them, in pieces of 256 KiB. Gates
are of the built-in model as it is (`expert_gates.py`): wider experts choose alike.

    python benchmarks/expert_memory.py --pre-gates models/tiny-pre-gates/pre-gates.safetensors --out pre.jsonl

measures another model, the one whose experts are chosen one layer earlier: its own loading on demand,
loading what is chosen and, with `--gates` that were trained on such a model, what these foresee behind it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from wide import Widths, widened

import mimo_compile as mc
from mimo_compile.runtime import ExpertMemory, load
from mimo_compile.runtime.module import Module

WARM = 32
"""Tokens before those that are timed."""
WHOLE, ON_DEMAND, CHOSEN = "all in slots", "on demand", "own pre-gates"
BOTH = f"{CHOSEN}, gates 2 ahead"
COUNTS = frozenset(
    ("needs", "hits", "ahead", "late", "misses", "bytes_read", "loaded_ahead", "dropped", "unused")
)


def widths_of(factor: int) -> Widths:
    """Return the widths of experts with `factor` times as many inner rows.

    The first layer, which has none, gets as many as the experts of a token together.
    """
    from mimo_compile.frontend.huggingface import resolve_source

    config = json.loads((resolve_source("tiny") / "config.json").read_text())
    rows = config["moe_intermediate_size"] * factor * config["num_experts_per_tok"]
    return Widths(experts=factor, inner=max(rows, config["intermediate_size"]))


def model(path: Path | None, factor: int, quant: str, context: int, pre_gates: Path | None) -> Path:
    """Return the artifact, compiled unless it is there."""
    if path is not None and path.exists():
        return path
    with tempfile.TemporaryDirectory() as folder:
        source = widened(Path(folder), widths_of(factor))
        made = mc.compile(source, quant=quant, max_context=context, pre_gates=pre_gates)
        return made.save(path or Path(tempfile.mkdtemp()) / "wide.mimo")


def text(module: Module, count: int) -> list[int]:
    """Return tokens of held-out text."""
    from mimo_compile.tiny import corpus

    ids: list[int] = [0]
    for file in corpus.collect().held_out:
        ids += module.tokenizer.encode(file.text).ids
        if len(ids) >= count:
            return ids[:count]
    raise SystemExit(f"there are not {count} tokens of held-out text")


Rates = list[tuple[float, float | None]]
"""Pairs of a balance and its rate in bytes per second."""


@dataclass(frozen=True)
class Way:
    """A way to have experts."""

    mode: str
    parts: int = 1
    """Experts are so many times the memory for them."""
    file: str = ""
    """How fast the file can be read, for people."""
    rate: float | None = None
    """Bytes in a second; None: as fast as it goes."""
    how: ExpertMemory | None = None
    """None: all are mapped."""


@dataclass(frozen=True)
class Run:
    """One pass over the tokens."""

    number: int
    mode: str
    parts: int
    file: str
    seconds: list[float]
    """Of each timed token."""
    facts: dict[str, float]
    """Counts of the timed tokens, and sizes."""
    digest: str
    """Of all hidden states."""


def timed(path: Path, number: int, way: Way, tokens: list[int]) -> Run:
    """Append tokens one by one, all with one way: what it loads between two of them is its own affair."""
    module = load(path, threads=1, verify="full", expert_memory=way.how)
    session, digest, seconds = module.session(), hashlib.sha256(), []
    for token in tokens[:WARM]:
        session.append([token])
    first = module.experts.facts() if module.experts else {}
    for token in tokens[WARM:]:
        begin = time.perf_counter()
        hidden = session.append([token])
        seconds.append(time.perf_counter() - begin)
        digest.update(hidden.tobytes())
    last = module.experts.facts() if module.experts else {}
    if module.experts:
        module.experts.residency.forget()  # nothing goes on while another way is timed
    facts = {name: last[name] - (first[name] if name in COUNTS else 0) for name in last}
    return Run(number, way.mode, way.parts, way.file, seconds, facts, digest.hexdigest())


def row_of(way: Way, runs: list[Run]) -> dict[str, Any]:
    """Return the figures of a way: of each token the median of all runs counts."""
    count = len(runs[0].seconds)
    total = float(np.median([run.seconds for run in runs], 0).sum())
    row: dict[str, Any] = {
        "mode": way.mode, "parts": way.parts, "file": way.file, "rate": way.rate,
        "tokens_per_s": count / total, "ms": 1e3 * total / count,
    }  # fmt: skip
    if way.how is not None:
        sums = {name: sum(run.facts[name] for run in runs) for name in COUNTS}
        row |= {n: sums[n] / sums["needs"] for n in ("hits", "ahead", "late", "misses")}
        row["mb_read"] = sums["bytes_read"] / (len(runs) * count) / 1e6
        row["begun"] = sums["loaded_ahead"] / (len(runs) * count)
        row["dropped"], row["unused"] = (
            sums[name] / max(sums["loaded_ahead"], 1) for name in ("dropped", "unused")
        )
        row |= {name: runs[0].facts[name] for name in ("slots", "experts")}
    return row


def ways_of(size: int, gates: Path | None, pre_gated: bool, rates: dict[int, Rates]) -> list[Way]:
    """Return the ways to have experts of so many bytes, for each part of them and each rate of the file.

    Where experts are chosen one layer earlier, gates foresee the layer behind, and the next token's first.
    """
    out = [Way("mapped"), Way(WHOLE, how=ExpertMemory(1 << 50))]
    for parts, balance, rate in [(n, *pair) for n, pairs in rates.items() for pair in pairs]:
        file = f"{rate / 1e9:.2f} GB/s ({balance:g})" if rate else "page cache"
        asked: dict[str, dict[str, Any]] = {ON_DEMAND: {"ahead": 0}}
        if pre_gated:
            asked[CHOSEN] = {"ahead": 1}
            if gates is not None:
                asked[BOTH] = {"ahead": 2, "pre_gates": gates}
        else:
            asked |= {f"routers, {n} ahead": {"ahead": n} for n in (1, 2)}
        if gates is not None and not pre_gated:
            asked |= {f"gates, {n} ahead": {"ahead": n, "pre_gates": gates} for n in (1, 2)}
        out += [
            Way(mode, parts, file, rate, ExpertMemory(size // parts, bytes_per_s=rate, **more))
            for mode, more in asked.items()
        ]
    return out


def rates_of(path: Path, size: int, balances: list[float], tokens: list[int]) -> Rates:
    """Return the rate of each balance, by what a token takes and what it misses; both are measured first.

    A balance of 1 is the rate at which the bytes that a token needs, and that are not there, take as long to
    read as the token takes where all experts are in slots.
    """
    whole, few = Way(WHOLE, how=ExpertMemory(1 << 50)), Way("", how=ExpertMemory(size, ahead=0))
    runs = {way: [timed(path, n, way, tokens) for n in range(5)] for way in (whole, few)}
    seconds = row_of(whole, runs[whole])["ms"] / 1e3
    count = 1e6 * row_of(few, runs[few])["mb_read"]
    return [(0.0, None), *((balance, count / seconds / balance) for balance in balances)]


def judged(rows: list[dict[str, Any]]) -> None:
    """Add to each row how many times as fast as on demand it is, and could be at most.

    On demand a token computes for C, as long as it takes where all is in slots, and waits for L, the rest.
    Who reads as much beside it takes the longer of both at least.
    """
    whole = next(row["ms"] for row in rows if row["mode"] == WHOLE)
    base = {(row["parts"], row["file"]): row["ms"] for row in rows if row["mode"] == ON_DEMAND}
    for row in rows:
        demand = base.get((row["parts"], row["file"]))
        if demand is not None:
            row["ratio"] = demand / row["ms"]
            row["most"] = demand / max(whole, demand - whole)


def table(rows: list[dict[str, Any]]) -> str:
    """Return the figures as a table in Markdown."""
    lines = [
        "| slots | file | experts | ms | times on demand | at most | hits | of them ahead | late | misses "
        "| MB read | begun ahead | of them broken off |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    forms = {"ms": ".2f", "ratio": ".2f", "most": ".2f"}
    forms |= dict.fromkeys(("hits", "ahead", "late", "misses"), ".1%")
    forms |= {"mb_read": ".2f", "begun": ".2f", "dropped": ".0%"}
    for row in rows:
        cells = [format(row[n], form) if n in row else "–" for n, form in forms.items()]
        slots = f"{row['slots']:g} of {row['experts']:g}" if "slots" in row else "–"
        lines.append(f"| {slots} | {row['file'] or '–'} | {row['mode']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def around(page: Path, name: str) -> tuple[str, str]:
    """Return a page up to the first of two marks, and from the second one on."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    try:
        text = page.read_text()
    except OSError as error:
        raise SystemExit(f"--write {page}: {error.strerror}; name a page that is there") from error
    before, found, rest = text.partition(begin)
    _, ends, after = rest.partition(end)
    if not found or not ends:
        raise SystemExit(
            f"--write {page}: it has no lines {begin} and {end}; add them in this order"
        )
    return before + begin, end + after


def put(page: Path, name: str, lines: str) -> None:
    """Put a table between the marks of a page."""
    before, after = around(page, name)
    page.write_text(f"{before}\n\n{lines}\n\n{after}")


class Kept:
    """What was measured so far, in a file of JSON lines: a measurement that was broken off goes on there."""

    def __init__(self, path: Path | None, asked: dict[str, Any]) -> None:
        """Read what there is; it must have been ``asked`` for alike."""
        self._path = path
        lines = path.read_text().splitlines() if path and path.exists() else []
        found = [json.loads(line) for line in lines]
        if found and found[0]["asked"] != asked:
            raise SystemExit(f"{path} was measured with other options: {found[0]['asked']}")
        self.rates: dict[int, Rates] = {}
        self.runs: list[Run] = []
        for line in found[1:]:
            if "rates" in line:
                self.rates[line["parts"]] = [tuple(pair) for pair in line["rates"]]
            else:
                self.runs.append(Run(**line))
        if not found:
            self.add({"asked": asked})

    def add(self, line: dict[str, Any]) -> None:
        """Write a line at the end."""
        if self._path:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", type=Path, help="the artifact; compiled and kept if it is not there"
    )
    parser.add_argument("--factor", type=int, default=64, help="how many times as wide experts are")
    parser.add_argument("--quant", default="w2g64")
    parser.add_argument(
        "--parts", type=int, nargs="*", default=[4, 2], help="experts are so many times the memory"
    )
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument(
        "--balance", type=float, nargs="*", default=[0.5, 1, 2],
        help="time to read what is missing over the time to compute, for each rate",
    )  # fmt: skip
    parser.add_argument("--gates", type=Path, help="trained ones, of expert_gates.py")
    parser.add_argument(
        "--pre-gates", type=Path, help="compile the model with these, which choose its experts"
    )
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument(
        "--out", type=Path, help="JSON lines of all runs; one that is there goes on"
    )
    parser.add_argument("--write", type=Path, help="put the table between the marks of this page")
    args = parser.parse_args()
    if args.write:
        around(args.write, "expert memory")  # before all the measuring
    path = model(args.model, args.factor, args.quant, WARM + args.tokens, args.pre_gates)
    tokens = text(load(path), WARM + args.tokens)
    whole = load(path, threads=1, expert_memory=1 << 50)
    assert whole.experts is not None
    size = int(whole.experts.facts()["expert_bytes"])
    told = ("model", "factor", "quant", "tokens", "balance", "gates", "pre_gates")
    kept = Kept(args.out, {name: str(getattr(args, name)) for name in told})
    for parts in args.parts:
        if parts not in kept.rates:
            kept.rates[parts] = rates_of(path, size // parts, args.balance, tokens)
            kept.add({"parts": parts, "rates": kept.rates[parts]})
    ways = ways_of(size, args.gates, args.pre_gates is not None, kept.rates)
    done = {(run.number, run.mode, run.parts, run.file) for run in kept.runs}
    for number in range(args.repeat):
        for way in ways[number % len(ways) :] + ways[: number % len(ways)]:
            if (number, way.mode, way.parts, way.file) not in done:
                run = timed(path, number, way, tokens)
                kept.runs.append(run)
                kept.add(asdict(run))
    if len({run.digest for run in kept.runs}) > 1:
        raise SystemExit("hidden states depend on where experts lie")
    of: dict[tuple[str, int, str], list[Run]] = defaultdict(list)
    for run in kept.runs:
        of[run.mode, run.parts, run.file].append(run)
    rows = [row_of(way, of[way.mode, way.parts, way.file]) for way in ways]
    judged(rows)
    print(table(rows))
    if args.write:
        put(args.write, "expert memory", table(rows))


if __name__ == "__main__":
    main()
