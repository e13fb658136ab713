"""An interpolated, modified Kneser-Ney trigram over token ids: the yardstick for the model.

Source: S. F. Chen and J. Goodman, "An empirical study of smoothing techniques for language
modeling", 1999. Counts are kept as sorted arrays of integer keys and looked up by bisection.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Order:
    """One n-gram order: counts by key, and by context the total and the mass set aside."""

    keys: Ints
    counts: Ints
    contexts: Ints
    totals: Floats
    reserved: Floats
    discounts: Floats

    def interpolate(self, keys: Ints, contexts: Ints, lower: Floats) -> Floats:
        """Probabilities [n] of the n-grams `keys`, given those of the next lower order."""
        counts = _look_up(self.keys, self.counts.astype(np.float64), keys)
        totals = _look_up(self.contexts, self.totals, contexts)
        reserved = _look_up(self.contexts, self.reserved, contexts)
        kept = np.maximum(counts - self.discounts[np.minimum(counts, 3).astype(np.int64)], 0.0)
        seen = totals > 0
        safe = np.where(seen, totals, 1.0)
        return np.where(seen, (kept + reserved * lower) / safe, lower)


def _look_up(keys: Ints, values: Floats, wanted: Ints) -> Floats:
    """values[i] where keys[i] == wanted, else 0; `keys` is sorted."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0.0)


def _discounts(counts: Ints) -> Floats:
    """The discounts for counts 0, 1, 2 and 3 or more: [4]; 0 for a count of 0."""
    n = [float((counts == k).sum()) for k in range(1, 5)]
    if min(n) == 0.0:
        return np.array([0.0, 0.5, 0.5, 0.5])
    y = n[0] / (n[0] + 2.0 * n[1])
    found = [k - (k + 1) * y * n[k] / n[k - 1] for k in (1, 2, 3)]
    return np.array([0.0, *(min(max(d, 0.05), k) for k, d in zip((1, 2, 3), found, strict=True))])


def _order(keys: Ints, counts: Ints, vocab: int) -> _Order:
    """Sum up one order; keys are sorted, and a key's context is key // vocab."""
    discounts = _discounts(counts)
    contexts, inverse = np.unique(keys // vocab, return_inverse=True)
    totals: Floats = np.bincount(inverse, weights=counts).astype(np.float64)
    mass = discounts[np.minimum(counts, 3)]
    reserved: Floats = np.bincount(inverse, weights=mass).astype(np.float64)
    return _Order(keys, counts, contexts, totals, reserved, discounts)


class KneserNeyTrigram:
    """Trigram probabilities p(word | two words before), estimated from streams of tokens."""

    def __init__(self, streams: list[npt.NDArray[np.integer]], vocab: int) -> None:
        self.vocab = vocab
        parts = []
        for stream in streams:
            s = stream.astype(np.int64)
            parts.append((s[:-2] * vocab + s[1:-1]) * vocab + s[2:])
        keys, counts = np.unique(np.concatenate(parts), return_counts=True)
        self._three = _order(keys, counts, vocab)
        keys, counts = np.unique(keys % vocab**2, return_counts=True)
        self._two = _order(keys, counts, vocab)
        keys, counts = np.unique(keys % vocab, return_counts=True)
        self._one = _order(keys, counts, vocab)

    def probability(self, before: Ints, last: Ints, word: Ints) -> Floats:
        """p(word | before, last), element by element: three arrays [n] int64 → [n]."""
        uniform = np.full(len(word), 1.0 / self.vocab)
        one = self._one.interpolate(word, np.zeros_like(word), uniform)
        two = self._two.interpolate(last * self.vocab + word, last, one)
        pair = before * self.vocab + last
        return self._three.interpolate(pair * self.vocab + word, pair, two)

    def perplexity(self, tokens: npt.NDArray[np.integer]) -> float:
        """Perplexity per token over tokens[1:]; the first one is context only."""
        t = np.concatenate([tokens[:1], tokens]).astype(np.int64)
        return float(np.exp(-np.log(self.probability(t[:-2], t[1:-1], t[2:])).mean()))
