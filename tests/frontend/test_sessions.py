"""Sequences that go back and are used again: every layer must find what a fresh sequence would hold."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mimo_compile as mc
from mimo_compile.errors import UsageError
from mimo_compile.runtime import Stats

CONTEXT, RING = 320, 272
pytestmark = pytest.mark.compile


@pytest.fixture(scope="module")
def module(windowed):
    return windowed.module()


def logits(session, hidden):
    return np.concatenate([rows.copy() for rows in session.logits(hidden)])


def fresh(module, ids):
    session = module.session()
    return logits(session, session.append(ids))


def test_layers_are_what_inspect_tells(module):
    layers = module.manifest.decoder.layers
    assert [(x.name, x.role, x.window, x.slots) for x in layers] == [
        ("layers.0", "full", 0, CONTEXT), ("layers.1", "window", 8, RING), ("layers.2", "window", 8, RING),
    ]  # fmt: skip
    owned = [name for layer in layers for name in layer.states]
    assert sorted(owned) == sorted(module.manifest.states)


def test_a_prompt_with_the_same_beginning_costs_only_its_end(module, tools):
    one, other = tools.prompt(40), tools.prompt(30)[:25] + tools.prompt(50, seed=2)
    session = module.session()
    kinds = {"stop_at_eos": False, "max_new_tokens": 9}
    for prompt, reused in ((one, 0), (other, 25), (other, len(other) - 1), (other[:20], 19)):
        stats = Stats()
        found = list(module.generate_ids(prompt, session=session, stats=stats, **kinds))
        assert stats.reused_tokens == reused
        assert session.tokens[: len(prompt)] == tuple(prompt)
        kept = session.tokens
        assert found == list(module.generate_ids(prompt, **kinds))
        session = module.session()  # the fresh one ended it: begin again where it was
        session.append(kept)
    with pytest.raises(UsageError, match="has ended"):
        ended = module.session()
        module.session()
        list(module.generate_ids(one, session=ended, **kinds))


def test_generated_tokens_are_kept_where_they_decode_like_a_prompt(module, tools):
    session = module.session()
    out = list(module.generate_ids(tools.prompt(30), 8, session=session, stop_at_eos=False))
    again = [*tools.prompt(30), *out, 5, 6]
    assert session.keep_prefix(again) == 30 + 7  # the last one was never appended
    got = logits(session, session.append(again[37:]))
    np.testing.assert_allclose(got, fresh(module, again), rtol=2e-4, atol=2e-4)


def test_rings_give_back_as_much_as_they_hold(module, tools):
    """Of 300 positions a ring of 272 holds those from 28 on, and 7 before the next one are seen."""
    session, ids = module.session(), tools.prompt(300)
    session.append(ids)
    assert [session.can_rewind(n) for n in (0, 1, 34, 35, 300)] == [True, False, False, True, True]
    with pytest.raises(UsageError, match="cannot go back from 300 tokens to 34"):
        session.rewind(34)
    with pytest.raises(UsageError, match="301 tokens cannot be kept"):
        session.rewind(301)
    session.rewind(35)
    assert session.position == 35 and session.tokens == tuple(ids[:35])
    more = tools.prompt(9, seed=3)
    got = logits(session, session.append(more))
    np.testing.assert_allclose(got, fresh(module, ids[:35] + more), rtol=2e-4, atol=2e-4)


def test_where_rings_cannot_go_back_the_sequence_begins_anew(module, tools):
    session, ids = module.session(), tools.prompt(300)
    session.append(ids)
    assert session.keep_prefix([*ids[:20], 3]) == 0 and session.position == 0
    session.append(ids[:20])
    assert session.can_rewind(10)  # what was before the new beginning is no matter any more
    session.rewind(10)
    got = logits(session, session.append(ids[10:30]))
    np.testing.assert_allclose(got, fresh(module, ids[:30]), rtol=2e-4, atol=2e-4)


@settings(max_examples=12)
@given(
    st.lists(st.tuples(st.integers(1, 120), st.floats(0, 1)), min_size=1, max_size=5),
    st.integers(0, 99),
)
def test_any_way_back_and_forth_ends_where_a_fresh_sequence_does(module, moves, seed):
    rng = np.random.default_rng(seed)
    session = module.session()
    for count, part in moves:
        room = CONTEXT - 4 - session.position
        if room > 0:
            session.append(rng.integers(0, 257, min(count, room)))
        back = int(session.position * part)
        if session.can_rewind(back):
            session.rewind(back)
    session.append(rng.integers(0, 257, 3))
    ids = session.tokens
    got = logits(session, session.append([7]))
    np.testing.assert_allclose(got, fresh(module, [*ids, 7]), rtol=5e-4, atol=5e-4)


# -- caches in groups -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def groups(saved, tmp_path_factory):
    """A model whose caches quantise 64 positions together and hold the newest 320 as they were."""
    folder = tmp_path_factory.mktemp("groups")
    source = saved("llama-linear-mha")[1]
    return mc.compile(
        source, quant="kv4", db=folder / "records.db", max_context=512, threads=1
    ).module()


def test_groups_are_reopened_as_far_as_the_tail_holds_them(groups, tools):
    """Of 400 positions the tail holds those from 80 on: of the groups that begin at 0 and 64 not all."""
    layer = groups.manifest.decoder.layers[0]
    assert (layer.format, layer.slots, layer.group, layer.tail) == ("i4", 512, 64, 320)
    ids, more = tools.prompt(400), tools.prompt(90, seed=3)
    for kept in (130, 128, 64, 399):
        session = groups.session()
        session.append(ids[:kept])
        session.append(ids[kept:])
        places = (0, 63, 64, 65, 79, 127, 128, 129, 400)
        found = [session.can_rewind(n) for n in places]
        assert found == [True, False, True, False, False, False, True, True, True]
        with pytest.raises(
            UsageError, match=r"from 400 tokens to 100: caches in i4 quantise 64.*Keep 64 "
        ):
            session.rewind(100)
        session.rewind(kept)
        got = logits(session, session.append(more))
        again = groups.session()
        again.append(ids[:kept])
        assert np.array_equal(got, logits(again, again.append(more)))


def test_a_prompt_keeps_whole_groups_of_what_it_shares(groups, tools):
    ids, more = tools.prompt(400), tools.prompt(30, seed=3)
    session = groups.session()
    session.append(ids)
    assert session.keep_prefix(ids[:100] + more) == session.position == 64
    session.append(ids[64:100] + more)
    assert session.can_rewind(100)  # what the tail had lost was appended again
    assert session.keep_prefix(ids[:100] + more + more) == 130
    assert session.keep_prefix(ids[:50]) == 0


@settings(max_examples=6)
@given(
    st.lists(st.tuples(st.integers(1, 200), st.floats(0, 1)), min_size=1, max_size=6),
    st.integers(0, 99),
)
def test_any_way_back_in_groups_leaves_what_a_fresh_sequence_has(groups, moves, seed):
    rng, session, parts = np.random.default_rng(seed), groups.session(), []
    for count, share in moves:
        room = 508 - session.position
        if room > 0:
            parts.append(rng.integers(0, 257, min(count, room)))
            session.append(parts[-1])
        kept = int(share * len(parts))  # whole calls, whose rows a fresh sequence has bit for bit
        back = sum(map(len, parts[:kept]))
        if session.can_rewind(back):
            session.rewind(back)
            del parts[kept:]
    got = logits(session, session.append([7]))
    again = groups.session()
    for part in parts:
        again.append(part)
    assert np.array_equal(got, logits(again, again.append([7])))


# -- attention policies that decode apart ----------------------------------------------------------


@pytest.fixture(scope="module")
def resa(saved, tmp_path_factory):
    """The same model under a policy that makes its caches exact again after every fourth token."""
    folder = tmp_path_factory.mktemp("resa")
    source, text = saved("qwen2-window")[1], "resa:p=0.1,block=4,least=2,f=4"
    return mc.compile(
        source, db=folder / "records.db", max_context=CONTEXT, threads=1, attention=text
    ).module()


def check_exact(module, session):
    """Every key and every bound must be what the tokens have as a prompt."""
    logits(session, session.append([7]))
    ids = session.tokens
    got = logits(session, session.append([9], decode=True))
    again = module.session()
    again.append(ids)
    expected = logits(again, again.append([9], decode=True))
    np.testing.assert_allclose(got, expected, rtol=5e-4, atol=5e-4)


@pytest.mark.slow
def test_a_prompt_after_decoded_tokens_makes_them_exact_while_rings_hold_what_they_see(resa, tools):
    session = resa.session()
    session.append(tools.prompt(20))
    for token in (3, 4, 5):  # one less than is run again
        session.append([token], decode=True)
    session.append(tools.prompt(280, seed=2))  # rings have forgotten what the three see
    assert session.keep_prefix(session.tokens) == session.position == 302
    check_exact(resa, session)


@pytest.mark.slow
def test_what_nobody_asked_for_after_a_step_is_made_exact_before_the_next(resa, tools):
    session = resa.session()
    session.append(tools.prompt(20))
    for token in range(9):
        next(session.chunks([token], decode=True))  # given up right after its hidden state
    check_exact(resa, session)


@pytest.mark.slow
@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(1, 310), st.floats(0, 1)), min_size=1, max_size=6
    ),
    st.integers(0, 99),
)
def test_decoding_reading_and_going_back_leave_what_a_prompt_would(resa, moves, seed):
    rng = np.random.default_rng(seed)
    session = resa.session()
    session.append([5])
    for decode, count, part in moves:
        count = min(count % 12 + 1 if decode else count, CONTEXT - 4 - session.position)
        for ids in rng.integers(0, 257, (count, 1)) if decode else [rng.integers(0, 257, count)]:
            if len(ids):
                session.append(ids, decode=decode)
        back = int(session.position * part)
        if back and session.can_rewind(back):
            session.rewind(back)
    check_exact(resa, session)


# -- mistakes --------------------------------------------------------------------------------------


def test_two_texts_on_one_session_do_not_mix(module, tools):
    session = module.session()
    one = module.generate_ids(tools.prompt(9), 8, session=session, stop_at_eos=False)
    begun = [next(one) for _ in range(4)]
    other = list(module.generate_ids(tools.prompt(12, seed=2), 8, session=session))
    with pytest.raises(UsageError, match="changed by others"):
        next(one)
    assert begun and other
    # as long as before, but other tokens
    one = module.generate_ids(tools.prompt(9), 8, session=session, stop_at_eos=False)
    next(one)
    session.rewind(0)
    session.append(tools.prompt(9, seed=3))
    with pytest.raises(UsageError, match="changed by others"):
        next(one)


def test_steps_that_others_step_into_do_not_run_beyond_the_context(module, tools):
    session = module.session()
    steps = session.chunks(tools.prompt(300))
    next(steps)
    held = session.position
    assert 0 < held < 300  # or nothing is tested
    session.append(tools.prompt(10))
    with pytest.raises(UsageError, match=f"had {held} tokens, now it has {held + 10}"):
        list(steps)


def test_wrong_types_and_ended_sessions_are_refused(module, tools):
    with pytest.raises(UsageError, match="session is 5, which is none"):
        module.generate_ids(tools.prompt(3), 1, session=5)
    session = module.session()
    session.append(tools.prompt(5))
    for wrong in ("3", None, 2.0):
        with pytest.raises(UsageError, match=r"position is .* whole number"):
            session.rewind(wrong)
    session.rewind(np.int64(4))
    assert session.position == 4
    module.session()
    for change in (lambda: session.rewind(2), lambda: session.keep_prefix(tools.prompt(3))):
        with pytest.raises(UsageError, match="has ended"):
            change()
    assert session.position == 4
