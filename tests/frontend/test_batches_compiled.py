"""Several sequences decoded together: each is what it is alone, whatever was in its place before."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mimo_compile as mc
from mimo_compile.errors import ArtifactError, UsageError
from mimo_compile.runtime import Stats
from mimo_compile.runtime.batch import append_each
from mimo_compile.verify import batch as batch_check
from mimo_compile.verify import eager_decoder, verify_artifact

BATCH = 3
pytestmark = pytest.mark.compile


@pytest.fixture(scope="module")
def module(windowed):
    return windowed.module()


def logits(session, hidden):
    return np.concatenate([rows.copy() for rows in session.logits(hidden)])


def fresh(module, ids):
    """Return the logits behind some tokens, of a sequence that has the module to itself."""
    module.reset()
    session = module.session()
    session.append(ids[:-1])
    return logits(session, session.append(ids[-1:], decode=True))


def poison(module):
    """Leave NaN in every slot of every sequence; both cache formats read 0xFF.. so."""
    module._states.bytes[:] = 0xFF


@settings(max_examples=8)
@given(data=st.data())
def test_sequences_of_any_length_are_what_they_are_alone(module, data):
    lengths = data.draw(st.lists(st.integers(1, 300), min_size=BATCH, max_size=BATCH))
    slots = data.draw(st.permutations(range(BATCH)))[: data.draw(st.integers(2, BATCH))]
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    poison(module)
    sessions = [module.session(slot=slot) for slot in slots]
    texts = [rng.integers(0, 257, n).tolist() for n in lengths[: len(slots)]]
    for session, text in zip(sessions, texts, strict=True):
        session.append(text)
    for _ in range(3):
        tokens = rng.integers(0, 257, len(slots)).tolist()
        got = logits(sessions[0], append_each(module, sessions, tokens))
        texts = [[*text, token] for text, token in zip(texts, tokens, strict=True)]
    assert [s.tokens for s in sessions] == [tuple(text) for text in texts]
    for row, text in zip(got, texts, strict=True):
        np.testing.assert_allclose(row, fresh(module, text)[0], rtol=5e-4, atol=5e-4)


def test_more_prompts_than_places_give_what_each_gives_alone(module, tools):
    """A place is used again after a longer text, whose keys must not be seen, nor slots never written."""
    prompts = [tools.prompt(n, seed=n) for n in (290, 3, 40, 9, 1, 270, 20)]
    alone = [list(module.generate_ids(p, 9, stop_at_eos=False)) for p in prompts]
    poison(module)
    stats, got, places = Stats(), [[] for _ in prompts], []
    for index, token in module.generate_batch_ids(prompts, 9, stop_at_eos=False, stats=stats):
        got[index].append(token)
        places.append(index)
    assert got == alone
    assert places[: BATCH + 1] == [0, 1, 2, 0]  # prompts first, then a token of each
    assert (stats.new_tokens, stats.sequences, stats.stopped) == (63, 7, "length")
    assert stats.prompt_tokens == sum(map(len, prompts)) and stats.decode_tokens_per_s > 0
    assert stats.joules_per_token is None and stats.joules_reason


def test_sequences_come_and_go_by_themselves(module, tools):
    """Sessions in other places live on when one begins anew; it is their own that ends them."""
    first, second = module.session(slot=0), module.session(slot=2)
    first.append(tools.prompt(20))
    second.append(tools.prompt(30, seed=2))
    anew = module.session(slot=0)
    anew.append(tools.prompt(5, seed=3))
    got = logits(anew, append_each(module, [second, anew], [7, 9]))
    with pytest.raises(UsageError, match="has ended"):
        append_each(module, [first, second], [1, 2])
    assert second.position == 31 and anew.position == 6  # none of them moved
    second.rewind(25)  # and back, as a session does
    again = logits(second, append_each(module, [anew, second], [4, 3]))
    for row, ids in (
        (got[0], [*tools.prompt(30, seed=2), 7]),
        (got[1], [*tools.prompt(5, seed=3), 9]),
        (again[0], [*tools.prompt(5, seed=3), 9, 4]),
        (again[1], [*tools.prompt(30, seed=2)[:25], 3]),
    ):
        np.testing.assert_allclose(row, fresh(module, ids)[0], rtol=5e-4, atol=5e-4)


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({"batch": 0}, "0 sequences cannot be decoded together"),
        ({"batch": 257}, "257 sequences cannot be decoded together"),
        ({"quant": "w4g64a8kv4"}, "--batch 2 has no kernels for caches in kv4"),
        ({"attention": "quest:budget=64"}, "--batch 2 has no kernels for --attention quest"),
        ({"attention": "full+int8"}, r"--batch 2 has no kernels for --attention full\+int8"),
    ],
)
def test_models_that_no_kernels_batch_are_refused_at_once(asked, match):
    with pytest.raises(UsageError, match=match):
        mc.compile("no such folder", **{"batch": 2, **asked})


def test_states_are_those_of_one_sequence(windowed):
    manifest, entries = windowed.manifest, windowed.programs.entries
    assert manifest.decoder.batch == BATCH
    assert {s.shape[0] for s in manifest.states.values()} == {2}  # KV heads
    for name, heads in ((f"batch_{BATCH}", 2 * BATCH), ("step_1", 2), ("step_64", 2)):
        assert {b.shape[0] for b in entries[name].buffers if b.kind == "state"} == {heads}


def test_verify_compares_batches_with_each_alone(saved, windowed, tmp_path, monkeypatch, tools):
    source = saved("qwen2-window")[1]
    found = verify_artifact(windowed.save(tmp_path / "b.mimo"), source=source, tokens=32)
    assert found.ok and found.batch is not None and found.batch.rows == BATCH * 8

    def exchanged(module, sessions, tokens):
        return append_each(module, sessions, tokens)[::-1].copy()

    monkeypatch.setattr(batch_check, "append_each", exchanged)
    eager, ids = eager_decoder(windowed.manifest, source), np.array(tools.prompt(32))
    assert not batch_check.compare_batch(windowed.module(), eager, ids).ok


def test_a_program_for_more_sequences_than_there_are_is_refused(windowed, tmp_path):
    decoder = msgspec.structs.replace(windowed.manifest.decoder, batch=2)
    wrong = replace(windowed, manifest=msgspec.structs.replace(windowed.manifest, decoder=decoder))
    with pytest.raises(ArtifactError, match="ends beyond"):
        mc.load(wrong.save(tmp_path / "wrong.mimo"))
