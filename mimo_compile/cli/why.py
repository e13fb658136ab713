"""The answer to "why this schedule?" as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mimo_compile.cli.console import Console
    from mimo_compile.search.explain import Explanation

_OTHERS = 8


def show_why(console: Console, found: Explanation) -> None:
    """Print an explanation: rank, time and its origin, work, models, and what the others lack."""
    from mimo_compile.cli.console import number

    lines = [("rank", _rank(found)), ("time", _time(found)), ("from", found.origin)]
    lines.append(("model", f"{number(found.bound.total_us)} us, {found.bound}"))
    work = ", ".join(f"{_amount(n)} {k}" for k, n in found.counts.ops.items() if n)
    moved = ", ".join(f"{_bytes(n)} from {lv}" for lv, n in found.counts.bytes.items() if n)
    lines.append(("work", "; ".join(t for t in (work, moved) if t) or "not declared"))
    if found.counts.traits:
        traits = ", ".join(f"{k} {number(v)}" for k, v in found.counts.traits.items())
        lines.append(("traits", traits))
    if (text := _models(found)) is not None:
        lines.append(("ranking", text))
    if found.matters:
        names = ", ".join(f"{_feature(n)} {100 * c:.0f} %" for n, c in found.matters)
        lines.append(("matters", f"{names} (change of the learned prediction when dealt out anew)"))
    console.say(f"why {found.candidate}?")
    for name, text in lines:
        console.say(f"  {name:<8} {text}")
    if found.losers:
        console.say("  the best of each other algorithm, and why it lost:")
    for loser in found.losers[:_OTHERS]:
        time = "" if loser.measured_us is None else f"{number(loser.measured_us)} us: "
        console.say(f"    {loser.candidate}\n      {time}{loser.reason}")
    if len(found.losers) > _OTHERS:
        console.say(f"    ... and {len(found.losers) - _OTHERS} more")


def _rank(found: Explanation) -> str:
    if found.rank is None:
        others = f"{len(found.known)} others were" if found.known else "nothing was"
        return f"not measured ({others}, with the code of this version)"
    where = " elsewhere, none on this target" if found.elsewhere else ""
    text = f"{found.rank} of {len(found.known)} measured{where}"
    places = []
    if found.analytic_rank is not None:
        places.append(f"{found.analytic_rank} by the analytic model")
    if found.learned_rank is not None:
        places.append(f"{found.learned_rank} by the learned one that did not see it")
    return f"{text}; place {' and '.join(places)}" if places else text


def _time(found: Explanation) -> str:
    from mimo_compile.cli.console import number

    roof = f"roofline of the necessary work {number(found.roofline_us)} us"
    if found.chosen is None:
        return f"not measured; {roof}"
    measured = found.chosen.result.latency_us
    parts = [
        f"{number(measured)} us",
        f"{roof}: {100 * found.roofline_us / measured:.0f} % of the roof",
    ]
    predicted = [f"analytic {number(found.chosen.analytic_us)} us"]
    if found.chosen.learned_us is not None:
        predicted.append(f"learned {number(found.chosen.learned_us)} us")
    return "; ".join([*parts, "predicted: " + ", ".join(predicted)])


def _models(found: Explanation) -> str | None:
    pairs = (("analytic", found.analytic_rho), ("learned", found.learned_rho))
    texts = [f"{n} {rho:.2f}" for n, rho in pairs if rho is not None]
    if not texts:
        return None
    return f"rank correlation with {len(found.known)} measured times: " + ", ".join(texts)


def _feature(name: str) -> str:
    """Return a feature's name without the schedule's: ``knobs.rows``, ``traffic.l2``."""
    parts = name.split(".")
    return f"{parts[0]}.{parts[-1]}" if len(parts) > 2 else name


def _amount(count: float) -> str:
    from mimo_compile.cli.console import number

    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{number(count / limit)}{unit}"
    return number(count)


def _bytes(count: float) -> str:
    from mimo_compile.cli.console import size

    return size(count)
