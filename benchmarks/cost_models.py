"""How well the cost model ranks kernels of unseen workloads, and what each group of features is worth.

    python benchmarks/cost_models.py [FILE...] [--json]

FILE: databases and JSON lines of tuning records, and recorded spaces (default: the records of the package).
Nothing is measured; of workloads with more than --most candidates so many are drawn.
Workloads are held out in five parts, with all their thread counts; a model is trained on the records of the
others. Per held-out workload and thread count, all in logarithms:

- rank: Spearman's correlation of predicted and measured times (0 for a constant prediction); pairs: share of
  pairs in the right order;
- SNR: centred, in dB, after the workload's mean error is taken away (a search compares kernels of one
  workload); off: that mean error;
- top 1, top 5: how often the best is the predicted best, or among the five predicted best (of those with more
  than ten candidates); loss: how much slower than the best the predicted best is.

`own` samples are measured candidates of the workload itself that the model has seen too; they are drawn five
times, and the figures are of the rest. All is done for each seed anew: other parts, other draws, other
ensembles; after ± stands the standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mimo_compile.cost_models.features import ANALYTIC, GROUPS, without
from mimo_compile.cost_models.learned import PRIOR, LatencyModel, Sample
from mimo_compile.cost_models.updating import centred_snr_db, pairwise_accuracy
from mimo_compile.search.explain import rank_correlation
from mimo_compile.search.train import packaged, read_records
from mimo_compile.search.warm import PRIOR_ROUNDS, samples_of

FOLDS = 5
OWN = (8, 16, 32, 64)
ABLATED = 32
"""Own samples when groups of features are left out."""
DRAWS = 5
REST = 12
"""Samples that must be left to rank, besides those that the model has seen."""


@dataclass(frozen=True)
class Score:
    """Of one held-out workload; None where it is undefined."""

    rank: float
    pairs: float | None
    snr_db: float | None
    off: float
    top1: float
    top5: float | None
    loss: float


def score(measured: Sequence[float], predicted: Sequence[float]) -> Score:
    """Compare predicted with measured times."""
    m, p = np.log(measured), np.log(predicted)
    off = float((p - m).mean())
    pick = int(p.argmin())
    first = m[p.argsort(kind="stable")[:5]]
    return Score(
        rank_correlation(list(m), list(p)) or 0.0, pairwise_accuracy(m, p), centred_snr_db(m, p - off),
        abs(off), float(m[pick] == m.min()), float(m.min() in first) if len(m) > 10 else None,
        math.expm1(float(m[pick] - m.min())),
    )  # fmt: skip


def mean_of(scores: Sequence[Score]) -> dict[str, float]:
    """Return means over workloads, the SNR's and the offset's median."""

    def defined(name: str) -> list[float]:
        return [x for s in scores if (x := getattr(s, name)) is not None] or [math.nan]

    out = {
        name: statistics.fmean(defined(name)) for name in ("rank", "pairs", "top1", "top5", "loss")
    }
    out |= {name: statistics.median(defined(name)) for name in ("snr_db", "off")}
    return {**out, "workloads": len(scores)}


def drawn(samples: Sequence[Sample], most: int) -> list[Sample]:
    """Draw at most so many samples of each group."""
    groups: dict[str, list[Sample]] = {}
    for s in samples:
        groups.setdefault(s.group, []).append(s)
    rng = np.random.default_rng(2)
    return [
        mine[i]
        for _, mine in sorted(groups.items())
        for i in sorted(rng.permutation(len(mine))[:most])
    ]


def folds(samples: Sequence[Sample], seed: int = 0) -> list[set[str]]:
    """Deal the workloads out."""
    names = sorted({s.group.partition("@")[0] for s in samples})
    order = np.random.default_rng(seed).permutation(len(names))
    return [{names[i] for i in order[k::FOLDS]} for k in range(FOLDS)]


def split(
    samples: Sequence[Sample], held: set[str]
) -> tuple[list[Sample], dict[str, list[Sample]]]:
    """Return the samples of other workloads, and those held out by workload and thread count."""
    rest, groups = [], {}
    for s in samples:
        if s.group.partition("@")[0] in held:
            groups.setdefault(s.group, []).append(s)
        else:
            rest.append(s)
    return rest, groups


def trained(samples: Sequence[Sample], seed: int = 0) -> LatencyModel:
    """Train as a warm start does."""
    model = LatencyModel(rounds=PRIOR_ROUNDS, seed=seed)
    model.fit(samples)
    return model


def with_prior(samples: Sequence[Sample], model: LatencyModel) -> list[Sample]:
    """Put a model's opinion under samples, as a search does."""
    values = model.predict([s.blocks for s in samples]).value
    return [
        replace(s, blocks=({**s.blocks[0], PRIOR: math.log(v) - s.blocks[0][ANALYTIC]},))
        for s, v in zip(samples, values, strict=True)
    ]


def cold_and_warm(samples: Sequence[Sample], least: int, seed: int = 0) -> dict[str, list[Score]]:
    """Score the roofline and a warm start on held-out workloads with at least ``least`` candidates."""
    out: dict[str, list[Score]] = {"roofline": [], "warm start": []}
    for held in folds(samples, seed):
        rest, groups = split(samples, held)
        model = trained(rest, seed)
        for mine in groups.values():
            if len(mine) < least:
                continue
            times, blocks = [s.value for s in mine], [s.blocks for s in mine]
            out["roofline"].append(score(times, LatencyModel().predict(blocks).value))
            out["warm start"].append(score(times, model.predict(blocks).value))
    return out


def with_own(
    samples: Sequence[Sample], numbers: Sequence[int] = OWN, seed: int = 0
) -> dict[tuple[int, str], list[Score]]:
    """Score models that have seen some candidates of the held-out workload, cold and warm."""
    out: dict[tuple[int, str], list[Score]] = {}
    rng = np.random.default_rng([1, seed])
    for held in folds(samples, seed):
        rest, groups = split(samples, held)
        if not any(len(mine) >= numbers[0] + REST for mine in groups.values()):
            continue
        prior = trained(rest, seed)
        for mine in groups.values():
            warm = with_prior(mine, prior)
            for own in numbers:
                if len(mine) < own + REST:
                    continue
                for _ in range(DRAWS):
                    order = rng.permutation(len(mine))
                    for kind, some in (("cold", mine), ("warm", warm)):
                        model = LatencyModel(min_samples=4, seed=seed)
                        model.fit([some[i] for i in order[:own]])
                        left = [some[i] for i in order[own:]]
                        got = model.predict([s.blocks for s in left]).value
                        out.setdefault((own, kind), []).append(score([s.value for s in left], got))
    return out


def ablation(samples: Sequence[Sample], least: int, seed: int = 0) -> dict[str, list[Score]]:
    """Score models that lack one group of features each, with own samples where there are enough."""

    def scores(some: Sequence[Sample]) -> list[Score]:
        own = with_own(some, [ABLATED], seed)
        return own.get((ABLATED, "warm")) or cold_and_warm(some, least, seed)["warm start"]

    out = {"all": scores(samples)}
    for group in GROUPS:
        rest = [replace(s, blocks=(without(s.blocks[0], [group]),)) for s in samples]
        out["- " + group] = scores(rest)
    return out


def tables(
    samples: Sequence[Sample], least: int, seeds: Sequence[int]
) -> dict[str, dict[str, Row]]:
    """Score everything once for each seed: other parts held out, other draws, other ensembles."""
    runs: dict[str, dict[str, list[dict[str, float]]]] = {}

    def take(title: str, found: Mapping[str, Sequence[Score]]) -> None:
        for name, scores in found.items():
            runs.setdefault(title, {}).setdefault(name, []).append(mean_of(scores))

    for seed in seeds:
        take("held-out workloads", cold_and_warm(samples, least, seed))
        own = with_own(samples, seed=seed)
        take("own samples", {f"{n}, {kind}": v for (n, kind), v in sorted(own.items())})
        take("features", ablation(samples, least, seed))
    return {t: {n: spread_of(m) for n, m in rows.items()} for t, rows in runs.items()}


Row = dict[str, tuple[float, float]]
"""Mean and standard deviation over seeds of each figure."""


def spread_of(runs: Sequence[dict[str, float]]) -> Row:
    """Return mean and standard deviation of each figure."""
    values = {k: np.array([r[k] for r in runs]) for k in runs[0]}
    return {k: (float(v.mean()), float(v.std())) for k, v in values.items()}


def row(name: str, m: Row) -> str:
    """Return a line of a Markdown table."""

    def both(figure: str, digits: int, scale: float = 1.0, unit: str = "") -> str:
        mean, sd = (scale * x for x in m[figure])
        return "-" if math.isnan(mean) else f"{mean:.{digits}f} ± {sd:.{digits}f}{unit}"

    cells = [
        name, f"{m['workloads'][0]:.0f}", both("rank", 2), both("pairs", 2), both("snr_db", 1),
        both("off", 2), both("top1", 0, 100, " %"), both("top5", 0, 100, " %"), both("loss", 1, 100, " %"),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


HEAD = """| {} | workloads | rank | pairs | SNR, dB | off | top 1 | top 5 | loss |
|---|---|---|---|---|---|---|---|---|"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Score, and print tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument(
        "--least", type=int, default=3, help="candidates that a workload must have (default: 3)"
    )
    parser.add_argument(
        "--most", type=int, default=256, help="candidates of one workload (default: 256)"
    )
    parser.add_argument(
        "--seeds", type=int, default=5, help="times that all is done, otherwise dealt (default: 5)"
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(arguments)
    records = [r for path in args.files or packaged() for r in read_records(path)]
    samples = drawn(samples_of(records)[0], args.most)
    found = tables(samples, args.least, range(args.seeds))
    if args.json:
        json.dump(
            {"samples": len(samples), "seeds": args.seeds, "tables": found}, sys.stdout, indent=1
        )
        return 0
    print(
        f"{len(samples)} candidates, {len({s.group for s in samples})} workloads and thread counts, "
        f"{args.seeds} seeds"
    )
    for title, lines in found.items():
        print("\n" + HEAD.format(title))
        print("\n".join(row(name, m) for name, m in lines.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
