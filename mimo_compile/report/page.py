"""The page: sections of charts and tables, put together into one file without any outside reference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.resources import files

from mimo_compile import __version__
from mimo_compile.cost_models.analytic import DeviceModel
from mimo_compile.report.data import Machine, ReportData, Subject
from mimo_compile.report.svg import Axis, Bar, Plot, bars, escape, short

_MOST_PLOTS = 24
_MOST_POINTS = 300
_MOST_BARS = 18


def page(data: ReportData) -> str:
    """Return the whole page as HTML."""
    style = (files("mimo_compile.report") / "style.css").read_text(encoding="utf-8")
    body = [_head(data)]
    for machine in data.machines:
        body.append(_machine(machine, data))
    stamp = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    body.append(f'<p class="soft">Written by mimo-compile {escape(__version__)} on {stamp}.</p>')
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(data.title)} – kernel report</title><style>{style}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _head(data: ReportData) -> str:
    out = [
        f"<h1>{escape(data.title)}</h1>",
        f'<p class="soft"><code>{escape(data.path)}</code></p>',
    ]
    manifest = data.manifest
    if manifest is not None:
        size = sum(data.members.values())
        facts = [
            ("quantisation", manifest.quant), ("objective", manifest.objective),
            ("kernels", len(manifest.plan)), ("size", f"{size / 2**20:.1f} MiB"),
            ("target", f"{manifest.target.name}, {manifest.target.threads} threads"),
        ]  # fmt: skip
        rows = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in facts)
        out.append(f'<div class="card"><table>{rows}</table></div>')
    if data.unread:
        out.append(f'<p class="soft">{_count(data.unread, "record")} could not be read.</p>')
    return "".join(out)


def _machine(machine: Machine, data: ReportData) -> str:
    subjects = sorted(machine.subjects, key=lambda s: -_weight(s))
    used = f"{machine.threads} threads"
    if machine.simulated:
        used = "simulated: all times are modelled, none was measured"
    out = [f"<h2>{escape(machine.hardware)}, {used}</h2>", _tiles(machine, data)]
    if data.manifest is not None:
        out.append(_by_kernel(subjects))
    out += [_speedups(subjects), _roofline(subjects, machine), _curves(subjects), _fronts(subjects)]
    out.append(_table(subjects))
    return "".join(out)


def _weight(subject: Subject) -> float:
    """Microseconds that a decoding step spends in a workload; outside of an artifact those of one call."""
    latency = subject.latency_us or 0.0
    return latency * _step_calls(subject) if subject.calls else latency


def _step_calls(subject: Subject) -> int:
    step = subject.calls.get("step_1", 0) + subject.calls.get("head_1", 0)
    return step or subject.calls.get("main", 0)


def _section(title: str, text: str, content: str) -> str:
    return f'<h2>{title}</h2><p class="soft">{text}</p>{content}' if content else ""


def _tiles(machine: Machine, data: ReportData) -> str:
    verdicts = machine.verdicts
    tiles: list[tuple[str, str]] = []
    if data.manifest is not None:
        step = [s for s in machine.subjects if _step_calls(s)]
        known = [s for s in step if s.latency_us is not None]
        if known:
            total = sum(_weight(s) for s in known)
            what = "one step of one token" if data.manifest.decoder else "one call"
            guessed = sum(not s.timed for s in known) + len(step) - len(known)
            note = f", {guessed} of {len(step)} kernels only predicted" if guessed else ""
            tiles.append((f"{short(total / 1e3)} ms", f"in kernels for {what}{note}"))
        chosen = Counter(c.source for c in data.manifest.plan)
        tiles.append(
            (str(chosen["measured"]), f"of {len(data.manifest.plan)} kernels chosen by measurement")
        )
    rated = [(s.speedup, _weight(s)) for s in machine.subjects if s.speedup is not None]
    if rated:
        before = sum(w * r for r, w in rated if r is not None)
        after = sum(w for _, w in rated)
        if after:
            tiles.append(
                (
                    f"{before / after:.2f}×",
                    f"tuned over default, {_count(len(rated), 'workload')} together",
                )
            )
    if verdicts:
        bad = sum(n for v, n in verdicts.items() if v != "ok")
        tiles.append((str(sum(verdicts.values())), f"records, {bad} of them rejected"))
    sources = {s.best.energy_source for s in machine.subjects if s.measured_energy and s.best}
    tiles.append(
        (
            ", ".join(sorted(sources)) or "none",
            "energy meter" if sources else "energy meter: joules are modelled",
        )
        if not machine.simulated
        else ("simulated", "times: cycles of a model, of a machine that does not exist")
    )
    cells = "".join(
        f'<div class="card tile"><b>{escape(b)}</b><span>{escape(t)}</span></div>' for b, t in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _by_kernel(subjects: Sequence[Subject]) -> str:
    """Time, then energy, of one decoding step (or one call of the module) by workload."""
    used = [s for s in subjects if _step_calls(s)]
    out = [
        _section(
            "Time by kernel",
            "Microseconds of one decoding step of one token: calls times the latency of one. Pale bars were "
            "not measured but predicted.",
            _bars(used, _weight, "us", "bar"),
        )
    ]
    for measured, title in (
        (True, "Energy by kernel, measured"),
        (False, "Energy by kernel, modelled"),
    ):
        if measured and not all(s.measured_energy for s in used if s.results):
            continue

        def joules(s: Subject, measured: bool = measured) -> float:
            return (s.energy_mj(measured) or 0.0) * _step_calls(s)

        text = (
            "Millijoules of one decoding step, from a meter."
            if measured
            else "Millijoules of one decoding step by the analytic model: for ranking, not absolute figures."
        )
        out.append(_section(title, text, _bars(used, joules, "mJ", "bar2" if measured else "bar3")))
        if measured:
            break
    return "".join(out)


def _bars(
    subjects: Sequence[Subject], value: Callable[[Subject], float], unit: str, kind: str
) -> str:
    ranked = sorted(((value(s), s) for s in subjects), key=lambda p: -p[0])
    total = sum(v for v, _ in ranked)
    if not total:
        return ""
    items = [
        Bar(
            f"{_step_calls(s)} × {s.workload}", v, f"{short(v)} {unit}  {100 * v / total:.0f} %",
            f"{s.workload}: {v:.4g} {unit}", kind if s.timed or unit != "us" else "pale",
        )
        for v, s in ranked[:_MOST_BARS] if v > 0
    ]  # fmt: skip
    rest = sum(v for v, _ in ranked[_MOST_BARS:])
    if rest > 0:
        text = f"{short(rest)} {unit}  {100 * rest / total:.0f} %"
        items.append(Bar(f"{len(ranked) - _MOST_BARS} more", rest, text, "", kind))
    return f'<div class="card scroll">{bars(items, title=f"{unit} by kernel")}</div>'


def _speedups(subjects: Sequence[Subject]) -> str:
    rated = sorted((s for s in subjects if s.speedup), key=lambda s: -(s.speedup or 0))
    items = [
        Bar(s.workload, s.speedup or 0.0, f"{s.speedup:.2f}×", s.workload)
        for s in rated[:_MOST_BARS]
    ]  # fmt: skip
    if not items:
        return ""
    text = "Latency of the configuration used without tuning over that of the chosen one; both were measured."
    return _section(
        "Speed-up by tuning",
        text,
        f'<div class="card scroll">{bars(items, title="speed-up")}</div>',
    )


def _roofline(subjects: Sequence[Subject], machine: Machine) -> str:
    shown = [s for s in subjects if s.best is not None and s.best.record.bytes.get("dram")]
    marks = []
    for subject in shown:
        assert subject.best is not None
        record = subject.best.record
        work = 2 * sum(record.ops.get(k, 0.0) for k in ("fma_f32", "dot_i8", "tile_i8"))
        if work:
            rate = work / subject.best.latency_us / 1e3
            marks.append((work / record.bytes["dram"], rate, subject))
    if not marks:
        return ""
    device, text = _device(machine)
    rates = [m[1] for m in marks]
    tops = []
    if device is not None:
        tops = [2 * device.ops_per_s[k] * machine.threads / 1e9 for k in ("fma_f32", "dot_i8")]
    knees = [t * 1e9 / device.bandwidth("dram", machine.threads) for t in tops] if device else []
    x = Axis.around(
        [*(m[0] for m in marks), *knees], log=True, title="operations per byte from memory"
    )
    y = Axis.around([*rates, *tops], log=True, title="Gop/s")
    plot = Plot(x, y, 920, 380, "roofline")
    names = ("f32 multiply-add", "int8 dot")
    for top, knee, kind, name in zip(tops, knees, ("roof2", "roof"), names, strict=False):
        slope = top / knee
        start = max(x.low, y.low / slope)
        plot.line([(start, start * slope), (knee, top), (x.high, top)], kind)
        plot.text((x.high, top), f"{name} {short(top)} Gop/s", "end", -4, -5)
    ops = sorted({m[2].op for m in marks})
    for index, op in enumerate(ops):
        mine = [m for m in marks if m[2].op == op]
        labels = [
            f"{s.workload}: {rate:.3g} Gop/s, {s.latency_us or 0:.4g} us" for _, rate, s in mine
        ]
        plot.points([(a, b) for a, b, _ in mine], f"op{min(index, 4)}", 5, labels)
    colours = ("c-one", "c-two", "c-three", "c-four", "c-rest")
    legend = "".join(
        f'<span><i class="{colours[min(i, 4)]}"></i>{escape(op)}</span>' for i, op in enumerate(ops)
    )
    content = f'<div class="card"><div class="legend">{legend}</div>{plot.svg()}</div>'
    return _section("Roofline", text, content)


def _device(machine: Machine) -> tuple[DeviceModel | None, str]:
    from mimo_compile.search.calibrate import load

    rates = load(machine.local) if machine.local is not None else None
    about = "The best kernel of each workload. Operations count a multiply-add as two."
    if rates is None or machine.local is None:
        return None, f"{about} No roof is drawn: this machine's rates were not measured."
    device = DeviceModel.guess(machine.local).calibrated(rates.to_json())
    memory = device.bandwidth("dram", machine.threads) / 1e9
    return (
        device,
        f"{about} The roofs are this machine's measured rates; {memory:.3g} GB/s from memory.",
    )


def _small(subject: Subject, plot: Plot) -> str:
    return f'<div class="card"><h3>{escape(subject.workload)}</h3>{plot.svg()}</div>'


def _gallery(cards: list[str]) -> str:
    if not cards:
        return ""
    first, rest = cards[:6], cards[6:_MOST_PLOTS]
    out = f'<div class="grid-of-plots">{"".join(first)}</div>'
    if rest:
        hidden = f'<div class="grid-of-plots">{"".join(rest)}</div>'
        out += f"<details><summary>{len(rest)} more</summary>{hidden}</details>"
    if len(cards) > _MOST_PLOTS:
        out += (
            f'<p class="soft">{len(cards) - _MOST_PLOTS} workloads of less weight are left out.</p>'
        )
    return out


def _curves(subjects: Sequence[Subject]) -> str:
    cards = []
    for subject in subjects:
        trials = subject.trials()
        curve = subject.curve()
        if len(trials) < 3 or not curve:
            continue
        good = [
            (float(i), r.latency_us)
            for i, r in enumerate(trials, 1)
            if r.ok and r.latency_us is not None
        ]
        # slow outliers would flatten the curve
        limit = curve[0][1] * 2.5
        shown = [p for p in good if p[1] <= limit]
        step = max(1, len(shown) // _MOST_POINTS)
        y = Axis.around([*(p[1] for p in shown), curve[-1][1]], log=True, title="us")
        plot = Plot(Axis(0, len(trials) * 1.03 + 1, title="candidates"), y, title="tuning curve")
        plot.points(shown[::step], "trial", 2.2)
        plot.steps(curve, "curve")
        plot.text(curve[-1], f"{short(curve[-1][1])} us", "end", 0, -5)
        cards.append(_small(subject, plot))
    text = "Each dot is a correct candidate in the order of measuring; the line is the best so far."
    return _section("Tuning curves", text, _gallery(cards))


def _fronts(subjects: Sequence[Subject]) -> str:
    out = []
    for measured in (True, False):
        cards = []
        for subject in subjects:
            if subject.measured_energy != measured or len(subject.results) < 2:
                continue
            pairs = [(r, r.point(measured)) for r in subject.results]
            points = [(a, b, r) for r, (a, b) in pairs if b is not None]
            if len(points) < 2:
                continue
            near = min(p[0] for p in points) * 4
            points = sorted((p for p in points if p[0] <= near), key=lambda p: p[0])[:_MOST_POINTS]
            keys = {r.record.key for r in subject.front}
            front = [(a, b) for a, b, r in points if r.record.key in keys]
            rest = [(a, b) for a, b, r in points if r.record.key not in keys]
            labels = [
                _name(r.record.schedule, r.record.config)
                for _, _, r in points
                if r.record.key in keys
            ]
            x = Axis.around([p[0] for p in points], log=True, title="us")
            y = Axis.around([p[1] for p in points], log=True, title="mJ")
            plot = Plot(x, y, title="Pareto front")
            plot.points(rest, "rest", 2.6)
            plot.steps(front, "front")
            plot.points(front, "front", 4, labels)
            cards.append(_small(subject, plot))
        kind = "measured" if measured else "modelled"
        text = f"Latency and {kind} energy of each correct candidate; the line joins those that none beats."
        if not measured:
            text += " Modelled energy follows latency closely, so fronts are short."
        out.append(_section(f"Pareto fronts, energy {kind}", text, _gallery(cards)))
    return "".join(out)


def _name(schedule: str, config: dict[str, int | float | str | bool]) -> str:
    return f"{schedule}({', '.join(f'{k}={v}' for k, v in config.items())})"


def _how_timed(subject: Subject) -> str:
    return "simulated" if any(r.simulated for r in subject.records) else "measured"


def _table(subjects: Sequence[Subject]) -> str:
    rows = []
    for s in subjects[:400]:
        choice = s.choice
        schedule = choice.schedule if choice else s.best.record.schedule if s.best else ""
        config = choice.config if choice else s.best.record.config if s.best else {}
        energy = s.energy_mj(s.measured_energy)
        cells = [
            f"<code>{escape(s.workload)}</code>",
            f"<code>{escape(_name(schedule, dict(config)))}</code>",
            choice.source if choice else _how_timed(s),
            str(len(s.records)),
            "–" if s.default is None else short(s.default.latency_us),
            "–" if s.latency_us is None else short(s.latency_us),
            "–" if s.speedup is None else f"{s.speedup:.2f}×",
            "–" if energy is None else f"{short(energy)}{'' if s.measured_energy else ' mod.'}",
        ]
        tags = ["<td>"] * 3 + ['<td class="n">'] * 5
        rows.append(
            "<tr>" + "".join(f"{t}{c}</td>" for t, c in zip(tags, cells, strict=True)) + "</tr>"
        )
    names = ("workload", "kernel", "choice", "records", "default us", "us", "speed-up", "mJ")
    head = "".join(f'<th class="{"n" if i > 2 else ""}">{n}</th>' for i, n in enumerate(names))
    if not rows:
        return ""
    body = f'<div class="card scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'
    return _section("All workloads", "“mod.”: modelled, not measured.", body)
