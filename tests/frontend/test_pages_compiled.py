"""Sequences over pages of a pool are what they are alone, whoever shares their pages or had them before."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mimo_compile as mc
from mimo_compile.cli import main
from mimo_compile.errors import UsageError
from mimo_compile.frontend.huggingface import load_checkpoint
from mimo_compile.frontend.models.kv import Paging
from mimo_compile.ir.formats import parse_scheme
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.pipeline.build import Extras, build_artifact
from mimo_compile.pipeline.choose import choose
from mimo_compile.pipeline.graphs import decoder_graphs
from mimo_compile.pipeline.pages import bytes_of, paging_of
from mimo_compile.runtime import Stats
from mimo_compile.runtime.batch import append_each
from mimo_compile.verify import verify_artifact

BATCH, CONTEXT, PAGE, PAGES = 3, 96, 16, 8
pytestmark = pytest.mark.compile


@pytest.fixture(scope="module")
def loaded(saved):
    return load_checkpoint(saved("qwen2-window")[1], parse_scheme("none"), CONTEXT)


@pytest.fixture(scope="module")
def paged(loaded):
    """Layer 0 keeps its contexts in pages, enough for one and two begun ones; layers 1 and 2 have rings."""
    graphs = decoder_graphs(
        loaded.decoder, steps=(1, 16), batch=BATCH, paging=Paging(PAGES, CONTEXT, PAGE)
    )
    hardware = local_cpu().with_threads(1)
    choices = choose(graphs, hardware, "latency", None).choices
    return build_artifact(graphs, choices, hardware, Extras())


@pytest.fixture(scope="module")
def module(paged):
    return paged.module()


def eager(loaded, ids):
    """Return the logits behind some tokens."""
    with torch.no_grad():
        return loaded.decoder.prefill(ids)[1][-1].numpy()


def poison(module):
    """Leave NaN wherever anything may be kept."""
    for data in module._machine.states.values():
        data[:] = 0xFF
    module.pool.clear()


@settings(max_examples=6)
@given(data=st.data())
def test_sequences_that_come_share_go_back_and_end_are_what_they_are_alone(module, loaded, data):
    draw, rng = data.draw, np.random.default_rng(data.draw(st.integers(0, 99)))
    poison(module)
    texts = {}
    sessions = {}
    hidden = {}
    slots = st.integers(0, BATCH - 1)

    def tokens(count):
        return rng.integers(0, 257, count).tolist()

    for what in draw(st.lists(st.sampled_from("aaaaabbrfe"), min_size=4, max_size=14)):
        slot = draw(slots)
        if what == "a":
            if slot not in sessions:
                sessions[slot], texts[slot] = module.session(slot=slot), []
            more = tokens(draw(st.integers(1, 30)))[: CONTEXT - len(texts[slot])]
            want = (slot, len(texts[slot]), len(texts[slot]) + len(more))
            if more and module.pool.needed([want]) > module.pool.free:
                with pytest.raises(UsageError, match="more pages"):
                    sessions[slot].append(more)
            elif more:
                hidden[slot] = sessions[slot].append(more)
                texts[slot] += more
        elif what == "b":
            going = [s for s in sessions if 0 < len(texts[s]) < CONTEXT]
            wants = [(s, len(texts[s]), len(texts[s]) + 1) for s in going]
            if len(going) > 1 and module.pool.needed(wants) <= module.pool.free:
                more = tokens(len(going))
                rows = append_each(module, [sessions[s] for s in going], more)
                for s, token, row in zip(going, more, rows, strict=True):
                    hidden[s], texts[s] = row[None].copy(), [*texts[s], token]
        elif slot in sessions and what == "r":
            kept = draw(st.integers(0, len(texts[slot])))
            sessions[slot].rewind(kept)
            del texts[slot][kept:]
            hidden.pop(slot, None)
        elif slot in sessions and what == "f" and (other := draw(slots)) != slot:
            sessions[other], texts[other] = sessions[slot].fork(other), list(texts[slot])
            hidden.pop(other, None)
        elif slot in sessions and what == "e":
            sessions.pop(slot).end()
            texts.pop(slot), hidden.pop(slot, None)
    for slot, session in sessions.items():
        assert session.tokens == tuple(texts[slot])
        if slot in hidden:
            (rows,) = session.logits(hidden[slot])
            np.testing.assert_allclose(rows[0], eager(loaded, texts[slot]), rtol=5e-4, atol=5e-4)


def test_more_texts_than_pages_give_what_each_gives_alone(module, loaded, tools):
    common = tools.prompt(37, seed=5)
    prompts = [[*common, n] for n in range(4)] + [tools.prompt(n, seed=n) for n in (60, 3, 80)]
    poison(module)
    alone = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(12):
            ids.append(int(eager(loaded, ids).argmax()))
        alone.append(ids[len(prompt) :])
    stats, got = Stats(), [[] for _ in prompts]
    for index, token in module.generate_batch_ids(prompts, 12, stop_at_eos=False, stats=stats):
        got[index].append(token)
    assert got == alone
    assert stats.reused_tokens >= 74 and module.pool.free == PAGES


def test_the_manifest_says_what_is_shared(paged, tmp_path, capsys):
    decoder, states = paged.manifest.decoder, paged.manifest.states
    pool = decoder.pool
    assert (pool.page, pool.pages, pool.states) == (
        PAGE, PAGES, ("layers.0.k_cache", "layers.0.v_cache"),
    )  # fmt: skip
    assert states[pool.table].shape == (1, 16) and states["layers.1.k_cache"].shape[1] == 7
    assert states["layers.0.k_cache"].shape[1] == PAGES  # blocks of 16 slots, one in each page
    for name in (f"batch_{BATCH}", "step_16"):
        shapes = {b.source: b.shape for b in paged.programs.entries[name].buffers}
        assert shapes["layers.0.k_cache"] == states["layers.0.k_cache"].shape
        assert shapes[pool.table][0] == (BATCH if name.startswith("batch") else 1)
    file = paged.save(tmp_path / "p.mimo")
    assert main(["inspect", str(file)]) == 0
    held = PAGES * PAGE * 2 * (16 + 16) * 4
    assert (
        f"pages     {PAGES} of {PAGE} positions for all of them, {held >> 10}.0 KiB"
        in capsys.readouterr().out
    )
    assert main(["inspect", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pages"] == {"pages": PAGES, "page": PAGE, "bytes": held}
    assert found["layers"][0]["state_bytes"] == held
    ring = 2 * 112 * 2 * 16 * 4
    assert found["state_bytes"] == held + BATCH * (2 * ring + 64)


@pytest.mark.slow
def test_verify_compares_sequences_over_pages(saved, paged, tmp_path):
    found = verify_artifact(
        paged.save(tmp_path / "p.mimo"), source=saved("qwen2-window")[1], tokens=40
    )
    assert found.ok and found.batch is not None and found.batch.rows == BATCH * 8


@pytest.mark.slow
def test_16_bit_caches_sinks_and_experts_lie_in_pages(saved, tmp_path):
    source = saved("mimo_v2_flash")[1]
    artifact = mc.compile(
        source,
        quant="kv16",
        db=tmp_path / "r.db",
        max_context=130,
        threads=1,
        batch=4,
        pages=7,
    )
    pool = artifact.manifest.decoder.pool
    assert (pool.page, pool.pages, len(pool.states)) == (64, 7, 4)
    found = verify_artifact(artifact.save(tmp_path / "b.mimo"), source=source, tokens=100)
    assert found.ok and found.batch is not None


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({"pages": 0}, "0 is no number of pages and no size"),
        ({"pages": "2GB"}, "'2GB' is no number of pages and no size"),
        ({"pages": "-1"}, "'-1' is no number"),
        ({"pages": "0.0001KiB"}, "is no number of pages"),
        ({"pages": "9" * 5000}, "9' is no number of pages"),
        ({"pages": "9" * 400 + "GiB"}, "GiB' is no number of pages"),
        ({"pages": True}, "True is no number"),
        ({"pages": 2.5}, "2.5 is no number"),
        ({"pages": 8, "batch": 1}, "--pages 8 is for several sequences"),
        ({"pages": 8, "attention": "sale"}, "no kernels for --attention sale"),
        (
            {"pages": 8, "attention": "quest:page=48"},
            "blocks of 48 tokens .* neither parts of a page of 64",
        ),
        ({"pages": 8, "attention": "full+int8"}, "no kernels for --attention full"),
    ],
)
def test_pages_that_cannot_be_are_refused_at_once(asked, match):
    with pytest.raises(UsageError, match=match) as found:
        mc.compile("no such folder", **{"batch": 2, **asked})
    assert found.value.remedy


def test_modules_and_programs_have_no_pages(tmp_path):
    with pytest.raises(UsageError, match="pages of caches are for model folders"):
        mc.compile(tmp_path / "x.pt2", pages=8)


def test_memory_is_that_of_pages_in_all_layers(loaded):
    decoder = loaded.decoder
    each = bytes_of(decoder.stage("layers.0").module, 64)
    assert each == 64 * 2 * (16 + 16) * 4
    assert paging_of(decoder, "64KiB", 3) == Paging(65536 // each, CONTEXT, 64)
    assert paging_of(decoder, "1GiB", 3).pages == 3 * 2  # more than all can use
    assert (
        paging_of(decoder, 4, 3) == Paging(4, CONTEXT, 64) and paging_of(decoder, None, 3) is None
    )
    with pytest.raises(
        UsageError, match=r"3 pages of 64 positions are too few .*beside 2 others"
    ) as found:
        paging_of(decoder, 3, 3)
    assert "--pages 4 or more" in found.value.remedy
    with pytest.raises(UsageError, match="--pages 16KiB: 1 pages"):
        paging_of(decoder, "16KiB", 2)
