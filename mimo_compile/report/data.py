"""What a report is about, gathered from an artifact or a database of records."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mimo_compile.errors import InputError
from mimo_compile.ir.hardware import Hardware, local_cpu
from mimo_compile.runtime.program import Choice, Manifest, decoding_entry
from mimo_compile.search.farm_runs import Worker
from mimo_compile.search.lookup import Result, pareto, summarise, use_measured
from mimo_compile.search.records import Record, decode


@dataclass(slots=True)
class Subject:
    """One workload on one machine: its records and what they say."""

    workload: str
    records: list[Record]
    results: list[Result]
    front: list[Result]
    measured_energy: bool
    """True when one meter measured joules; only those are shown then, else only modelled ones."""
    best: Result | None
    default: Result | None = None
    calls: dict[str, int] = field(default_factory=dict)
    """Calls by entry point, when the subject belongs to an artifact."""
    choice: Choice | None = None
    decodes: str = "step_1"
    """Entry point of the artifact that decodes one token."""

    @property
    def op(self) -> str:
        """The operator."""
        return self.workload.partition(":")[0]

    @property
    def speedup(self) -> float | None:
        """Default latency over the chosen one."""
        if self.default is None or self.best is None:
            return None
        return self.default.latency_us / self.best.latency_us

    @property
    def latency_us(self) -> float | None:
        """Microseconds of one call: as planned, else the best measured."""
        if self.choice is not None and self.choice.latency_us is not None:
            return self.choice.latency_us
        return None if self.best is None else self.best.latency_us

    @property
    def step_calls(self) -> int:
        """Calls in one decoding step of one token, or in one call of a module; 0 outside of an artifact."""
        step = self.calls.get(self.decodes, 0) + self.calls.get("head_1", 0)
        return step or self.calls.get("main", 0)

    @property
    def weight(self) -> float:
        """Microseconds that a decoding step spends in it; outside of an artifact those of one call."""
        latency = self.latency_us or 0.0
        return latency * self.step_calls if self.calls else latency

    def energy_mj(self, measured: bool) -> float | None:
        """Millijoules of one call, measured or modelled, never one for the other."""
        if self.best is not None:
            return self.best.measured_mj if measured else self.best.modelled_mj
        planned = self.choice
        if planned is None or (planned.energy_source not in (None, "modelled")) != measured:
            return None
        return planned.energy_mj

    @property
    def meter(self) -> str | None:
        """The meter behind ``energy_mj(True)``; None where there are no measured joules."""
        if self.energy_mj(True) is None:
            return None
        if self.best is not None:
            return self.best.energy_source if self.measured_energy else None
        return None if self.choice is None else self.choice.energy_source

    @property
    def timed(self) -> bool:
        """True when the latency was measured, False when it is only predicted."""
        return self.choice is None or self.choice.source == "measured"

    def curve(self) -> list[tuple[float, float]]:
        """Return (trial, best microseconds so far) in the order of measuring, without confirmations."""
        best, out = math.inf, []
        for number, record in enumerate(self.trials(), 1):
            if record.ok and record.latency_us is not None and record.latency_us < best:
                best = record.latency_us
                out.append((float(number), best))
        if out:
            out.append((float(len(self.trials())), best))
        return out

    def trials(self) -> list[Record]:
        """Return the records of the search itself, oldest first."""
        return sorted((r for r in self.records if r.phase == "search"), key=lambda r: r.time)


@dataclass(slots=True)
class Machine:
    """All subjects that were measured on one machine."""

    hardware: str
    threads: int
    subjects: list[Subject]
    local: Hardware | None = None
    """This machine, if it is the one."""
    features: tuple[str, ...] = ()

    @property
    def simulated(self) -> bool:
        """True for a machine that does not exist: its times are a model's."""
        return any(r.simulated for s in self.subjects for r in s.records)

    @property
    def verdicts(self) -> Counter[str]:
        """Trials by verdict."""
        return Counter(str(r.verdict) for s in self.subjects for r in s.records)


@dataclass(slots=True)
class ReportData:
    """The content of a report."""

    title: str
    path: str
    machines: list[Machine]
    manifest: Manifest | None = None
    members: dict[str, int] = field(default_factory=dict)
    """Bytes of the artifact's members."""
    unread: int = 0
    """Records of the artifact that this version cannot read."""
    workers: list[Worker] = field(default_factory=list)
    """What workers of farms did, of a database that farms wrote to."""


def gather(path: str | os.PathLike[str]) -> ReportData:
    """Read an artifact or a database.

    Raises:
        InputError: the file is missing, or is neither.
    """
    file = Path(path)
    try:
        with file.open("rb") as stream:
            start = stream.read(16)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", file=file) from error
    if start.startswith(b"SQLite format 3"):
        from mimo_compile.search.database import open_records
        from mimo_compile.search.farm_runs import load

        with open_records(file) as db:
            assert db is not None  # of a path that is given
            return ReportData(file.name, str(file), _machines(db, {}), workers=load(db))
    if not start.startswith(b"PK"):
        raise InputError(
            "this is neither an artifact nor a database of records",
            file=file,
            remedy="Give an OUT.mimo or a records.db",
        )
    return _from_artifact(file)


def _from_artifact(file: Path) -> ReportData:
    from mimo_compile.runtime.container import open_artifact

    parts = open_artifact(file, for_this_machine=False)
    lines = (parts.texts.get("records.jsonl") or b"").splitlines()
    records, unread = [], 0
    for line in lines:
        try:
            records.append(decode(line))
        except InputError:  # of a newer version, say: the artifact itself is sound
            unread += 1
    choices = {c.workload: c for c in parts.manifest.plan}
    machines = _machines(records, choices)
    main = max(machines, key=lambda m: len(m.subjects), default=None)
    if main is None:
        target = parts.manifest.target
        main = Machine(target.name, target.threads, [], features=target.features)
        machines.append(main)
    known = {s.workload for s in main.subjects}
    main.subjects += [
        Subject(w, [], [], [], False, None, calls=dict(c.calls), choice=c)
        for w, c in choices.items()
        if w not in known
    ]
    for subject in (s for m in machines for s in m.subjects):
        subject.decodes = decoding_entry(parts.manifest.entries)
    members = {name: member.bytes for name, member in parts.manifest.members.items()}
    return ReportData(parts.manifest.name, str(file), machines, parts.manifest, members, unread)


def _machines(records: Iterable[Record], choices: Mapping[str, Choice]) -> list[Machine]:
    groups: dict[tuple[str, int, tuple[str, ...]], dict[str, list[Record]]] = {}
    for record in records:
        key = (record.hardware, record.threads, record.features)
        groups.setdefault(key, {}).setdefault(record.workload, []).append(record)
    out = []
    for (name, threads, features), workloads in groups.items():
        here = local_cpu()
        same = (
            here.id == name and tuple(sorted(here.features)) == features and threads <= here.cores
        )
        local = here.with_threads(threads) if same else None
        subjects = [_subject(w, rows, choices.get(w), local) for w, rows in workloads.items()]
        out.append(Machine(name, threads, subjects, local, features))
    return sorted(out, key=lambda m: -sum(len(s.records) for s in m.subjects))


def _subject(
    workload: str, records: list[Record], choice: Choice | None, local: Hardware | None
) -> Subject:
    results = summarise(records)
    best = min(results, key=lambda r: r.latency_us, default=None)
    if choice is not None:
        chosen = [
            r for r in results
            if (r.record.schedule, r.record.config) == (choice.schedule, choice.config)
        ]  # fmt: skip
        best = chosen[0] if chosen else best
    return Subject(
        workload, records, results, pareto(results), use_measured(results), best,
        _default(workload, results, local), dict(choice.calls) if choice else {}, choice,
    )  # fmt: skip


def _default(workload: str, results: Sequence[Result], local: Hardware | None) -> Result | None:
    """Return the result of the configuration that is used without tuning, if it was measured here."""
    if local is None or not results:
        return None
    from mimo_compile.errors import MimoError
    from mimo_compile.ir.ops import parse_workload
    from mimo_compile.search.space import JointSpace

    try:
        default = JointSpace(parse_workload(workload), local).defaults()[0]
    except (MimoError, ImportError):
        return None
    return next(
        (
            r for r in results
            if r.record.schedule == default.schedule and r.record.config == default.config
        ),
        None,
    )  # fmt: skip
