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
import hashlib
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

import msgspec

from mimo_compile.cost_models.analytic import DeviceModel
from mimo_compile.cost_models.updating import DynamicShare
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import PRESETS, Hardware
from mimo_compile.ir.ops import parse_workload
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Kernel, Schedule, Space
from mimo_compile.search import Database, tune_workloads
from mimo_compile.search.joules import Joules
from mimo_compile.search.lookup import Result
from mimo_compile.search.measure.recording import Recording
from mimo_compile.search.measure.replay import ReplayMeasurer
from mimo_compile.search.meters.replay import ReplayMeter
from mimo_compile.search.objective import parse_objective
from mimo_compile.search.records import Record, Verdict, versions
from mimo_compile.search.space import Candidate

HW = PRESETS["x86-64-v3"].with_threads(2)
DEVICE = DeviceModel.guess(HW)
WORKLOAD = parse_workload("swiglu:t=64,f=8192")
POWERS = (1, 2, 4, 8, 16, 32, 64, 128)
ORDERED: dict[str, tuple[int, ...]] = {
    "rows": POWERS, "cols": POWERS, "unroll": POWERS[:6], "prefetch": (0, 1, 2, 4, 8, 16),
    "split": POWERS[:6],
}  # fmt: skip
CHOICES: dict[str, tuple[str, ...]] = {
    "order": ("ab", "ba", "aab"), "layout": ("p", "q", "r", "s"), "store": ("plain", "stream"),
}  # fmt: skip
GAP = 0.2
"""Part of the energy that the planted value saves; it changes no time."""


@dataclass(frozen=True)
class Law:
    """What kind of machine: strengths of what time and energy depend on."""

    time_pairs: float = 0.0
    """Largest effect of two knobs together on time, as a logarithm."""
    energy_knobs: float = 0.06
    """Largest effect of each knob's value on energy."""
    energy_pairs: float = 0.0
    time_noise: float = 0.003
    energy_noise: float = 0.01
    planted: bool = False
    """One layout saves `GAP` of the energy; nothing else than time matters to it."""
    slope: float = 0.0
    """Energy falls by this power of the time that ``split`` costs: what is frugal is slow."""
    metered: bool = True


LAWS: dict[str, Law] = {
    "smooth": Law(),
    "twins": Law(energy_knobs=0.0, energy_noise=0.002, planted=True),
    "trade": Law(slope=3.0),
    "rugged": Law(time_pairs=0.04, energy_pairs=0.03, energy_noise=0.02),
    "loud": Law(energy_knobs=0.03, energy_noise=0.04),
    "modelled": Law(metered=False),
}


def number(*what: object) -> float:
    """Return a number in [-1, 1] that belongs to these words."""
    digest = hashlib.sha256("|".join(map(str, what)).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**47 - 1


def make(**knobs: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(knobs.items()))


class Paper(Schedule):
    """Some 3.3e5 configs; what they declare says part of what they cost."""

    name = "swiglu.paper"
    op = "swiglu"
    config = tuple

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        return True

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        knobs: dict[str, Any] = {**ORDERED, **CHOICES}
        return Space(make, knobs, make(**{k: v[0] for k, v in knobs.items()}))

    def config_from_json(self, values: Any) -> Any:
        return make(**values)

    @staticmethod
    def config_to_json(config: Any) -> dict[str, Any]:
        return dict(config)

    def lower(self, workload: Workload, config: Any, hardware: Hardware) -> Kernel:
        raise AssertionError("nothing is built")

    def work(self, workload: Workload, config: Any, hardware: Hardware) -> Counts:
        c, n = dict(config), float(workload.integer("t") * workload.integer("f"))
        return Counts(
            {"fma_f32": 2 * n, "int_op": n * (1 / c["unroll"] + c["split"] / 32)},
            {
                "dram": 12 * n * (1 + 0.3 * c["split"] / 32),
                "l2": 12 * n * (1 + 4 / c["rows"]),
                "l1": 12 * n * (1 + 8 / c["cols"]),
            },
            {
                "tasks": 64.0, "share": 0.5, "useful": 1.0, "lanes": 8.0, "sums": 8.0, "loads": 1.0,
                "tile_bytes": 64.0 * c["rows"] * c["cols"],
            },
        )  # fmt: skip


class Machine(ReplayMeasurer):
    """Measures any candidate by a law; ``seed`` draws its coefficients."""

    def __init__(self, law: Law, seed: int) -> None:
        super().__init__([])
        self.law, self.seed = law, seed
        self.watts = 9.0 + 6.0 * (1 + self._at("watts"))
        self.picojoules = {
            level: base * 2 ** self._at("level", level)
            for level, base in (("l1", 20.0), ("l2", 60.0), ("dram", 160.0))
        }
        self.frugal = CHOICES["layout"][int(2 * (1 + self._at("frugal"))) % 4]

    def _at(self, *what: object) -> float:
        return number(self.seed, *what)

    def latency_us(self, c: Candidate) -> float:
        """Flat around an optimum of its own for each knob; some values of choices cost a little."""
        config, log = c.config, 0.0
        for knob, values in ORDERED.items():
            best = (len(values) - 1) * (0.5 + 0.3 * self._at("best", knob))
            far = max(0.0, abs(values.index(config[knob]) - best) - 0.7)
            log += 0.03 * (1.2 + self._at("steep", knob)) * far**2
        for knob in CHOICES:
            if self.law.planted and knob == "layout":
                continue
            log += 0.03 * max(0.0, self._at("choice", knob, config[knob]))
        log += self.law.time_pairs * self._pairs(config, "time")
        return 100.0 * math.exp(log) * (1 + self.law.time_noise * self._at("noise", c.key))

    def _pairs(self, config: Any, what: str) -> float:
        names = sorted(config)
        pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
        chosen = [p for p in pairs if self._at("pair", what, *p) > 0.6]
        return sum(self._at(what, a, config[a], b, config[b]) for a, b in chosen)

    def energy_mj(self, c: Candidate, latency_us: float) -> float:
        """Return millijoules by coefficients that no model here is told of."""
        config, law = c.config, self.law
        mj = self.watts * latency_us * 1e-3
        if law.planted:
            mj *= 1 - GAP * (config["layout"] == self.frugal)
        else:
            work = Paper().work(WORKLOAD, c.knobs, HW)
            mj += sum(v * self.picojoules[k] for k, v in work.bytes.items()) * 1e-9
        log = sum(law.energy_knobs * self._at("joules", k, config[k]) for k in config)
        log += law.energy_pairs * self._pairs(config, "energy")
        if law.slope:
            values = ORDERED["split"]
            best = (len(values) - 1) * (0.5 + 0.3 * self._at("best", "split"))
            log -= law.slope * 0.02 * abs(values.index(config["split"]) - best)
        return mj * math.exp(log) * (1 + law.energy_noise * self._at("read", c.key))

    def _find(self, candidate: Candidate) -> Record:
        us = self.latency_us(candidate)
        work = Paper().work(WORKLOAD, candidate.knobs, HW)
        mj = self.energy_mj(candidate, us) if self.law.metered else None
        return Record(
            key="", workload=str(WORKLOAD), schedule=Paper.name, schedule_version=1,
            config=candidate.config, hardware=HW.id, features=(), threads=2, cache="cold",
            versions=versions(), verdict=Verdict.OK, latency_us=us, ops=dict(work.ops),
            bytes=dict(work.bytes), modelled_mj=DEVICE.energy_mj(work, us), energy_mj=mj,
            energy_source="replay" if mj is not None else "", energy_window_s=1.0,
        )  # fmt: skip

    def describe(self, space: Any, candidates: Sequence[Candidate]) -> list[Counts | None]:
        return [Paper().work(WORKLOAD, c.knobs, HW) for c in candidates]


def with_joules(recording: Recording, seed: int) -> ReplayMeasurer:
    """Return a recorded space's measurer with joules by a hidden law over its times and its work."""
    measurer = recording.measurer()
    rates = {lv: 2 ** number(seed, lv) for lv in ("l1", "l2", "l3", "dram")}
    watts = 15.0 * 2 ** number(seed, "watts")

    def joules(r: Record) -> float | None:
        if r.latency_us is None:
            return None
        mj = watts * r.latency_us * 1e-3
        mj += sum(60.0 * rates.get(lv, 1.0) * n for lv, n in r.bytes.items()) * 1e-9
        log = sum(0.06 * number(seed, r.schedule, k, v) for k, v in r.config.items())
        noise = 0.01 * number(seed, "read", r.schedule, sorted(r.config.items()))
        return mj * math.exp(log) * (1 + noise)

    measurer._known = {
        key: msgspec.structs.replace(
            r, energy_mj=joules(r), energy_source="replay", energy_window_s=1.0
        )
        for key, r in measurer._known.items()
    }
    return measurer


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
