"""The page: sections of charts and tables, put together into one file without any outside reference."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files

from mimo_compile import __version__
from mimo_compile.report import charts, tables
from mimo_compile.report.data import Machine, ReportData
from mimo_compile.report.models import Study, study
from mimo_compile.report.parts import count, facts
from mimo_compile.report.svg import escape, short

MOST_PLOTS = 24
"""Charts in one gallery."""


def page(
    data: ReportData, most_plots: int = MOST_PLOTS, studies: Sequence[Study] | None = None
) -> str:
    """Return the whole page as HTML.

    Args:
        data: What it is about.
        most_plots: Charts in one gallery; fewer make a smaller page.
        studies: What the cost models say of each machine; None: they are asked now.
    """
    known = studies if studies is not None else [study(m) for m in data.machines]
    style = (files("mimo_compile.report") / "style.css").read_text(encoding="utf-8")
    machines = [
        _machine(machine, data, index, most_plots, known[index])
        for index, machine in enumerate(data.machines)
    ]
    if not any(s.records or s.choice for m in data.machines for s in m.subjects):
        machines = ['<p class="soft">There are no records to show.</p>']
    stamp = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(data.title)} – kernel report</title><style>{style}</style></head>"
        f"<body><main>{_head(data)}{''.join(machines)}{tables.farms(data.workers)}"
        f'<p class="soft">Written by mimo-compile {escape(__version__)} on {stamp}.</p>'
        "</main></body></html>\n"
    )


def _head(data: ReportData) -> str:
    out = [
        f"<h1>{escape(data.title)}</h1>",
        f'<p class="soft"><code>{escape(data.path)}</code></p>',
    ]
    manifest = data.manifest
    if manifest is not None:
        size = sum(data.members.values())
        out.append(
            facts(
                [
                    ("quantisation", manifest.quant), ("objective", manifest.objective),
                    ("kernels", len(manifest.plan)), ("size", f"{size / 2**20:.1f} MiB"),
                    ("target", f"{manifest.target.name}, {manifest.target.threads} threads"),
                ]
            )
        )  # fmt: skip
    if data.unread:
        out.append(f'<p class="soft">{count(data.unread, "record")} could not be read.</p>')
    return "".join(out)


def _machine(machine: Machine, data: ReportData, index: int, most: int, found: Study) -> str:
    subjects = sorted(machine.subjects, key=lambda s: -s.weight)
    rates = found.rates
    used = count(machine.threads, "thread")
    if machine.simulated:
        used = "simulated: all times are modelled, none was measured"
    sections = "".join(
        [
            charts.by_kernel(subjects) if data.manifest is not None else "",
            charts.speedups(subjects),
            tables.wins(subjects),
            charts.roofline(subjects, machine, rates),
            charts.calibration(found.calibrations),
            charts.curves(subjects, rates, most),
            charts.fronts(subjects, most),
            tables.workloads(subjects),
            tables.provenance(machine, data),
        ]
    )
    # ids are those of sections; a page may have several machines
    sections = re.sub(r'(<h2 id="|aria-labelledby=")', rf"\g<1>m{index}-", sections)
    names = re.findall(r'<h2 id="([a-z0-9-]+)">([^<]*)</h2>', sections)
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title in names)
    return (
        f'<h2 class="machine">{escape(machine.hardware)}, {escape(used)}</h2>'
        f'<nav aria-label="sections">{links}</nav>{_tiles(machine, data)}{sections}'
    )


def _tiles(machine: Machine, data: ReportData) -> str:
    """Return the figures that matter most, each in a box with what it means."""
    tiles: list[tuple[str, str]] = []
    if data.manifest is not None:
        step = [s for s in machine.subjects if s.step_calls]
        known = [s for s in step if s.latency_us is not None]
        if known:
            total = sum(s.weight for s in known)
            what = "one step of one token" if data.manifest.decoder else "one call"
            guessed = sum(not s.timed for s in known) + len(step) - len(known)
            note = f", {guessed} of {len(step)} kernels only predicted" if guessed else ""
            tiles.append((f"{short(total / 1e3)} ms", f"in kernels for {what}{note}"))
        chosen = Counter(c.source for c in data.manifest.plan)
        tiles.append(
            (str(chosen["measured"]), f"of {len(data.manifest.plan)} kernels chosen by measurement")
        )
    rated = [(s.speedup, s.weight) for s in machine.subjects if s.speedup is not None]
    after = sum(w for _, w in rated)
    if after:
        before = sum(w * r for r, w in rated if r is not None)
        text = f"tuned over default, {count(len(rated), 'workload')} together"
        tiles.append((f"{before / after:.2f}×", text))
    if machine.verdicts:
        bad = sum(n for v, n in machine.verdicts.items() if v != "ok")
        tiles.append((str(sum(machine.verdicts.values())), f"records, {bad} of them rejected"))
    sources = {s.best.energy_source for s in machine.subjects if s.measured_energy and s.best}
    if machine.simulated:
        tiles.append(("simulated", "times: cycles of a model, of a machine that does not exist"))
    elif sources:
        tiles.append((", ".join(sorted(sources)), "energy meter"))
    else:
        tiles.append(("no meter", "joules are modelled, not measured"))
    cells = "".join(
        f'<div class="card tile"><b>{escape(b)}</b><span>{escape(t)}</span></div>' for b, t in tiles
    )
    return f'<div class="tiles">{cells}</div>'
