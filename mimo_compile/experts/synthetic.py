"""Synthetic traces of expert load: from fluctuating to stable, as load does while a model is trained.

Of each layer, ``logits(t+1) = logits(t) + sigma(t) eps`` with ``sigma(t) = max(sigma_end, sigma_0
exp(-t/tau))`` and counts drawn from a multinomial of ``softmax(logits)``. The two regimes are those of
"Prediction Is All MoE Needs" (arXiv 2404.16914): its traces were not published, and this shape is ours.
"""

from __future__ import annotations

import numpy as np

from mimo_compile.experts.trace import LoadTrace


def drifting(
    steps: int = 6000,
    layers: int = 4,
    experts: int = 16,
    draws: int = 8192,
    *,
    begin: float = 0.1,
    end: float = 0.001,
    decay: float = 200.0,
    jump: int | None = None,
    seed: int = 0,
) -> LoadTrace:
    """Make a trace whose logits walk at random, in steps that shrink.

    Args:
        steps: T.
        layers: L; each walks by itself.
        experts: E.
        draws: Choices of a step in each layer: tokens times experts of a token.
        begin: Standard deviation of the first step of a logit.
        end: Least standard deviation; 0 for a trace that ends in pure noise of counting.
        decay: Steps in which it falls by a factor of e.
        jump: Step at which all logits are drawn anew; None: never.
        seed: Of the draws.
    """
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((layers, experts)) * 0.5
    counts = np.empty((steps, layers, experts), np.int64)
    for t in range(steps):
        if t == jump:
            logits = rng.standard_normal((layers, experts))
        share = np.exp(logits - logits.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
        counts[t] = rng.multinomial(draws, share)
        logits = logits + max(end, begin * np.exp(-t / decay)) * rng.standard_normal(logits.shape)
    return LoadTrace(counts, tuple(f"layers.{i}" for i in range(layers)))


def steady(
    steps: int = 6000, layers: int = 4, experts: int = 16, draws: int = 8192, *, seed: int = 0
) -> LoadTrace:
    """Make a trace of constant proportions: nothing but the noise of counting."""
    return drifting(steps, layers, experts, draws, begin=0.0, end=0.0, seed=seed)
