"""Models with experts over pages: texts and states are the same bits with few experts in memory."""

from __future__ import annotations

import numpy as np
import pytest

import mimo_compile as mc
from mimo_compile.runtime import ExpertMemory, Stats
from mimo_compile.runtime.batch import append_each

pytestmark = [pytest.mark.compile, pytest.mark.slow]
BATCH, PAGES, CONTEXT = 3, 5, 130
EXPERT = 3 * 64 * 32 * 4
"""Bytes of one; 3 layers have 8 each, of which a token gets 2."""


@pytest.fixture(scope="module")
def file(saved, tmp_path_factory):
    """Three texts at a time over fewer pages than they may need."""
    folder = tmp_path_factory.mktemp("paged-experts")
    artifact = mc.compile(
        saved("mimo_v2_flash")[1], db=folder / "r.db", max_context=CONTEXT, threads=1, batch=BATCH,
        pages=PAGES,
    )  # fmt: skip
    return artifact.save(folder / "paged.mimo")


@pytest.fixture(scope="module")
def texts(tools):
    """Prompts of one beginning, longer than a page, and others."""
    common = tools.prompt(70, seed=5)
    return [[*common, n] for n in range(3)] + [tools.prompt(n, seed=n) for n in (60, 3, 90)]


@pytest.fixture(scope="module")
def wanted(file, texts):
    return generated(mc.load(file, threads=1), texts)


def generated(module, texts):
    """Texts that wait for pages, share them and are set aside; then hidden states after a fork and a cut."""
    stats, got = Stats(), [[] for _ in texts]
    for index, token in module.generate_batch_ids(texts, 20, stop_at_eos=False, stats=stats):
        got[index].append(token)
    assert stats.reused_tokens > 0
    session = module.session(slot=0)
    states = [part.copy() for part in session.chunks(texts[0])]
    other = session.fork(1)
    session.rewind(66)
    for token in (5, 80, 200):
        states.append(append_each(module, [session, other], [token, token + 1]).copy())
    other.end()
    states.append(session.append([9]).copy())
    return got, np.concatenate(states)


@pytest.mark.parametrize("experts", [2, 5, 11, 24])
@pytest.mark.parametrize("ahead", [0, 2])
def test_texts_over_pages_do_not_depend_on_what_is_in_memory(file, texts, wanted, experts, ahead):
    how = ExpertMemory(experts * EXPERT, ahead=ahead)
    module = mc.load(file, threads=1, expert_memory=how)
    got, states = generated(module, texts)
    assert got == wanted[0] and np.array_equal(states, wanted[1])
    facts = module.experts.facts()
    assert facts["slots"] == experts and facts["misses"] > 0
    assert facts["waves"] > 0 if experts < 8 else experts < 24 or not facts["waves"]
