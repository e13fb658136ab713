"""Answers from records: the best candidate of a workload, its Pareto front, packaged records."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files

from mimo_compile.errors import InputError
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.workload import Workload
from mimo_compile.search.database import Database
from mimo_compile.search.objective import Objective, Point, pareto_front
from mimo_compile.search.records import Record, Verdict, decode, encode, versions
from mimo_compile.search.space import Candidate, JointSpace

LASTING = (Verdict.WRONG, Verdict.SUSPICIOUS)
"""Verdicts that bar a candidate for good; a later timeout or crash only adds no time."""
NEAR = 1.25
"""Times the fastest of another machine, or number of threads, that one of its results may have taken."""


@dataclass(frozen=True, slots=True)
class Result:
    """All records of one candidate on one target taken together."""

    record: Record
    """Its newest record with verdict ok."""
    latency_us: float
    """Median over its confirming records if there are any, else over all."""
    measured_mj: float | None
    energy_source: str
    modelled_mj: float | None

    def point(self, measured: bool) -> Point:
        """Return (latency, energy), the energy measured or modelled, never a mixture."""
        return self.latency_us, self.measured_mj if measured else self.modelled_mj

    def point_by(self, meter: str) -> Point:
        """Return (latency, energy by a meter, if it measured any); an empty name stands for the model."""
        if not meter:
            return self.latency_us, self.modelled_mj
        return self.latency_us, self.measured_mj if self.energy_source == meter else None


def summarise(records: Iterable[Record]) -> list[Result]:
    """Join the records of each candidate; candidates that ever gave a wrong result are left out.

    The leaders of a search were timed against each other at its end (phase ``confirm``), the others read
    once, maybe luckily or on a quieter machine. Such a reading makes none of them the fastest: those that
    look faster than the fastest confirmed one of their schedule (of all, if it has none), but did not when
    both were read once, are scaled by what that one's time rose.

    A candidate that was not timed, because another one is the same code, gets that one's figures, whatever
    they are by now; without that one's records, those of its own record. Such results come last.
    """
    groups: dict[str, list[Record]] = {}
    once: dict[str, float] = {}
    twins: dict[str, Record] = {}
    for record in records:
        if record.twin:
            twins[record.key] = record
        else:
            groups.setdefault(record.key, []).append(record)
    # a crash or timeout of its own leaves it what it was; own times and lasting verdicts do not
    own = {
        k for k in twins.keys() & groups.keys()
        if any((r.ok and r.latency_us is not None) or r.verdict in LASTING for r in groups[k])
    }  # fmt: skip
    alone = {k: [r] for k, r in twins.items() if k not in own and r.twin not in groups}
    groups |= alone
    own |= alone.keys()
    out = []
    for rows in groups.values():
        good = [r for r in rows if r.ok and r.latency_us is not None]
        if not good or any(r.verdict in LASTING for r in rows):
            continue
        confirmed = [r for r in good if r.phase == "confirm"]
        final = confirmed or good
        if confirmed:
            single = [r for r in good if r.phase != "confirm"] or confirmed
            once[rows[0].key] = statistics.median(
                r.latency_us for r in single if r.latency_us is not None
            )
        joules = [r for r in final if r.energy_mj is not None] or [
            r for r in good if r.energy_mj is not None
        ]
        models = [r.modelled_mj for r in final if r.modelled_mj is not None]
        source = joules[-1].energy_source if joules else ""
        energies = [
            r.energy_mj for r in joules if r.energy_source == source and r.energy_mj is not None
        ]
        out.append(
            Result(
                record=good[-1],
                latency_us=statistics.median(
                    r.latency_us for r in final if r.latency_us is not None
                ),
                measured_mj=statistics.median(energies) if energies else None,
                energy_source=source,
                modelled_mj=statistics.median(models) if models else None,
            )
        )
    out = _scaled(out, once)
    results = {r.record.key: r for r in out}
    return out + [
        replace(results[r.twin], record=r)
        for key, r in twins.items()
        if key not in own and r.twin in results
    ]


def _scaled(results: list[Result], once: dict[str, float]) -> list[Result]:
    """See `summarise`; ``once``: what confirmed candidates took when they were read once."""
    confirmed = sorted(
        (r for r in results if r.record.key in once), key=lambda r: r.latency_us, reverse=True
    )
    if not confirmed:
        return results
    fastest = confirmed[-1]
    own = {r.record.schedule: r for r in confirmed}

    def scaled(result: Result) -> Result:
        anchor = own.get(result.record.schedule, fastest)
        then, now = once[anchor.record.key], anchor.latency_us
        if result.record.key in once or not then <= result.latency_us < now:
            return result
        return replace(result, latency_us=result.latency_us * now / then)

    return [scaled(r) for r in results]


def use_measured(results: Sequence[Result]) -> bool:
    """Say whether energies are compared as measured: some were, all by one meter.

    Those without a measured energy then have none to be compared by. A search reads joules of the
    promising candidates only.
    """
    return bool(meter_of(results))


def meter_of(results: Sequence[Result], prefer: str = "") -> str:
    """Return the meter by whose joules results are compared, "" where only modelled ones are comparable.

    Args:
        results: Those of one workload.
        prefer: The meter that counts if there are several.
    """
    meters = {r.energy_source for r in results if r.measured_mj is not None}
    if prefer in meters:
        return prefer
    return meters.pop() if len(meters) == 1 else ""


def best(results: Sequence[Result], objective: Objective, meter: str = "") -> Result | None:
    """Return the best candidate of one workload by the objective (``meter``: see `meter_of`)."""
    by = meter_of(results, meter)
    return objective.choose(results, lambda r: r.point_by(by))


def pareto(results: Sequence[Result], meter: str = "") -> list[Result]:
    """Return the Pareto front in latency and energy, fastest first (``meter``: see `meter_of`)."""
    by = meter_of(results, meter)
    return pareto_front(results, lambda r: r.point_by(by))


Kept = Mapping[str, Sequence[Record]]
"""Records by workload that came with something that was compiled before."""


def kept_records(text: bytes | None) -> dict[str, list[Record]]:
    """Return the records in JSON lines by workload; those of a newer version are left out."""
    out: dict[str, list[Record]] = {}
    for line in (text or b"").splitlines():
        with contextlib.suppress(InputError):
            record = decode(line)
            out.setdefault(record.workload, []).append(record)
    return out


def results_for(
    workload: Workload | str, hardware: Hardware, db: Database | None = None, *, near: bool = False,
    kept: Kept | None = None, within: Mapping[str, int] | None = None,
) -> list[Result]:  # fmt: skip
    """Return the results known for a workload on a target: own records first, else packaged ones.

    Only records made with the installed compiler count, and only of one cache state (cold before hot: times
    in different states cannot be compared). Simulated times count for simulated targets only, and nothing
    else counts there.

    ``kept`` ones of this very target count beside own ones, and where no others are known.

    With ``near``, when nothing was measured on this very target, results of other machines whose code
    this one can run stand in for them, all of one machine and number of threads (the same number preferred,
    then the nearest).
    ``within`` names the schedules that can be used there, with their versions: only their records stand in.
    """
    own = db.records(workload, hardware) if db is not None else []
    more = list((kept or {}).get(str(workload), ()))
    now = versions()
    if hardware.kind == "sim":
        return summarise(r for r in own if r.versions == now and r.simulated)
    features = tuple(sorted(hardware.features))

    def here(records: Iterable[Record]) -> list[Record]:
        same = (hardware.id, hardware.threads, features)
        return [
            r for r in records if (r.hardware, r.threads, r.features) == same and r.versions == now
        ]

    # kept ones were measured here too: a few new readings do not make the best known one unknown
    own, more_here = here(own), here(more)
    if own and (found := _one_state(_joined(own, more_here))):
        return found
    packaged = _packaged().get(str(workload), [])
    if found := _one_state(here(packaged)) or _one_state(more_here):
        return found
    if not near:
        return []
    others = [*_joined(db.records(workload) if db is not None else (), more), *packaged]
    groups: dict[tuple[bool, str, int, int], list[Record]] = {}
    for r in others:
        usable = within is None or within.get(r.schedule) == r.schedule_version
        if usable and r.versions == now and hardware.features.issuperset(r.requires):
            away = abs(r.threads - hardware.threads)
            groups.setdefault((away > 0, r.hardware, away, r.threads), []).append(r)
    for name in sorted(groups):
        if found := _one_state(groups[name]):
            return found
    return []


def _joined(first: Iterable[Record], then: Iterable[Record]) -> list[Record]:
    """Return all records, each once."""
    return list({encode(r): r for r in (*first, *then)}.values()) if then else list(first)


def known_results(
    space: JointSpace, db: Database | None = None, kept: Kept | None = None
) -> list[tuple[Candidate, Result]]:
    """Return the measured candidates of a space, fastest first; records of older code do not count.

    Where there are only records of another machine or number of threads (`measured_here` tells), these are
    what was within 25 % of the fastest there: what of the others happens to belong into this space may be
    anything.
    """
    versions = {name: s.version for name, s in space.schedules.items()}
    results = sorted(
        (
            r
            for r in results_for(
                space.workload, space.hardware, db, near=True, kept=kept, within=versions
            )
            if versions.get(r.record.schedule) == r.record.schedule_version
        ),
        key=lambda r: r.latency_us,
    )
    found: dict[Candidate, Result] = {}
    for r in results:
        if not measured_here(r, space.hardware) and r.latency_us > NEAR * results[0].latency_us:
            continue
        candidate = space.adopt(r.record.schedule, r.record.config, r.record.threads)
        if candidate is not None:
            found.setdefault(candidate, r)
    return _with_joules(space, list(found.items()))


def _with_joules(
    space: JointSpace, found: list[tuple[Candidate, Result]]
) -> list[tuple[Candidate, Result]]:
    """Leave out what a search with a meter passed over, so that the others' joules can be compared.

    Only where the fastest has joules, and each layout of the tensors still has a candidate.
    """
    if not found or not use_measured([r for _, r in found]) or found[0][1].measured_mj is None:
        return found
    metered = [(c, r) for c, r in found if r.measured_mj is not None]

    def layouts(pairs: list[tuple[Candidate, Result]]) -> set[tuple[tuple[str, str], ...]]:
        return {tuple(sorted(space.layouts(c).items())) for c, _ in pairs}

    return metered if layouts(metered) == layouts(found) else found


def measured_here(result: Result, hardware: Hardware) -> bool:
    """Say whether a result is of this machine with this number of threads."""
    return (result.record.hardware, result.record.threads) == (hardware.id, hardware.threads)


def _one_state(records: Iterable[Record]) -> list[Result]:
    rows = list(records)
    for cache_state in ("cold", "hot"):
        if found := summarise(r for r in rows if r.cache == cache_state):
            return found
    return []


@cache
def _packaged() -> dict[str, list[Record]]:
    """Records shipped in the package, by workload (``mimo_compile/pretuned/*.jsonl``)."""
    out: dict[str, list[Record]] = {}
    folder = files("mimo_compile") / "pretuned"
    if not folder.is_dir():
        return out
    for entry in sorted(folder.iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".jsonl"):
            for line in entry.read_text(encoding="utf-8").splitlines():
                if line.strip():
                    record = decode(line, file=entry.name)
                    out.setdefault(record.workload, []).append(record)
    return out
