"""Models that learn from measurements: gradient-boosted trees on top of the analytic prediction.

The label of a sample is ``log(measured / analytic)``, so the trees correct the roofline (or the sum of
energies) and an unseen workload starts from it. Its weight is ``(best of the workload / measured) ** alpha``:
errors on good kernels count, errors on slow ones hardly do (energy-aware search, section 2: grad = w (p - y),
hess = w). Several models, each trained on its own draw of the samples, give a mean and a spread.

A program may have several blocks (loop nests, parallel regions). Its cost is the sum of theirs, each by the
same trees: with z_b = analytic_b + tree_b in logarithms, the prediction is log sum exp z_b, and the gradient
reaches each block by its share of the cost.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from mimo_compile.cost_models import stored
from mimo_compile.cost_models.features import (
    ANALYTIC,
    MODELLED,
    VERSION,
    Features,
    columns_of,
    matrix,
)
from mimo_compile.errors import InputError, MissingExtra

Array = npt.NDArray[np.floating[Any]]
Blocks = tuple[Features, ...]
"""The features of a program's blocks, at least one."""

PRIOR = "roof.prior"
"""What a model of other shapes or machines adds to the roofline (logarithm)."""
_PARAMS = {
    "max_depth": 5, "eta": 0.25, "gamma": 1e-3, "min_child_weight": 0.0, "tree_method": "hist",
    "max_bin": 64, "base_score": 0.0, "verbosity": 0, "objective": "reg:squarederror",
}  # fmt: skip
_FARTHEST = 10.0
"""Most that trees may correct, as a logarithm."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured candidate; ``group`` is its workload on its target."""

    blocks: Blocks
    value: float
    """Microseconds or millijoules of a call."""
    group: str
    source: str = ""
    """The meter of millijoules."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted values, and how far the members of the ensemble disagree."""

    value: npt.NDArray[np.float64]
    """Microseconds or millijoules."""
    spread: npt.NDArray[np.float64]
    """Standard deviation of the value's logarithm; NaN where no ensemble was asked."""


def sample_weights(values: Array, groups: Sequence[str], alpha: float = 1.0) -> Array:
    """Return ``(least of the group / value) ** alpha`` for each sample, in (0, 1]."""
    least: dict[str, float] = {}
    for group, value in zip(groups, values, strict=True):
        least[group] = min(least.get(group, math.inf), float(value))
    ratio = np.array([least[g] / float(v) for g, v in zip(groups, values, strict=True)])
    weights: Array = ratio**alpha
    return weights


def summed_squares(
    base: Array, program: npt.NDArray[np.intp], labels: Array, weights: Array
) -> Callable[[Array, Any], tuple[Array, Array]]:
    """Return ``sum_p w_p (log sum_b exp(base_b + f_b) - label_p)^2 / 2`` as an objective for XGBoost.

    Args:
        base: ``[blocks]``, what the trees' output ``f`` is added to.
        program: ``[blocks]``, the program of each block.
        labels: ``[programs]``, logarithms of what was measured.
        weights: ``[programs]``.

    Returns:
        Gradient and (bounded) Hessian with respect to ``f``. With one block for each program they are
        ``w (base + f - label)`` and ``w``: weighted least squares.
    """

    def objective(f: Array, _: Any) -> tuple[Array, Array]:
        total, share = _summed(base + f, program, len(labels))
        error = weights * (total - labels)
        return error[program] * share, weights[program] * share

    return objective


def _summed(z: Array, program: npt.NDArray[np.intp], count: int) -> tuple[Array, Array]:
    """Return each program's ``log sum exp z``, and the share of each block in it."""
    top = np.full(count, -np.inf)
    np.maximum.at(top, program, z)
    part = np.exp(z - top[program])
    sums = np.bincount(program, part, count)
    return top + np.log(sums), part / sums[program]


@dataclass(slots=True)
class _Flat:
    """Blocks of all programs in one table."""

    rows: list[Features]
    program: npt.NDArray[np.intp]
    base: Array

    @property
    def single(self) -> bool:
        """True when each program has one block."""
        return len(self.rows) == len(np.unique(self.program))


class Model:
    """An ensemble that corrects an analytic value; untrained, it returns that value."""

    kind: ClassVar[str]
    base: ClassVar[tuple[str, ...]]
    """Features whose sum is the logarithm that trees correct."""
    source = ""

    def __init__(
        self,
        *,
        min_samples: int = 16,
        members: int = 4,
        rounds: int = 32,
        alpha: float = 1.0,
        drawn: float = 0.8,
        seed: int = 0,
        threads: int = 1,
    ) -> None:
        """Start untrained.

        Args:
            min_samples: Below that many samples the analytic value stays.
            members: Models in the ensemble.
            rounds: Trees of each.
            alpha: Exponent of the weights.
            drawn: Share of the samples that each member sees.
            seed: Decides the draws.
            threads: One is fastest for some hundred samples, by far beside other load.
        """
        self.min_samples = min_samples
        self.members = members
        self.rounds = rounds
        self.alpha = alpha
        self.drawn = drawn
        self.seed = seed
        self.threads = threads
        self.columns: tuple[str, ...] = ()
        self.samples = 0
        self.meta: dict[str, Any] = {}
        """Where a stored model comes from."""
        self._boosters: list[Any] = []

    @property
    def trained(self) -> bool:
        """True when predictions come from trees."""
        return bool(self._boosters)

    def _flat(self, programs: Sequence[Blocks]) -> _Flat:
        rows = [row for blocks in programs for row in blocks]
        program = np.repeat(np.arange(len(programs)), [len(blocks) for blocks in programs])
        base = np.array([sum(row.get(name, 0.0) for name in self.base) for row in rows])
        return _Flat(rows, program, base)

    def fit(self, samples: Sequence[Sample]) -> None:
        """Train from scratch on all samples (does nothing when they are too few).

        Raises:
            ValueError: a value is not positive and finite, or from a meter that is not this model's.
        """
        values = np.array([s.value for s in samples])
        if not (np.isfinite(values).all() and (values > 0).all()):
            raise ValueError("measured values must be positive and finite")
        if strange := {s.source for s in samples} - {self.source}:
            raise ValueError(f"values by {sorted(strange)} in a model of {self.source!r}")
        if len(samples) < self.min_samples:
            return
        columns = columns_of(row for s in samples for row in s.blocks)
        flat = self._flat([s.blocks for s in samples])
        table = matrix(flat.rows, columns)
        keep = ~(np.isclose(table, table[0], rtol=0, atol=0, equal_nan=True).all(0))
        keep[0] |= not keep.any()  # trees need some table
        table = table[:, keep]
        # An order of their own: the same set of samples gives the same trees.
        first = np.searchsorted(flat.program, np.arange(len(samples)))
        keys = [(s.group, s.value, table[i].tobytes()) for s, i in zip(samples, first, strict=True)]
        order = sorted(range(len(samples)), key=keys.__getitem__)
        place = np.argsort(np.array(order))
        blocks = np.argsort(place[flat.program], kind="stable")
        flat = _Flat(flat.rows, place[flat.program][blocks], flat.base[blocks])
        samples = [samples[i] for i in order]
        values = np.array([s.value for s in samples])
        weights = sample_weights(values, [s.group for s in samples], self.alpha)
        self._boosters = [
            self._member(i, table[blocks], flat, np.log(values), weights)
            for i in range(self.members)
        ]
        self.columns = tuple(c for c, k in zip(columns, keep, strict=True) if k)
        self.samples = len(samples)

    def _member(
        self, index: int, table: npt.NDArray[np.float32], flat: _Flat, labels: Array, weights: Array
    ) -> Any:
        """Train one member on its own draw of the programs."""
        xgb = _xgboost()
        count = len(labels)
        rng = np.random.default_rng([self.seed, index])
        drawn = np.sort(rng.permutation(count)[: max(1, round(self.drawn * count))])
        mine = np.isin(flat.program, drawn)
        program = np.searchsorted(drawn, flat.program[mine])
        base, labels, weights = flat.base[mine], labels[drawn], weights[drawn]
        params = {
            **_PARAMS, "seed": self.seed + index, "nthread": self.threads, "colsample_bynode": 0.5,
        }  # fmt: skip
        if flat.single:  # what `summed_squares` is then, in C++
            data = xgb.DMatrix(
                table[mine], label=labels - base, weight=weights, nthread=self.threads
            )
            return xgb.train(params, data, self.rounds)
        data = xgb.DMatrix(table[mine], label=np.zeros(len(base)), nthread=self.threads)
        objective = summed_squares(base, program, labels, weights)
        return xgb.train(params, data, self.rounds, obj=objective)

    def predict(self, programs: Sequence[Blocks]) -> Prediction:
        """Predict programs; an untrained model gives the analytic values, with unknown spread."""
        if not programs:
            return Prediction(np.zeros(0), np.zeros(0))
        flat = self._flat(programs)
        if not self._boosters:
            total, _ = _summed(flat.base, flat.program, len(programs))
            return Prediction(np.exp(total), np.full(len(programs), np.nan))
        data = _xgboost().DMatrix(matrix(flat.rows, self.columns), nthread=self.threads)
        each = []
        for booster in self._boosters:
            raw = np.clip(booster.predict(data, output_margin=True), -_FARTHEST, _FARTHEST)
            each.append(_summed(flat.base + raw, flat.program, len(programs))[0])
        logs = np.array(each, np.float64)
        return Prediction(np.exp(logs.mean(0)), logs.std(0))

    # -- storing -------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> str:
        """Write the trained model as JSON (atomically); return the SHA-256 of its content.

        Raises:
            ValueError: it is not trained.
        """
        if not self._boosters:
            raise ValueError("an untrained model cannot be saved")
        members = [json.loads(b.save_raw("json").decode()) for b in self._boosters]
        content = {
            "kind": self.kind, "source": self.source, "features": VERSION, "columns": list(self.columns),
            "samples": self.samples, "meta": self.meta, "members": members,
        }  # fmt: skip
        return stored.write(path, content)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, sha256: str | None = None) -> Self:
        """Read a model; XGBoost sees its content only after its hash was found right.

        Args:
            path: A file that `save` wrote.
            sha256: The hash known from elsewhere; a file with another one is refused.

        Raises:
            InputError: missing, damaged, of another schema or kind or other features, or not the
                expected model.
        """
        content = stored.read(path, sha256=sha256)
        file = Path(path)
        if content.get("kind") != cls.kind:
            raise InputError(
                f"this is a model of {content.get('kind')}, not of {cls.kind}", file=file
            )
        if content.get("features") != VERSION:
            raise InputError(
                f"the cost model reads features of version {content.get('features')}, "
                f"this version has {VERSION}",
                file=file,
                remedy="train it anew: python -m mimo_compile.search.train",
            )
        xgb = _xgboost()
        model = cls()
        try:
            model.source = str(content["source"])
            model.columns = tuple(str(c) for c in content["columns"])
            model.samples = int(content["samples"])
            model.meta = dict(content["meta"])
            for member in content["members"]:
                booster = xgb.Booster({"nthread": model.threads})
                booster.load_model(bytearray(json.dumps(member).encode()))
                model._boosters.append(booster)
        except (xgb.core.XGBoostError, KeyError, TypeError, ValueError) as error:
            raise InputError("the cost model cannot be read", file=file) from error
        return model


class LatencyModel(Model):
    """Predicts microseconds: corrects the roofline, or what another model made of it."""

    kind = "latency"
    base = (ANALYTIC, PRIOR)


@dataclass(slots=True)
class _Offsets:
    """Mean of log(measured / modelled) by workload: enough to compare the kernels of one."""

    sums: dict[str, tuple[float, int]] = field(default_factory=dict)

    def add(self, group: str, value: float) -> None:
        total, count = self.sums.get(group, (0.0, 0))
        self.sums[group] = total + value, count + 1

    def of(self, group: str) -> float:
        """The workload's own mean, else that of all, else none."""
        total, count = self.sums.get(group, (0.0, 0))
        if not count:
            total = sum(t for t, _ in self.sums.values())
            count = sum(n for _, n in self.sums.values())
        return total / count if count else 0.0


class EnergyModel(Model):
    """Predicts millijoules of kernels whose latency is known (rows by `features.with_energy`).

    It learns from one meter. Before it is trained it scales modelled energies to the meter's.
    """

    kind = "energy"
    base = (MODELLED,)

    def __init__(self, source: str = "", **options: Any) -> None:
        """Start untrained, for values of the meter ``source``; for ``options`` see `Model`."""
        super().__init__(**options)
        self.source = source
        self._offsets = _Offsets()

    def fit(self, samples: Sequence[Sample]) -> None:
        """Train from scratch on all samples; few of them only give the scale."""
        super().fit(samples)
        self._offsets = _Offsets()
        if samples and not self.trained:
            raw = super().predict([s.blocks for s in samples]).value
            for s, modelled in zip(samples, raw, strict=True):
                self._offsets.add(s.group, math.log(s.value / modelled))

    def predict_mj(self, programs: Sequence[Blocks], group: str) -> Prediction:
        """Predict candidates of one workload."""
        raw = self.predict(programs)
        if self.trained:
            return raw
        return Prediction(raw.value * math.exp(self._offsets.of(group)), raw.spread)


def _xgboost() -> Any:
    try:
        import xgboost
    except ModuleNotFoundError as error:
        raise MissingExtra("the learned cost model", missing="xgboost") from error
    return xgboost
