"""Which drafts a model keeps, and what it says instead of the first that it does not.

The rules are lossless: what is emitted is distributed as what the model alone would say (Leviathan, Kalman
and Matias, arXiv 2211.17192). The random numbers depend on seed and position only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from mimo_compile.runtime.sampling import (
    Distribution,
    Sampling,
    distribution,
    draw,
    most_probable,
    sample,
    uniform,
)

_KEEP, _INSTEAD, _DRAFT = 1, 2, 3
"""Streams of random numbers, beside that of plain sampling (0): one for each question at a position."""


def draft(
    logits: npt.NDArray[Any], sampling: Sampling | None, position: int
) -> tuple[int, Distribution] | None:
    """Return a draft and what it was drawn from.

    Args:
        logits: `[vocab]` of a draft head.
        sampling: How it is drawn; None: it is the token with the greatest logit.
        position: Of the token in its sequence.

    Returns:
        None where the logits are no numbers to draw from: there is no draft then.
    """
    best = int(np.argmax(logits))
    if not math.isfinite(logits[best]):
        return None
    if sampling is None:
        return best, (np.array([best]), np.ones(1))
    drawn = distribution(logits, sampling)
    return draw(drawn, uniform(sampling.seed, position, _DRAFT)), drawn


def emitted(
    logits: Iterable[npt.NDArray[Any]],
    drafts: list[int],
    sampling: Sampling,
    position: int,
) -> list[int]:
    """Return the model's own tokens for as long as the drafts are the same, and one more.

    Each is what plain sampling draws at its position: a draft is kept with the probability that the model
    gives it.

    Args:
        logits: `[vocab]` of each position, one more than there are drafts; taken as far as needed.
        drafts: The drafts.
        sampling: How the model's tokens are drawn.
        position: Of the first draft.

    Returns:
        One token more than drafts were kept.

    Raises:
        MimoError: logits are no numbers to draw from.
    """
    out: list[int] = []
    for row, logit in enumerate(logits):
        token = sample(logit, sampling, position + row)
        out.append(token)
        if row == len(drafts) or token != drafts[row]:
            break
    return out


def emitted_from(
    logits: Iterable[npt.NDArray[Any]],
    drafts: list[int],
    drawn: list[Distribution],
    sampling: Sampling,
    position: int,
) -> list[int]:
    """Return the drafts that are kept, and one token more; for drafts that were drawn from distributions.

    A draft d of distribution q is kept with probability min(1, p(d) / q(d)), p being the model's; the first
    that is not gives way to a token drawn from (p - q)+. So more are kept than by `emitted`.

    Args:
        logits: As for `emitted`, as are the other arguments.
        drafts: The drafts.
        drawn: What each was drawn from.
        sampling: Of a temperature above 0.
        position: Of the first draft.

    Raises:
        MimoError: logits are no numbers to draw from.
    """
    out: list[int] = []
    for row, logit in enumerate(logits):
        at = position + row
        if row == len(drafts):
            out.append(sample(logit, sampling, at))
            break
        most_probable(logit, at)
        p, q = distribution(logit, sampling), drawn[row]
        mine, theirs = _of(p, drafts[row]), _of(q, drafts[row])
        if uniform(sampling.seed, at, _KEEP) * theirs < mine:
            out.append(drafts[row])
            continue
        out.append(draw(rest(p, q), uniform(sampling.seed, at, _INSTEAD)))
        break
    return out


def rest(p: Distribution, q: Distribution) -> Distribution:
    """Return what is left of p where q takes its part: (p - q)+, not normalised; p itself if nothing is."""
    order = np.argsort(q[0])
    ids, probabilities = q[0][order], q[1][order]
    at = np.minimum(np.searchsorted(ids, p[0]), len(ids) - 1)
    left = np.maximum(p[1] - np.where(ids[at] == p[0], probabilities[at], 0.0), 0.0)
    return (p[0], left) if left.sum() > 0 else p


def _of(drawn: Distribution, token: int) -> float:
    """Return the probability of a token."""
    return float(drawn[1][drawn[0] == token].sum())
