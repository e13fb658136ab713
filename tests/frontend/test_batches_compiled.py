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
from mimo_compile.frontend.huggingface import load_checkpoint
from mimo_compile.frontend.models.stages import LayerCore
from mimo_compile.ir.formats import parse_scheme
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.ir.policies import parse_policy
from mimo_compile.pipeline.batch import check_layers
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
    for held in module._machine.states.values():
        held[:] = 0xFF


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
        ({"batch": "2"}, "'2' sequences cannot"),
        ({"batch": 2.0}, "2.0 sequences cannot"),
        ({"batch": 2.5}, "2.5 sequences cannot"),
        ({"batch": True}, "True sequences cannot"),
        ({"batch": None}, "None sequences cannot"),
        ({"attention": "full+int8"}, r"--batch 2 has no kernels for --attention full\+int8"),
    ],
)
def test_models_that_no_kernels_batch_are_refused_at_once(asked, match):
    with pytest.raises(UsageError, match=match):
        mc.compile("no such folder", **{"batch": 2, **asked})


def test_caches_too_large_to_index_are_refused_before_kernels_are_built(saved):
    source = saved("qwen2-window")[1]
    loaded = load_checkpoint(source, parse_scheme("none"), 512)
    each = 2 * 16 * 512  # heads, numbers, slots; those of windows are smaller
    check_layers(loaded.decoder, (1 << 31) // each)
    with pytest.raises(UsageError, match=f"use --batch {(1 << 31) // each}, or a smaller --max"):
        check_layers(loaded.decoder, (1 << 31) // each + 1)


def test_sizes_of_caches_are_those_of_their_order(tools, tmp_path):
    """Rows of 16 numbers fill a line of 32 in a cache of 16 bits that keeps each key by itself."""
    policy = parse_policy("lessismore:budget=12")
    tools.make_model("llama", num_hidden_layers=5).save_pretrained(tmp_path)
    loaded = load_checkpoint(tmp_path, parse_scheme("kv16"), 512, attention=policy)
    layers = [s.module for s in loaded.decoder.stages() if isinstance(s.module, LayerCore)]
    assert "rows" in {layer.attend.lay for layer in layers}
    each = 2 * 32 * 512  # heads, numbers, slots
    check_layers(loaded.decoder, (1 << 31) // each)
    with pytest.raises(UsageError, match=f"use --batch {(1 << 31) // each}, or a smaller --max"):
        check_layers(loaded.decoder, (1 << 31) // each + 1)


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

    eager, ids = eager_decoder(windowed.manifest, source), np.array(tools.prompt(32))
    module = windowed.module()
    with monkeypatch.context() as patch:
        patch.setattr(batch_check, "append_each", exchanged)
        assert not batch_check.compare_batch(module, eager, ids).ok

    def spoiling(module, sessions, tokens):
        """Lose what one of the sequences that rest has at its first position, as a wrong kernel might."""
        hidden = append_each(module, sessions, tokens)
        resting = {*range(BATCH)} - {session.slot for session in sessions}
        for name, data in module._machine.states.items():
            if "k_cache" in name and len(sessions) > 1:
                for slot in resting:
                    data.reshape(BATCH, -1)[slot, :64] = 0xFF
        return hidden

    assert any("k_cache" in name for name in module._machine.states)
    monkeypatch.setattr(batch_check, "append_each", spoiling)
    assert not batch_check.compare_batch(module, eager, ids).ok


def test_one_token_leaves_the_batch_out_of_verification(saved, windowed, tmp_path, monkeypatch):
    monkeypatch.setattr("mimo_compile.verify.check_kernels", lambda *a: ())
    artifact = windowed.save(tmp_path / "b.mimo")
    found = verify_artifact(artifact, source=saved("qwen2-window")[1], tokens=1)
    assert found.end_to_end.ok and found.batch is None
    assert any("2 tokens" in note for note in found.notes)


@given(count=st.integers(2, 4), decoded=st.integers(1, 8))
def test_sequences_that_are_compared_rest_and_go_on(count, decoded):
    turns = list(batch_check.turns_of(count, decoded))
    assert turns[0] == list(range(count)) and all(turns)
    took = [sum(i in going for going in turns) for i in range(count)]
    assert took == [decoded] * count
    if decoded > 1:
        assert turns[-1] == [0]  # by itself, when others had turns without it
        assert any(0 not in going for going in turns)
    if decoded > count + 1 > 3:
        rested = {i for going in turns if len(going) > 1 for i in range(count) if i not in going}
        assert rested == set(range(count))


@given(st.integers(2, 4), st.integers(2, 400), st.integers(1, 8), st.sampled_from((1, 16, 64)))
def test_sequences_that_are_compared_complete_a_group_and_read_it(count, tokens, decoded, period):
    decoded = min(decoded, tokens - 1)
    prompts = batch_check.prompts_of(count, tokens, decoded, period)
    assert len(prompts) == count and min(prompts) >= 1 and max(prompts) + decoded <= tokens
    if tokens > period > 1 < decoded:
        for prompt in prompts:  # a group ends among those decoded, before their last
            assert (prompt + decoded - 1) // period > prompt // period


@given(st.integers(2, 256), st.lists(st.integers(0, 999), min_size=1, max_size=9))
def test_slots_that_are_compared_are_the_outer_ones_and_others(batch, ids):
    slots = batch_check.slots_of(batch, np.array(ids))
    assert slots == sorted(set(slots)) and len(slots) == min(batch, 4)
    assert (slots[0], slots[-1]) == (0, batch - 1)


@pytest.mark.slow
def test_experts_sinks_and_one_kv_head_over_16_bit_caches(saved, tmp_path):
    source = saved("mimo_v2_flash")[1]
    artifact = mc.compile(
        source, quant="kv16", db=tmp_path / "r.db", max_context=64, threads=1, batch=BATCH
    )
    workloads = [parse_workload(c.workload) for c in artifact.manifest.plan]
    attend = get_op("cached_attention")
    asked = [attend.full(w) for w in workloads if w.op == attend.name]
    batched = [p for p in asked if p["b"] == BATCH]
    assert {p["c"] for p in batched} == {"bf16"} and {p["kv"] for p in batched} == {1, 2}
    assert any(p["sink"] for p in batched)
    found = verify_artifact(artifact.save(tmp_path / "b.mimo"), source=source, tokens=40)
    assert found.ok and found.batch is not None and found.batch.rows == BATCH * 8
    assert found.batch.choices > 0 == found.batch.strayed


def together(source, tmp_path, quant, attention, tokens=40):
    """Compile for several sequences, verify, and return the module with NaN in all slots."""
    artifact = mc.compile(
        source, quant=quant, attention=attention, db=tmp_path / "r.db", max_context=192, threads=1,
        batch=BATCH,
    )  # fmt: skip
    path = artifact.save(tmp_path / "b.mimo")
    found = verify_artifact(path, source=source, tokens=tokens, perplexity_tokens=0)
    assert found.ok and found.batch is not None and found.batch.rows == BATCH * 8
    module = mc.load(path, threads=1)
    poison(module)
    return module


def batched_ops(module):
    """Return the ops that work on all sequences at once."""
    workloads = [parse_workload(c.workload) for c in module.manifest.plan]
    return {w.op for w in workloads if dict(w.params).get("b") == BATCH}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "quant"), [("mimo_v2_flash", "kvfp8"), ("qwen3", "kv8"), ("qwen3", "w4g32a8kv4")]
)
def test_caches_of_fewer_bits(saved, tmp_path, tools, case, quant):
    """Tails and groups of each sequence go back by themselves."""
    module = together(saved(case)[1], tmp_path, quant, "model")
    assert {"kv_append", "cached_attention"} <= batched_ops(module)
    texts = [tools.prompt(n, seed=n) for n in (62, 126, 120)]
    sessions = [module.session(slot=slot) for slot in range(BATCH)]
    for session, text in zip(sessions, texts, strict=True):
        session.append(text)
    for seed in range(5):
        append_each(module, sessions, tools.prompt(9, seed=seed)[:BATCH])
    sessions[0].rewind(66)  # within a group, behind one that ended in the batch
    sessions[2].rewind(64 if quant != "kvfp8" else 63)  # the other goes on behind such a group
    kept = [session.tokens for session in sessions]
    got = logits(sessions[0], append_each(module, sessions, [5, 6, 7]))
    for row, ids, token in zip(got, kept, (5, 6, 7), strict=True):
        alone = fresh(module, [*ids, token])[0]
        assert np.abs(row - alone).max() <= 1e-3 * np.abs(alone).max()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attention", "ops"),
    [
        (
            "quest:budget=32,page=16,dense=1",
            {"describe_blocks", "score_blocks", "sparse_attention"},
        ),
        ("moba:block=16,k=2", {"describe_blocks", "score_blocks", "select_blocks"}),
        ("resa:p=0.1,block=16,least=2,f=4", {"score_blocks", "sparse_attention"}),
        ("lessismore:budget=12,correct=4", {"score_keys", "select_blocks", "sparse_attention"}),
        ("stream:sink=3,recent=8", {"sparse_attention", "kv_append"}),
        ("sale:bq=16,bk=16,local=16,sink=16,least=16", {"cached_attention"}),
    ],
)
def test_policies_that_choose(tools, tmp_path, tmp_path_factory, attention, ops):
    folder = tmp_path_factory.mktemp("deep")
    tools.make_model("llama", num_hidden_layers=5).save_pretrained(folder)
    module = together(folder, tmp_path, "none", attention, tokens=64)
    assert ops <= batched_ops(module)
    prompts = [tools.prompt(n, seed=n) for n in (90, 3, 40, 9, 1)]
    alone = [list(module.generate_ids(p, 12, stop_at_eos=False)) for p in prompts]
    poison(module)
    got = [[] for _ in prompts]
    for index, token in module.generate_batch_ids(prompts, 12, stop_at_eos=False):
        got[index].append(token)
    assert got == alone


def test_a_program_for_more_sequences_than_there_are_is_refused(windowed, tmp_path):
    decoder = msgspec.structs.replace(windowed.manifest.decoder, batch=2)
    wrong = replace(windowed, manifest=msgspec.structs.replace(windowed.manifest, decoder=decoder))
    with pytest.raises(ArtifactError, match="ends beyond"):
        mc.load(wrong.save(tmp_path / "wrong.mimo"))
