"""Candidate -> verdict and numbers: build in one child, run in another, compare here.

Order for each candidate: build; run twice on poisoned outputs; compare with the reference that was
computed before; only then measure time and energy. All candidates of a batch are built first, so
that no compiler disturbs a clock.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mimo_compile.cost_models.analytic import DeviceModel
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.schedules.base import Schedule
from mimo_compile.search.measure.cases import Case, CaseStore, Scratch
from mimo_compile.search.measure.verify import judge
from mimo_compile.search.measure.worker import Pool, Reply, default_memory
from mimo_compile.search.meters.base import Meter, measure_energy
from mimo_compile.search.records import Verdict
from mimo_compile.search.space import Candidate, JointSpace

_KEPT = 1024
"""Most object files kept at a time."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a candidate may use up. Seconds of wall clock; bytes of address space."""

    build_s: float = 60.0
    run_s: float = 20.0
    time_s: float = 30.0
    memory_bytes: int = 0
    """0 stands for `worker.default_memory`."""


@dataclass(frozen=True, slots=True)
class Timing:
    """How time and energy are taken."""

    warm_up_s: float = 0.02
    batches: int = 9
    batch_s: float = 0.006
    budget_s: float = 0.5
    cache: str = "cold"
    """``cold``: weights and states rotate over more bytes than the last-level cache holds; ``hot``."""
    rotate_bytes: int = 0
    """Bytes to rotate over; 0 stands for twice the last-level cache."""
    memory_bytes: int = 1 << 30
    """Most bytes of rotating copies."""
    energy_window_s: float = 2.0
    confirm_rounds: int = 3


@dataclass(frozen=True, slots=True)
class Measurement:
    """What came of a candidate; see `records.Record` for the meaning of the fields."""

    candidate: Candidate
    verdict: Verdict
    message: str = ""
    seed: int = 0
    latency_us: float | None = None
    p10_us: float | None = None
    p90_us: float | None = None
    cv: float | None = None
    calls: int = 0
    energy_mj: float | None = None
    energy_spread_mj: float | None = None
    energy_source: str = ""
    energy_window_s: float | None = None
    modelled_mj: float | None = None
    error_ratio: float | None = None
    code_hash: str = ""
    requires: tuple[str, ...] = ()
    counts: Counts = field(default_factory=Counts)


class Measures(Protocol):
    """What a tuner needs of a measurer; `measure.replay` has one that looks numbers up."""

    cache: str

    def measure(
        self, space: JointSpace, candidates: Sequence[Candidate], seed: int
    ) -> Iterator[Measurement]:
        """Yield one measurement for each candidate of one workload, in any order."""
        ...

    def confirm(
        self, space: JointSpace, candidates: Sequence[Candidate], seed: int
    ) -> Iterator[Measurement]:
        """Measure correct candidates against each other, interleaved."""
        ...

    def describe(self, space: JointSpace, candidates: Sequence[Candidate]) -> list[Counts | None]:
        """Return the work each candidate's kernel declares (None where lowering fails)."""
        ...

    def close(self) -> None:
        """Release everything."""
        ...


@runtime_checkable
class Predicts(Protocol):
    """What a measurer has besides when it knows times without measuring: the search ranks by them."""

    def predict_us(self, space: JointSpace, candidates: Sequence[Candidate]) -> list[float]:
        """Return microseconds of each candidate of one workload."""
        ...


class Measurer:
    """Measures on this machine, in child processes that it starts, limits and replaces."""

    def __init__(
        self,
        hardware: Hardware,
        *,
        device: DeviceModel | None = None,
        meter: Meter | None = None,
        limits: Limits | None = None,
        timing: Timing | None = None,
        builders: int | None = None,
        scratch: Path | None = None,
    ) -> None:
        """Prepare; children start with the first request.

        Args:
            hardware: Whose features and thread count kernels are built for; must be runnable here.
            device: Rates for modelled energy and the physical floor (None: guessed, no floor).
            meter: Joules counter read around a run of calls, or None.
            limits: Time and memory a candidate may take.
            timing: How time is taken.
            builders: Compiler processes; by default one for each core, at most 4.
            scratch: Folder for temporary files (None: memory or the temporary folder).
        """
        self.hardware = hardware
        self.limits = limits or Limits()
        self.timing = timing or Timing()
        self.cache = self.timing.cache
        self.device = device or DeviceModel.guess(hardware)
        self.meter = meter
        self._built: dict[str, Reply] = {}
        """Candidates whose object code is kept."""
        self._best_us: dict[str, float] = {}
        """Fastest so far by workload: what takes twice as long is timed only briefly."""
        self._scratch = Scratch(scratch)
        self.cases = CaseStore(self._scratch)
        memory = self.limits.memory_bytes or default_memory()
        temporary = {"TMPDIR": str(self._scratch.path)}
        count = builders or max(1, min(4, hardware.cores))
        single = {"OMP_NUM_THREADS": "1", "TVM_NUM_THREADS": "1"}
        self.builders = Pool("build", count, memory=memory, env=temporary | single)
        threads = {"TVM_NUM_THREADS": str(hardware.cores), "TVM_BIND_THREADS": "0"}
        self.runner = Pool("run", 1, memory=memory, env=temporary | threads)

    # -- building ------------------------------------------------------------------------------

    def _request(self, space: JointSpace, candidate: Candidate, do: str) -> dict[str, Any]:
        kind = type(space.schedules[candidate.schedule])
        hardware = {**asdict(space.hardware), "features": sorted(space.hardware.features)}
        return {
            "do": do, "schedule": f"{kind.__module__}:{kind.__qualname__}",
            "workload": str(candidate.workload),
            "config": candidate.config, "hardware": hardware,
            "out": str(self._scratch.path / f"{candidate.key}.o"),
        }  # fmt: skip

    def build(self, space: JointSpace, candidates: Sequence[Candidate]) -> list[Reply]:
        """Build candidates not built before; the object code is in the file that `code_path` names."""
        new = [c for c in candidates if c.key not in self._built]
        requests = [self._request(space, c, "build") for c in new]
        replies = {c.key: self._built[c.key] for c in candidates if c.key in self._built}
        replies |= dict(
            zip((c.key for c in new), self._all(requests, self.limits.build_s), strict=True)
        )
        return [replies[c.key] for c in candidates]

    def describe(self, space: JointSpace, candidates: Sequence[Candidate]) -> list[Counts | None]:
        """Return the work each candidate's kernel declares (None where lowering fails)."""
        out: dict[str, Counts | None] = {}
        costly = []
        for c in candidates:
            schedule = space.schedules[c.schedule]
            if type(schedule).work is Schedule.work:  # must generate code to tell
                costly.append(c)
            else:
                out[c.key] = schedule.work(c.workload, space.config(c), space.hardware)
        requests = [self._request(space, c, "describe") for c in costly]
        for c, r in zip(costly, self._all(requests, self.limits.build_s), strict=True):
            out[c.key] = Counts(r.value["ops"], r.value["bytes"]) if r.status == "ok" else None
        return [out[c.key] for c in candidates]

    def _all(self, requests: Sequence[dict[str, Any]], limit_s: float) -> list[Reply]:
        out: list[Reply | None] = [None] * len(requests)
        for index, reply in self.builders.run(requests, limit_s):
            out[index] = reply
        return [r for r in out if r is not None]

    def code_path(self, candidate: Candidate) -> Path:
        """Return where `build` puts a candidate's object code."""
        return self._scratch.path / f"{candidate.key}.o"

    def _keep_code(self, candidate: Candidate, built: Reply) -> None:
        """Keep the code of a good candidate for `confirm`, within a limit."""
        self._built[candidate.key] = built
        while len(self._built) > _KEPT:
            self._forget_code(next(iter(self._built)))

    def _forget_code(self, *keys: str) -> None:
        for key in keys:
            self._built.pop(key, None)
            (self._scratch.path / f"{key}.o").unlink(missing_ok=True)

    # -- running -------------------------------------------------------------------------------

    def _call(self, request: dict[str, Any], limit_s: float) -> Reply:
        return self.runner.call(request, limit_s)

    def _failed(self, candidate: Candidate, reply: Reply, seed: int, during: str) -> Measurement:
        if reply.out_of_memory:
            verdict = Verdict.OOM
        elif reply.status == "timeout":
            verdict = Verdict.TIMEOUT
        elif during == "build":
            verdict = Verdict.BUILD_FAILED
        else:
            verdict = Verdict.CRASH
        message = f"{during}: {reply.kind + ': ' if reply.kind else ''}{reply.message}"[:2000]
        return Measurement(candidate, verdict, message, seed)

    def measure(
        self, space: JointSpace, candidates: Sequence[Candidate], seed: int
    ) -> Iterator[Measurement]:
        """Build, verify and measure candidates of one workload on the fresh inputs of one seed."""
        if not candidates:
            return
        self.cases.keep_only(space.workload, seed)
        case = self.cases.case(space.workload, seed)
        try:
            for candidate, built in zip(candidates, self.build(space, candidates), strict=True):
                result = self._measure_one(space, candidate, built, case)
                if result.verdict is Verdict.OK:
                    self._keep_code(candidate, built)
                yield result
        finally:
            self._forget_code(*(c.key for c in candidates if c.key not in self._built))

    def _measure_one(
        self, space: JointSpace, candidate: Candidate, built: Reply, case: Case
    ) -> Measurement:
        if built.status != "ok":
            return self._failed(candidate, built, case.seed, "build")
        checked = self._verified(space, candidate, built, case)
        if checked.verdict is Verdict.OK:
            limit = 2.0 * self._best_us.get(str(space.workload), math.inf)
            times = self._time([candidate.key], stop_above_us=limit)
            if times.status != "ok":
                checked = self._failed(candidate, times, case.seed, "timing")
            else:
                checked = self._timed(checked, times.value["seconds"][0], times.value["calls"][0])
                checked = self._floor(self._energy(checked))
                if checked.verdict is Verdict.OK and checked.latency_us is not None:
                    name = str(space.workload)
                    self._best_us[name] = min(checked.latency_us, self._best_us.get(name, math.inf))
        if checked.verdict in (Verdict.OK, Verdict.SUSPICIOUS):
            self._call({"do": "drop"}, self.limits.run_s)
        else:
            self.runner.replace()  # whatever it did to its process ends with it
        return checked

    def _verified(
        self, space: JointSpace, candidate: Candidate, built: Reply, case: Case
    ) -> Measurement:
        """Load and run a built candidate and compare; the slot stays loaded when the verdict is ok."""
        schedule, config = space.schedules[candidate.schedule], space.config(candidate)
        facts = built.value
        base = Measurement(
            candidate, Verdict.OK, seed=case.seed, code_hash=facts["code_hash"],
            requires=tuple(facts["requires"]), counts=Counts(facts["ops"], facts["bytes"]),
        )  # fmt: skip
        try:
            files = self.cases.files(case, schedule, config)
        except (ValueError, KeyError, IndexError, TypeError) as error:
            return replace(base, verdict=Verdict.BUILD_FAILED, message=f"pack: {error}")
        args = [
            {**a, "file": str(files[a["name"]]) if a["name"] in files else None}
            for a in facts["args"]
        ]
        missing = [a["name"] for a in args if a["file"] is None and a["role"] != "output"]
        if missing:
            text = f"the kernel wants {missing}, which packing does not give"
            return replace(base, verdict=Verdict.BUILD_FAILED, message=text)
        request = {
            "do": "load", "slot": candidate.key, "code": str(self.code_path(candidate)),
            "symbol": facts["symbol"], "args": args, "threads": space.hardware.threads,
        }  # fmt: skip
        if (reply := self._call(request, self.limits.run_s)).status != "ok":
            return self._failed(candidate, reply, case.seed, "load")
        folder = self._scratch.folder("results")
        reply = self._call(
            {"do": "check", "slot": candidate.key, "folder": str(folder)}, self.limits.run_s
        )
        if reply.status != "ok":
            return self._failed(candidate, reply, case.seed, "run")
        got = {
            p.stem: np.load(p, allow_pickle=False)
            for p in folder.glob("*.npy")
            if not p.stem.endswith(".second")
        }
        states = {a["name"] for a in facts["args"] if a["role"] == "state"}
        changed = {n: got.pop(n) for n in states & set(got)}
        if changed:
            whole = {n: changed.get(n, np.load(files[n], allow_pickle=False)) for n in states}
            got |= schedule.unpack_state(space.workload, config, whole)
        return self._judged(base, case, reply.value, got)

    @staticmethod
    def _judged(
        base: Measurement, case: Case, seen: dict[str, Any], got: dict[str, Any]
    ) -> Measurement:
        ratio, message = judge(case.args, got, case.expected, case.bound, case.inputs)
        finite = min(ratio, 1e30)
        if seen["overrun"]:
            message = f"memory beyond {', '.join(seen['overrun'])} was written"
        elif seen["modified"]:
            message = f"{', '.join(seen['modified'])} was changed, and must not be"
        elif seen["forked"]:
            message = "a process was started"
        elif not message and seen["differs"]:
            message = f"two runs on the same inputs differ in {', '.join(seen['differs'])}"
        verdict = Verdict.WRONG if message else Verdict.OK
        return replace(base, verdict=verdict, message=message, error_ratio=finite)

    def time_plain(
        self, candidate: Candidate, facts: dict[str, Any], threads: int, inputs: dict[str, Any]
    ) -> float | None:
        """Time a built kernel without verification (calibration); return the least seconds of a call."""
        folder = self._scratch.folder("plain")
        args = []
        for a in facts["args"]:
            path = folder / f"{a['name']}.npy"
            if a["name"] in inputs:
                np.save(path, inputs[a["name"]], allow_pickle=False)
            args.append({**a, "file": str(path) if a["name"] in inputs else None})
        request = {
            "do": "load", "slot": candidate.key, "code": str(self.code_path(candidate)),
            "symbol": facts["symbol"], "args": args, "threads": threads,
        }  # fmt: skip
        if self._call(request, self.limits.run_s).status != "ok":
            return None
        times = self._time([candidate.key])
        self._call({"do": "drop"}, self.limits.run_s)
        self._forget_code(candidate.key)
        return min(times.value["seconds"][0]) if times.status == "ok" else None

    # -- time, energy, floor -------------------------------------------------------------------

    def _time(
        self, slots: Sequence[str], rounds: int = 1, stop_above_us: float = math.inf
    ) -> Reply:
        p = self.timing
        rotate = 0
        if p.cache == "cold":
            rotate = p.rotate_bytes or 2 * self.hardware.l3_bytes
        request = {
            "do": "time", "slots": list(slots), "batches": p.batches * rounds, "batch_s": p.batch_s,
            "warm_up_s": p.warm_up_s, "budget_s": p.budget_s * rounds, "rotate_bytes": rotate,
            "memory_bytes": p.memory_bytes, "stop_above_s": min(stop_above_us * 1e-6, 1e9),
        }  # fmt: skip
        return self._call(request, self.limits.time_s * rounds * len(slots))

    def _timed(self, m: Measurement, seconds: Sequence[float], calls: int) -> Measurement:
        us = sorted(max(s * 1e6, 1e-3) for s in seconds)
        mean = statistics.fmean(us)
        latency = statistics.median(us)
        return replace(
            m,
            latency_us=latency,
            p10_us=us[round(0.1 * (len(us) - 1))],
            p90_us=us[round(0.9 * (len(us) - 1))],
            cv=statistics.pstdev(us) / mean,
            calls=calls,
            modelled_mj=self.device.energy_mj(m.counts, latency),
        )

    def _energy(self, m: Measurement) -> Measurement:
        if self.meter is None:
            return m

        def spin(seconds: float) -> tuple[int, float]:
            request = {"do": "spin", "slot": m.candidate.key, "seconds": seconds}
            reply = self._call(request, self.limits.time_s + seconds)
            return (
                (int(reply.value["calls"]), float(reply.value["seconds"]))
                if reply.status == "ok"
                else (0, 0.0)
            )

        reading = measure_energy(self.meter, spin, self.timing.energy_window_s)
        if reading.energy_mj is None:
            return replace(m, message=f"energy: {reading.reason}")
        return replace(
            m, energy_mj=reading.energy_mj, energy_spread_mj=reading.spread_mj,
            energy_source=self.meter.name, energy_window_s=reading.window_s,
        )  # fmt: skip

    def _floor(self, m: Measurement) -> Measurement:
        """Doubt a time that beats the machine; measure it another way before it is called suspicious."""
        necessary = get_op(m.candidate.workload.op).counts(m.candidate.workload)
        floor_us = self.device.floor_us(necessary, self.hardware)
        if floor_us is None or m.latency_us is None or m.latency_us >= 0.9 * floor_us:
            return m
        reply = self._call(
            {"do": "spin", "slot": m.candidate.key, "seconds": 0.2}, self.limits.time_s
        )
        if reply.status == "ok" and reply.value["calls"]:
            again = 1e6 * reply.value["seconds"] / reply.value["calls"]
            if again >= 0.9 * floor_us:
                return replace(m, latency_us=again, p90_us=max(again, m.p90_us or again))
        text = f"{m.latency_us:.3g} us is below the physical floor of {floor_us:.3g} us"
        return replace(m, verdict=Verdict.SUSPICIOUS, message=text)

    def confirm(
        self, space: JointSpace, candidates: Sequence[Candidate], seed: int
    ) -> Iterator[Measurement]:
        """Build and verify candidates again and time them against each other, batch by batch."""
        self.cases.keep_only(space.workload, seed)
        case = self.cases.case(space.workload, seed)
        loaded: list[Measurement] = []
        out: list[Measurement] = []
        self.runner.replace()
        for candidate, built in zip(candidates, self.build(space, candidates), strict=True):
            ok = built.status == "ok"
            checked = (
                self._verified(space, candidate, built, case)
                if ok
                else self._failed(candidate, built, seed, "build")
            )
            if checked.verdict is not Verdict.OK:
                out.append(checked)
                if ok:  # the others' slots may be damaged: leave the comparison to another run
                    break
            else:
                loaded.append(checked)
        if loaded and not any(m.verdict is not Verdict.BUILD_FAILED for m in out):
            times = self._time([m.candidate.key for m in loaded], self.timing.confirm_rounds)
            if times.status == "ok":
                for m, seconds, calls in zip(
                    loaded, times.value["seconds"], times.value["calls"], strict=True
                ):
                    out.append(self._energy(self._timed(m, seconds, calls)))
        self.runner.replace()
        self._forget_code(*(c.key for c in candidates))
        yield from out

    # -- life ----------------------------------------------------------------------------------

    def close(self) -> None:
        """End the children and remove all files."""
        self.builders.close()
        self.runner.close()
        self._scratch.close()

    def __enter__(self) -> Measurer:
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close."""
        self.close()


def runnable_here(hardware: Hardware) -> bool:
    """Say whether kernels for the target can run on this machine."""
    from mimo_compile.ir.hardware import local_cpu

    return (
        hardware.kind == "cpu"
        and not local_cpu().missing(hardware.features)
        and (hardware.threads <= len(os.sched_getaffinity(0)))
    )
