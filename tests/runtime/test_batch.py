"""Several texts at a time, with a decoder in miniature whose sums are exact: each is the same as alone."""

import msgspec
import numpy as np
import pytest
import runtime_samples
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime_samples import BATCH, CONTEXT, VOCAB, WIDTH

from mimo_compile.errors import ArtifactError, UsageError
from mimo_compile.runtime import Module, Stats, load
from mimo_compile.runtime.batch import append_each
from mimo_compile.runtime.entry import Memory
from mimo_compile.runtime.program import Buffer

PROMPTS = [list(b"def main(argv):"), list(b"x"), list(b"import os\n"), list(b"class A:"), [7, 8]]


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Module:
    file = tmp_path_factory.mktemp("batch") / "batch.mimo"
    return load(runtime_samples.decoder(BATCH).save(file))


@pytest.fixture(scope="module")
def single(decoder_file) -> Module:
    return load(decoder_file)


def collected(pairs, count: int) -> list[list[int]]:
    out: list[list[int]] = [[] for _ in range(count)]
    for index, token in pairs:
        out[index].append(token)
    return out


prompts = st.lists(st.integers(0, VOCAB - 2), min_size=1, max_size=CONTEXT)


@settings(max_examples=40)
@given(st.lists(prompts, max_size=7), st.integers(0, 12), st.booleans())
def test_each_text_is_what_it_is_alone(module, single, texts, count, to_the_end):
    texts = [text[: CONTEXT - count] for text in texts]
    for held in module._machine.states.values():
        held[:] = 0xFF  # NaN wherever nothing was written
    how = {"stop_at_eos": not to_the_end}
    alone = [list(single.generate_ids(text, count, **how)) for text in texts]
    stats = Stats()
    for one in (module, single):  # without `batch` one after the other
        got = collected(one.generate_batch_ids(texts, count, stats=stats, **how), len(texts))
        assert got == alone
        assert stats.new_tokens == sum(map(len, alone))
        assert stats.prompt_tokens == sum(map(len, texts))
        stats = Stats()


def test_a_text_that_ends_makes_room_for_the_next(module, single):
    """The longest one is still under way while others begin and end in the places beside it."""
    alone = [list(single.generate_ids(text, 20, stop_at_eos=False)) for text in PROMPTS]
    end = alone[1][3]
    decoder = msgspec.structs.replace(module.manifest.decoder, eos=(end,))
    cut = [text[: text.index(end)] if end in text else text for text in alone]
    changed = msgspec.structs.replace(module.manifest, decoder=decoder)
    kept, module.manifest = module.manifest, changed
    try:
        pairs = list(module.generate_batch_ids(PROMPTS, 20))
    finally:
        module.manifest = kept
    assert collected(pairs, len(PROMPTS)) == cut and len(cut[1]) < 4
    begun = [index for at, (index, _) in enumerate(pairs) if index not in dict(pairs[:at])]
    assert begun == [i for i in range(len(PROMPTS)) if cut[i]]
    first = next(at for at, (index, _) in enumerate(pairs) if index == BATCH)
    assert any(index < BATCH for index, _ in pairs[first:])


def test_texts_come_in_whole_characters(module):
    texts = ["", "", ""]
    for index, piece in module.generate_batch(["déf ", "x = ", "a"], 9, stop_at_eos=False):
        assert piece
        texts[index] += piece
    for text, prompt in zip(texts, ["déf ", "x = ", "a"], strict=True):
        assert text == "".join(module.generate(prompt, 9, stop_at_eos=False))


def test_each_text_draws_its_own_numbers(module, single):
    how = {"temperature": 30.0, "stop_at_eos": False}
    same = [PROMPTS[0]] * 3
    got = collected(module.generate_batch_ids(same, 9, seed=[1, 2, 1], **how), 3)
    assert got[0] == got[2] != got[1]
    assert got[1] == list(single.generate_ids(PROMPTS[0], 9, seed=2, **how))
    got = collected(module.generate_batch_ids(same, 9, seed=2, **how), 3)
    assert got[0] == got[1] == got[2]


def test_sequences_that_rest_are_not_touched(module):
    resting, other, third = (module.session(slot=slot) for slot in range(BATCH))
    for session, text in zip((resting, other, third), PROMPTS, strict=False):
        session.append(text)
    (held,) = module._machine.states.values()
    mine = held[: CONTEXT * WIDTH * 4]
    before = mine.copy()
    hidden = append_each(module, [third, other], [1, 2])
    assert before.any() and np.array_equal(mine, before)
    embed, _ = runtime_samples.embeddings()
    for row, ids in zip(hidden, ([*PROMPTS[2], 1], [*PROMPTS[1], 2]), strict=True):
        assert np.array_equal(row, embed[ids].sum(0))
    assert [s.position for s in (resting, other, third)] == [15, 2, 11]
    third.rewind(0)
    assert np.array_equal(append_each(module, [third, resting], [5, 6])[0], embed[5])


def test_what_cannot_be_is_said(module):
    with pytest.raises(UsageError, match=r"no sequence 3: decoder was compiled for 3 at a time"):
        module.session(slot=3)
    with pytest.raises(UsageError, match="no sequence -1"):
        module.session(slot=-1)
    with pytest.raises(UsageError, match="batch_3 works on all sequences"):
        module.bind("batch_3", 1)
    one, full = module.session(slot=1), module.session(slot=0)
    one.append([5])
    full.append([1] * CONTEXT)
    with pytest.raises(UsageError, match="2 tokens are for 1 sequences: give one to each"):
        append_each(module, [one, one], [1, 2])
    with pytest.raises(UsageError, match="49 tokens do not fit the context of 48"):
        append_each(module, [one, full], [1, 2])
    with pytest.raises(UsageError, match="token id 300 is outside"):
        append_each(module, [one, module.session(slot=2)], [1, 300])
    assert one.position == 1 and full.position == CONTEXT
    module.session(slot=0)
    with pytest.raises(UsageError, match="this sequence has ended"):
        append_each(module, [one, full], [1, 2])
    assert one.position == 1
    with pytest.raises(UsageError, match=r"49 prompt tokens .* \(prompt 1\)"):
        module.generate_batch_ids([[5], [1] * 49])
    with pytest.raises(UsageError, match=r"the prompt is empty \(prompt 2\)"):
        module.generate_batch_ids([[5], [6], []])
    with pytest.raises(UsageError, match=r"no adapter 'law' \(prompt 1\)"):
        module.generate_batch_ids([[5], [6]], adapter=[None, "law"])
    with pytest.raises(UsageError, match="2 prompts have 3 of seed"):
        module.generate_batch_ids([[5], [6]], seed=[1, 2, 3])
    with pytest.raises(UsageError, match="the prompts are one text"):
        module.generate_batch("def add(")
    assert list(module.generate_batch_ids([])) == []


@pytest.mark.parametrize(
    ("prompts", "how", "match"),
    [
        (None, {}, "the prompts are of type NoneType"),
        (5, {}, "the prompts are of type int"),
        (iter([[5]]), {}, "the prompts are of type list_iterator"),
        (np.array(5), {}, "the prompts are of type ndarray"),
        ([[5], [[1], [2, 3]]], {}, r"flat sequence of whole numbers \(prompt 1\)"),
        ([[5]], {"seed": None}, "seed is None; it must be whole"),
        ([[5]], {"seed": "x"}, "seed is x; it must be whole"),
        ([[5]], {"temperature": "x"}, "temperature is x"),
        ([[5]], {"top_k": float("inf")}, "top_k is inf"),
        ([[5]], {"max_new_tokens": 2.5}, "max_new_tokens is 2.5; it must be a whole number"),
    ],
)
def test_what_is_no_list_or_number_is_said(module, prompts, how, match):
    with pytest.raises(UsageError, match=match):
        module.generate_batch_ids(prompts, **how)


@pytest.mark.parametrize("slot", [1.0, "0", None])
def test_slots_are_whole_numbers(module, slot):
    with pytest.raises(UsageError, match=r"slot is .*; it must be a whole number"):
        module.session(slot=slot)


def test_one_sequence_of_another_module_is_refused(module, single):
    other = single.session()
    other.append([5])
    with pytest.raises(UsageError, match="of another module"):
        append_each(module, [other], [1])
    assert other.position == 1


def test_what_ended_a_sequence_and_what_to_do_fits_the_module(module, single):
    for one, remedy in ((single, "--batch 2"), (module, "slot of its own, of which there are 3")):
        first = one.session()
        list(one.generate_ids([5], 1))
        with pytest.raises(UsageError, match=f"has ended.*{remedy}"):
            first.append([5])


def test_figures_of_a_run_are_not_those_of_the_one_before(module):
    used, fresh = Stats(), Stats()
    session = module.session()
    session.append(PROMPTS[0])
    runs = (
        lambda s: module.generate_ids([*PROMPTS[0], 1], 6, session=session, stats=s),
        lambda s: module.generate_batch_ids(PROMPTS, 4, stop_at_eos=False, stats=s),
    )
    for run in (runs[0], runs[1], runs[1]):
        assert list(run(used))
    list(runs[1](fresh))
    for name in ("prompt_tokens", "reused_tokens", "sequences", "new_tokens", "stopped"):
        assert getattr(used, name) == getattr(fresh, name)
    assert used.joules_source is None is used.joules_decode
    used.prefill_seconds = used.decode_seconds = 1e9
    list(module.generate_ids([5], 3, stop_at_eos=False, stats=used))
    assert (used.new_tokens, used.sequences, used.prompt_tokens) == (3, 1, 1)
    assert max(used.prefill_seconds, used.decode_seconds) < 1e9


def test_slots_lie_as_far_apart_as_states_are_long():
    """Whatever part of a state an entry works on."""
    held = np.zeros(3 * 256, np.uint8)
    memory = Memory(held[:0], {"cache": held}, None, None, "here", 3)
    part = Buffer("state", (16,), "float32", 0, "cache")
    for slot in range(3):
        memory.place(part, slot)[0][...] = slot + 1
    assert held.view(np.float32).reshape(3, 64)[:, :16].tolist() == [[n] * 16 for n in (1, 2, 3)]
    assert not held.view(np.float32).reshape(3, 64)[:, 16:].any()


def test_who_begins_anew_ends_a_batch_in_progress(module):
    pairs = module.generate_batch_ids(PROMPTS, 9, stop_at_eos=False)
    next(pairs)
    module.reset()
    with pytest.raises(UsageError, match="this sequence has ended"):
        list(pairs)


@pytest.mark.parametrize(
    ("facts", "match"),
    [
        ({"batch": 0}, "batch 0"),
        ({"batch": 1 << 20}, "batch 1048576"),
        ({"batch": 2}, "ends beyond"),
    ],
)
def test_manifests_that_promise_other_batches_are_refused(tmp_path, facts, match):
    artifact = runtime_samples.decoder(BATCH)
    decoder = msgspec.structs.replace(artifact.manifest.decoder, **facts)
    artifact.manifest = msgspec.structs.replace(artifact.manifest, decoder=decoder)
    with pytest.raises(ArtifactError, match=match):
        load(artifact.save(tmp_path / "wrong.mimo"))


def test_one_for_each_sequence_of_odd_size_is_refused(tmp_path):
    from mimo_compile.runtime.program import State

    artifact = runtime_samples.decoder(BATCH)
    states = {**artifact.manifest.states, "odd": State((3,), "float32")}
    artifact.manifest = msgspec.structs.replace(artifact.manifest, states=states)
    with pytest.raises(ArtifactError, match="does not end on a 64-byte boundary"):
        load(artifact.save(tmp_path / "wrong.mimo"))
