"""Policies that choose what they read, and caches of 8-bit floats, over pages of a pool.

A module over pages beside one whose sequences have caches of their own: the same tokens in the same steps
give the same logits, to the bit, whoever shares pages or had them before.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mimo_compile.frontend.huggingface import load_checkpoint
from mimo_compile.frontend.models.kv import Paging
from mimo_compile.ir.formats import parse_scheme
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.policies import parse_policy
from mimo_compile.pipeline.build import Extras, build_artifact
from mimo_compile.pipeline.choose import choose
from mimo_compile.pipeline.graphs import decoder_graphs
from mimo_compile.runtime import batch
from mimo_compile.runtime.batch import append_each

BATCH, CONTEXT, PAGE, PAGES = 3, 128, 16, 10
pytestmark = [
    pytest.mark.compile,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::mimo_compile.errors.CheckpointWarning"),
]
KINDS = [
    ("quest:budget=16,page=4,dense=0,least=1", "none"), ("moba:block=32,k=2", "kv16"),
    ("resa:p=0.2,block=4,least=2,f=5", "kv16"), ("lessismore:budget=12,correct=4", "kv16"),
    ("seer:budget=12,block=4,gate=12", "none"), ("full", "kvfp8"), ("full", "kv4"),
]  # fmt: skip


def gates_of(folder):
    """Write random gates of width 12 for blocks of 4 positions, and return their file."""
    draw, made = torch.Generator().manual_seed(0), {}
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.attn_gate.attngate_"
        for part, rows in (("q", 16), ("k", 48)):
            made[f"{name}linear_{part}.weight"] = torch.randn(4, rows, 12, generator=draw)
            made[f"{name}{part}norm.weight"] = 1 + 0.2 * torch.randn(12, generator=draw)
    save_file(made, folder / "g.safetensors", {"gates": json.dumps({"block": 4, "width": 12})})
    return folder / "g.safetensors"


@pytest.fixture(scope="module")
def pair(request, saved, tools, tmp_path_factory):
    """Return the modules over pages and over caches of their own."""
    text, quant = request.param
    source = saved("llama-linear-mha")[1]
    if text.startswith("lessismore"):  # layers 2 and 4 choose
        source = tmp_path_factory.mktemp("deep")
        tools.make_model("llama", num_hidden_layers=5).save_pretrained(source)
    gates = gates_of(tmp_path_factory.mktemp("gates")) if text.startswith("seer") else None
    paging = Paging(PAGES, CONTEXT, PAGE) if quant != "kv4" else Paging(5, 192, 64)
    decoder = load_checkpoint(
        source, parse_scheme(quant), paging.cap, attention=parse_policy(text), gate_file=gates
    ).decoder
    hardware, made = local_cpu().with_threads(1), []
    for each in (paging, None):
        graphs = decoder_graphs(decoder, steps=(1, 16), batch=BATCH, paging=each)
        choices = choose(graphs, hardware, "latency", None).choices
        made.append(build_artifact(graphs, choices, hardware, Extras()).module())
    return made


class Twins:
    """Sequences of both modules that are given the same."""

    def __init__(self, pair) -> None:
        self.pair = pair
        self.texts: dict[int, list[tuple[list[int], bool]]] = {}
        self.sessions: dict[int, tuple] = {}
        self.hidden: dict[int, tuple] = {}
        for module in pair:
            module.reset()
            for held in module._machine.states.values():
                held[:] = 0xFF  # NaN, wherever nothing was written
        pair[0].pool.clear()

    def length(self, slot: int) -> int:
        return sum(len(ids) for ids, _ in self.texts[slot])

    def begin(self, slot: int) -> None:
        self.sessions[slot] = tuple(module.session(slot=slot) for module in self.pair)
        self.texts[slot] = []
        self.hidden.pop(slot, None)

    def fits(self, counts: dict[int, int]) -> bool:
        wants = [(s, self.length(s), self.length(s) + n) for s, n in counts.items()]
        pool = self.pair[0].pool
        most = self.pair[0].manifest.decoder.max_context
        return pool.needed(wants) <= pool.free and all(end <= most for *_, end in wants)

    def append(self, slot: int, ids: list[int], decode: bool) -> None:
        if ids and self.fits({slot: len(ids)}):
            both = [s.append(ids, decode=decode) for s in self.sessions[slot]]
            self.hidden[slot] = tuple(both)
            self.texts[slot].append((ids, decode))

    def step(self, tokens: dict[int, int]) -> None:
        if len(tokens) < 2 or not self.fits(dict.fromkeys(tokens, 1)):
            return
        rows = [
            append_each(module, [self.sessions[s][i] for s in tokens], list(tokens.values()))
            for i, module in enumerate(self.pair)
        ]
        for n, (slot, token) in enumerate(tokens.items()):
            self.hidden[slot] = tuple(own[n : n + 1].copy() for own in rows)
            self.texts[slot].append(([token], True))

    def fork(self, slot: int, other: int) -> None:
        if any(decode for _, decode in self.texts[slot]):
            return  # the other module would have to decode them one by one, not in a batch
        paged = self.sessions[slot][0].fork(other)
        alone = self.pair[1].session(slot=other)
        for ids, decode in self.texts[slot]:
            alone.append(ids, decode=decode)
        self.sessions[other], self.texts[other] = (paged, alone), list(self.texts[slot])
        self.hidden.pop(other, None)

    def rewind(self, slot: int, kept: int) -> None:
        for session in self.sessions[slot]:
            session.rewind(kept)
        left, out = kept, []
        for ids, decode in self.texts[slot]:
            out.append((ids[:left], decode))
            left -= len(out[-1][0])
        self.texts[slot] = [part for part in out if part[0]]
        self.hidden.pop(slot, None)

    def end(self, slot: int) -> None:
        for session in self.sessions.pop(slot):
            session.end()
        self.texts.pop(slot), self.hidden.pop(slot, None)

    def compare(self) -> None:
        for slot, (mine, own) in self.hidden.items():
            (a,), (b,) = (
                [rows.copy() for rows in session.logits(h)]
                for session, h in zip(self.sessions[slot], (mine, own), strict=True)
            )
            assert np.isfinite(a).all() and np.array_equal(a, b), slot


def lived(pair, draw) -> None:
    """Let sequences come, go on, share, go back and end."""
    twins, rng = Twins(pair), np.random.default_rng(draw(st.integers(0, 99)))
    slots = st.integers(0, BATCH - 1)
    for what in draw(st.lists(st.sampled_from("aaaadddbbbrfe"), min_size=4, max_size=16)):
        slot = draw(slots)
        if what == "a" and slot not in twins.sessions:
            twins.begin(slot)
        if slot not in twins.sessions:
            continue
        if what == "a":
            twins.append(slot, rng.integers(0, 257, draw(st.integers(1, 70))).tolist(), False)
        elif what == "d":
            twins.append(slot, rng.integers(0, 257, draw(st.integers(1, 4))).tolist(), True)
        elif what == "b":
            going = [s for s in twins.sessions if twins.texts[s]]
            twins.step({s: int(rng.integers(257)) for s in going})
        elif what == "r":
            twins.rewind(slot, draw(st.integers(0, twins.length(slot))))
        elif what == "f" and (other := draw(slots)) != slot:
            twins.fork(slot, other)
        elif what == "e":
            twins.end(slot)
        twins.compare()


@pytest.mark.parametrize("pair", KINDS, indirect=True, ids="/".join)
def test_sequences_of_every_kind(pair):
    @settings(max_examples=15)
    @given(data=st.data())
    def run(data):
        lived(pair, data.draw)

    run()


@pytest.mark.parametrize("pair", KINDS[:1], indirect=True, ids="/".join)
def test_texts_that_are_set_aside_go_on_as_they_were(pair, tools, monkeypatch):
    """Their prompts are read densely again; what they had made chooses what it attends to, as it did."""
    again = batch._again
    prompts = [tools.prompt(n, seed=n) for n in (2, 3, 20, 30)]  # they grow into each other's pages
    Twins(pair)
    texts, made = [], []
    monkeypatch.setattr(batch, "_again", lambda one: made.append(one.made) or again(one))
    for module in pair:
        got: list[list[int]] = [[] for _ in prompts]
        for index, token in module.generate_batch_ids(prompts, 60, stop_at_eos=False):
            got[index].append(token)
        texts.append(got)
    assert texts[0] == texts[1] and any(made)
    assert pair[0].pool.free == PAGES
