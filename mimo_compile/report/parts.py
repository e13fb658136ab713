"""Pieces that sections of the page are made of: headings, cards, bars, keys, tables, galleries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mimo_compile.report.svg import Plot, escape


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar: its name, length, a text behind it and its colour."""

    label: str
    value: float
    text: str
    kind: str = "bar"


def bars(items: Sequence[Bar], *, title: str, whole: float | None = None) -> str:
    """Return horizontal bars as a list: on a narrow page each name stands above its bar.

    ``whole`` is the value of a bar over the full width (None: the largest).
    """
    top = whole or max((i.value for i in items), default=0.0) or 1.0
    rows = []
    for item in items:
        share = max(0.4, 100 * item.value / top)
        rows.append(
            f'<li><span class="name">{escape(item.label)}</span>'
            f'<span class="track"><i class="{item.kind}" style="width:{share:.1f}%"></i></span>'
            f'<span class="value">{escape(item.text)}</span></li>'
        )
    return f'<ol class="bars" aria-label="{escape(title)}">{"".join(rows)}</ol>'


def section(name: str, title: str, text: str, content: str) -> str:
    """Return a section with a heading and an explanation; nothing without content."""
    if not content:
        return ""
    return (
        f'<section aria-labelledby="{name}"><h2 id="{name}">{escape(title)}</h2>'
        f'<p class="soft">{escape(text)}</p>{content}</section>'
    )


def key(entries: Sequence[tuple[str, str]]) -> str:
    """Return what the marks of a chart mean: (class of the mark, text)."""
    marks = [(f'<i class="{kind}"></i>' if kind else "", text) for kind, text in entries]
    items = "".join(f"<span>{mark}{escape(text)}</span>" for mark, text in marks)
    return f'<div class="key">{items}</div>'


def card(title: str, plot: Plot, entries: Sequence[tuple[str, str]], note: str = "") -> str:
    """Return a chart in a card with its name above and its key below."""
    below = f'<p class="note">{escape(note)}</p>' if note else ""
    return (
        f'<figure class="card"><figcaption><h3>{escape(title)}</h3></figcaption>{plot.svg()}'
        f"{key(entries)}{below}</figure>"
    )


def gallery(cards: Sequence[str], most: int, first: int = 6) -> str:
    """Return charts beside each other: some at once, more behind a click, the rest left out."""
    if not cards:
        return ""
    shown, hidden = cards[: min(first, most)], cards[first:most]
    out = f'<div class="grid-of-plots">{"".join(shown)}</div>'
    if hidden:
        inner = f'<div class="grid-of-plots">{"".join(hidden)}</div>'
        out += f"<details><summary>{count(len(hidden), 'more workload')}</summary>{inner}</details>"
    if len(cards) > most:
        left = count(len(cards) - most, "workload")
        out += f'<p class="soft">{left} of less weight left out to keep the page small.</p>'
    return out


def table(header: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; header: (title, class of the column, ``n`` for numbers); cells are HTML."""
    kinds = [f' class="{kind}"' if kind else "" for _, kind in header]
    titles = zip([t for t, _ in header], kinds, strict=True)
    head = "".join(f'<th scope="col"{kind}>{escape(t)}</th>' for t, kind in titles)
    body = "".join(
        "<tr>" + "".join(f"<td{k}>{c}</td>" for k, c in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="card scroll" tabindex="0"><table><tr>{head}</tr>{body}</table></div>'


def facts(pairs: Sequence[tuple[str, object]]) -> str:
    """Return names with their values."""
    rows = "".join(
        f'<tr><th scope="row">{escape(k)}</th><td>{escape(v)}</td></tr>' for k, v in pairs
    )
    return f'<div class="card scroll" tabindex="0"><table class="facts">{rows}</table></div>'


def count(number: int, thing: str) -> str:
    """Return ``1 kernel``, ``2 kernels``."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def kernel_name(schedule: str, config: Mapping[str, int | float | str | bool]) -> str:
    """Return ``schedule(knob=value, ...)``."""
    return f"{schedule}({', '.join(f'{k}={v}' for k, v in config.items())})"
