"""The page's tables: which algorithm wins where, all workloads, and where the numbers come from."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime

from mimo_compile.report.data import Machine, ReportData, Subject
from mimo_compile.report.parts import Bar, bars, count, facts, kernel_name, section, table
from mimo_compile.report.svg import escape, short
from mimo_compile.search.farm_runs import TITLES, Worker, searches, table_cells

_MOST_ROWS = 400
_MOST_SEARCHES = 8
_MOST_WORKERS = 64
_CLASS = ("m", "t", "w", "a")
"""Parameters that make kinds of workloads: tokens and formats, not extents."""


def wins(subjects: Sequence[Subject]) -> str:
    """Return, for each kind of workload, which algorithm is fastest how often and by how much."""
    kinds: dict[str, list[tuple[str, str, float | None]]] = {}
    for subject in subjects:
        best: dict[str, float] = {}
        for r in sorted(subject.results, key=lambda r: r.latency_us):
            best.setdefault(r.record.schedule, r.latency_us)
        if not best:
            continue
        names = list(best)
        lead = best[names[1]] / best[names[0]] if len(names) > 1 else None
        second = names[1] if len(names) > 1 else ""
        kinds.setdefault(_kind(subject.workload), []).append((names[0], second, lead))
    rivalled = {k: f for k, f in kinds.items() if any(second for _, second, _ in f)}
    if not rivalled:
        return ""
    rows = []
    for kind, found in sorted(rivalled.items(), key=lambda k: _order(k[0])):
        for winner, times in Counter(w for w, _, _ in found).most_common():
            mine = [f for f in found if f[0] == winner]
            leads = [lead for _, _, lead in mine if lead is not None]
            rival = Counter(second for _, second, _ in mine if second).most_common(1)
            rows.append(
                [
                    f"<code>{escape(kind)}</code>", f"<code>{escape(winner)}</code>",
                    f"{times} of {len(found)}",
                    f"{statistics.median(leads):.2f}×" if leads else "no rival",
                    f"<code>{escape(rival[0][0])}</code>" if rival else "–",
                ]
            )  # fmt: skip
    text = (
        "The fastest algorithm of each workload, by its best measured candidate. The lead is the time of the "
        "next algorithm's best over that of the winner (median)."
    )
    if alone := len(kinds) - len(rivalled):
        text += (
            f" {count(alone, 'kind')} of workloads with records of one algorithm only are left out."
        )
    header = (
        ("workloads", "c"),
        ("algorithm", "c"),
        ("fastest", "n"),
        ("lead", "n"),
        ("next", "c"),
    )
    return section("wins", "Which algorithm wins", text, table(header, rows[:_MOST_ROWS]))


def _kind(workload: str) -> str:
    """Return ``mpgemm m=1,w=w4g64,a=a8`` of a workload's text."""
    op, _, rest = workload.partition(":")
    kept = [p for p in rest.split(",") if p.partition("=")[0] in _CLASS]
    return f"{op} {','.join(kept)}".strip()


def _order(kind: str) -> tuple[str, str, int]:
    """Sort kinds by operator, then formats, then tokens as numbers."""
    op, _, rest = kind.partition(" ")
    parts = dict(p.split("=", 1) for p in rest.split(",") if "=" in p)
    tokens = parts.pop("m", None) or parts.pop("t", None) or ""
    return op, ",".join(parts.values()), int(tokens) if tokens.isdigit() else 0


def workloads(subjects: Sequence[Subject]) -> str:
    """Return one line for each workload."""
    rows = []
    metered = any(s.meter for s in subjects)
    alone = metered and all(s.meter for s in subjects)
    for s in subjects[:_MOST_ROWS]:
        choice = s.choice
        schedule = choice.schedule if choice else s.best.record.schedule if s.best else ""
        config = choice.config if choice else s.best.record.config if s.best else {}
        rows.append(
            [
                f"<code>{escape(s.workload)}</code>",
                f"<code>{escape(kernel_name(schedule, dict(config)))}</code>" if schedule else "–",
                escape(choice.source if choice else _how_timed(s)),
                str(len(s.records)),
                "–" if s.default is None else short(s.default.latency_us),
                "–" if s.latency_us is None else short(s.latency_us),
                "–" if s.speedup is None else f"{s.speedup:.2f}×",
                *([_joules(s)] if metered else []),
                *([] if alone else ["–" if (mj := s.energy_mj(False)) is None else short(mj)]),
            ]
        )
    if not rows:
        return ""
    names = ["workload", "kernel", "time is", "records", "default µs", "µs", "speed-up"]
    names += ["mJ, measured"] if metered else []
    names += [] if alone else ["mJ, modelled"]
    header = [(n, "n" if i > 2 else "c" if i < 2 else "") for i, n in enumerate(names)]
    text = "Microseconds and millijoules of one call."
    if len(subjects) > _MOST_ROWS:
        text += f" {len(subjects) - _MOST_ROWS} of least weight are left out."
    return section("workloads", "All workloads", text, table(header, rows))


def _joules(subject: Subject) -> str:
    """Return measured millijoules with their meter."""
    mj = subject.energy_mj(True) if subject.meter else None
    return "–" if mj is None else f"{short(mj)} {escape(subject.meter or '')}"


def _how_timed(subject: Subject) -> str:
    return "simulated" if any(r.simulated for r in subject.records) else "measured"


def farms(workers: Sequence[Worker]) -> str:
    """Return, for each search on a farm, what its workers did and how their time went."""
    found = searches(workers)
    out = []
    for number, rows in enumerate(found[:_MOST_SEARCHES]):
        first = rows[0]
        when = datetime.fromtimestamp(first.began, UTC).strftime("%Y-%m-%d %H:%M UTC")
        head = (
            f"<h3>{escape(when)}: {escape(count(len(rows), 'worker'))}, {first.seconds:.0f} s</h3>"
            f'<p class="soft">For {escape(first.hardware)}, {escape(count(first.threads, "thread"))}. The '
            f"tuner itself computed for {first.tuner_s:.1f} s.</p>"
        )
        used = [
            Bar(w.name, w.share, f"{100 * w.share:.0f} % of {w.busy_s + w.idle_s:.0f} s")
            for w in rows[:_MOST_WORKERS]
        ]
        header = [(t, "n" if i > 1 else "c" if i == 0 else "") for i, t in enumerate(TITLES)]
        lines = [[f"<code>{escape(c[0])}</code>", *map(escape, c[1:])] for c in table_cells(rows)]
        chart = bars(used, title=f"share of time used, search {number + 1}", whole=1.0)
        out.append(f"{head}{chart}{table(header, lines[:_MOST_WORKERS])}")
        if len(rows) > _MOST_WORKERS:
            out.append(f'<p class="soft">{len(rows) - _MOST_WORKERS} workers are left out.</p>')
    text = (
        "The newest searches on a cluster. Bars: the share of its time that a worker was busy. Seconds are "
        "those of a whole node: a build on one of four CPUs counts a quarter. Waiting is from the arrival of "
        "an action to its start."
    )
    if len(found) > _MOST_SEARCHES:
        text += f" {len(found) - _MOST_SEARCHES} older ones are left out."
    return section("farms", "What the workers did", text, "".join(out))


def provenance(machine: Machine, data: ReportData) -> str:
    """Return on what the numbers rest: machine, versions, times, how many were measured."""
    records = [r for s in machine.subjects for r in s.records]
    pairs: list[tuple[str, object]] = [("machine", machine.hardware), ("threads", machine.threads)]
    if machine.features:
        pairs.append(("instruction sets", " ".join(machine.features)))
    if records:
        first, last = (
            datetime.fromtimestamp(f(r.time for r in records), UTC).strftime("%Y-%m-%d %H:%M")
            for f in (min, max)
        )
        how = "simulated" if machine.simulated else "measured"
        pairs.append((how, f"{first} to {last} UTC"))
        versions = sorted({", ".join(f"{n} {v}" for n, v in r.versions.items()) for r in records})
        pairs.append(("compiled with", "; ".join(v for v in versions if v) or "unknown"))
        phases = Counter("the same code again" if r.twin else r.phase for r in records)
        pairs.append(("records", _counted(phases)))
        pairs.append(("verdicts", _counted(machine.verdicts)))
        if any(r.worker for r in records):
            by = Counter(r.worker or "no farm" for r in records)
            pairs.append(("workers", _counted(by)))
        pairs.append(("caches", _counted(Counter(r.cache for r in records))))
        meters = Counter(r.energy_source for r in records if r.energy_mj is not None)
        modelled = sum(r.modelled_mj is not None for r in records)
        joules = f"measured: {_counted(meters)}" if meters else "measured: none"
        pairs.append(("energies", f"{joules}; modelled: {count(modelled, 'record')}"))
    manifest = data.manifest
    if manifest is not None:
        chosen = Counter(str(c.source) for c in manifest.plan)
        pairs.append(("times of the plan", _counted(chosen)))
        sources = Counter(c.energy_source or "none" for c in manifest.plan)
        pairs.append(("energies of the plan", _counted(sources)))
        built = ", ".join(f"{n} {v}" for n, v in manifest.versions.items())
        pairs.append(("artifact built by", built))
        pairs.append(("it requires", " ".join(manifest.target.features) or "nothing beyond x86-64"))
        members = ", ".join(f"{n} {_size(b)}" for n, b in sorted(data.members.items()))
        pairs.append(("its members", members))
    text = (
        "Times are cycles of a model." if machine.simulated
        else "Times are medians of batches on this machine. Measured and modelled energies are never "
        "compared with each other."
    )  # fmt: skip
    return section("provenance", "Where the numbers come from", text, facts(pairs))


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{n} {name}" for name, n in counts.most_common()) or "none"


def _size(count_: int) -> str:
    size = float(count_)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
