"""What the learned model is worth: predictions of what it has not seen, and what they depend on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mimo_compile.cost_models.features import ANALYTIC, Features
from mimo_compile.cost_models.learned import LatencyModel, Sample

FOLDS = 5


def held_out_us(samples: Sequence[Sample], seed: int = 0, folds: int = FOLDS) -> list[float] | None:
    """Predict each sample by a model fitted to the others (in ``folds`` parts); None when they are too few.

    Raises:
        MissingExtra: xgboost is not installed.
    """
    if len(samples) < 2 * LatencyModel().min_samples:
        return None
    order = np.random.default_rng(seed).permutation(len(samples))
    out = np.zeros(len(samples))
    for fold in range(folds):
        held = order[fold::folds]
        rest = np.setdiff1d(order, held)
        model = LatencyModel(seed=seed)
        model.fit([samples[i] for i in rest])
        out[held] = model.predict([samples[i].blocks for i in held]).value
    return [float(x) for x in out]


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Return Spearman's coefficient (ties share their mean rank); None below 3 points or without spread."""
    if len(a) < 3:
        return None
    x, y = _ranks(a), _ranks(b)
    spread = float(x.std() * y.std())
    return None if spread == 0 else float(((x - x.mean()) * (y - y.mean())).mean() / spread)


def _ranks(values: Sequence[float]) -> Any:
    array = np.asarray(values, float)
    _, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def what_matters(
    samples: Sequence[Sample], seed: int = 0, most: int = 6
) -> list[tuple[str, float]]:
    """Return the features on which the learned model's predictions depend most.

    For each feature: by how much predictions change on average (logarithm: 0.1 is about 10 %) when its values
    are dealt out anew among the candidates. Empty with too few samples.
    """
    model = LatencyModel(seed=seed)
    if len(samples) < 2 * model.min_samples:
        return []
    model.fit(samples)
    rows: list[Features] = [s.blocks[0] for s in samples]
    before = np.log(model.predict([(r,) for r in rows]).value)
    rng = np.random.default_rng(seed)
    found = []
    for name in sorted({n for r in rows for n in r} - {ANALYTIC}):
        values = [r.get(name) for r in rows]
        if len(set(values)) < 2:
            continue
        dealt = [values[i] for i in rng.permutation(len(values))]
        changed = [(_with(r, name, v),) for r, v in zip(rows, dealt, strict=True)]
        moved = float(np.abs(np.log(model.predict(changed).value) - before).mean())
        found.append((name, moved))
    return sorted((f for f in found if f[1] > 1e-3), key=lambda f: -f[1])[:most]


def _with(row: Features, name: str, value: float | None) -> Features:
    """Return a row with one value changed; None leaves it out."""
    return {k: v for k, v in row.items() if k != name} | ({} if value is None else {name: value})
