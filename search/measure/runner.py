"""Object code -> verdict and numbers, by a child process: verify, time, read joules, doubt.

The reference was computed before, by the parent; the child only runs the kernel and hands back what it
wrote. A child in which a kernel misbehaved is replaced.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mimo_compile.cost_models.analytic import DeviceModel
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.schedules.base import Schedule
from mimo_compile.search.measure.base import Limits, Measurement, Timing
from mimo_compile.search.measure.builder import code_path
from mimo_compile.search.measure.cases import Case, CaseStore, Scratch
from mimo_compile.search.measure.clock import Stopwatch
from mimo_compile.search.measure.verify import judge
from mimo_compile.search.measure.worker import Pool, Reply, default_memory
from mimo_compile.search.meters.base import Meter, Reading
from mimo_compile.search.records import Verdict
from mimo_compile.search.space import Candidate, JointSpace


def failed(candidate: Candidate, reply: Reply, seed: int, during: str) -> Measurement:
    """Return the verdict on a candidate whose request did not end well."""
    if reply.device_lost:
        verdict = Verdict.DEVICE_LOST
    elif reply.out_of_memory:
        verdict = Verdict.OOM
    elif reply.status == "timeout":
        verdict = Verdict.TIMEOUT
    elif during == "build":
        verdict = Verdict.BUILD_FAILED
    else:
        verdict = Verdict.CRASH
    message = f"{during}: {reply.kind + ': ' if reply.kind else ''}{reply.message}"[:2000]
    return Measurement(candidate, verdict, message, seed)


def arguments(
    cases: CaseStore, case: Case, schedule: Schedule, config: Any, facts: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the arguments of a built kernel, each with the file of its first contents (outputs: None).

    Raises:
        ValueError: what the kernel wants cannot be packed; the text is what the record says.
    """
    try:
        files = cases.files(case, schedule, config)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"pack: {error}") from error
    args = [
        {**a, "file": str(files[a["name"]]) if a["name"] in files else None} for a in facts["args"]
    ]
    missing = [a["name"] for a in args if a["file"] is None and a["role"] != "output"]
    if missing:
        raise ValueError(f"the kernel wants {missing}, which packing does not give")
    return args


def _where(case: Case) -> str:
    """Say where sequences of a case stand: their KV lengths, and which rest."""
    pos = case.inputs["pos"].reshape(-1, 2)
    each = [f"{start + valid}{'' if valid else ' and no token'}" for start, valid in pos.tolist()]
    return f"at KV length {', '.join(each)}"


def _trespass(seen: dict[str, Any]) -> str:
    """Say what a kernel did besides writing its results ("": nothing)."""
    if seen["overrun"]:
        return f"memory beyond {', '.join(seen['overrun'])} was written"
    if seen["modified"]:
        return f"{', '.join(seen['modified'])} was changed, and must not be"
    return "a process was started" if seen["forked"] else ""


class Runner:
    """The process in which candidates run, and what is concluded from it."""

    def __init__(
        self,
        hardware: Hardware,
        limits: Limits,
        timing: Timing,
        device: DeviceModel,
        meter: Meter | None,
        scratch: Scratch,
    ) -> None:
        """Prepare; the child starts with the first request. Arguments as in `Measurer`."""
        self.hardware = hardware
        self.limits = limits
        self.device = device
        self.meter = meter
        self.clock = Stopwatch(timing, hardware, limits.time_s)
        self.cases = CaseStore(scratch)
        self._scratch = scratch
        env = {
            "TMPDIR": str(scratch.path),
            "TVM_NUM_THREADS": str(hardware.cores),
            "TVM_BIND_THREADS": "0",
        }
        cuda = hardware.kind == "cuda"  # whose driver reserves addresses without end
        memory = 0 if cuda else limits.memory_bytes or default_memory()
        self.pool = Pool("gpu" if cuda else "run", 1, memory=memory, env=env)

    def call(self, request: Mapping[str, Any], limit_s: float) -> Reply:
        """Ask the child."""
        return self.pool.call(request, limit_s)

    def drop(self) -> None:
        """Unload everything."""
        self.call({"do": "drop"}, self.limits.run_s)

    # -- verification --------------------------------------------------------------------------

    def verified(
        self, space: JointSpace, candidate: Candidate, built: Reply, case: Case
    ) -> Measurement:
        """Load and run a built candidate and compare; the slot stays loaded when the verdict is ok.

        Where there is more to verify (`batches.further`), that comes before.
        """
        if (more := self.cases.further(case)) is not None:
            found = self._compared(space, candidate, built, more)
            if found.verdict is not Verdict.OK:
                return replace(found, message=f"{_where(more)}: {found.message}")
        return self._compared(space, candidate, built, case)

    def _compared(
        self, space: JointSpace, candidate: Candidate, built: Reply, case: Case
    ) -> Measurement:
        schedule, config = space.schedules[candidate.schedule], space.config(candidate)
        facts = built.value
        base = Measurement(
            candidate, Verdict.OK, seed=case.seed, code_hash=facts["code_hash"],
            requires=tuple(facts["requires"]), counts=Counts(facts["ops"], facts["bytes"]),
        )  # fmt: skip
        try:
            args = arguments(self.cases, case, schedule, config, facts)
        except ValueError as error:
            return replace(base, verdict=Verdict.BUILD_FAILED, message=str(error))
        request = {
            "do": "load", "slot": candidate.key, "code": str(code_path(self._scratch, candidate)),
            "symbol": facts["symbol"], "args": args, "threads": space.hardware.threads,
            "device": facts.get("device"), "bytes": facts["bytes"],
        }  # fmt: skip
        if (reply := self.call(request, self.limits.run_s)).status != "ok":
            return failed(candidate, reply, case.seed, "load")
        folder = self._scratch.folder("results")
        reply = self.call(
            {"do": "check", "slot": candidate.key, "folder": str(folder)}, self.limits.run_s
        )
        if reply.status != "ok":
            return failed(candidate, reply, case.seed, "run")
        got = {p.stem: np.load(p, allow_pickle=False) for p in folder.glob("*.npy")}
        states = {a["name"] for a in facts["args"] if a["role"] == "state"}
        changed = {n: got.pop(n) for n in states & set(got)}
        if changed:
            files = {a["name"]: a["file"] for a in args}
            whole = {n: changed.get(n, np.load(files[n], allow_pickle=False)) for n in states}
            got |= schedule.unpack_state(space.workload, config, whole)
        bound = self.cases.bound(case, schedule.exact(config))
        return self._judged(base, case, bound, reply.value, got)

    @staticmethod
    def _judged(
        base: Measurement, case: Case, bound: Mapping[str, Any], seen: dict[str, Any], got: dict[str, Any]
    ) -> Measurement:  # fmt: skip
        ratio, message = judge(case.args, got, case.expected, bound, case.inputs)
        finite = min(ratio, 1e30)
        differs = f"two runs on the same inputs differ in {', '.join(seen['differs'])}"
        message = _trespass(seen) or message or (differs if seen["differs"] else "")
        verdict = Verdict.WRONG if message else Verdict.OK
        return replace(base, verdict=verdict, message=message, error_ratio=finite)

    def still_right(self, m: Measurement) -> Measurement:
        """Run a loaded candidate once more after it was timed: it must still do all its work, and no harm."""
        reply = self.call({"do": "again", "slot": m.candidate.key}, self.limits.run_s)
        if reply.status != "ok":
            return failed(m.candidate, reply, m.seed, "run after timing")
        message = _trespass(reply.value)
        if reply.value["differs"]:
            names = ", ".join(reply.value["differs"])
            message = f"{names} differs after many calls on the same inputs"
        if not message:
            return m
        return Measurement(
            m.candidate, Verdict.WRONG, message, m.seed, error_ratio=m.error_ratio,
            code_hash=m.code_hash, requires=m.requires, counts=m.counts,
        )  # fmt: skip

    # -- time, energy, floor -------------------------------------------------------------------

    def time(self, slots: Sequence[str], rounds: int = 1, stop_above_us: float = math.inf) -> Reply:
        """Time loaded slots against each other, see `Stopwatch.time`."""
        return self.clock.time(self.call, slots, rounds, stop_above_us)

    def timed(self, m: Measurement, times: Reply, which: int = 0) -> Measurement:
        """Return a measurement with its batches' seconds per call summed up; ``which`` of the slots timed."""
        seconds, calls = times.value["seconds"][which], times.value["calls"][which]
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
            device=times.value.get("device", ""),
        )

    def energy(self, m: Measurement) -> Measurement:
        """Return a loaded candidate's measurement with its joules, or why there are none."""
        if self.meter is None:
            return m
        reading = self.reading(m, self.meter)
        if reading.energy_mj is None:
            return replace(m, message=f"energy: {reading.reason}")
        return replace(
            m, energy_mj=reading.energy_mj, energy_spread_mj=reading.spread_mj,
            energy_source=self.meter.name, energy_window_s=reading.window_s,
        )  # fmt: skip

    def reading(self, m: Measurement, meter: Meter) -> Reading:
        """Read a loaded candidate's joules."""
        return self.clock.joules(self.call, meter, m.candidate.key)

    def floor(self, m: Measurement) -> Measurement:
        """Doubt a time that beats the machine; measure it another way before it is called suspicious."""
        workload = m.candidate.workload
        inputs = self.cases.case(workload, m.seed).inputs  # kept: they were just computed with
        necessary = get_op(workload.op).counts_of(workload, inputs)
        floor_us = self.device.floor_us(necessary, self.hardware)
        if floor_us is None or m.latency_us is None or m.latency_us >= 0.9 * floor_us:
            return m
        reply = self.call(
            {"do": "spin", "slot": m.candidate.key, "seconds": 0.2}, self.limits.time_s
        )
        if reply.status == "ok" and reply.value["calls"]:
            again = 1e6 * reply.value["seconds"] / reply.value["calls"]
            if again >= 0.9 * floor_us:
                return replace(m, latency_us=again, p90_us=max(again, m.p90_us or again))
        text = f"{m.latency_us:.3g} us is below the physical floor of {floor_us:.3g} us"
        return replace(m, verdict=Verdict.SUSPICIOUS, message=text)
