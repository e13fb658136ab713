"""A latency model that learns from measurements: gradient-boosted trees on top of the analytic prediction.

The label of a sample is ``log(measured / analytic)``, so the trees correct the roofline and an unseen
workload starts from it. Its weight is ``(fastest of the workload / measured) ** alpha``: errors on good
kernels count, errors on slow ones hardly do (energy-aware search, section 2: grad = w (p - y), hess = w).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mimo_compile.cost_models.features import Features, columns_of, matrix
from mimo_compile.errors import InputError, MissingExtra

Array = npt.NDArray[np.floating[Any]]
SCHEMA = 1
_PARAMS = {
    "max_depth": 6, "eta": 0.2, "gamma": 1e-3, "min_child_weight": 0.0, "tree_method": "hist",
    "base_score": 0.0, "verbosity": 0,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured candidate (microseconds); ``group`` is its workload on its target."""

    features: Features
    latency_us: float
    group: str


def sample_weights(latency_us: Array, groups: Sequence[str], alpha: float = 1.0) -> Array:
    """Return ``(fastest of the group / latency) ** alpha`` for each sample, in (0, 1]."""
    fastest: dict[str, float] = {}
    for group, value in zip(groups, latency_us, strict=True):
        fastest[group] = min(fastest.get(group, math.inf), float(value))
    ratio = np.array([fastest[g] / float(v) for g, v in zip(groups, latency_us, strict=True)])
    weights: Array = ratio**alpha
    return weights


def weighted_squares(labels: Array, weights: Array) -> Callable[[Array, Any], tuple[Array, Array]]:
    """Return the objective ``sum w (p - y)^2 / 2`` as XGBoost wants it: gradient and Hessian at ``p``."""

    def objective(predicted: Array, _: Any) -> tuple[Array, Array]:
        return weights * (predicted - labels), weights.copy()

    return objective


class LatencyModel:
    """Predicts microseconds; the analytic prediction until it has seen ``min_samples`` samples."""

    def __init__(
        self,
        *,
        min_samples: int = 16,
        rounds: int = 60,
        alpha: float = 1.0,
        seed: int = 0,
        threads: int = 1,
    ) -> None:
        """Start untrained. One thread is fastest for some hundred samples, by far beside other load."""
        self.min_samples = min_samples
        self.rounds = rounds
        self.alpha = alpha
        self.seed = seed
        self.threads = threads
        self.columns: tuple[str, ...] = ()
        self.samples = 0
        self._booster: Any = None

    @property
    def trained(self) -> bool:
        """True when predictions come from trees."""
        return self._booster is not None

    def fit(self, samples: Sequence[Sample]) -> None:
        """Train from scratch on all samples (does nothing when they are too few).

        Raises:
            ValueError: a latency is not positive and finite.
        """
        latency = np.array([s.latency_us for s in samples])
        if not (np.isfinite(latency).all() and (latency > 0).all()):
            raise ValueError("latencies must be positive and finite")
        if len(samples) < self.min_samples:
            return
        # A fixed order: the same set of samples gives the same trees.
        samples = sorted(samples, key=lambda s: (s.group, s.latency_us, sorted(s.features.items())))
        latency = np.array([s.latency_us for s in samples])
        xgb = _xgboost()
        rows = [s.features for s in samples]
        self.columns = columns_of(rows)
        labels = np.log(latency) - np.array([r["analytic"] for r in rows])
        weights = sample_weights(latency, [s.group for s in samples], self.alpha)
        data = xgb.DMatrix(matrix(rows, self.columns), label=labels, nthread=self.threads)
        params = {**_PARAMS, "seed": self.seed, "nthread": self.threads}
        self._booster = xgb.train(params, data, self.rounds, obj=weighted_squares(labels, weights))
        self.samples = len(samples)

    def predict_us(self, rows: Sequence[Features]) -> npt.NDArray[np.float64]:
        """Return predicted microseconds of candidates."""
        if not rows:
            return np.zeros(0)
        base = np.array([r["analytic"] for r in rows])
        if self._booster is None:
            return np.asarray(np.exp(base))
        raw = self._booster.predict(
            _xgboost().DMatrix(matrix(rows, self.columns), nthread=self.threads), output_margin=True
        )
        return np.asarray(np.exp(base + np.clip(raw, -10.0, 10.0)))

    def save(self, path: str | os.PathLike[str]) -> str:
        """Write the trained model as JSON (atomically); return the SHA-256 of its content.

        Raises:
            ValueError: it is not trained.
        """
        if self._booster is None:
            raise ValueError("an untrained model cannot be saved")
        booster = json.loads(self._booster.save_raw("json").decode())
        content = {"columns": list(self.columns), "samples": self.samples, "booster": booster}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(text.encode()).hexdigest()
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("w") as out:
                out.write(f'{{"schema":{SCHEMA},"sha256":"{digest}","content":{text}}}')
                out.flush()
                os.fsync(out.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        return digest

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, sha256: str | None = None) -> LatencyModel:
        """Read a model; its content is parsed by XGBoost only after its hash was found right.

        Args:
            path: A file that `save` wrote.
            sha256: The hash known from elsewhere; a file with another one is refused.

        Raises:
            InputError: missing, damaged, of a newer schema, or not the expected model.
        """
        file = Path(path)
        try:
            outer = json.loads(file.read_bytes())
            schema, digest, content = outer["schema"], outer["sha256"], outer["content"]
        except OSError as error:
            raise InputError(f"cannot read the cost model: {error.strerror}", file=file) from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError("this is not a cost model", file=file) from error
        if schema != SCHEMA:
            raise InputError(
                f"the cost model has schema {schema}, this version reads {SCHEMA}", file=file
            )
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        if hashlib.sha256(text.encode()).hexdigest() != digest or (sha256 or digest) != digest:
            raise InputError("the cost model does not match its SHA-256", file=file)
        xgb = _xgboost()
        model = cls()
        try:
            model.columns = tuple(str(c) for c in content["columns"])
            model.samples = int(content["samples"])
            booster = xgb.Booster({"nthread": model.threads})
            booster.load_model(bytearray(json.dumps(content["booster"]).encode()))
            model._booster = booster
        except (xgb.core.XGBoostError, KeyError, TypeError, ValueError) as error:
            raise InputError("the cost model cannot be read", file=file) from error
        return model


def _xgboost() -> Any:
    try:
        import xgboost
    except ModuleNotFoundError as error:
        raise MissingExtra("the learned cost model", missing="xgboost") from error
    return xgboost
