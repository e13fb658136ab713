"""``mimo-compile experts``: how load moves among experts, forecasts of it, and where to put them."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimo_compile.cli.options import check_output, need_extra, positive
from mimo_compile.errors import UsageError

if TYPE_CHECKING:
    from mimo_compile.cli.console import Console
    from mimo_compile.experts.backtest import Row
    from mimo_compile.experts.forecast import Predictor
    from mimo_compile.experts.placement import Judged, Placement
    from mimo_compile.experts.trace import LoadTrace

DESCRIPTION = """\
Show what a routing log (`run --route-log`) says about the load of experts: how even it is and how it
moves, how well its future can be forecast beside the noise of counting, and (with --devices) how
placements of the experts would have done. Forecasts use nothing of what they are judged by."""
EXAMPLE = """
mimo-compile experts r.safetensors --tokens 16
mimo-compile experts r.safetensors --predictors average,arima,lstm --horizon 100 --devices 4
"""
HORIZONS = (1000, 2000)
"""Steps that are forecast unless asked otherwise, where the trace is long enough."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "trace", type=Path, metavar="LOG", help="routing log, or trace of expert load"
    )
    parser.add_argument(
        "--tokens",
        type=positive,
        metavar="N",
        help="tokens of a step (default: those of each call)",
    )
    parser.add_argument(
        "--texts",
        type=positive,
        default=1,
        metavar="B",
        help="count tokens as if so many texts had run side by side (default: 1)",
    )
    parser.add_argument(
        "--window", type=positive, default=100, metavar="W", help="steps averaged (default: 100)"
    )
    parser.add_argument(
        "--horizon",
        type=positive,
        action="append",
        metavar="H",
        help="steps to forecast; may be repeated (default: 1000 and 2000, or half of a shorter trace)",
    )
    parser.add_argument(
        "--predictors",
        default="average",
        metavar="LIST",
        help="average (default), arima, lstm, with commas between; the first one is used for placements",
    )
    parser.add_argument(
        "--origins", type=positive, default=3, metavar="N", help="forecasts to judge (default: 3)"
    )
    parser.add_argument(
        "--devices", type=positive, metavar="D", help="place the experts on so many"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="OUT.json",
        help="write the placements; needs --devices",
    )


def run(args: argparse.Namespace) -> int:
    """Read, forecast, place; return 0."""
    need_extra("experts")
    console: Console = args.console
    if args.output is not None:
        check_output(args.output, ".json")
        if args.devices is None:
            raise UsageError("--output writes placements", remedy="Give --devices, too.")
    from mimo_compile.experts.backtest import backtest, origins_of
    from mimo_compile.experts.forecast import get_predictor
    from mimo_compile.experts.trace import LoadTrace

    names = list(dict.fromkeys(args.predictors.split(",")))
    predictors = [get_predictor(name, args.window, args.seed) for name in names]
    trace = LoadTrace.load(args.trace, args.tokens or 0, args.texts)
    steps = len(trace.counts)
    horizons = tuple(dict.fromkeys(args.horizon or _horizons(steps, args.window)))
    origins = origins_of(steps, max(horizons), args.window, args.origins)
    loads = _loads(trace, args.window)
    rows = backtest(trace, predictors, horizons, origins=origins, window=args.window)
    placed = [] if args.devices is None else _placed(trace, predictors[0], args.devices, args.seed)
    if args.output is not None:
        _write(args.output, args.trace, trace, [placement for placement, _ in placed])
    facts = {
        "ok": True, "path": args.trace, "output": args.output, "steps": steps, "experts": trace.experts,
        "choices_per_step": float(trace.counts[:, 0].sum(-1).mean()), "left_out": trace.left_out,
        "window": args.window, "origins": origins, "load": loads,
        "forecasts": [_forecast(row) for row in rows],
        "placements": [_placement(*one) for one in placed],
    }  # fmt: skip
    _show(console, facts)
    console.result(facts)
    return 0


def _horizons(steps: int, window: int) -> tuple[int, ...]:
    return tuple(h for h in HORIZONS if steps - h >= window) or (max(1, steps // 2),)


def _loads(trace: LoadTrace, window: int) -> list[dict[str, Any]]:
    """Return how the load of each layer is and moves."""
    import numpy as np

    from mimo_compile.experts.noise import wander

    found = wander(trace, min(window, len(trace.counts)))
    totals = trace.counts.sum(0)
    out = []
    for i, layer in enumerate(trace.layers):
        whole = totals[i].sum()
        judged = len(found.stable) >= 3
        changes = int((np.diff(found.stable[:, i].astype(int)) != 0).sum())
        out.append(
            {
                "layer": layer, "busiest": float(totals[i].max() * trace.experts / whole) if whole else None,
                "unused": int((totals[i] == 0).sum()),
                "state": ("stable" if found.stable[-1, i] else "transient") if judged else None,
                "changes": changes if judged else None,
                "excess": float(found.excess[-1, i]) if len(found.excess) else None,
                "dispersion": float(found.dispersion[i]),
            }
        )  # fmt: skip
    return out


def _placed(
    trace: LoadTrace, predictor: Predictor, devices: int, seed: int
) -> list[tuple[Placement, Judged]]:
    """Place experts by the first half of a trace and judge by the second one."""
    from mimo_compile.experts.placement import greedy, judge, partition, round_robin

    steps = len(trace.counts)
    half = steps // 2
    if not half:
        raise UsageError("a trace of one step cannot be forecast", remedy="Record more.")
    known, later = trace.part(0, half), trace.part(half, steps)
    shares = predictor.forecast(known.shares(), (steps - half,)).shares[steps - half]
    found = [round_robin(len(trace.layers), trace.experts, devices), greedy(shares, devices)]
    if known.ids is not None:
        found.append(partition(shares, known.ids, devices, seed=seed))
    return [(one, judge(one, shares, later)) for one in found]


def _write(path: Path, source: Path, trace: LoadTrace, placements: list[Placement]) -> None:
    """Write which device each expert of each layer lies on, by placement."""
    content = {
        "log": source.name,
        "devices": placements[0].devices,
        "placements": {
            one.name: dict(zip(trace.layers, one.device.tolist(), strict=True))
            for one in placements
        },
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _forecast(row: Row) -> dict[str, Any]:
    return {
        "predictor": row.predictor, "horizon": row.horizon, "error": row.error.relative,
        "mass": row.error.mass, "worst": row.worst, "floor": row.floor.relative,
        "floor_mass": row.floor.mass, "window_floor": row.window_floor.relative, "dead": row.error.dead,
        "seconds": row.seconds, "notes": row.notes,
    }  # fmt: skip


def _placement(placement: Placement, judged: Judged) -> dict[str, Any]:
    return {
        "placement": placement.name, "predicted": judged.predicted, "replayed": judged.replayed,
        "by_step": judged.by_step, "fan_out": judged.fan_out, "crossing": judged.crossing,
    }  # fmt: skip


def _show(console: Console, facts: dict[str, Any]) -> None:
    from mimo_compile.cli.console import table

    def percent(value: float | None) -> str:
        return "-" if value is None or math.isnan(value) else f"{100 * value:.2f} %"

    def plain(value: float | None) -> str:
        return "-" if value is None or math.isnan(value) else f"{value:.2f}"

    console.say(
        f"{facts['path']}: {facts['steps']} steps of {facts['choices_per_step']:.0f} choices, "
        f"{len(facts['load'])} layers of {facts['experts']} experts"
    )
    rows: list[tuple[Any, ...]] = [
        (
            one["layer"], plain(one["busiest"]), one["unused"], one["state"] or "-", percent(one["excess"]),
            plain(one["dispersion"]),
        )
        for one in facts["load"]
    ]  # fmt: skip
    console.say(
        table(rows, ("layer", "busiest", "unused", "state", "excess", "dispersion"), right="lrrlrr")
    )
    rows = [
        (
            one["predictor"], one["horizon"], percent(one["error"]), percent(one["floor"]),
            percent(one["window_floor"]), percent(one["mass"]), f"{one['seconds']:.2f}",
        )
        for one in facts["forecasts"]
    ]  # fmt: skip
    names = ("forecast", "steps", "error", "floor", "window's floor", "mass", "seconds")
    console.say("\n" + table(rows, names, right="lrrrrrr"))
    for one in facts["forecasts"]:
        for note in one["notes"]:
            console.log(f"note: {one['predictor']}: {note}")
    if facts["placements"]:
        keys = ("placement", "predicted", "replayed", "by_step", "fan_out", "crossing")
        rows = [
            (one["placement"], *(plain(one[key]) for key in keys[1:]))
            for one in facts["placements"]
        ]
        console.say(
            "\n" + table(rows, (*keys[:3], "by step", "fan-out", "crossing"), right="lrrrrr")
        )
