"""Models of recorded spaces, each trained on the samples of all spaces but one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from mimo_compile.cost_models.analytic import DeviceModel
from mimo_compile.cost_models.features import Extractor
from mimo_compile.cost_models.learned import LatencyModel, Sample
from mimo_compile.ir.counts import Counts
from mimo_compile.search.measure.recording import Recording
from mimo_compile.search.warm import PRIOR_ROUNDS

NEAREST, DRAWN = 600, 1000
"""Of each space, the best and some of all candidates."""


@cache
def load(path: Path) -> Recording:
    """Return a recorded space, read once."""
    return Recording.load(path)


def train_on_others(paths: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """Train a model for each space on the samples of all others, if there are any; return their files."""
    rng = np.random.default_rng(0)
    samples: dict[Path, list[Sample]] = {}
    for path in paths:
        recording = load(path)
        device = DeviceModel.guess(recording.hardware)
        extract = Extractor(recording.workload, recording.hardware, device)
        rows = [
            (r, Counts(r.ops, r.bytes, traits))
            for r, traits in zip(recording.records, recording.traits, strict=True)
            if r.ok
        ]
        best = np.argsort([r.latency_us for r, _ in rows])[:NEAREST]
        drawn = rng.permutation(len(rows))[:DRAWN]
        chosen = [rows[i] for i in sorted({*best.tolist(), *drawn.tolist()})]
        samples[path] = [
            Sample(extract.blocks(w, r.schedule, r.config), r.latency_us, str(recording.workload))
            for r, w in chosen
        ]
    out = {}
    for path in paths if len(paths) > 1 else ():
        others = [p for p in paths if p != path]
        model = LatencyModel(rounds=PRIOR_ROUNDS, seed=0)
        model.fit([s for p in others for s in samples[p]])
        model.meta = {"schedules": sorted({r for p in others for r in load(p).knobs})}
        out[path] = folder / f"{path.name}.json"
        model.save(out[path])
    return out
