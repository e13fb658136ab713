"""Trials that searches need on recorded spaces: ours, chance, Kernel Tuner, Optuna, TVM MetaSchedule.

    python benchmarks/search_quality.py                             # ours and chance, all of spaces/
    python benchmarks/search_quality.py --peers kernel_tuner,optuna,metaschedule --out q.jsonl
    python benchmarks/search_quality.py --out q.jsonl --write       # -> docs/search-quality.md

A space holds the time of each legal config, so a search is replayed in seconds and nothing is measured.
Counted are distinct legal configs until one is within 2 % (5 %) of the least time of all; the median and
quartiles over seeds are shown. A config that is illegal, or was asked for before, costs a peer no trial, but
a search that asked `4 * limit + 400` times in all is given up like one that spent its trials: it counts as
missed, and how many ended so is shown (`cut`). Ours
runs as in the product (tuner, strategy, cost model), with an empty database and without its early stop.
`ours-blind` begins without the schedules' defaults, as all peers do: these are compared. `ours-warm` and
`ours-warm-blind` have a model of other shapes besides, as the product has where there are records: it is
trained on the other recorded spaces, never on the one that is searched.

How a joint space is offered: Kernel Tuner gets one parameter for the algorithm and the union of all knobs,
those that an algorithm does not have fixed, with the legal configs as its restriction, in simulation mode on
the same numbers (`kernel_tuner_replay.py`). Optuna gets a categorical parameter for the algorithm and then
that algorithm's knobs; it cannot be told what is legal, so illegal trials are reported to it as failed.
MetaSchedule gets a sketch for each algorithm, whose trace samples one category a knob, and a postprocessor
that refuses what is illegal (`metaschedule_replay.py`). It takes no starting points, and runs with rounds of
its own 64 candidates and of 8.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
from other_spaces import load, train_on_others
from pages import add_line, read_lines, write_part

from mimo_compile.cost_models.learned import LatencyModel
from mimo_compile.search import tuner as tuner_module
from mimo_compile.search.budget import Budget, Clock
from mimo_compile.search.database import Database
from mimo_compile.search.learner import Prior
from mimo_compile.search.measure.recording import Recording
from mimo_compile.search.objective import parse_objective
from mimo_compile.search.space import Candidate
from mimo_compile.search.tuner import Tuner

SPACES = Path(__file__).parent / "spaces"
LEVELS = (1.05, 1.02)
PAGE = "search-quality.md"


class Enough(KeyboardInterrupt):
    """The tightest level is reached, or the trials are spent."""


class Lookup:
    """Answers a search and counts: time of a config, infinite if it failed; each new one is a trial."""

    def __init__(self, recording: Recording, limit: int) -> None:
        self.recording, self.limit = recording, limit
        self.times = {
            (r.schedule, tuple(sorted(r.config.items()))): r.latency_us if r.ok else math.inf
            for r in recording.records
        }
        self.goals = [f * recording.best_us for f in LEVELS]
        self.reached: list[int | None] = [None] * len(LEVELS)
        self.seen: set = set()
        self.asked = 0
        self.most = 4 * limit + 400
        """Times that it may ask, repeated and illegal configs included."""
        self.cut = False
        self.prior: Path | None = None
        """A model of other spaces, for searches that start warm."""

    def __call__(self, schedule: str, knobs: dict) -> float | None:
        """Return the time, None for an illegal config."""
        key = schedule, tuple(sorted(knobs.items()))
        self.asked += 1
        if self.asked > self.most:
            self.cut = True
            raise Enough
        time_us = self.times.get(key)
        if time_us is None or key in self.seen:
            return time_us
        self.seen.add(key)
        for i, goal in enumerate(self.goals):
            if self.reached[i] is None and time_us <= goal:
                self.reached[i] = len(self.seen)
        if self.reached[-1] is not None or len(self.seen) >= self.limit:
            raise Enough
        return time_us


def ours(
    lookup: Lookup,
    seed: int,
    *,
    strategy: str = "evolutionary",
    blind: bool = False,
    warm: bool = False,
) -> None:
    recording = lookup.recording
    measurer = recording.measurer()
    answer = measurer._answer

    def counted(candidate: Candidate, number: int):
        lookup(candidate.schedule, candidate.config)
        return answer(candidate, number)

    measurer._answer = counted
    tuner_module.patience = lambda size, batch: 10**9  # no early stop
    with tempfile.TemporaryDirectory(dir=_memory()) as folder, Database(Path(folder) / "db") as db:
        tuner = Tuner(
            recording.hardware, db, measurer, parse_objective("latency"), seed=seed,
            device=recording.device, strategy=strategy, prior=_prior(lookup.prior) if warm else None,
        )  # fmt: skip
        tuner.add(recording.workload, 1.0, recording.schedules())
        if blind:
            tuner.tasks[0].strategy._seeds.clear()
        tuner.run(Clock(Budget(trials=lookup.limit + 1), None))


@cache
def _prior(path: Path) -> Prior:
    model = LatencyModel.load(path)
    return Prior(model, frozenset(model.meta["schedules"]), "other spaces")


def _memory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def chance(lookup: Lookup, seed: int) -> None:
    keys = list(lookup.times)
    for i in np.random.default_rng(seed).permutation(len(keys)):
        schedule, knobs = keys[int(i)]
        lookup(schedule, dict(knobs))


# -- Optuna ------------------------------------------------------------------------------------


def optuna_search(lookup: Lookup, seed: int, *, sampler: str) -> None:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    make = {
        "tpe": lambda: optuna.samplers.TPESampler(seed=seed),
        "tpe-joint": lambda: optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True),
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
        "gp": lambda: optuna.samplers.GPSampler(seed=seed),
    }[sampler]
    study = optuna.create_study(sampler=make())
    knobs = lookup.recording.knobs
    names = list(knobs)

    while True:
        trial = study.ask()
        schedule = trial.suggest_categorical("schedule", names)
        config = {}
        for knob, values in knobs[schedule].items():
            config[knob] = trial.suggest_categorical(f"{schedule}.{knob}", list(values))
        value = lookup(schedule, config)
        if value is None or math.isinf(value):
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, value)


# -- the table ---------------------------------------------------------------------------------

Search = Callable[[Lookup, int], None]


def contestants(peers: list[str]) -> dict[str, Search]:
    out: dict[str, Search] = {
        "ours": ours,
        "ours-blind": lambda lk, s: ours(lk, s, blind=True),
        "ours-warm": lambda lk, s: ours(lk, s, warm=True),
        "ours-warm-blind": lambda lk, s: ours(lk, s, warm=True, blind=True),
        "random": chance,
    }
    if "optuna" in peers:
        for sampler in ("tpe", "tpe-joint", "random"):
            out[f"optuna {sampler}"] = lambda lk, s, sampler=sampler: optuna_search(
                lk, s, sampler=sampler
            )
    if "kernel_tuner" in peers:
        import kernel_tuner_replay as kt

        for strategy in kt.STRATEGIES:
            out[f"kernel_tuner {strategy}"] = lambda lk, s, n=strategy: kt.search(lk, s, n)
    if "metaschedule" in peers:
        import metaschedule_replay as ms

        for name in ms.ROUNDS:
            out[name] = lambda lk, s, n=name: ms.search(lk, s, n, Enough)
    return out


def versions_of(peers: list[str]) -> dict[str, str]:
    package = {"kernel_tuner": "kernel-tuner", "optuna": "optuna", "metaschedule": "apache-tvm"}
    return {p: version(package[p]) for p in peers}


def one(job: tuple[str, str, int, int, list[str], Path | None]) -> tuple[list[int | None], bool]:
    """Run one search; return the trials at each level (None: not reached), and whether it asked too often."""
    path, name, seed, limit, peers, prior = job
    lookup = Lookup(load(Path(path)), limit)
    lookup.prior = prior
    with contextlib.suppress(Enough):
        contestants(peers)[name](lookup, seed)
    return lookup.reached, lookup.cut


def quartiles(values: list[int | None], limit: int) -> dict[str, float | None]:
    """Summarise; runs that did not get there count as more than all others."""
    known = sorted(math.inf if v is None else v for v in values)
    pick = [statistics.median(known)]
    pick += [known[round(q * (len(known) - 1))] for q in (0.25, 0.75)]
    median, low, high = (None if math.isinf(v) else v for v in pick)
    return {"median": median, "p25": low, "p75": high, "missed": sum(v is None for v in values)}


def summary(
    name: str, recording: Recording, search: str, got: list, args: argparse.Namespace
) -> dict:
    """Return the line of one search on one space."""
    limit = len(recording.records) if search == "random" else args.limit
    reached, cut = zip(*got, strict=True)
    loose, tight = (quartiles([r[i] for r in reached], limit) for i in (0, 1))
    return {
        "space": name, "workload": str(recording.workload), "threads": recording.hardware.threads,
        "cache": recording.cache, "configs": len(recording.records), "best_us": recording.best_us,
        "within_percent": {f"{f:g}": 100 * recording.share_within(f) for f in LEVELS},
        "search": search, "seeds": args.seeds, "limit": limit, "within_2": tight, "within_5": loose,
        "trials": reached, "cut": sum(cut),
    }  # fmt: skip


def by_space(lines: list[dict]) -> dict[str, dict[str, dict]]:
    """Return lines by space and search, those with the fewest configs first; a later line counts."""
    out: dict[str, dict[str, dict]] = {}
    for line in sorted(lines, key=lambda x: (x["workload"].partition(":")[0], x["configs"])):
        out.setdefault(line["space"], {})[line["search"]] = line
    return out


def median_of(line: dict) -> float:
    value = line["within_2"]["median"]
    return math.inf if value is None else value


BLIND = ("ours-warm-blind", "ours-blind")
OURS = ("ours-warm", "ours", *BLIND)


def table(lines: list[dict]) -> str:
    """Return two tables: what the spaces are and who is best on them, and all medians."""
    spaces = by_space(lines)
    columns = "space", "workload, threads", "configs", "in 2 %", *BLIND, "random", "best peer"
    out = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    least: Counter[str] = Counter()
    for name, found in spaces.items():
        chance_line = found["random"]
        others = {n: x for n, x in found.items() if n not in (*OURS, "random")}
        rival = min(others, key=lambda n: median_of(others[n]))
        own = {n: found[n] for n in OURS if n in found}
        least.update(n for n, x in own.items() if median_of(x) < median_of(others[rival]))
        shares = [
            f"{_spread(own[n])}, {100 * median_of(own[n]) / median_of(chance_line):.0f} %"
            if n in own
            else ""
            for n in BLIND
        ]
        out.append(
            f"| {name} | `{chance_line['workload']}`, {chance_line['threads']} | {chance_line['configs']} | "
            f"{chance_line['within_percent']['1.02']:.2f} % | {' | '.join(shares)} | "
            f"{_spread(chance_line)} | {rival}: {_spread(others[rival])} |"
        )
    most = max(x["limit"] for x in lines if x["search"] != "random")
    wins = ", ".join(f"`{n}` {least[n]}" for n in OURS)
    out += [
        "",
        f"Percentages are of random's median. Fewer trials than every peer, of {len(spaces)} spaces: {wins}. "
        f"All medians (-: less than half of the seeds got there in {most} trials):",
        "", "| search | " + " | ".join(spaces) + " |", "|---|" + "---|" * len(spaces),
    ]  # fmt: skip
    for name in dict.fromkeys((*OURS, *(line["search"] for line in lines))):
        cells = [
            _show(x["within_2"]["median"]) if (x := s.get(name)) else "" for s in spaces.values()
        ]
        out.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(out) + "\n"


def _show(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _spread(line: dict) -> str:
    tight = line["within_2"]
    return f"{_show(tight['median'])} ({_show(tight['p25'])} to {_show(tight['p75'])})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "spaces", nargs="*", type=Path, help="recordings (default: all of benchmarks/spaces)"
    )
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument(
        "--limit", type=int, default=1000, help="trials after which a search is given up"
    )
    parser.add_argument("--peers", default="", help="kernel_tuner,optuna,metaschedule")
    parser.add_argument("--only", default="", help="comma-separated names of searches to run")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a line for each search; those there are left out")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE}")
    args = parser.parse_args()
    lines = read_lines(args.out) if args.out else []
    if args.write:
        write_part(PAGE, "recorded spaces", table(lines))
        return
    paths = args.spaces or sorted(SPACES.glob("*.jsonl.xz"))
    if not paths:
        parser.error(
            f"there are no recordings in {SPACES}: give files, or make some with record_space.py"
        )
    peers = [p for p in args.peers.split(",") if p]
    names = [n for n in contestants(peers) if not args.only or n in args.only.split(",")]
    if not names:
        parser.error(f"no search is called {args.only}: {', '.join(contestants(peers))}")
    versions = versions_of(peers)
    done = {(x["space"], x["search"]) for x in lines if x["seeds"] == args.seeds}
    with ProcessPoolExecutor(args.jobs) as pool, tempfile.TemporaryDirectory() as folder:
        priors: dict[Path, Path] = {}
        if any("warm" in name for name in names):
            priors = train_on_others(sorted({*paths, *SPACES.glob("*.jsonl.xz")}), Path(folder))
        for path in paths:
            recording, space = load(path), path.name.partition(".")[0]
            print(f"\n{path.name}: {recording.workload}, {len(recording.records)} configs, "
                  f"{100 * recording.share_within(1.02):.2f} % within 2 %", flush=True)  # fmt: skip
            print(
                f"{'':26}{'2 %':>7} {'quartiles':>13} {'missed':>6} {'cut':>4} {'5 %':>7} {'seconds':>8}"
            )
            for name in names:
                if (space, name) in done or ("warm" in name and path not in priors):
                    continue
                begin = time.perf_counter()
                limit = len(recording.records) if name == "random" else args.limit
                jobs = [
                    (str(path), name, s, limit, peers, priors.get(path)) for s in range(args.seeds)
                ]
                line = summary(space, recording, name, list(pool.map(one, jobs)), args)
                took = (time.perf_counter() - begin) / args.seeds
                line["version"] = versions.get(name.split()[0], "")
                tight, loose = line["within_2"], line["within_5"]
                spread = f"{_show(tight['p25'])}..{_show(tight['p75'])}"
                print(f"{name:26}{_show(tight['median']):>7} {spread:>13} {tight['missed']:>6} "
                      f"{line['cut']:>4} {_show(loose['median']):>7} {took:8.2f}", flush=True)  # fmt: skip
                if args.out:
                    add_line(args.out, line)


if __name__ == "__main__":
    main()
