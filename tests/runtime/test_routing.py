"""Choices of experts are recorded as they are, kept in files, and forced on other runs."""

from __future__ import annotations

import dataclasses
import json
from functools import cache

import numpy as np
import paged_samples
import pytest
import routed_samples as samples
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.errors import InputError, UsageError
from mimo_compile.ir.ops import get_op
from mimo_compile.runtime import load, tensor_file
from mimo_compile.runtime.routers import Rule
from mimo_compile.runtime.routing import RoutingLog, recording, replaying

PROMPT = [5, 17, 200, 3, 99, 5, 42]


@pytest.fixture(scope="module")
def routed_file(tmp_path_factory):
    return samples.routed().save(tmp_path_factory.mktemp("routed") / "routed.mimo")


@pytest.fixture(scope="module")
def module(routed_file):
    return load(routed_file, threads=1)


def hidden_of(module, tokens, slot=0):
    session = module.session(slot=slot)
    return np.concatenate([h.copy() for h in session.chunks(tokens)])


def recorded(module, tokens=PROMPT):
    with recording(module) as recorder:
        hidden = hidden_of(module, tokens)
    return recorder.log(), hidden


def test_a_log_has_what_was_chosen_and_no_padding(module):
    log, hidden = recorded(module)
    assert (log.ids == samples.chosen(PROMPT)).all()
    assert log.position.tolist() == list(range(7)) and set(log.sequence.tolist()) == {0}
    assert log.step.tolist() == [0] * 4 + [1] * 3  # steps of 4, the second one padded
    assert (log.layers, log.experts, log.dropped) == (samples.LAYERS, samples.EXPERTS, 0)
    places = np.argsort(-hidden[:, : samples.EXPERTS], -1, kind="stable")[:, :2]
    assert (np.sort(places) == np.sort(log.ids[:, 0])).all()  # what the experts got


def test_texts_that_are_decoded_together_are_told_apart(module):
    with recording(module, range(2)) as recorder:
        list(module.generate_batch(["ab", "cde", "f"], 4, stop_at_eos=False))
    log = recorder.log()
    begins = {text: log.position[log.sequence == text].tolist() for text in range(3)}
    assert begins == {0: list(range(5)), 1: list(range(6)), 2: list(range(4))}
    together = [set(log.sequence[log.step == s].tolist()) for s in set(log.step.tolist())]
    assert {0, 1} in together


def test_programs_are_as_they_were(module):
    before = [list(module.bind(n).calls) for n in ("step_1", "step_4", "batch_2")]
    log, _ = recorded(module)
    with pytest.raises(ZeroDivisionError), replaying(module, log):
        _ = 1 / 0
    assert before == [module.bind(n).calls for n in ("step_1", "step_4", "batch_2")]


def test_a_run_that_replays_its_own_log_is_the_same_run(module):
    log, hidden = recorded(module)
    with replaying(module, log) as replay:
        again = hidden_of(module, PROMPT)
    assert (again == hidden).all()
    assert (replay.forced, replay.changed, replay.own) == (14, 0, 0)


@settings(max_examples=15)
@given(st.integers(0, 2**31), st.integers(1, 7))
def test_other_experts_are_forced_and_weighed_by_own_logits(module, seed, kept):
    log, _ = recorded(module)
    draw = np.random.default_rng(seed)
    ids = draw.random((kept, 2, samples.EXPERTS)).argsort(-1)[..., :2].astype(np.int16)
    other = dataclasses.replace(
        log, ids=ids, **{n: getattr(log, n)[:kept] for n in ("sequence", "position", "step")}
    )
    with replaying(module, other) as replay, recording(module) as recorder:
        hidden = hidden_of(module, PROMPT)
    assert (recorder.log().ids == np.concatenate([ids, samples.chosen(PROMPT)[kept:]])).all()
    assert replay.own == 2 * (7 - kept)
    assert replay.changed == int((ids != samples.chosen(PROMPT)[:kept]).any(-1).sum())
    logits = samples.table()[PROMPT].reshape(7, 2, -1).astype(np.float64)
    scores = 1 / (1 + np.exp(-logits))
    wanted = np.zeros_like(scores)
    np.put_along_axis(wanted, recorder.log().ids.astype(int), 1.0, -1)
    wanted *= scores
    wanted *= 2.5 / wanted.sum(-1, keepdims=True)
    np.testing.assert_allclose(hidden.reshape(7, 2, -1), wanted, rtol=5e-6)


def test_weights_follow_their_experts_where_all_are_chosen(tmp_path, monkeypatch):
    """With k = E logits and weights have one shape."""
    for name, made in list(vars(samples).items()):
        if hasattr(made, "cache_clear"):  # what is kept is of two experts
            monkeypatch.setattr(samples, name, cache(made.__wrapped__))
    monkeypatch.setattr(samples, "CHOSEN", 8)
    monkeypatch.setattr(samples, "RULE", "e=8,k=8,scoring=sigmoid,factor=2.5")
    module = load(samples.routed().save(tmp_path / "all.mimo"), threads=1)
    log, hidden = recorded(module)
    other = dataclasses.replace(log, ids=log.ids[..., ::-1].copy())
    with replaying(module, other) as replay:
        again = hidden_of(module, PROMPT)
    assert replay.changed == replay.forced == 14
    np.testing.assert_allclose(again, hidden, rtol=5e-6)
    assert np.ptp(hidden) > 0.01


def test_tokens_that_are_run_again_keep_their_experts(module):
    log, _ = recorded(module)
    other = dataclasses.replace(log, ids=log.ids[::-1].copy())
    with replaying(module, other) as replay, recording(module) as recorder:
        session = module.session()
        session.append(PROMPT)
        session.rewind(4)
        session.append([8, 8, 8])
    assert (recorder.log().ids == np.concatenate([other.ids, other.ids[4:]])).all()
    assert replay.own == 0 and replay.forced == 20


def test_tokens_beyond_the_limit_are_counted(module):
    with recording(module, most=5) as recorder:
        hidden_of(module, PROMPT)
    log = recorder.log()
    assert len(log.ids) == 4 and log.dropped == 3  # whole steps


@settings(max_examples=10)
@given(
    st.integers(0, 5), st.integers(1, 3), st.integers(1, 4), st.integers(4, 300), st.integers(0, 9)
)
def test_files_give_back_what_was_written(tmp_path_factory, n, layers, k, experts, dropped):
    draw = np.random.default_rng(n)
    numbers = [np.sort(draw.integers(0, 9, n)).astype(np.int32) for _ in range(3)]
    ids = draw.random((n, layers, experts)).argsort(-1)[..., :k].astype(np.int16)
    names = tuple(f"layers.{i}" for i in range(layers))
    log = RoutingLog(ids, *numbers, names, experts, "a model", dropped)
    path = tmp_path_factory.mktemp("log") / "r.safetensors"
    log.save(path)
    first = path.read_bytes()
    found = RoutingLog.load(path)
    found.save(path)
    assert path.read_bytes() == first and found.source == str(path)
    for field in dataclasses.fields(RoutingLog):
        if field.name != "source":
            assert np.array_equal(getattr(log, field.name), getattr(found, field.name))


def damaged(data: bytes, what: str) -> bytes:
    size = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:size])
    if what == "short":
        return data[:-3]
    if what == "cut":
        return data[:5]
    if what == "text":
        return b"\x05\0\0\0\0\0\0\0{not}"
    if what == "twice":  # the second expert of the first token is its first one
        return data[: size + 2] + data[size : size + 2] + data[size + 4 :]
    if what == "expert":
        return data[:size] + b"\x63" + data[size + 1 :]
    changes = {
        "format": {"__metadata__": {**header["__metadata__"], "format": "other"}},
        "type": {"ids": {**header["ids"], "dtype": "I32"}},
        "layers": {"__metadata__": {**header["__metadata__"], "layers": "a"}},
        "number": {"__metadata__": {**header["__metadata__"], "experts": "-8"}},
        "many": {"__metadata__": {**header["__metadata__"], "experts": "999999999"}},
        "names": {"__metadata__": {**header["__metadata__"], "layers": "a,a"}},
    }
    text = json.dumps(header | changes[what]).encode()
    return len(text).to_bytes(8, "little") + text + data[size:]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("short", "not where its header says"), ("cut", "no safetensors file"),
        ("text", "header is malformed JSON"), ("expert", "it has"), ("format", "its format is 'other'"),
        ("type", "not where its header says"), ("layers", "not of the same tokens and layers"),
        ("number", "not whole numbers"), ("many", "999999999 experts, not 1 to 32767"),
        ("names", "two of its layers"), ("twice", "one of them twice"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused(module, tmp_path, what, message):
    path = tmp_path / "r.safetensors"
    recorded(module)[0].save(path)
    path.write_bytes(damaged(path.read_bytes(), what))
    with pytest.raises(InputError, match=message) as error:
        RoutingLog.load(path)
    assert str(path) in str(error.value)


@pytest.mark.fuzz
@settings(max_examples=60)
@given(st.data())
def test_no_damage_is_more_than_an_input_error(module, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "r.safetensors"
    recorded(module)[0].save(path)
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at : at + data.draw(st.integers(0, 3))] = data.draw(
            st.one_of(st.binary(max_size=4), st.sampled_from([b"1e999", b"9" * 30, b"null", b"[]"]))
        )
    path.write_bytes(whole)
    try:
        RoutingLog.load(path)
    except InputError as error:
        assert str(path) in str(error)


def test_logs_of_other_models_are_refused(module, decoder_file):
    log, _ = recorded(module)
    other = dataclasses.replace(log, experts=9)
    with pytest.raises(InputError, match="2 of 9 experts; routed has 2 layers"):  # noqa: SIM117
        with replaying(module, other):
            pass
    plain = load(decoder_file, threads=1)
    for make in (lambda: recording(plain), lambda: replaying(plain, log)):
        with pytest.raises(UsageError, match="decoder has no experts"), make():
            pass


def test_texts_that_may_share_pages_are_not_told_apart(module, tmp_path):
    log, _ = recorded(module)
    paged = load(paged_samples.decoder().save(tmp_path / "paged.mimo"), threads=1)
    for make in (lambda n: recording(paged, range(n)), lambda n: replaying(paged, log, range(n))):
        with pytest.raises(UsageError, match="may share pages"), make(2):
            pass
        with pytest.raises(UsageError, match="has no experts"), make(1):
            pass


def test_rules_have_the_defaults_of_the_op():
    defaults = {p.name: p.default for p in get_op("route").params if p.default is not None}
    rule = Rule.parse("route:t=3,e=8,k=2")
    assert rule == Rule(3, 8, 2, defaults["scoring"], bool(defaults["norm"]), defaults["factor"])
    assert Rule.parse(f"route:t=1,{samples.RULE},norm=0") == Rule(1, 8, 2, "sigmoid", False, 2.5)


def test_text_files_are_no_tensors(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        tensor_file.read(tmp_path / "none")
    (tmp_path / "long").write_bytes(b"\xff" * 64)
    with pytest.raises(InputError, match="no safetensors file"):
        tensor_file.read(tmp_path / "long")
