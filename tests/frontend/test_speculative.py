"""Texts with drafts are those without, token by token, and states are what they would be."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import islice

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import mimo_compile as mc
from mimo_compile.errors import UsageError
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.workload import Workload
from mimo_compile.runtime import ExpertMemory, Speculation, Stats, accept, drafting
from mimo_compile.runtime.routing import recording, replaying
from mimo_compile.runtime.speculate import doubt
from mimo_compile.schedules import get_schedule

pytestmark = pytest.mark.compile
HEADS, CONTEXT = 2, 60
SHAPES = {
    **{f"{n}.weight": (64,) for n in ("enorm", "hnorm", "input_layernorm")},
    **{f"{n}.weight": (64,) for n in ("pre_mlp_layernorm", "final_layernorm")},
    "eh_proj.weight": (64, 128),
    "self_attn.q_proj.weight": (96, 64),
    "self_attn.k_proj.weight": (48, 64),
    "self_attn.v_proj.weight": (32, 64),
    "self_attn.o_proj.weight": (64, 64),
    "self_attn.attention_sink_bias": (4,),
    "mlp.gate_proj.weight": (32, 64),
    "mlp.up_proj.weight": (32, 64),
    "mlp.down_proj.weight": (64, 32),
}


@pytest.fixture(scope="module")
def checkpoint(saved, tmp_path_factory):
    """A MiMo-V2-Flash model with random weights and two random draft layers."""
    target = tmp_path_factory.mktemp("drafting")
    shutil.copytree(saved("mimo_v2_flash")[1], target, dirs_exist_ok=True)
    tensors = load_file(target / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for i in range(HEADS):
        for name, shape in SHAPES.items():
            noise = torch.randn(shape, generator=generator)
            value = 1 + 0.2 * noise if "norm" in name else noise * (1.5 / shape[-1] ** 0.5)
            tensors[f"model.mtp.layers.{i}.{name}"] = value
    save_file(tensors, target / "model.safetensors")
    return target


@pytest.fixture(scope="module")
def artifact(checkpoint):
    return mc.compile(checkpoint, db=checkpoint / "records.db", max_context=CONTEXT, threads=1)


@pytest.fixture(scope="module")
def module(artifact):
    return artifact.module()


def generate(module, prompt, count=None, **how):
    stats = Stats()
    how = {"stop_at_eos": False, "stats": stats, **how}
    return list(module.generate_ids(prompt, count, **how)), stats


def next_logits(session, token=7):
    (rows,) = session.logits(session.append([token]))
    return rows.copy()


@pytest.fixture
def oracle(module, monkeypatch):
    """Return a function that makes drafts right where a rule of their positions says so, else wrong."""

    def install(prompt, truth, right):
        def draft(logits, sampling, position):
            known = truth[position - len(prompt)] if position - len(prompt) < len(truth) else 0
            token = known if right(position) else (known + 1) % 257
            return token, (np.array([token]), np.ones(1))

        monkeypatch.setattr(accept, "draft", draft)

    return install


def test_kernels_of_one_token_and_of_several_add_up_alike(artifact):
    """As the artifact says; and each pair of calls has orders of one name."""
    assert artifact.manifest.decoder.alike == (1, 4) and not doubt(artifact.manifest.decoder)
    by_kernel = {c.kernel: c for c in artifact.manifest.plan}
    hardware = local_cpu().with_threads(1)

    def order(call):
        choice = by_kernel[call.kernel]
        schedule = get_schedule(choice.schedule)
        config = schedule.config_from_json(choice.config)
        return schedule.order(Workload.parse(choice.workload), config, hardware)

    entries = artifact.programs.entries
    for kind in ("step", "head"):
        pairs = list(zip(*(entries[f"{kind}_{t}"].calls for t in (1, 4)), strict=True))
        assert pairs
        for one, several in pairs:
            assert order(one) == order(several) is not None, one.label


def test_logits_do_not_depend_on_what_comes_with_a_token(module, tools):
    ids = tools.prompt(40)
    session = module.session()
    session.append(ids[:8])
    single = [next_logits(session, token)[0] for token in ids[8:]]
    session = module.session()
    session.append(ids[:8])
    for at in range(8, 40, 4):
        hidden = np.concatenate([part.copy() for part in session.chunks(ids[at : at + 4])])
        (rows,) = session.logits(hidden)
        for i, row in enumerate(rows):
            assert np.array_equal(row, single[at - 8 + i]), at + i


@pytest.mark.parametrize("depth", [None, 1, 2])
def test_greedy_texts_are_the_same(module, tools, depth):
    for length in (1, 9, 30):
        prompt = tools.prompt(length, seed=length)
        plain, _ = generate(module, prompt)
        found, stats = generate(module, prompt, speculative=Speculation(depth))
        assert found == plain and len(found) == CONTEXT - length + 1
        assert stats.new_tokens == 1 + stats.passes + sum(stats.accepted)
        told = stats.acceptance
        assert told["passes"] == stats.passes and len(told["heads"]) == HEADS
        assert all(h["accepted"] <= h["judged"] <= h["drafted"] for h in told["heads"])


@pytest.mark.parametrize(
    "right",
    [
        pytest.param(lambda position: True, id="always"),
        pytest.param(lambda position: False, id="never"),
        pytest.param(lambda position: position % 3 > 0, id="two of three"),
        pytest.param(lambda position: position % 7 in (1, 2, 4), id="some"),
    ],
)
def test_any_drafts_give_the_same_text_and_states(module, tools, oracle, right):
    prompt = tools.prompt(7)
    session = module.session()
    plain, _ = generate(module, prompt, 40, session=session)
    want = next_logits(session)
    oracle(prompt, plain, right)
    session = module.session()
    found, stats = generate(module, prompt, 40, session=session, speculative=Speculation(2))
    assert found == plain
    assert session.tokens == (*prompt, *plain[:-1])
    assert np.array_equal(next_logits(session), want)
    if right(0) and right(1) and right(2):
        assert stats.accepted == stats.drafted and stats.passes == 13
    if not right(1):
        assert not sum(stats.accepted)


def test_routing_logs_have_the_tokens_of_the_text_and_no_drafts(module, tools, oracle):
    prompt = tools.prompt(7)
    with recording(module) as recorder:
        truth, _ = generate(module, prompt)
    plain = recorder.log()
    oracle(prompt, truth, lambda position: position % 3 > 0)
    with recording(module) as recorder:
        found, stats = generate(module, prompt, speculative=Speculation(2))
    log = recorder.log()
    assert found == truth and sum(stats.drafted) > sum(stats.accepted) > 0
    assert recorder.rows == len(log.ids) == len(plain.ids)
    for name in ("position", "sequence", "ids"):
        assert np.array_equal(getattr(log, name), getattr(plain, name))
    # a run with drafts finds all of its tokens there
    with replaying(module, log) as replay:
        again, _ = generate(module, prompt, speculative=Speculation(2))
    assert again == truth and replay.own == 0 and not module.rejected


@pytest.mark.parametrize("experts", [2, 9, 24])
def test_texts_with_drafts_do_not_depend_on_which_experts_are_in_memory(
    artifact, module, tools, oracle, tmp_path, experts
):
    prompt = tools.prompt(7)
    truth, _ = generate(module, prompt, 30)
    oracle(prompt, truth, lambda position: position % 3 > 0)
    sessions = [module.session()]
    generate(module, prompt, 30, session=sessions[0], speculative=Speculation(2))
    how = ExpertMemory(experts * 3 * 64 * 32 * 4, ahead=2)
    limited = mc.load(artifact.save(tmp_path / "few.mimo"), threads=1, expert_memory=how)
    sessions.append(limited.session())
    found, stats = generate(limited, prompt, 30, session=sessions[1], speculative=Speculation(2))
    assert found == truth and sum(stats.drafted) > sum(stats.accepted) > 0
    assert np.array_equal(*(next_logits(session) for session in sessions))
    facts = limited.experts.facts()
    assert facts["slots"] == experts
    assert facts["waves"] > 0 if experts < 8 else experts < 24 or not facts["waves"]


@pytest.fixture(scope="module")
def paged(checkpoint, tmp_path_factory):
    """Two sequences over pages that each could fill alone."""
    made = mc.compile(
        checkpoint, db=checkpoint / "records.db", max_context=130, threads=1, batch=2, pages=6
    )
    return made.save(tmp_path_factory.mktemp("paged") / "paged.mimo")


STEPS = st.one_of(
    st.tuples(st.just("text"), st.integers(0, 1), st.integers(1, 40), st.integers(1, 20)),
    st.tuples(st.just("fork"), st.integers(0, 1)),
    st.tuples(st.just("rewind"), st.integers(0, 1), st.integers(0, 4)),
)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(st.lists(STEPS, min_size=1, max_size=6), st.sampled_from([2, 5, 24]), st.integers(0, 2))
@example([("text", 1, 1, 16), ("fork", 1), ("text", 0, 1, 1)], 2, 0)  # heads go with a fork
def test_drafts_over_pages_with_few_experts_in_memory(paged, tools, steps, experts, ahead):
    """Texts of two sequences that share pages, fork and go back are the plain ones, as are their states."""
    how = ExpertMemory(experts * 3 * 64 * 32 * 4, ahead=ahead)
    modules = [mc.load(paged, threads=1), mc.load(paged, threads=1, expert_memory=how)]
    begun = [[module.session(slot=slot) for slot in (0, 1)] for module in modules]
    for kind, slot, *numbers in steps:
        found = []
        for module, sessions, drafts in zip(modules, begun, (False, True), strict=True):
            session = sessions[slot]
            if kind == "fork" and session.position:
                sessions[1 - slot] = session.fork(1 - slot)
            if kind == "rewind" and session.can_rewind(max(session.position - numbers[0], 0)):
                session.rewind(max(session.position - numbers[0], 0))
            if kind == "text":
                # texts begin alike, or go on behind what the sequence holds
                held = list(session.tokens) if numbers[0] % 2 and session.position < 70 else []
                prompt = [*held, *tools.prompt(numbers[0], seed=numbers[0] % 3)]
                found.append(
                    generate(module, prompt, numbers[1], session=session, speculative=drafts)[0]
                )
        assert found[:1] == found[1:]
        assert begun[0][slot].tokens == begun[1][slot].tokens
    for plain, other in zip(*begun, strict=True):
        assert np.array_equal(next_logits(plain), next_logits(other))


def test_drawn_texts_are_those_of_the_seed(module, tools, oracle):
    prompt, how = tools.prompt(5), {"temperature": 0.9, "top_k": 20, "seed": 4}
    plain, _ = generate(module, prompt, 30, **how)
    assert generate(module, prompt, 30, speculative=True, **how)[0] == plain
    drawn = Speculation(2, draw=True)
    first, stats = generate(module, prompt, 30, speculative=drawn, **how)
    assert first == generate(module, prompt, 30, speculative=drawn, **how)[0]
    assert stats.new_tokens == 30 == 1 + stats.passes + sum(stats.accepted)
    oracle(prompt, plain, lambda position: position % 4 > 1)
    assert generate(module, prompt, 30, speculative=Speculation(2), **how)[0] == plain


def test_a_text_may_end_amid_accepted_drafts(module, tools, oracle):
    prompt = tools.prompt(6)
    plain, _ = generate(module, prompt, 20)
    oracle(prompt, plain, lambda position: True)
    for count in range(8):
        session = module.session()
        assert (
            generate(module, prompt, count, session=session, speculative=True)[0] == plain[:count]
        )
        assert len(session.tokens) == (len(prompt) + count - 1 if count else 0)
    # closed between two tokens of a pass: the sequence holds what a plain one would
    session = module.session()
    tokens = module.generate_ids(
        prompt, 20, session=session, speculative=Speculation(2), stop_at_eos=False
    )
    assert list(islice(tokens, 3)) == plain[:3]
    tokens.close()
    assert session.tokens == (*prompt, *plain[:2])


def test_a_text_ends_at_an_end_token_amid_accepted_drafts(artifact, tools, oracle):
    prompt = tools.prompt(6)
    plain, _ = generate(artifact.module(), prompt, 20)
    at = next(i for i in range(3, 20) if plain[i] not in plain[:i] and i % 3)
    decoder = msgspec.structs.replace(artifact.manifest.decoder, eos=(plain[at],))
    manifest = msgspec.structs.replace(artifact.manifest, decoder=decoder)
    ending = replace(artifact, manifest=manifest).module()
    oracle(prompt, plain, lambda position: True)
    sessions = []
    for speculative in (False, Speculation(2), Speculation(1)):
        sessions.append(ending.session())
        stats = Stats()
        how = {"session": sessions[-1], "stats": stats, "speculative": speculative}
        assert list(ending.generate_ids(prompt, 20, **how)) == plain[:at]
        assert stats.stopped == "eos"
        if speculative:  # the end token is the one more
            assert stats.new_tokens + 1 == 1 + stats.passes + sum(stats.accepted)
            assert stats.judged == stats.accepted
    assert len({s.tokens for s in sessions}) == 1


def test_sessions_go_on_with_and_without_drafts(module, tools):
    """Heads that missed tokens get them again; what they hold of a prompt's beginning stays."""
    one, other = tools.prompt(20), tools.prompt(14)[:12] + tools.prompt(8, seed=2)
    session = module.session()
    for prompt, speculative in (
        (one, False),
        (other, True),
        (one, True),
        (other, False),
        (one, True),
    ):
        found, _ = generate(module, prompt, 12, session=session, speculative=speculative)
        session_tokens = session.tokens
        assert found == generate(module, prompt, 12)[0]
        assert session_tokens == (*prompt, *found[:-1])
        session = module.session()  # the fresh one ended it: begin again where it was
        if speculative:
            session.draft()
        session.append(session_tokens)


def test_heads_read_what_they_would_read_of_the_finished_text(module, tools):
    """Rows of drafts that were not kept are made again: drafts are those of a session that reads it all."""
    prompt = tools.prompt(10)
    session = module.session()
    found, _ = generate(module, prompt, 25, session=session, speculative=Speculation(HEADS))

    def drafts(session):
        rows = []

        def pick(logits, position):
            rows.append(logits.copy())
            return 3 + position

        session.propose(found[-1], HEADS, pick)
        return rows

    used = drafts(session)
    again = module.session()
    again.draft()
    again.append([*prompt, *found[:-1]])
    for got, want in zip(used, drafts(again), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


def test_heads_that_lag_read_no_more_than_they_see(artifact, tools, monkeypatch):
    """Drafts after plain tokens are those of heads that read all; rows before their windows are left out."""
    layers = artifact.manifest.decoder.layers
    (window,) = {layer.window for layer in layers if layer.name.startswith("mtp.")}
    tokens = tools.prompt(CONTEXT - 4, seed=3)
    assert 0 < window < len(tokens)

    def drafts(at, reads=(), unlimited=False):
        if unlimited:
            monkeypatch.setattr(drafting, "_reach", lambda decoder: 0)
        session, rows = artifact.module().session(), []
        session.draft()

        def pick(logits, position):
            rows.append(logits.copy())
            return 3 + position

        for end in (*reads, at):  # drafting at each of them, after tokens one by one
            for token in tokens[session.position : end]:
                session.append([token])
            rows.clear()
            session.propose(9, HEADS, pick)
        first = session.drafts.rows[0][0]
        monkeypatch.undo()
        return rows, first

    for reads in ((), (5,), (20, 24)):
        late, first = drafts(len(tokens), reads)
        want, zero = drafts(len(tokens), unlimited=True)
        assert zero == 0 and (first == len(tokens) - window)
        for got, other in zip(late, want, strict=True):
            np.testing.assert_allclose(got, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("asked", [2, 1, "no", None, 0])
def test_what_says_nothing_of_drafts(module, tools, asked):
    with pytest.raises(UsageError, match="speculative is"):
        module.generate_ids(tools.prompt(3), speculative=asked)


def test_more_heads_than_there_are(module, tools):
    with pytest.raises(UsageError, match="3 drafts cannot be made"):
        module.generate_ids(tools.prompt(3), speculative=Speculation(3))
