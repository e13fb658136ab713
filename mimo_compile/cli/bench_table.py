"""Tables of ``mimo-compile bench``: the rows of a workload, and ours beside the fastest peer."""

from __future__ import annotations

from collections.abc import Sequence

from mimo_compile.bench.contest import Row
from mimo_compile.bench.peers import LeftOut
from mimo_compile.bench.summary import Cell
from mimo_compile.cli.console import number, table

_ROW_HEADER = (
    "cache", "impl", "schedule", "bits", "us", "p10..p90", "ratio", "GB/s", "Gop/s", "of roof",
)  # fmt: skip
_CELL_HEADER = (
    "workload", "cache", "ours us", "bits", "of roof", "fastest peer", "bits", "ratio", "p10..p90",
)  # fmt: skip
_NOTABLE_CORES = 0.1


def render(rows: list[Row]) -> str:
    """Lay out the rows of one workload as tables; ratios are to our fastest."""
    if not rows:
        return ""
    out = [f"\n{rows[0].contestant.op}  ({rows[0].contestant.threads} threads)"]
    for cache in dict.fromkeys(r.contestant.cache for r in rows):
        lines: list[tuple[object, ...]] = []
        for r in (r for r in rows if r.contestant.cache == cache):
            c, figures = r.contestant, r.json()
            lines.append(
                (
                    cache, c.impl, c.schedule, number(c.bits_per_weight), _us(r.median_us),
                    f"{_us(r.p10_us)}..{_us(r.p90_us)}",
                    None if r.ratio is None else f"{r.ratio[0]:.2f}x",
                    number(figures["gb_per_s"]), number(figures["gop_per_s"]), _share(r),
                )
            )  # fmt: skip
        out.append(table(lines, _ROW_HEADER, right="lllrrrrrrr"))
        others = next(r.foreign_cores for r in rows if r.contestant.cache == cache)
        if others is not None and others >= _NOTABLE_CORES:
            out.append(f"other programs used {others:.1f} cores meanwhile")
    return "\n".join(out)


def render_summary(summary: list[Cell]) -> str:
    """Lay out our fastest beside the fastest peer in each cell, then name the cells where ours is slower."""
    common, names = short_names([c.ours.contestant.op for c in summary])
    lines: list[tuple[object, ...]] = []
    for cell in summary:
        ours, peer = cell.ours.contestant, cell.peer
        ratio = None if peer is None else peer.ratio
        lines.append(
            (
                names[ours.op], ours.cache, _us(cell.ours.median_us), number(ours.bits_per_weight),
                _share(cell.ours), None if peer is None else peer.contestant.impl,
                None if peer is None else number(peer.contestant.bits_per_weight),
                None if ratio is None else f"{ratio[0]:.2f}x",
                None if ratio is None else f"{ratio[1]:.2f}..{ratio[2]:.2f}",
            )
        )  # fmt: skip
    slower = [
        f"  {c.ours.contestant.op} {c.ours.contestant.cache}"
        + ("" if c.sure else " (not in all rounds)")
        for c in summary
        if c.slower
    ]
    return "\n".join(
        [
            "\nOurs beside the fastest peer" + (f": {common}" if common else ""),
            table(lines, _CELL_HEADER, right="llrrrlrrr"),
            f"slower than a peer in {len(slower)} of {len(summary)} cells",
            *slower,
        ]
    )


def short_names(ops: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Split the texts of workloads into what all have and what tells each from the others.

    Returns:
        The op with the parameters that all have (nothing for a single workload), and what is left by text.
    """
    texts = list(dict.fromkeys(ops))
    parts = {text: text.partition(":")[2].split(",") for text in texts}
    if len(texts) < 2 or len({text.partition(":")[0] for text in texts}) > 1:
        return "", {text: text for text in texts}
    shared = [p for p in parts[texts[0]] if all(p in own for own in parts.values())]
    rest = {t: ",".join(p for p in own if p not in shared) for t, own in parts.items()}
    return f"{texts[0].partition(':')[0]}:{','.join(shared)}", {t: rest[t] or t for t in texts}


def _us(value: float) -> str:
    """Return microseconds with three significant digits, seconds of them as whole numbers."""
    return f"{value:,.0f}" if value >= 1e6 else number(value)


def reason(entry: LeftOut) -> str:
    """Say in one line what cannot take part, and why."""
    return f"{entry.impl}: {entry.reason}" + (f" ({entry.remedy})" if entry.remedy else "")


def _share(row: Row) -> str | None:
    return None if row.roof_us is None else f"{100 * row.roof_us / row.median_us:.0f} %"
