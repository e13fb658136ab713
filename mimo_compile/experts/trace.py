"""Traces of expert load: how many tokens went to each expert, step by step."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from mimo_compile.errors import InputError, UsageError
from mimo_compile.runtime import tensor_file
from mimo_compile.runtime.routing import FORMAT as CHOICES
from mimo_compile.runtime.routing import RoutingLog

Floats = npt.NDArray[np.float64]
FORMAT = "mimo-compile expert load 1"
MOST_CHOICES = 1 << 53
"""Sums of more are not exact in float64."""


@dataclass(frozen=True)
class LoadTrace:
    """Tokens of each expert in T steps of L layers with E experts."""

    counts: npt.NDArray[np.int64]
    """``[T, L, E]``."""
    layers: tuple[str, ...]
    distinct: int = 0
    """Experts that a token gets, all of them different ones; 0: each of the counted is a draw by itself."""
    ids: npt.NDArray[np.int16] | None = field(default=None, compare=False)
    """``[N, L, k]``: choices of the tokens, step after step; None where only counts are known."""
    left_out: int = 0
    """Tokens that fill no step."""

    def __post_init__(self) -> None:
        """Check the shape.

        Raises:
            UsageError: Counts are negative, too large, or not of these layers, or two of these have one name.
        """
        shape = self.counts.shape
        if len(shape) != 3 or shape[1] != len(self.layers) or not shape[2]:
            raise UsageError(
                f"counts {list(shape)} are not [steps, {len(self.layers)} layers, experts]"
            )
        if self.counts.size and self.counts.min() < 0:
            raise UsageError("a count of tokens is negative")
        if self.counts.sum(dtype=np.float64) > MOST_CHOICES:
            raise UsageError(f"the counts are of more than {MOST_CHOICES} choices")
        if len(set(self.layers)) < len(self.layers):
            raise UsageError("two layers have one name")

    @property
    def experts(self) -> int:
        """E."""
        return int(self.counts.shape[2])

    def shares(self) -> Floats:
        """Return ``[T, L, E]`` float64: of each step's tokens in a layer; NaN in steps without any."""
        totals = self.counts.sum(-1, keepdims=True)
        with np.errstate(invalid="ignore"):
            return np.asarray(self.counts / totals)

    def part(self, begin: int, end: int) -> LoadTrace:
        """Return some steps of it."""
        ids = None
        if self.ids is not None:
            rows = self.counts[:, 0].sum(-1).cumsum() // max(self.distinct, 1)
            rows = np.concatenate([[0], rows])
            ids = self.ids[rows[begin] : rows[min(end, len(self.counts))]]
        return LoadTrace(self.counts[begin:end], self.layers, self.distinct, ids)

    @classmethod
    def of_log(cls, log: RoutingLog, tokens: int = 0, texts: int = 1) -> LoadTrace:
        """Count the choices of a log.

        Args:
            log: What a run has chosen.
            tokens: Tokens of a step, as a server that takes so many at a time would have them; what does
                not fill the last one is left out. 0: as the log's own calls had them.
            texts: So many texts run side by side: of each of them a token, then of each the next one. Where
                one ends earlier, the others go on. 1: one after the other.

        Raises:
            UsageError: The log has fewer tokens than one step.
        """
        ids, step = log.ids, log.step
        if texts > 1:
            order = np.lexsort((log.sequence, log.position, log.sequence // texts))
            ids = ids[order]
            if not tokens:  # a token of each text is a step
                rounds = np.stack([log.position[order], log.sequence[order] // texts])
                changes = (np.diff(rounds) != 0).any(0)
                step = np.concatenate([[0], changes.cumsum()])
        steps = (
            np.unique(step, return_inverse=True)[1] if not tokens else np.arange(len(ids)) // tokens
        )
        count = len(ids) // tokens if tokens else (int(steps.max()) + 1 if len(ids) else 0)
        used = int((steps < count).sum())
        if not count:
            raise UsageError(
                f"the routing log has {len(ids)} tokens, too few for a step of {tokens or 1}",
                remedy="Record more, or ask for smaller steps.",
            )
        layers, experts, k = len(log.layers), log.experts, ids.shape[2]
        places = (steps[:used, None] * layers + np.arange(layers)) * experts
        flat = (places[:, :, None] + ids[:used]).ravel()
        counts = np.bincount(flat, minlength=count * layers * experts)
        shaped = counts.reshape(count, layers, experts).astype(np.int64)
        return cls(shaped, log.layers, k, ids[:used], len(ids) - used)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the counts as safetensors; choices are not kept.

        Raises:
            OSError: The file cannot be written.
        """
        facts = {"format": FORMAT, "layers": ",".join(self.layers), "distinct": str(self.distinct)}
        tensor_file.write(path, {"counts": self.counts}, facts)

    @classmethod
    def load(cls, path: str | os.PathLike[str], tokens: int = 0, texts: int = 1) -> LoadTrace:
        """Read a routing log, or a file that `save` wrote; arguments as in `of_log`.

        Raises:
            InputError: It is neither of them, or damaged.
            UsageError: Steps are asked for of a file that has them already, or it is too short.
        """
        tensors, facts = tensor_file.read(path)
        if facts.get("format") == CHOICES:
            return cls.of_log(RoutingLog.load(path), tokens, texts)
        counts = tensors.get("counts")
        if facts.get("format") != FORMAT or counts is None or counts.dtype != np.int64:
            raise InputError(
                f"it is no routing log and no trace of expert load: its format is "
                f"{facts.get('format', 'not said')!r}",
                file=path, remedy="`run --route-log` writes a routing log",
            )  # fmt: skip
        if tokens or texts > 1:
            raise UsageError(
                f"{path} has counts of steps: they cannot be divided into others",
                remedy="Leave --tokens and --texts out.",
            )
        layers = tuple(facts.get("layers", "").split(","))
        distinct = facts.get("distinct", "0")
        try:
            return cls(counts, layers, int(distinct) if distinct.isdecimal() else 0)
        except UsageError as error:
            raise InputError(f"it is damaged: {error.what}", file=path) from error
