"""What is emitted is distributed as what the model alone would say, whatever drafts are."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from mimo_compile.errors import MimoError
from mimo_compile.runtime import accept
from mimo_compile.runtime.sampling import Sampling, distribution, sample

VOCAB = 4
RNG = np.random.default_rng(7)
MODEL, HEADS = RNG.normal(0, 1.2, (VOCAB, VOCAB)), RNG.normal(0, 1.2, (2, VOCAB, VOCAB))
"""Logits of the next token given the last one, of the model and of two draft heads."""


def probabilities(logits, sampling):
    out = np.zeros(len(logits))
    ids, chances = distribution(logits, sampling)
    out[ids] = chances
    return out


def speculated(sampling, drawn, tokens=3):
    """Return the first tokens of a text after token 0, from passes over two drafts; and what was kept."""
    text, kept = [0], []
    while len(text) <= tokens:
        at, drafts, sources = len(text), [], []
        for head in HEADS:
            before = drafts[-1] if drafts else text[-1]
            how = sampling if drawn else None
            found, source = accept.draft(head[before], how, at + len(drafts))
            drafts.append(found)
            sources.append(source)
        rows = (MODEL[token] for token in [text[-1], *drafts])
        if drawn:
            new = accept.emitted_from(rows, drafts, sources, sampling, at)
        else:
            new = accept.emitted(rows, drafts, sampling, at)
        assert 1 <= len(new) <= 3 and new[:-1] == drafts[: len(new) - 1]
        kept.append(len(new) - 1)
        text += new
    return tuple(text[1 : 1 + tokens]), kept


HOW = [
    pytest.param({"temperature": 1.0}, id="all"),
    pytest.param({"temperature": 0.7, "top_k": 3, "top_p": 0.9}, id="filtered"),
]


@pytest.mark.parametrize("drawn", [False, True], ids=["greedy drafts", "drawn drafts"])
@pytest.mark.parametrize("how", HOW)
def test_texts_are_as_likely_as_without_drafts(how, drawn):
    """Chi-square on all texts of three tokens with exact probabilities; drafts fail and hold in all ways."""
    exact = np.stack([probabilities(row, Sampling(**how)) for row in MODEL])
    expected = np.einsum("a,ab,bc->abc", exact[0], exact, exact)
    runs, counts, kept = 600, np.zeros((VOCAB,) * 3), []
    for seed in range(runs):
        text, held = speculated(Sampling(seed=seed, **how), drawn)
        counts[text] += 1
        kept += held
    assert {0, 1} <= set(kept) and (2 in kept or "top_k" in how)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    rare = expected[possible] * runs < 8
    seen, wanted = counts[possible], expected[possible] * runs
    if rare.any():
        seen = np.append(seen[~rare], seen[rare].sum())
        wanted = np.append(wanted[~rare], wanted[rare].sum())
    assert chisquare(seen, wanted).pvalue > 1e-4


def test_greedy_drafts_give_the_text_of_the_seed():
    for seed in range(50):
        sampling, plain = Sampling(1.0, seed=seed), [0]
        while len(plain) < 4:
            plain.append(sample(MODEL[plain[-1]], sampling, len(plain)))
        assert speculated(sampling, drawn=False)[0] == tuple(plain[1:])


@given(st.integers(2, 40), st.floats(0.05, 5), st.floats(0.05, 5), st.integers(0, 2**32 - 1))
def test_the_rule_leaves_the_distribution_as_it_is(vocab, sharp, other, seed):
    """Kept or instead: q min(1, p / q) + (1 - sum min(p, q)) rest = p, to roundings."""
    rng = np.random.default_rng(seed)
    p, q = (x / x.sum() for x in (rng.random(vocab) ** sharp, rng.random(vocab) ** other))
    p[rng.random(vocab) < 0.2] = 0
    if not p.sum():
        p[0] = 1
    p /= p.sum()
    ids = np.arange(vocab)
    shuffled = rng.permutation(vocab)
    left = accept.rest((ids, p), (shuffled, q[shuffled]))[1]
    found = np.minimum(p, q) + (1 - np.minimum(p, q).sum()) * left / left.sum()
    np.testing.assert_allclose(found, p, atol=4e-16 * vocab)


def test_drafts_outside_of_what_may_be_drawn_are_never_kept():
    sampling = Sampling(1.0, top_k=1)
    logits = np.array([0.0, 3.0, 1.0])
    drawn = (np.array([0, 2]), np.array([0.5, 0.5]))
    for seed in range(20):
        how = Sampling(sampling.temperature, top_k=1, seed=seed)
        assert accept.emitted_from(iter([logits, logits]), [2], [drawn], how, 5) == [1]


def test_logits_that_are_no_numbers():
    bad, good = np.array([0.0, math.nan]), np.array([1.0, 0.0])
    assert accept.draft(bad, None, 3) is None and accept.draft(bad, Sampling(1.0), 3) is None
    for rows, drafts in (([bad], []), ([good, bad], [0])):
        with pytest.raises(MimoError, match="no numbers"):
            accept.emitted(iter(rows), drafts, Sampling(), 0)
    with pytest.raises(MimoError, match="no numbers"):
        accept.emitted_from(iter([bad]), [0], [(np.array([0]), np.ones(1))], Sampling(1.0), 0)
