"""Draws the next token from logits, in float64 and reproducibly."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mimo_compile.errors import MimoError, UsageError

Distribution = tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]
"""Tokens that may be drawn `[n]`, and their probabilities `[n]`."""
_MASK = (1 << 64) - 1
_FIRST_LOOK = 512  # most probable tokens among which top_p is looked for before sorting all


_RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("temperature", lambda x: 0 <= x < math.inf, "0 or more"),
    ("top_k", lambda x: x == int(x) and x >= 0, "0 or more, whole"),
    ("top_p", lambda x: 0 < x <= 1, "above 0, at most 1"),
    ("seed", lambda x: x == int(x), "whole"),
)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn; see `Module.generate`."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UsageError: A value is out of its range.
        """
        for name, good, range_ in _RANGES:
            value = getattr(self, name)
            try:
                fits = bool(good(value))
            except (TypeError, ValueError, OverflowError):  # no number at all, or infinite
                fits = False
            if not fits:
                raise UsageError(f"{name} is {value}; it must be {range_}")


def sample(logits: npt.NDArray[Any], sampling: Sampling, position: int) -> int:
    """Draw a token.

    Args:
        logits: `[vocab]`; minus infinity excludes a token.
        sampling: Temperature 0 takes the greatest logit, the lowest id among equals.
        position: Place of the token in its sequence; each has a random number of its own.

    Raises:
        MimoError: The logits hold NaN or plus infinity, or exclude every token.
    """
    best = most_probable(logits, position)
    if sampling.temperature == 0:
        return best
    return draw(distribution(logits, sampling), uniform(sampling.seed, position))


def most_probable(logits: npt.NDArray[Any], position: int) -> int:
    """Return the token with the greatest logit, the lowest id among equals.

    Raises:
        MimoError: The logits hold NaN or plus infinity, or exclude every token.
    """
    best = int(np.argmax(logits))  # the first NaN if there is one
    if not math.isfinite(logits[best]):
        raise MimoError(
            f"the logits at position {position} are no numbers to draw from: {logits[best]}",
            remedy="Run: mimo-compile verify, to see which kernel or weight is wrong.",
        )
    return best


def draw(drawn: Distribution, at: float) -> int:
    """Return the token that a number in [0, 1) falls on; the probabilities may add up to anything."""
    ids, probabilities = drawn
    sums = np.cumsum(probabilities)
    index = int(np.searchsorted(sums, at * sums[-1], side="right"))
    return int(ids[min(index, len(ids) - 1)])


def distribution(logits: npt.NDArray[Any], sampling: Sampling) -> Distribution:
    """Return the tokens that may be drawn at a temperature above 0, and their probabilities.

    Args:
        logits: `[vocab]`, with a finite maximum.
        sampling: Temperature first, then `top_k`, then `top_p`.

    Returns:
        Ids `[n]`, and probabilities `[n]` that add up to 1. By falling probability, the lower id
        first among equals, if `top_k` or `top_p` chose; else by id.
    """
    vocab = logits.shape[0]
    scaled = logits.astype(np.float64)
    scaled -= scaled.max()
    scaled /= sampling.temperature
    k = min(sampling.top_k, vocab) or vocab
    if sampling.top_p < 1:
        ids, weights = _nucleus(scaled, k, sampling.top_p)
    elif k < vocab:
        ids = _top(scaled, k)
        weights = np.exp(scaled[ids])
    else:
        ids = np.arange(vocab)
        weights = np.exp(scaled, out=scaled)
    weights /= weights.sum()
    return ids, weights


def _nucleus(
    scaled: npt.NDArray[np.float64], k: int, top_p: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return the most probable of the k greatest that reach `top_p` of their sum, and weights."""
    part = scaled if k == len(scaled) else scaled[_top(scaled, k)]
    enough = top_p * float(np.exp(part).sum())
    look = min(k, _FIRST_LOOK)
    while True:
        ids = _top(scaled, look)
        weights = np.exp(scaled[ids])
        sums = np.cumsum(weights)
        if look == k or sums[-1] >= enough:
            break
        look = min(k, 8 * look)
    count = int(np.searchsorted(sums, enough)) + 1  # all of them if rounding keeps the sum below
    return ids[:count], weights[:count]


def _top(values: npt.NDArray[np.float64], k: int) -> npt.NDArray[np.int64]:
    """Return the indices of the k greatest values, falling, the lower index first among equals."""
    size = values.shape[0]
    if k < size:
        least = np.partition(values, -k)[-k]
        above = np.flatnonzero(values > least)
        equal = np.flatnonzero(values == least)[: k - len(above)]
        chosen = np.concatenate([above, equal])
    else:
        chosen = np.arange(size)
    chosen = chosen[np.argsort(-values[chosen])]
    # Then order equals by index. Two sorts of numbers are five times faster than a stable one.
    falls = np.ones(len(chosen), bool)
    falls[1:] = values[chosen[1:]] != values[chosen[:-1]]
    return np.asarray(np.sort(np.cumsum(falls) * size + chosen) % size)


def uniform(seed: int, position: int, stream: int = 0) -> float:
    """Return a random number in [0, 1) that depends on nothing but its arguments.

    Three rounds of SplitMix64's mixing function (Steele, Lea, Flood 2014), one for each argument.
    """
    state = 0
    for part in (seed, position, stream):
        state = _mix(state + (part & _MASK) + 0x9E3779B97F4A7C15)
    return (state >> 11) * 2.0**-53


def _mix(z: int) -> int:
    z &= _MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return z ^ (z >> 31)
