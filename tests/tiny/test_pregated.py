"""Gates that decide experts one layer earlier: the product's model says what the trained one does."""

import itertools
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from micro_models import FOLDER, MICRO, untrained
from tokenizers import Tokenizer

import mimo_compile as mc
from mimo_compile.frontend.huggingface import load_checkpoint
from mimo_compile.ir.formats import parse_scheme
from mimo_compile.runtime import ExpertMemory, Speculation, Stats
from mimo_compile.runtime.pregate import BEGIN, Gate, PreGates
from mimo_compile.runtime.routing import recording
from mimo_compile.tiny import corpus, pregated
from mimo_compile.tiny.checkpoint import export, load
from mimo_compile.tiny.evaluate import perplexity

pytestmark = pytest.mark.compile
SHIPPED = (
    Path(__file__).resolve().parents[2] / "models" / "tiny-pre-gates" / "pre-gates.safetensors"
)


@pytest.fixture(scope="module")
def model():
    """A model whose routers tell experts apart."""
    made = untrained(seed=1)
    made.requires_grad_(False)
    for layer in made.layers[1:]:
        layer.mlp.router.normal_(0.0, 1.0, generator=torch.Generator().manual_seed(2))
    return made


def drawn(count, length=24):
    gen = torch.Generator().manual_seed(3)
    return torch.randint(0, MICRO.vocab_size, (count, length), generator=gen)


def test_gates_learn_and_the_product_says_the_same(model, tmp_path):
    gated = pregated.PreGated(model)
    assert list(gated.pre_gates) == ["0", "1"]
    ids = drawn(24)
    steps, losses = pregated.learn(gated, model, ids.repeat(8, 1), 24, 0.05, 60)
    assert steps == 8 and losses[-1] < losses[0]
    file = tmp_path / "pre-gates.safetensors"
    gated.save(file, "micro")
    tokenizer = (FOLDER / "tokenizer.json").read_text()
    export(model, tokenizer, tmp_path / "m")
    stored = load(tmp_path / "m")
    again = pregated.PreGated(stored)
    again.pre_gates.load_state_dict(gated.pre_gates.state_dict())
    want = again.logits(again(ids[:1])[0])[0].detach()
    found = load_checkpoint(
        tmp_path / "m", parse_scheme("none"), pre_gate_file=file
    ).decoder.prefill(ids[0].tolist())[1]
    assert (found - want).abs().max() < 1e-4 * want.abs().max()


def test_least_squares_comes_nearer_than_the_routers_themselves(model):
    gated, ids = pregated.PreGated(model), drawn(30)

    def distance():
        says, wanted = gated(ids)[0], model(ids)[0]
        return (says - wanted).square().mean().item()

    before = distance()
    pregated.fit(gated, model, ids)
    assert distance() < before


@pytest.mark.slow
def test_drafts_change_no_text_wherever_experts_lie(model, tmp_path):
    """Draft heads keep routers of their own; what they draft is verified by early experts."""
    gated, ids = pregated.PreGated(model), drawn(24)
    pregated.fit(gated, model, ids)
    file, source = tmp_path / "pre-gates.safetensors", tmp_path / "m"
    gated.save(file, "micro")
    export(model, (FOLDER / "tokenizer.json").read_text(), source)
    path = mc.compile(
        source, quant="w8a8", pre_gates=file, db=tmp_path / "r.db", max_context=96, threads=1
    ).save(tmp_path / "m.mimo")
    plain = mc.load(path, threads=1)
    prompts = [ids[i, :n].tolist() for i, n in enumerate((9, 20))]
    want = [list(plain.generate_ids(p, 40, stop_at_eos=False)) for p in prompts]
    size, gates = 2 * expert_bytes(path), foreseeing(path, tmp_path / "gates.safetensors")
    ways = [ExpertMemory(size, ahead=ahead) for ahead in (0, 1, 2)]
    ways += [ExpertMemory(n * size, ahead=2, pre_gates=gates) for n in (1, 2, 4)]
    for how in (None, *ways):
        module, logs = mc.load(path, threads=1, expert_memory=how), []
        for drafts in (False, True, Speculation(1), Speculation(3)):
            stats = Stats()
            with recording(module) as recorder:
                found = [
                    list(module.generate_ids(
                        p, 40, stop_at_eos=False, speculative=drafts, stats=stats
                    ))
                    for p in prompts
                ]  # fmt: skip
            assert found == want
            assert not isinstance(drafts, Speculation) or sum(stats.drafted)
            logs.append(recorder.log())
        for log in logs[1:]:
            assert np.array_equal(log.ids, logs[0].ids)
            assert np.array_equal(log.position, logs[0].position)


def expert_bytes(path):
    """Return the bytes of one expert of an artifact."""
    facts = mc.load(path, expert_memory=1 << 30).experts.facts()
    return facts["expert_bytes"] // facts["experts"]


def foreseeing(path, file):
    """Write gates for an artifact that foresee anything."""
    stacks, rng = mc.load(path, expert_memory=1 << 30).experts.stacks, np.random.default_rng(4)
    pairs = itertools.product(range(BEGIN, len(stacks)), range(len(stacks)))
    shapes = ((stacks[0].shape.experts, MICRO.hidden_size), (stacks[0].shape.experts,))
    gates = {pair: Gate(*(rng.standard_normal(s, np.float32) for s in shapes)) for pair in pairs}
    PreGates(tuple(stack.label for stack in stacks), gates).save(file)
    return file


@pytest.mark.slow
def test_shipped_gates_cost_little():
    base = load(FOLDER)
    gated = pregated.PreGated(base)
    gated.read(SHIPPED)
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    held = corpus.encode(tokenizer, corpus.collect().held_out)[:20000]
    usual, early = (perplexity(m, held, 512, 256) for m in (base, gated))
    assert early < 1.02 * usual
