"""Forecasts and placements of expert load: the built-in model's own routing, and synthetic traces.

    python benchmarks/expert_load.py --artifact t.mimo --keep routing.safetensors --out load.jsonl
    python benchmarks/expert_load.py --keep routing.safetensors --out load.jsonl --write docs/experts.md

The first command reads the held-out text with an artifact of `tiny` (any quantisation) and keeps its
routing log, which later ones use again. Predictors at two horizons, each beside the noise of counting;
then placements on 2 and 4 devices. All forecasts are of steps that the predictor has not seen.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from mimo_compile.errors import InputError
from mimo_compile.experts.backtest import backtest
from mimo_compile.experts.forecast import Predictor, SlidingAverage, get_predictor
from mimo_compile.experts.noise import wander
from mimo_compile.experts.placement import greedy, judge, partition, round_robin
from mimo_compile.experts.synthetic import drifting
from mimo_compile.experts.trace import LoadTrace
from mimo_compile.runtime.routing import RoutingLog, recording

HORIZONS = (1000, 2000)
LONG = 1000
"""Steps of a second average."""
LEARNED = 2200
"""Steps behind which all predictors learn from what came before, for the longer horizon, too."""
TOKENS, SIDE_BY_SIDE = 16, 16
"""Tokens of a step of the real trace; texts that it is counted side by side for."""
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def record(artifact: Path, length: int) -> RoutingLog:
    """Run the held-out text through an artifact, in windows of so many tokens."""
    from mimo_compile.runtime import load
    from mimo_compile.tiny import corpus

    module = load(artifact)
    texts = [file.text for file in corpus.collect().held_out]
    with recording(module, most=None) as recorder:
        for text in texts:
            ids = np.array([0, *module.tokenizer.encode(text).ids], np.int32)
            for at in range(0, len(ids), length):
                for _ in module.session().chunks(ids[at : at + length]):
                    pass
    return recorder.log()


def traces(log: RoutingLog) -> dict[str, tuple[LoadTrace, list[int]]]:
    """Return each trace with the steps at which it is forecast."""
    walk, slow = drifting(seed=1), drifting(begin=0.06, decay=1200.0, seed=1)
    real = LoadTrace.of_log(log, TOKENS)
    # windows of one file follow each other in the log; those that a server has at a time are strangers
    names = np.random.default_rng(0).permutation(int(log.sequence.max()) + 1).astype(np.int32)
    strangers = replace(log, sequence=names[log.sequence])
    mixed = LoadTrace.of_log(strangers, TOKENS, SIDE_BY_SIDE)

    def late(trace: LoadTrace) -> list[int]:
        last = len(trace.counts) - max(HORIZONS)
        if last < LEARNED:
            raise InputError(f"{len(trace.counts)} steps are too few", file="routing log")
        return [int(t) for t in np.linspace(max(last // 2, LEARNED), last, 3)]

    return {
        "tiny, file after file": (real, late(real)),
        f"tiny, {SIDE_BY_SIDE} windows side by side": (mixed, late(mixed)),
        "synthetic, transient": (walk, [200, 300, 400]),
        "synthetic, long transient": (slow, [LEARNED, 2400, 2600]),
        "synthetic, stable": (walk, [2500, 3250, 4000]),
    }


def predictors() -> list[Predictor]:
    """Return those that are judged."""
    short, *others = (get_predictor(name) for name in ("average", "arima", "lstm"))
    return [short, SlidingAverage(LONG, f"average of {LONG}"), *others]


def forecasts(
    name: str, trace: LoadTrace, origins: Sequence[int], predictor: Predictor
) -> list[dict]:
    """Judge a predictor on one trace."""
    found = wander(trace)
    draws = int(trace.counts[:, 0].sum(-1).mean())
    rows = backtest(trace, [predictor], HORIZONS, origins=origins)
    return [
        {
            "kind": "forecast", "trace": name, "steps": len(trace.counts), "experts": trace.experts,
            "draws": draws, "origins": list(origins), "dispersion": float(np.nanmean(found.dispersion)),
            **asdict(replace(row, error=None, floor=None, window_floor=None)),
            "error": row.error.relative, "mass": row.error.mass, "dead": row.error.dead,
            "floor": row.floor.relative, "floor_mass": row.floor.mass,
            "window_floor": row.window_floor.relative,
        }
        for row in rows
    ]  # fmt: skip


def placements(name: str, trace: LoadTrace, devices: int) -> list[dict]:
    """Place by the first half of a trace, judge by the second one."""
    half = len(trace.counts) // 2
    known, later = trace.part(0, half), trace.part(half, len(trace.counts))
    ahead = len(later.counts)
    shares = get_predictor("average", half).forecast(known.shares(), (ahead,)).shares[ahead]
    layers = len(trace.layers)
    made = [round_robin(layers, trace.experts, devices), greedy(shares, devices)]
    made += [partition(shares, known.ids, devices, slack) for slack in (0.05, 0.25)]
    labels = ("round robin", "greedy", "partition, 5 % slack", "partition, 25 % slack")
    return [
        {
            "kind": "placement", "trace": name, "devices": devices, "placement": label,
            **asdict(judge(one, shares, later)),
        }
        for label, one in zip(labels, made, strict=True)
    ]  # fmt: skip


def page(rows: list[dict]) -> str:
    """Return both tables in Markdown."""

    def percent(value: float) -> str:
        return f"{100 * value:.2f} %"

    out = [
        "| trace | steps ahead | predictor | error | floor | floor of an average of 100 | wrong tokens | s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if r["kind"] == "forecast":
            cells = (
                r["trace"], r["horizon"], r["predictor"] + " *" * bool(r["notes"]),
                percent(r["error"]), percent(r["floor"]), percent(r["window_floor"]), percent(r["mass"]),
                f"{r['seconds']:.2f}",
            )  # fmt: skip
            out.append("| " + " | ".join(str(c) for c in cells) + " |")
    out += [
        "",
        "| trace | devices | placement | predicted | replayed | by step | fan-out | crossing |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if r["kind"] == "placement":
            keys = ("predicted", "replayed", "by_step", "fan_out", "crossing")
            cells = (r["trace"], r["devices"], r["placement"], *(f"{r[k]:.3f}" for k in keys))
            out.append("| " + " | ".join(str(c) for c in cells) + " |")
    return "\n".join(out)


def write(path: Path, text: str) -> None:
    """Put the tables between the marks of a page."""
    whole = path.read_text()
    before, _, rest = whole.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise InputError(f"it has no {BEGIN} and {END}", file=path)
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--artifact", type=Path, help="of tiny; needed where --keep is not there yet"
    )
    parser.add_argument("--keep", type=Path, required=True, help="the routing log")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window (default: 512)")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines")
    parser.add_argument("--write", type=Path, help="put the tables into this page")
    args = parser.parse_args()
    if not args.out.exists():
        if not args.keep.exists():
            if args.artifact is None:
                raise SystemExit(f"{args.keep} is not there: give --artifact to make it")
            record(args.artifact, args.length).save(args.keep)
        rows: list[dict] = []
        for name, (trace, origins) in traces(RoutingLog.load(args.keep)).items():
            for predictor in predictors():
                rows += forecasts(name, trace, origins, predictor)
                print(page(rows[-len(HORIZONS) :]).splitlines()[2:4])
            if trace.ids is not None:
                rows += [row for devices in (2, 4) for row in placements(name, trace, devices)]
            print(name, len(trace.counts), "steps")
        args.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [json.loads(line) for line in args.out.read_text().splitlines()]
    print(page(rows))
    if args.write is not None:
        write(args.write, page(rows))


if __name__ == "__main__":
    main()
