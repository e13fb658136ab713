"""The page's charts: bars by kernel, roofline, tuning curves, Pareto fronts, predicted against measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mimo_compile.report.data import Machine, Subject
from mimo_compile.report.models import Calibration, Rates, roofline_us
from mimo_compile.report.parts import Bar, bars, card, count, gallery, kernel_name, section
from mimo_compile.report.svg import Axis, Plot, duration, short
from mimo_compile.search.lookup import Result

_MOST_POINTS = 250
_MOST_BARS = 18
_MOST_SHARES = 10
_GAIN = 1.01
"""The least speed-up that is shown."""
_CLOSE = 0.02
"""Relative difference of a single reading and the confirmed time that is told."""
_FAR = 8.0
"""A line this many times below the best is told of, not drawn: it would flatten the curve."""


def by_kernel(subjects: Sequence[Subject]) -> str:
    """Return time, then energy, of one decoding step (or one call of the module) by workload."""
    used = [s for s in subjects if s.step_calls]
    guessed = any(not s.timed for s in used)
    text = "One decoding step of one token (one call of a module): calls times the latency of one."
    if guessed:
        text += " Pale bars were not measured but predicted."
    out = [section("time", "Time by kernel", text, _bars(used, lambda s: s.weight, "µs", "bar"))]
    # one bar without joules, or with another meter's, would make the others' parts of the whole wrong
    meters = {s.meter for s in used}
    measured = len(meters) == 1 and None not in meters
    if measured:
        title, kind = "Energy by kernel, measured", "bar2"
        text = "Millijoules of one decoding step, from a meter."
    else:
        title, kind = "Energy by kernel, modelled", "bar3"
        text = "Millijoules of one decoding step by the analytic model: for ranking, not absolute figures."

    def joules(s: Subject) -> float:
        return (s.energy_mj(measured) or 0.0) * s.step_calls

    out.append(section("energy", title, text, _bars(used, joules, "mJ", kind)))
    return "".join(out)


def _bars(
    subjects: Sequence[Subject], value: Callable[[Subject], float], unit: str, kind: str
) -> str:
    ranked = sorted(((value(s), s) for s in subjects), key=lambda p: -p[0])
    total = sum(v for v, _ in ranked)
    show = duration if unit == "µs" else lambda v: f"{short(v)} {unit}"
    if not total:
        return ""
    items = [
        Bar(
            f"{s.step_calls} × {s.workload}", v, f"{show(v)} · {100 * v / total:.0f} %",
            kind if s.timed or unit != "µs" else "pale",
        )
        for v, s in ranked[:_MOST_BARS] if v > 0
    ]  # fmt: skip
    rest = sum(v for v, _ in ranked[_MOST_BARS:])
    if rest > 0:
        text = f"{show(rest)} · {100 * rest / total:.0f} %"
        items.append(Bar(f"{len(ranked) - _MOST_BARS} more", rest, text, kind))
    return f'<div class="card">{bars(items, title=f"{unit} by kernel")}</div>'


def speedups(subjects: Sequence[Subject]) -> str:
    """Return how much faster the chosen kernels are than those that are used without tuning."""
    rated = sorted((s for s in subjects if s.speedup), key=lambda s: -(s.speedup or 0))
    shown = [s for s in rated if (s.speedup or 0) >= _GAIN][:_MOST_BARS]
    if not rated:
        return ""
    items = [Bar(s.workload, s.speedup or 0.0, f"{s.speedup:.2f}×") for s in shown]
    text = "Latency of the configuration used without tuning over that of the chosen one; both were measured."
    if left := len(rated) - len(shown):
        text += f" {count(left, 'workload')} with a smaller speed-up left out."
    if not shown:
        return section(
            "speedup", "Speed-up by tuning", text, '<p class="soft">None gained 1 %.</p>'
        )
    content = f'<div class="card">{bars(items, title="speed-up by tuning")}</div>'
    return section("speedup", "Speed-up by tuning", text, content)


# -- roofline ----------------------------------------------------------------------------------


def roofline(subjects: Sequence[Subject], machine: Machine, rates: Rates) -> str:
    """Return the best kernel of each workload under the machine's roofs."""
    marks = []
    for subject in subjects:
        if subject.best is None or not subject.best.record.bytes.get("dram"):
            continue
        record = subject.best.record
        multiplied = ("fma_f32", "dot_i8", "tile_i8", "dot_bf16", "tile_bf16")
        work = 2 * sum(record.ops.get(k, 0.0) for k in multiplied)
        if work:
            rate = work / subject.best.latency_us / 1e3
            marks.append((work / record.bytes["dram"], rate, subject))
    if not marks:
        return ""
    text = (
        "The best kernel of each workload. Operations count a multiply-add as two. Small kernels may stand "
        "above the slope: caches serve them."
    )
    roofs: list[tuple[str, str, float]] = []
    memory = rates.device.bandwidth("dram", machine.threads)
    entries: list[tuple[str, str]] = []
    if rates.calibrated:
        kinds = (("roof2", "fma_f32", "f32 multiply-add"), ("roof", "dot_i8", "int8 dot"))
        roofs = [
            (k, name, 2 * rates.device.ops_per_s[op] * machine.threads / 1e9)
            for k, op, name in kinds
        ]
        text += " The roofs are this machine's measured rates."
        entries += [(f"line-{k}", f"{name}: {short(top)} Gop/s") for k, name, top in roofs]
        entries.append(("line-roof", f"slope: {memory / 1e9:.3g} GB/s from memory"))
    else:
        why = "it is simulated" if machine.simulated else "this machine's rates were not measured"
        text += f" No roof is drawn: {why}."
    knees = [top * 1e9 / memory for _, _, top in roofs]
    xs = [*(m[0] for m in marks), *knees]
    x = Axis.around(xs, log=True, title="operations per byte from memory")
    y = Axis.around([*(m[1] for m in marks), *(r[2] for r in roofs)], log=True, title="Gop/s")
    label = f"roofline of {count(len(marks), 'kernel')}"
    plot = Plot(x, y, 460, 300, label)
    for (kind, _, top), knee in zip(roofs, knees, strict=True):
        slope = top / knee
        start = max(x.low, y.low / slope)
        plot.line([(start, start * slope), (knee, top), (x.high, top)], kind)
    ops = sorted({m[2].op for m in marks})
    for index, op in enumerate(ops):
        mine = [m for m in marks if m[2].op == op]
        labels = [
            f"{s.workload}: {rate:.3g} Gop/s, {s.latency_us or 0:.4g} µs" for _, rate, s in mine
        ]
        plot.points([(a, b) for a, b, _ in mine], f"op{min(index, 4)}", 4.5, labels)
        entries.append((f"dot op{min(index, 4)}", f"{op} ({len(mine)})"))
    content = (
        f'<div class="two">{card("all kernels", plot, entries)}{_shares(subjects, rates)}</div>'
    )
    return section("roofline", "Roofline", text, content)


def _shares(subjects: Sequence[Subject], rates: Rates) -> str:
    """Return how near to the roof the heaviest kernels are, in figures."""
    items: list[Bar] = []
    for subject in subjects:
        roof = roofline_us(subject, rates)
        if roof is not None and subject.best is not None and len(items) < _MOST_SHARES:
            share = roof / subject.best.latency_us
            text = f"{100 * share:.0f} %" if share < 1.05 else "above"
            items.append(Bar(subject.workload, min(share, 1.0), text))
    if not items:
        return ""
    rate = (
        "its measured rates"
        if rates.calibrated
        else "typical rates, since its own were not measured"
    )
    note = (
        f"Time of the necessary work by {rate}, over the time measured. “Above”: small data stay in caches, "
        "table look-up avoids multiplications, or the rates were measured beside other load."
    )
    return (
        '<div class="card"><h3>share of the roof, the kernels of most weight</h3>'
        f'{bars(items, title="share of the roof")}<p class="soft small">{note}</p></div>'
    )


# -- tuning curves -----------------------------------------------------------------------------


def curves(subjects: Sequence[Subject], rates: Rates, most: int) -> str:
    """Return, for each workload, the candidates in the order of measuring and the best so far."""
    cards = [c for s in subjects if (c := _curve(s, rates))]
    text = (
        "Each dot is a correct candidate in the order of measuring, read once; the line is the best so far. "
        "What counts is the confirmation at the end, where the leaders were compared with each other. Slow "
        "ones beyond the chart are left out. Algorithms that avoid multiplications may pass the roofline."
    )
    if cards and not rates.calibrated and rates.hardware.kind != "sim":
        text += " Rooflines are by typical rates, since this machine's were not measured."
    return section("curves", "Tuning curves", text, gallery(cards, most))


def _curve(subject: Subject, rates: Rates) -> str:
    trials, curve = subject.trials(), subject.curve()
    if len(trials) < 3 or not curve:
        return ""
    good = [
        (float(i), r.latency_us)
        for i, r in enumerate(trials, 1)
        if r.ok and r.latency_us is not None
    ]
    best = curve[-1][1]
    entries = [("line-curve", f"best reading {duration(best)} of {len(trials)} candidates")]
    if subject.best is not None and abs(subject.best.latency_us / best - 1) > _CLOSE:
        entries.append(("", f"confirmed: {duration(subject.best.latency_us)}"))
    lines: list[tuple[str, float]] = []
    default = subject.default.latency_us if subject.default is not None else None
    if default is not None:
        lines.append(("default", default))
        entries.append(("line-default", f"default {duration(default)} ({default / best:.2f}×)"))
    roof = roofline_us(subject, rates)
    if roof is not None:
        drawn = roof * _FAR > best
        if drawn:
            lines.append(("roof", roof))
        where = "" if drawn else ", below the chart"
        entries.append(("line-roof", f"roofline {duration(roof)}{where}"))
    limit = max(best * 2.5, (default or 0.0) * 1.2)
    shown = [p for p in good if p[1] <= limit]
    step = -(-len(shown) // _MOST_POINTS)
    y = Axis.around([*(p[1] for p in shown), *(v for _, v in lines)], log=True, title="µs")
    x = Axis(0, len(trials) * 1.03 + 1, title="candidates measured")
    label = f"tuning curve of {subject.workload}: from {short(curve[0][1])} to {short(best)} µs"
    plot = Plot(x, y, title=label)
    for kind, value in lines:
        plot.line([(x.low, value), (x.high, value)], kind)
    plot.points(shown[:: max(1, step)], "trial", 2.2)
    plot.steps([p for p in curve if p[1] <= y.high], "curve")
    return card(subject.workload, plot, entries)


# -- Pareto fronts -----------------------------------------------------------------------------


def fronts(subjects: Sequence[Subject], most: int) -> str:
    """Return latency against energy of each workload's candidates, those by a meter apart from the others."""
    out = []
    for measured in (True, False):
        mine = [s for s in subjects if s.measured_energy == measured]
        cards = [c for s in mine if (c := _front(s, measured))]
        kind = "measured" if measured else "modelled"
        text = f"Latency and {kind} energy of each correct candidate; the line joins those that none beats."
        if not measured:
            text += " Modelled energy follows latency closely, so fronts are short."
        out.append(
            section(f"pareto-{kind}", f"Pareto fronts, energy {kind}", text, gallery(cards, most))
        )
    return "".join(out)


def _front(subject: Subject, measured: bool) -> str:
    pairs = [(r, r.point(measured)) for r in subject.results]
    points = [(a, b, r) for r, (a, b) in pairs if b is not None]
    if len(points) < 2:
        return ""
    near = min(p[0] for p in points) * 4
    points = sorted((p for p in points if p[0] <= near), key=lambda p: p[0])
    keys = {r.record.key for r in subject.front}
    on_front = [p for p in points if p[2].record.key in keys]
    rest = [p for p in points if p[2].record.key not in keys][:_MOST_POINTS]
    kept = [*rest, *on_front]
    x = Axis.around([p[0] for p in kept], log=True, title="µs")
    y = Axis.around([p[1] for p in kept], log=True, title="mJ")
    label = f"Pareto front of {subject.workload}: {count(len(on_front), 'point')}"
    plot = Plot(x, y, title=label)
    plot.points([p[:2] for p in rest], "rest", 2.6)
    plot.steps([p[:2] for p in on_front], "front")
    plot.points([p[:2] for p in on_front], "front", 3.6, [_label(p[2]) for p in on_front])
    entries = [
        ("dot front", f"{len(on_front)} on the front"),
        ("dot rest", f"{len(rest)} others"),
    ]
    if unread := sum(b is None for _, (_, b) in pairs):
        entries.append(("", f"{unread} without measured joules left out"))
    note = ""
    chosen = subject.best
    if chosen is not None:
        latency, energy = chosen.point(measured)
        if energy is not None and latency <= near:
            plot.ring((latency, energy), "chosen", f"chosen: {_label(chosen)}")
            entries.append(("ring chosen", f"chosen: {duration(latency)}, {short(energy)} mJ"))
            note = _label(chosen)
    return card(subject.workload, plot, entries, note)


def _label(result: Result) -> str:
    return kernel_name(result.record.schedule, result.record.config)


# -- cost models -------------------------------------------------------------------------------


def calibration(found: Mapping[str, Calibration]) -> str:
    """Return predicted against measured times of each cost model."""
    names = {
        "analytic": "analytic model (roofline of the declared work)",
        "learned": "learned model (each candidate predicted from the others)",
    }
    cards = []
    for name, one in found.items():
        measured = [p.measured_us for p in one.pairs]
        predicted = [p.predicted_us for p in one.pairs]
        both = Axis.around([*measured, *predicted], log=True)
        x = Axis(both.low, both.high, True, "measured µs")
        y = Axis(both.low, both.high, True, "predicted µs")
        plot = Plot(x, y, 330, 290, f"predicted against measured times of the {names[name]}")
        plot.line([(x.low, y.low), (x.high, y.high)], "roof2")
        step = -(-len(one.pairs) // (3 * _MOST_POINTS))
        some = one.pairs[:: max(1, step)]
        labelled = some if len(some) <= 60 else []
        labels = [f"{p.workload}, {p.name}" for p in labelled]
        plot.points([(p.measured_us, p.predicted_us) for p in some], "pair", 2.2, labels)
        note = f"Typical error {100 * one.typical_error:.0f} % (median) of {len(one.pairs)} candidates."
        if one.rho is not None:
            over = (
                f"median of {count(one.within, 'workload')}" if one.within
                else "over all of them, workloads mixed"
            )  # fmt: skip
            note += f" Rank correlation {one.rho:.2f} ({over})."
        entries = [("dot pair", "a candidate"), ("line-roof2", "prediction is right")]
        cards.append(card(names[name], plot, entries, note))
    text = (
        "What the models predict of measured candidates, by this version and these records; not what a "
        "search believed while it ran. Rank correlation 1: they are ordered as the measurement orders them."
    )
    return section("models", "Cost models", text, gallery(cards, len(cards)))
