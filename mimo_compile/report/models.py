"""What the cost models say about a report's records: rooflines, predictions beside measurements."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from mimo_compile.cost_models.analytic import DeviceModel
from mimo_compile.errors import MimoError
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.ir.workload import Workload
from mimo_compile.report.data import Machine, Subject
from mimo_compile.schedules.base import Schedule
from mimo_compile.search.lookup import Result

MOST = 600
"""Candidates of one machine whose times are predicted, spread over its workloads."""
ENOUGH = 8
"""Candidates of one workload from which on its ranks mean something."""


@dataclass(frozen=True, slots=True)
class Rates:
    """A machine as the analytic model sees it."""

    hardware: Hardware
    device: DeviceModel
    calibrated: bool
    """True when the rates were measured on it; else they are typical ones."""


def rates_of(machine: Machine) -> Rates:
    """Return a machine's rates: calibrated if it is this one and was, else guessed from its features."""
    from mimo_compile.search.calibrate import load

    here = machine.local
    kind = "sim" if machine.simulated else "cpu"
    hardware = here or Hardware(
        machine.hardware, kind, frozenset(machine.features), machine.threads, machine.threads
    )
    device = DeviceModel.guess(hardware)
    measured = load(here) if here is not None else None
    if measured is None:
        return Rates(hardware, device, False)
    return Rates(hardware, device.calibrated(measured.to_json()), True)


def roofline_us(subject: Subject, rates: Rates) -> float | None:
    """Return the roofline of the necessary work; None for a workload that no op here takes.

    Nor is there one for a simulated machine: its cycle model is no roofline.
    """
    if rates.hardware.kind == "sim":
        return None
    try:
        workload = parse_workload(subject.workload)
        return rates.device.latency_us(get_op(workload.op).counts(workload), rates.hardware)
    except MimoError:
        return None


@dataclass(frozen=True, slots=True)
class Pair:
    """A measured candidate and what was predicted of it."""

    workload: str
    name: str
    measured_us: float
    predicted_us: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """Predictions of one model beside the measurements."""

    pairs: list[Pair]
    rho: float | None
    """Rank correlation: the median over workloads with `ENOUGH` candidates, else over all pairs."""
    within: int
    """Number of workloads that the median is over; 0: it is over all pairs."""

    @property
    def typical_error(self) -> float:
        """Median of |predicted / measured - 1|."""
        return statistics.median(abs(p.predicted_us / p.measured_us - 1) for p in self.pairs)


def calibrations(machine: Machine, rates: Rates) -> dict[str, Calibration]:
    """Return what the analytic and the learned model predict of the records, by the model's name.

    The learned model predicts each candidate after being fitted to others (five parts). It is absent with
    too few records, or where xgboost is not installed.
    """
    if machine.simulated:
        return {}
    try:
        from mimo_compile.cost_models.features import Extractor
        from mimo_compile.cost_models.learned import Sample
        from mimo_compile.search.held_out import held_out_us
    except ImportError:
        return {}
    samples, pairs = [], []
    for subject, results in _spread(machine.subjects):
        try:
            workload = parse_workload(subject.workload)
            extractor = Extractor(workload, rates.hardware, rates.device)
        except (MimoError, ValueError):
            continue
        for result in results:
            record = result.record
            counts = _work(workload, result, rates.hardware)
            predicted = rates.device.latency_us(counts, rates.hardware)
            knobs = ", ".join(f"{k}={v}" for k, v in record.config.items())
            name = f"{record.schedule}({knobs})"
            pairs.append(Pair(subject.workload, name, result.latency_us, predicted))
            row = extractor(counts, record.schedule, record.config)
            samples.append(Sample((row,), result.latency_us, subject.workload))
    if len(pairs) < 3:
        return {}
    out = {"analytic": _calibration(pairs)}
    try:
        learned = held_out_us(samples)
    except MimoError:  # xgboost is no part of what running artifacts needs
        learned = None
    if learned is not None:
        out["learned"] = _calibration(
            [
                Pair(p.workload, p.name, p.measured_us, us)
                for p, us in zip(pairs, learned, strict=True)
            ]
        )
    return out


@dataclass(frozen=True, slots=True)
class Study:
    """What the cost models say of one machine's records."""

    rates: Rates
    calibrations: dict[str, Calibration]


def study(machine: Machine) -> Study:
    """Ask the models about a machine's records; takes some seconds where there are many."""
    rates = rates_of(machine)
    return Study(rates, calibrations(machine, rates))


def _spread(subjects: Sequence[Subject]) -> list[tuple[Subject, list[Result]]]:
    """Return results of each workload, evenly over its candidates, at most `MOST` in all."""
    known = [s for s in subjects if s.results]
    each = max(2, MOST // max(1, len(known)))
    out = []
    for subject in known[:MOST]:
        ranked = sorted(subject.results, key=lambda r: r.latency_us)
        step = -(-len(ranked) // each)
        out.append((subject, ranked[::step]))
    return out


def _work(workload: Workload, result: Result, hardware: Hardware) -> Counts:
    """Return a candidate's work with what its schedule says of how it goes about it, if it still can."""
    from mimo_compile.schedules import get_schedule

    record = result.record
    try:
        schedule = get_schedule(record.schedule)
        if type(schedule).work is not Schedule.work and schedule.version == record.schedule_version:
            config = schedule.config_from_json(record.config)
            return schedule.told(workload, config, hardware)
    except (MimoError, ImportError, TypeError, ValueError, KeyError):
        pass
    try:
        return Counts(record.ops, record.bytes)
    except ValueError:  # kinds of work that this version does not know
        return Counts()


def _calibration(pairs: list[Pair]) -> Calibration:
    from mimo_compile.search.held_out import rank_correlation

    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(pair.workload, []).append(pair)
    found = [
        rank_correlation([p.predicted_us for p in g], [p.measured_us for p in g])
        for g in groups.values()
        if len(g) >= ENOUGH
    ]
    within = [rho for rho in found if rho is not None]
    if within:
        return Calibration(pairs, statistics.median(within), len(within))
    rho = rank_correlation([p.predicted_us for p in pairs], [p.measured_us for p in pairs])
    return Calibration(pairs, rho, 0)
