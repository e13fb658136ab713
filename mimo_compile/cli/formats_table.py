"""Which weight formats have kernels on which target, for ``mimo-compile targets --formats``."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mimo_compile.ir.hardware import Hardware

WIDTH = 100
"""Columns that the text needs at most."""
_OPS = {
    "mpgemm": "mpgemm:m={t},n=512,k=512,w={w},a={a}",
    "moe": "moe:t={t},e=8,k=2,d=512,f=512,w={w},a={a}",
}
_TOKENS = (1, 64)
"""Some kernels are for few tokens only, some for many."""
_SHORT = {(1,): " (few tokens only)", (64,): " (many tokens only)"}
"""Behind the kernels of a target that has some for these numbers of tokens alone."""
_ACTS = ("a16", "abf16", "af16", "a8", "a8g64")
"""Formats of activations; other groups of ``a8`` are as g64."""


def formats(targets: Mapping[str, Hardware]) -> list[dict[str, Any]]:
    """Return, for each op, weight format and activation, the schedules on each target.

    A pair is listed when at least one target has a kernel for it, or when none has (then ``kernels`` is
    empty everywhere), so that absence is visible. ``tokens`` says for which of few and many tokens (1, 64) a
    target has kernels: a model needs both.
    """
    from mimo_compile.errors import UsageError
    from mimo_compile.ir.formats import BASES
    from mimo_compile.ir.ops import parse_workload
    from mimo_compile.schedules import get_schedule, names_for

    out = []
    for op, spec in _OPS.items():
        schedules = [get_schedule(name) for name in names_for(op)]
        for weight in BASES:
            for act in _ACTS:
                try:
                    sizes = [parse_workload(spec.format(t=t, w=weight, a=act)) for t in _TOKENS]
                except UsageError:
                    continue
                each = {
                    name: {s.name: [s.supports(w, hw) for w in sizes] for s in schedules}
                    for name, hw in targets.items()
                }
                kernels = {
                    name: [schedule for schedule, taken in found.items() if any(taken)]
                    for name, found in each.items()
                }
                tokens = {
                    name: [t for i, t in enumerate(_TOKENS) if any(x[i] for x in found.values())]
                    for name, found in each.items()
                }
                out.append(
                    {"op": op, "weight": weight, "act": act, "kernels": kernels, "tokens": tokens}
                )
    return out


def lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of the list: formats with the same kernels together, `WIDTH` columns at most."""
    for op in dict.fromkeys(row["op"] for row in rows):
        same: dict[tuple[Any, ...], dict[str, list[str]]] = {}
        for row in rows:
            if row["op"] == op:
                key = tuple(
                    (target, (*names, _SHORT.get(tuple(row["tokens"][target]), "")))
                    for target, names in row["kernels"].items()
                )
                same.setdefault(key, {}).setdefault(row["weight"], []).append(row["act"])
        yield op
        for key, found in same.items():
            by_acts: dict[tuple[str, ...], list[str]] = {}
            for weight, acts in found.items():
                by_acts.setdefault(tuple(acts), []).append(weight)
            for taken, weights in by_acts.items():
                yield from _wrapped("  ", " ".join(weights) + ", " + " ".join(taken))
            by_names: dict[tuple[str, ...], list[str]] = {}
            for target, names in key:
                by_names.setdefault(names, []).append(target)
            for (*kernels, only), targets in by_names.items():
                few = all(t.startswith(("sim:", "cuda:")) for t in targets)
                if not kernels and len(by_names) > 1 and few:
                    continue  # machines on paper and GPUs have few
                short = " ".join(n.rpartition(".")[2] for n in kernels)
                yield from _wrapped(
                    "      ", f"{', '.join(targets)}: {short or 'none'}{only}", after="          "
                )


def _wrapped(start: str, text: str, after: str = "") -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=start, subsequent_indent=after or start, break_on_hyphens=False
    )
