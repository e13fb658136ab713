"""How many readings of joules a search needs, and what it misses: hidden energies on machines on paper.

    python benchmarks/energy_search.py [--seeds 20] [--first 100] [--laws twins rugged ...]
    python benchmarks/energy_search.py spaces/*.jsonl.xz --trials 256

No clock and no counter is read: a law gives each candidate its time and its joules, both with noise of its
own, and a search sees nothing of it but what it measures. Each seed is another machine (optimum,
coefficients, which knob saves energy) and another search. Recorded spaces (FILE) keep their times and get
hidden joules.

A search that reads joules where its rule says so stands beside one that reads those of every candidate within
the objective's window:

- readings: of the first, over all candidates that were timed (what reading each of them takes), with the
  most of any search; of near: over the readings of the second (there is none with `--alone`);
- loss: joules of its pick (by the objective) over those of the second's pick, less 1; two searches for the
  same differ by luck too;
- missed: the same over the best of the candidates that it timed itself: what the rule alone cost;
- saved: what the fastest candidate takes more than the pick;
- over: searches whose pick is slower than the limit allows.

The law `modelled` has no meter: its energies are those of the analytic model.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from energy_machines import DEVICE, HW, LAWS, WORKLOAD, Law, Machine, Paper, with_joules

from mimo_compile.cost_models.updating import DynamicShare
from mimo_compile.schedules.base import Schedule
from mimo_compile.search import Database, tune_workloads
from mimo_compile.search.joules import Joules
from mimo_compile.search.lookup import Result
from mimo_compile.search.measure.recording import Recording
from mimo_compile.search.measure.replay import ReplayMeasurer
from mimo_compile.search.meters.replay import ReplayMeter
from mimo_compile.search.objective import parse_objective
from mimo_compile.search.space import Candidate

# -- one search --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What came of one search."""

    pick_us: float
    pick_mj: float
    value: float
    """Of the objective, at the pick."""
    least_value: float
    """The least among the candidates that were timed and keep the limit."""
    fastest_value: float
    """Of the fastest candidate, as a search for latency would have it."""
    over: bool
    """True where the pick does not keep the objective's limit."""
    readings: int
    timed: int
    source: str


@contextlib.contextmanager
def reading_all() -> Iterator[None]:
    """Let searches read the joules of all candidates within the objective's window."""
    with (
        mock.patch.object(DynamicShare, "update", lambda *_: False),  # the share stays 1
        mock.patch.object(Joules, "_margin", lambda self: math.inf),
    ):
        yield


def search(task: str, seed: int, objective: str, trials: int, *, every: bool) -> Found:
    """Search once on a machine of a law, or on a recorded space (a path)."""
    measurer: ReplayMeasurer
    if task in LAWS:
        law = LAWS[task]
        measurer, workload, hardware, device = Machine(law, seed), WORKLOAD, HW, DEVICE
        schedules: list[Schedule] = [Paper()]
    else:
        law, recording = Law(), Recording.load(Path(task))
        measurer, workload = with_joules(recording, seed), recording.workload
        hardware, device, schedules = recording.hardware, recording.device, recording.schedules()
    with (
        tempfile.TemporaryDirectory(dir=_memory()) as folder,
        Database(Path(folder) / "db") as db,
        reading_all() if every else contextlib.nullcontext(),
    ):
        result = tune_workloads(
            {workload: 1.0}, hardware, db=db, measurer=measurer, device=device, trials=trials,
            schedules=schedules, objective=objective, seed=seed, warm_start=False,
            meter=ReplayMeter([]) if law.metered else "modelled",
        )  # fmt: skip
    (w,) = result.workloads
    assert w.best is not None
    goal = parse_objective(objective)

    def joules(r: Result) -> float:
        record = measurer._find(candidate_of(w, r))
        assert record is not None
        mj = record.energy_mj if law.metered else record.modelled_mj
        assert mj is not None
        return mj

    fastest = min(w.results, key=lambda r: r.latency_us)
    values = {
        r.record.key: goal.score((r.latency_us, joules(r)), fastest.latency_us) for r in w.results
    }
    mj, source = w.energy(w.best)
    assert mj is not None
    limit = (goal.limit or 1.0) * fastest.latency_us if goal.kind == "energy@latency" else math.inf
    return Found(
        w.best.latency_us, mj, values[w.best.record.key], min(values.values()),
        goal.score((fastest.latency_us, joules(fastest)), fastest.latency_us),
        w.best.latency_us > limit, len(measurer.metered) if law.metered else 0, w.trials, source,
    )  # fmt: skip


def candidate_of(w: Any, r: Result) -> Candidate:
    return Candidate(w.workload, r.record.schedule, tuple(sorted(r.record.config.items())))


def _memory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def pair(job: tuple[str, int, str, int, bool]) -> tuple[Found, Found]:
    """Search with the rule, and reading all that are near."""
    task, seed, objective, trials, alone = job
    few = search(task, seed, objective, trials, every=False)
    metered = (task not in LAWS or LAWS[task].metered) and not alone
    return few, search(task, seed, objective, trials, every=True) if metered else few


# -- tables ------------------------------------------------------------------------------------


def summary(pairs: Sequence[tuple[Found, Found]]) -> dict[str, float]:
    """Return the figures of one row."""
    loss = [few.value / every.value - 1 for few, every in pairs]
    missed = [few.value / few.least_value - 1 for few, _ in pairs]
    saved = [few.fastest_value / few.value - 1 for few, _ in pairs]
    read = [few.readings / few.timed for few, _ in pairs]
    near = sum(every.readings for _, every in pairs)
    return {
        "searches": len(pairs),
        "readings": sum(f.readings for f, _ in pairs) / sum(f.timed for f, _ in pairs),
        "most_readings": max(read),
        "of_near": sum(f.readings for f, _ in pairs) / near if near else math.nan,
        "loss": statistics.fmean(loss), "loss_sd": statistics.pstdev(loss), "worst_loss": max(loss),
        "missed": statistics.fmean(missed), "worst_missed": max(missed),
        "saved": statistics.fmean(saved), "over": sum(f.over for f, _ in pairs),
    }  # fmt: skip


COLUMNS = ("machine", "objective", "searches", "readings", "most", "of near", "loss", "±", "worst",
           "missed", "worst", "saved", "over")  # fmt: skip
HEAD = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def row(task: str, objective: str, m: dict[str, float]) -> str:
    """Return a line of a Markdown table."""

    def percent(name: str, digits: int = 1) -> str:
        return "-" if math.isnan(m[name]) else f"{100 * m[name]:.{digits}f} %"

    name = task if task in LAWS else Path(task).name.split(".")[0]
    cells = [name, objective, f"{m['searches']:.0f}"]
    cells += [percent(figure, 0) for figure in ("readings", "most_readings", "of_near")]
    cells += [
        percent(figure, 2) for figure in ("loss", "loss_sd", "worst_loss", "missed", "worst_missed")
    ]
    cells += [percent("saved"), f"{m['over']:.0f}"]
    return "| " + " | ".join(cells) + " |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Search, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "files", nargs="*", metavar="FILE", help="recorded spaces, besides the laws"
    )
    parser.add_argument("--laws", nargs="*", choices=list(LAWS), default=list(LAWS))
    parser.add_argument("--objectives", nargs="+", default=["energy@latency:1.05"])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=100, help="the first seed")
    parser.add_argument("--trials", type=int, default=192)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument(
        "--alone", action="store_true", help="without the searches that read all that are near"
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    if not args.json:
        print(HEAD)
    with ProcessPoolExecutor(args.jobs) as pool:
        for objective in args.objectives:
            for task in [*args.laws, *args.files]:
                seeds = range(args.first, args.first + args.seeds)
                found = list(
                    pool.map(pair, [(task, s, objective, args.trials, args.alone) for s in seeds])
                )
                m = summary(found)
                rows.append(
                    {
                        "machine": task, "objective": objective, **m,
                        "each": [{"few": asdict(f), "all": asdict(e)} for f, e in found],
                    }
                )  # fmt: skip
                if not args.json:
                    print(row(task, objective, m), flush=True)
    if args.json:
        json.dump({"trials": args.trials, "rows": rows}, sys.stdout, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
