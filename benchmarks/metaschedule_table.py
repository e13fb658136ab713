"""The table that `against_metaschedule.py` makes of the lines of a run."""

from __future__ import annotations

import math
from collections import Counter

SIDES = ("ours", "metaschedule")
INTEGER = ("gemm_int8", "gemv_w4", "gemm_w4")


def quantile(values, share):
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def geometric(values):
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def summary(contests):
    """Return the geometric mean of the kernels' ratios, and its p10 and p90 over rounds."""
    rounds = min(len(c["ratios"]) for c in contests)
    each = [geometric([c["ratios"][i] for c in contests]) for i in range(rounds)]
    return geometric([c["ratio"][0] for c in contests]), quantile(each, 0.1), quantile(each, 0.9)


def table(lines):
    """Return a Markdown table of all contests, and their geometric means."""
    searches = {(x["kernel"], x["side"]): x for x in lines if x["kind"] == "search"}
    contests = [x for x in lines if x["kind"] == "contest"]
    if not contests:
        return "No kernel was compared yet.\n"
    out = [
        "| kernel | workload | our pick | us | MetaSchedule, us | MetaSchedule takes | our trials "
        "| its trials (failed) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for c in contests:
        ours, theirs = (searches[c["kernel"], side] for side in SIDES)
        pick = ours["best"][0]["schedule"].rpartition(".")[2].removeprefix("x86_")
        took = "nothing right"
        if "ratio" in c:
            took = "{:.2f}x, {:.2f} to {:.2f}".format(*c["ratio"])
        out.append(
            f"| {c['kernel'].replace('_', ' ')} | `{c['op'].partition(':')[2]}` | `{pick}` "
            f"| {c['ours_us']:.1f} | {c.get('metaschedule_us', math.nan):.1f} | {took} "
            f"| {ours['trials']} in {ours['took']:.0f} s "
            f"| {theirs['trials']} ({theirs['trials'] - theirs['ok']}) in {theirs['took']:.0f} s |"
        )
    right = [c for c in contests if "ratio" in c]
    groups = {
        "all": right, "integer kernels": [c for c in right if c["kernel"] in INTEGER],
        "the shared space": [c for c in right if c["kernel"] == "matmul_f32"],
    }  # fmt: skip
    means = [
        "{}: **{:.2f}x** ({:.2f} to {:.2f})".format(name, *summary(some))
        for name, some in groups.items()
        if some
    ]
    first = contests[0]
    out.append(
        f"\nGeometric mean of MetaSchedule's time over ours: {', '.join(means) or 'none'}. Ratios are of "
        f"medians, with p10 and p90 over rounds. {first['threads']} threads, {first['seconds']:g} s for each "
        "search, operands in cache."
    )
    reasons = Counter()
    for (_, side), x in searches.items():
        if side == "metaschedule":
            reasons.update(x["errors"])
    if reasons:
        out.append("\nWhy candidates of MetaSchedule's failed:\n")
        out += [
            f"- {count} times: `{why.replace('`', '')}`" for why, count in reasons.most_common(3)
        ]
    return "\n".join(out) + "\n"
