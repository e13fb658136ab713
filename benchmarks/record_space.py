"""Measure a whole space of configs on this machine and write it as one compressed file of records.

Three steps, each resumable, so that little time on a quiet machine suffices:

    python benchmarks/record_space.py build NAME --minutes 9      # compiles everything; may run under load
    python benchmarks/record_space.py time NAME --minutes 9       # verifies and times; wants a quiet machine
    python benchmarks/record_space.py pack NAME                   # -> benchmarks/spaces/NAME.jsonl.xz

NAME is one of `SPACES`, ``all`` for every one of them in turn, or anything with ``--op``. Candidates are
built, verified and timed by the product's own measurer. In the first pass each is verified and timed, in
random order; the second leaves out those more than twice as slow as the best, the others those more than 15 %
slower. Inputs are fresh for each pass. A candidate's time is the median over passes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mimo_compile.errors import InputError, MimoError
from mimo_compile.ir.hardware import Hardware, local_cpu
from mimo_compile.ir.ops import parse_workload
from mimo_compile.schedules import get_schedule
from mimo_compile.schedules.base import KnobValue, Space
from mimo_compile.search.calibrate import device_model
from mimo_compile.search.measure import Measurer, Timing
from mimo_compile.search.measure.base import Limits
from mimo_compile.search.measure.builder import Builder, code_path
from mimo_compile.search.measure.cases import Scratch
from mimo_compile.search.measure.recording import Recording
from mimo_compile.search.measure.worker import Reply
from mimo_compile.search.records import Record, Verdict, record_key, versions
from mimo_compile.search.space import Candidate, JointSpace

HERE = Path(__file__).parent / "spaces"
CHUNK = 32
NEAR = 1.15
"""From the third pass on, times the best that a candidate may take to be timed again."""


@dataclass(frozen=True)
class Wanted:
    """A space to record."""

    op: str
    threads: int = 1
    cache: str = "hot"
    schedules: tuple[str, ...] = ()
    """Names of schedules; all that support the workload if empty."""
    only: tuple[tuple[str, tuple[KnobValue, ...]], ...] = ()
    """Knobs that take only some of their values (and those of the defaults)."""


SPACES = {
    # whole joint spaces: all algorithms with all their knobs
    "gemm_w4": Wanted("mpgemm:m=4,n=2048,k=2048,w=w4g64,a=a8"),
    "gemm_w2": Wanted("mpgemm:m=2,n=2048,k=2048,w=w2g64,a=a8", threads=2),
    "gemv_ternary": Wanted("mpgemm:m=1,n=2048,k=2048,w=w1.58,a=a8"),
    "gemv_w3": Wanted("mpgemm:m=1,n=2048,k=2048,w=w3g64,a=a8", threads=2),
    "gemm_bf16": Wanted("mpgemm:m=16,n=512,k=1024,w=bf16,a=abf16"),
    # attention; its legal configs are fewer
    "attention_append": Wanted("cached_attention:t=16,h=8,kv=2,d=64,dv=64,cap=1024", threads=2),
    "attention_mqa": Wanted("cached_attention:t=16,h=16,kv=1,d=192,dv=128,cap=1024", threads=2),
    "attention_decode": Wanted("cached_attention:t=4,h=32,kv=2,d=64,dv=64,cap=2048", threads=2),
    "attention_bf16": Wanted(
        "cached_attention:t=16,h=8,kv=2,d=64,dv=64,cap=1024,c=bf16", threads=2
    ),
}


def narrowed(space: Space, only: dict[str, tuple[KnobValue, ...]]) -> Space:
    """Return a space whose knobs take only some values, and those of the default."""
    knobs = {
        k: tuple(v for v in values if k not in only or v in (*only[k], getattr(space.default, k)))
        for k, values in space.knobs.items()
    }
    return replace(space, knobs=knobs)


def journal(path: Path) -> list[dict]:
    """Return the rows of a file of JSON lines; a last one without its end (a run was killed) is cut off.

    Raises:
        InputError: another line is damaged.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))  # what is written next begins a line
    rows = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise InputError(
                f"line {number} is damaged: {error}", file=path, remedy="Delete that line"
            ) from error
    return rows


class KeepingBuilder(Builder):
    """Keeps all object code in a folder, from one run to the next."""

    def __init__(self, folder: Path, limits: Limits, scratch: Scratch, count: int) -> None:
        super().__init__(limits, scratch, count)
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.replies: dict[str, Reply] = {}
        for row in journal(folder / "built.jsonl"):
            key = row.pop("key")
            self.replies[key] = Reply(**row)
        self._journal = (folder / "built.jsonl").open("a")

    def build(self, space: JointSpace, candidates: Sequence[Candidate]) -> list[Reply]:
        new = [c for c in candidates if c.key not in self.replies]
        for c, reply in zip(new, super().build(space, new), strict=True) if new else ():
            self.replies[c.key] = reply
            if reply.status == "ok":
                shutil.copyfile(code_path(self._scratch, c), self.folder / f"{c.key}.o")
            if reply.status != "timeout":  # which may be the load's fault: try again another time
                row = {"key": c.key, "status": reply.status, "value": reply.value,
                       "message": reply.message, "kind": reply.kind}  # fmt: skip
                self._journal.write(json.dumps(row) + "\n")
        self._journal.flush()
        return [self.replies[c.key] for c in candidates]

    def provide(self, candidates: Sequence[Candidate]) -> None:
        """Put the kept code of candidates where the runner looks for it."""
        for c in candidates:
            if (kept := self.folder / f"{c.key}.o").exists():
                path = code_path(self._scratch, c)
                path.unlink(missing_ok=True)
                path.symlink_to(kept)

    def keep(self, candidate: Candidate, built: Reply) -> None:
        """All is kept already."""

    def forget(self, *keys: str) -> None:
        for key in keys:
            (self._scratch.path / f"{key}.o").unlink(missing_ok=True)


class Keeper(Measurer):
    """A measurer whose object code stays in a folder."""

    def __init__(self, folder: Path, hardware: Hardware, limits: Limits, **more) -> None:
        super().__init__(hardware, limits=limits, **more)
        self.builder = KeepingBuilder(folder, limits, self._scratch, max(1, hardware.cores))

    def visit(self, space: JointSpace, candidates: Sequence[Candidate], seed: int):
        """Verify and time candidates, on the inputs of a seed."""
        self.builder.build(space, candidates)
        self.builder.provide(candidates)
        yield from self.measure(space, candidates, seed)


class Session:
    """One space under recording: where it is kept, what there is already."""

    def __init__(self, name: str, wanted: Wanted, work: Path, timing: Timing) -> None:
        self.name, self.wanted = name, wanted
        self.folder = work / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.hardware = local_cpu().with_threads(wanted.threads)
        self.workload = parse_workload(wanted.op)
        schedules = [get_schedule(n) for n in wanted.schedules] or None
        self.space = JointSpace(self.workload, self.hardware, schedules)
        for schedule, whole in self.space.spaces.items():
            self.space.spaces[schedule] = narrowed(whole, dict(wanted.only))
        self.candidates = list(self.space)
        self.timing = timing
        self.visits: dict[str, list[dict]] = {}
        for row in journal(self.folder / "visits.jsonl"):
            self.visits.setdefault(row["key"], []).append(row)

    def keeper(self) -> Keeper:
        limits = Limits(build_s=180.0, run_s=60.0)
        device = device_model(self.hardware, measure=False)
        return Keeper(
            self.folder / "code", self.hardware, limits, timing=self.timing, device=device
        )

    def build(self, until: float) -> bool:
        """Compile what is not compiled; return whether nothing is left."""
        with self.keeper() as keeper:
            left = [c for c in self.candidates if c.key not in keeper.builder.replies]
            order = np.random.default_rng(0).permutation(len(left))
            left = [left[int(i)] for i in order]
            say(f"{self.name}: {len(self.candidates)} legal configs, {len(left)} to build")
            begin, done = time.monotonic(), 0
            while left and time.monotonic() < until:
                keeper.builder.build(self.space, left[:CHUNK])
                left, done = left[CHUNK:], done + len(left[:CHUNK])
                if done % (8 * CHUNK) == 0 or not left:
                    progress("built", done, len(left), begin)
            failed = [r for r in keeper.builder.replies.values() if r.status != "ok"]
            say(f"{self.name}: {len(left)} left, {len(failed)} failed")
            for reply in failed[:3]:
                say(f"  {reply.status} {reply.kind}: {reply.message.splitlines()[-1:]}")
        return not left

    def best_us(self) -> float:
        return min((self.time_of(k) for k in self.visits), default=math.inf)

    def time_of(self, key: str) -> float:
        times = [v["us"] for v in self.visits.get(key, ()) if v["us"]]
        return statistics.median(times) if times else math.inf

    def due(self, number: int) -> list[Candidate]:
        """Return the candidates that pass ``number`` (from 0) is to time, in random order."""
        limit = (math.inf, 2.0)[number] if number < 2 else NEAR
        best = self.best_us()
        out = [
            c
            for c in self.candidates
            if len(rows := self.visits.get(c.key, ())) <= number
            and (number == 0 or (len(rows) == number and self.time_of(c.key) <= limit * best))
        ]
        order = np.random.default_rng(number).permutation(len(out))
        return [out[int(i)] for i in order]

    def time(self, until: float, passes: int) -> bool:
        """Verify and time; return whether nothing is left."""
        with self.keeper() as keeper, (self.folder / "visits.jsonl").open("a") as out:
            if any(c.key not in keeper.builder.replies for c in self.candidates):
                say(f"{self.name}: not all is built yet; building the rest on the way")
            for number in range(passes):
                left = self.due(number)
                begin, done, shown = time.monotonic(), 0, time.monotonic()
                total = len(left)
                while left:
                    if time.monotonic() > until:
                        return False
                    for m in keeper.visit(self.space, left[:CHUNK], 1000 + number):
                        row = {
                            "key": m.candidate.key, "us": m.latency_us, "p10": m.p10_us,
                            "p90": m.p90_us, "verdict": str(m.verdict), "message": m.message,
                            "error": m.error_ratio, "calls": m.calls, "time": round(time.time()),
                        }  # fmt: skip
                        self.visits.setdefault(m.candidate.key, []).append(row)
                        out.write(json.dumps(row) + "\n")
                    out.flush()
                    done, left = done + len(left[:CHUNK]), left[CHUNK:]
                    if time.monotonic() - shown > 20 or not left:
                        shown = time.monotonic()
                        progress(f"pass {number + 1}/{passes}", done, len(left), begin)
                if total:
                    say(
                        f"{self.name}: pass {number + 1}: {total} timed, best {self.best_us():.2f} us"
                    )
        return True

    def pack(self, out: Path) -> None:
        """Write the recording and say what it is like."""
        with self.keeper() as keeper:
            rows = [self._record(c, keeper) for c in self.candidates if c.key in self.visits]
            device = keeper.device
        if not rows:
            say(f"{self.name}: nothing was timed yet")
            return
        recording = Recording(
            self.workload, self.hardware, device,
            {"batches": self.timing.batches, "batch_s": self.timing.batch_s,
             "passes": max(len(v) for v in self.visits.values())},
            {n: {k: tuple(v) for k, v in s.knobs.items()} for n, s in self.space.spaces.items()},
            {c.schedule: c.knobs for c in self.space.defaults()},
            tuple(r for r, _ in rows),
            tuple(t for _, t in rows),
        )  # fmt: skip
        size = recording.save(out)
        describe(self.name, recording, size)

    def _record(self, c: Candidate, keeper: Keeper) -> tuple[Record, dict[str, float]]:
        schedule, visits = self.space.schedules[c.schedule], self.visits[c.key]
        counts = schedule.work(self.workload, self.space.config(c), self.hardware)
        bad = next((v for v in visits if v["verdict"] != "ok"), None)
        times = sorted(v["us"] for v in visits if v["us"])
        us = None if bad else statistics.median(times)
        many = len(times) > 1 and not bad
        record = Record(
            key=record_key(
                str(self.workload), c.schedule, schedule.version, c.config, self.hardware,
                self.timing.cache, versions(),
            ),
            workload=str(self.workload), schedule=c.schedule, schedule_version=schedule.version,
            config=c.config, hardware=self.hardware.id, features=(), threads=self.hardware.threads,
            cache=self.timing.cache, versions=versions(),
            verdict=Verdict(bad["verdict"]) if bad else Verdict.OK,
            latency_us=us,
            p10_us=None if bad else times[round(0.1 * (len(times) - 1))],
            p90_us=None if bad else times[round(0.9 * (len(times) - 1))],
            cv=statistics.pstdev(times) / statistics.fmean(times) if many else None,
            calls=sum(v["calls"] for v in visits),
            modelled_mj=None if bad else keeper.device.energy_mj(counts, us),
            error_ratio=max((v["error"] for v in visits if v["error"] is not None), default=None),
            message=bad["message"][:200] if bad else "",
            ops=dict(counts.ops), bytes=dict(counts.bytes), time=visits[-1]["time"],
        )  # fmt: skip
        return record, dict(counts.traits)


def describe(name: str, recording: Recording, size: int | None = None) -> None:
    ok = [r for r in recording.records if r.ok]
    if not ok:
        print(f"{name}: {recording.workload}: {len(recording.records)} configs, none of them ok")
        return
    best = min(ok, key=lambda r: r.latency_us)
    by = {}
    for r in ok:
        by[r.schedule] = min(by.get(r.schedule, math.inf), r.latency_us)
    print(
        f"{name}: {recording.workload} {recording.cache} threads={recording.hardware.threads}: "
        f"{len(recording.records)} configs, {len(ok)} ok, best {best.latency_us:.2f} us "
        f"{best.schedule} {best.config}; within 2 %: {100 * recording.share_within(1.02):.3f} %, 5 %: "
        f"{100 * recording.share_within(1.05):.3f} %" + (f"; {size / 1000:.0f} kB" if size else "")
    )
    print(
        "   best of each: " + ", ".join(f"{k} {v:.1f}" for k, v in sorted(by.items())), flush=True
    )


def values(text: str) -> tuple[KnobValue, ...]:
    """Read values of a knob; words stay words."""
    known = {"true": True, "false": False}
    return tuple(int(v) if v.isdigit() else known.get(v.lower(), v) for v in text.split(","))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def progress(what: str, done: int, left: int, begin: float) -> None:
    each = (time.monotonic() - begin) / max(1, done)
    say(
        f"  {what} {done}, {left} left, {1000 * each:.0f} ms each, {each * left / 60:.1f} min to go"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("do", choices=("build", "time", "pack", "list"))
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--op", help="workload of a space that is not in the list")
    parser.add_argument("--schedule", action="append", default=[], help="only these schedules")
    parser.add_argument(
        "--only", action="append", default=[], metavar="KNOB=V,V", help="values of a knob to keep"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", choices=("hot", "cold"), default="hot")
    parser.add_argument("--passes", type=int, default=9)
    parser.add_argument("--minutes", type=float, default=1e6, help="stop then; run again to go on")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser.add_argument("--work", type=Path, default=cache / "mimo_compile" / "spaces")
    parser.add_argument("-o", "--out", type=Path, default=HERE)
    args = parser.parse_args()
    names = list(SPACES) if args.names in ([], ["all"]) and not args.op else args.names
    until = time.monotonic() + 60 * args.minutes
    only = tuple((k, values(v)) for k, _, v in (text.partition("=") for text in args.only))
    finished = True
    for name in names:
        wanted = (
            Wanted(args.op, args.threads, args.cache, tuple(args.schedule), only)
            if args.op
            else SPACES[name]
        )
        timing = Timing(
            warm_up_s=0.003, batches=5, batch_s=0.0015, budget_s=0.05, repeats=0, cache=wanted.cache
        )
        session = Session(name, wanted, args.work, timing)
        if args.do == "build":
            finished &= session.build(until)
        elif args.do == "time":
            finished &= session.time(until, args.passes)
        elif args.do == "pack":
            session.pack(args.out / f"{name}.jsonl.xz")
        else:
            sizes = {n: sum(1 for _ in s) for n, s in session.space.spaces.items()}
            print(f"{name}: {session.workload}: {len(session.candidates)} legal configs {sizes}")
    sys.exit(0 if finished else 3)


if __name__ == "__main__":
    try:
        main()
    except MimoError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
