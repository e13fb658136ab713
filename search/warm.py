"""Warm start: what records of other shapes and machines say of a new workload.

A model is trained on the user's records of the same ops where there are enough of them; else one that comes
with the package is used, if it was trained on this machine or one like it, by the same compiler and the same
versions of the schedules.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from mimo_compile.cost_models.analytic import DeviceModel
from mimo_compile.cost_models.features import ISA, Extractor
from mimo_compile.cost_models.learned import LatencyModel, Sample
from mimo_compile.cost_models.pretrained import shipped
from mimo_compile.errors import MimoError
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware, local_cpu
from mimo_compile.ir.ops import parse_workload
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules import get_schedule
from mimo_compile.schedules.base import Schedule
from mimo_compile.search.database import Database
from mimo_compile.search.learner import Prior
from mimo_compile.search.lookup import summarise
from mimo_compile.search.records import Record, versions

LEAST = 96
"""Correct candidates that the user's records must hold before a model of their own is trained on them."""
MOST = 2048
"""Newest candidates that such a model is trained on: a second or so."""
LOOK = 4 * MOST
"""Newest records of an op that are looked at for them."""
PRIOR_ROUNDS = 100
"""Trees of each member: more than a search's own model has, since this one is trained once."""

_LOG = logging.getLogger(__name__)


def isa_of(features: Iterable[str]) -> list[str]:
    """Return the features that make another machine of one, sorted."""
    return sorted(set(ISA) & set(features))


def hardware_of(record: Record) -> Hardware:
    """Return the machine of a record; where it is not this one, with caches of the usual sizes."""
    here = local_cpu()
    name, _, cores = record.hardware.rpartition(".")
    if (here.id, tuple(sorted(here.features))) == (record.hardware, record.features):
        return replace(here, threads=record.threads)
    count = int(cores.removesuffix("c") or record.threads)
    return Hardware(name, "cpu", frozenset(record.features), count, record.threads)


def work_of(record: Record, workload: Workload, hardware: Hardware) -> Counts | None:
    """Return the work of a recorded candidate, None if its schedule is gone or has changed."""
    try:
        schedule = get_schedule(record.schedule)
        if schedule.version != record.schedule_version:
            return None
        if type(schedule).work is Schedule.work:
            return Counts(record.ops, record.bytes)
        return schedule.told(workload, schedule.config_from_json(record.config), hardware)
    except (MimoError, ValueError, TypeError, KeyError):
        return None


def samples_of(records: Iterable[Record]) -> tuple[list[Sample], dict[str, int]]:
    """Return samples of the correct candidates, with the versions of their schedules.

    Groups are ``workload@machine/threads/cache``.

    Features are by guessed rates of each machine: what is learned must not depend on one calibration.
    """
    groups: dict[tuple[str, str, int, str], list[Record]] = {}
    for r in records:
        if not r.simulated:
            groups.setdefault((r.workload, r.hardware, r.threads, r.cache), []).append(r)
    out: list[Sample] = []
    seen: dict[str, int] = {}
    for key, rows in groups.items():
        try:
            workload, hardware = parse_workload(key[0]), hardware_of(rows[0])
            extract = Extractor(workload, hardware, DeviceModel.guess(hardware))
        except (MimoError, ValueError):  # a generic function that is not known here, say
            continue
        for result in summarise(rows):
            r = result.record
            if (counts := work_of(r, workload, hardware)) is not None:
                rows_of = extract.blocks(counts, r.schedule, r.config)
                group = f"{key[0]}@{key[1]}/{key[2]}/{key[3]}"
                out.append(Sample(rows_of, result.latency_us, group))
                seen[r.schedule] = r.schedule_version
    return out, seen


def train(records: Iterable[Record], *, seed: int = 0) -> LatencyModel:
    """Train a model on records of any shapes and machines, all in one cache state.

    Its ``meta`` says where it comes from: machine, ISA, threads, cache state, versions.
    """
    rows = list(records)
    model = LatencyModel(rounds=PRIOR_ROUNDS, seed=seed)
    samples, schedules = samples_of(rows)
    model.fit(samples)
    model.meta = {
        "hardware": sorted({r.hardware for r in rows}), "isa": isa_of(f for r in rows for f in r.features),
        "threads": sorted({r.threads for r in rows}), "cache": sorted({r.cache for r in rows}),
        "versions": versions(), "schedules": schedules,
        "workloads": len({r.workload for r in rows}),
    }  # fmt: skip
    return model


def find_prior(
    hardware: Hardware, workloads: Iterable[Workload], db: Database, cache: str
) -> Prior | None:
    """Return a model for workloads on a target, trained on other shapes or machines; None without one.

    Args:
        hardware: The target.
        workloads: What is to be searched; their own records are left out.
        db: The user's records.
        cache: The state of caches that times are taken in.
    """
    if hardware.kind != "cpu":
        return None
    wanted = {str(w) for w in workloads}
    ops = {w.partition(":")[0] for w in wanted}
    isa, now = isa_of(hardware.features), versions()
    rows: list[Record] = []
    for op in sorted(ops):
        others = islice(db.newest(op, but=sorted(wanted), of=hardware.id), LOOK)
        fit = (
            r
            for r in others
            if r.cache == cache and r.versions == now and isa_of(r.features) == isa
        )
        rows += islice(fit, MOST)
    rows = sorted(rows, key=lambda r: r.time)[-MOST:]
    if len({r.key for r in rows if r.ok}) >= LEAST:
        model = train(rows)
        if model.trained:
            text = f"{model.samples} records of other workloads"
            _LOG.info("warm start from %s", text)
            return Prior(model, frozenset(model.meta["schedules"]), text)
    return _shipped_prior(hardware, cache)


def _shipped_prior(hardware: Hardware, cache: str) -> Prior | None:
    """Return the packaged model of this machine, else of one with the same ISA."""
    found: list[tuple[bool, str, Prior]] = []
    for path in shipped():
        try:
            model = _packaged(path, path.stat().st_mtime_ns)
            schedules = _same_versions(model.meta)
        except MimoError as error:
            _LOG.warning("the packaged cost model %s is not used: %s", path.name, error)
            continue
        if model.meta["isa"] != isa_of(hardware.features) or cache not in model.meta["cache"]:
            continue
        if not schedules:
            _LOG.warning(
                "the packaged cost model %s is not used: it was trained for other versions of the "
                "schedules or of TVM (python -m mimo_compile.search.train makes a new one)",
                path.name,
            )
            continue
        other = hardware.id not in model.meta["hardware"]
        found.append((other, path.name, Prior(model, schedules, path.name)))
    if not found:
        return None
    _, name, prior = min(found, key=lambda f: f[:2])
    _LOG.info("warm start from the packaged model %s", name)
    return prior


@lru_cache(maxsize=4)
def _packaged(path: Path, changed: int) -> LatencyModel:
    """Read a packaged model, once for each process: searches ask it, and never train it further.

    Args:
        path: The file.
        changed: When it was written.

    Raises:
        InputError: the file is damaged, or of another schema or kind.
    """
    return LatencyModel.load(path)


def _same_versions(meta: Mapping[str, Any]) -> frozenset[str]:
    """Return the schedules whose code is still what the model was trained on; none under another TVM."""
    if meta["versions"] != versions():
        return frozenset()
    out = set()
    for name, version in meta["schedules"].items():
        try:
            if get_schedule(name).version == version:
                out.add(name)
        except MimoError:
            continue
    return frozenset(out)
