"""Experts chosen one layer earlier beside sparse attention, adapters, batches in pages, and tuning."""

from __future__ import annotations

import pytest
from test_adapters import ATTENTION, write_adapter
from test_pre_gates import CONTEXT, NONE, drawn, written

import mimo_compile as mc
from mimo_compile.errors import UsageError
from mimo_compile.frontend.adapters import attach_adapters
from mimo_compile.frontend.huggingface import load_checkpoint
from mimo_compile.frontend.trained import gate_record
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.policies import parse_policy
from mimo_compile.pipeline.choose import tunable
from mimo_compile.pipeline.source import open_source
from mimo_compile.runtime import ExpertMemory
from mimo_compile.verify import verify_artifact

pytestmark = [
    pytest.mark.compile,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::mimo_compile.errors.CheckpointWarning"),
]
FOUR = 4 * 3 * 64 * 32 * 4
"""Bytes of four experts, of which a layer has eight."""


@pytest.fixture(scope="module")
def case(saved, tmp_path_factory):
    """A model whose layers all see all positions, the first one dense, and gates before the others."""
    model, folder = saved("dots1")
    return model, folder, written(drawn(model), tmp_path_factory.mktemp("gates"))


def limited(path, ahead):
    return mc.load(path, threads=1, expert_memory=ExpertMemory(FOUR, ahead=ahead))


@pytest.mark.parametrize(
    "attention",
    [
        "quest:budget=16,page=4,dense=0",  # an entry point of its own for generated tokens
        "lessismore:budget=12,correct=4",  # layers lend lists beside experts
        "resa:p=0.1,block=16,least=2,f=4",  # tokens that run twice
    ],
)
def test_sparse_attention(case, attention, tools, tmp_path):
    _, source, gates = case
    path = mc.compile(
        source, attention=attention, pre_gates=gates, db=tmp_path / "r.db", max_context=CONTEXT,
        threads=1,
    ).save(tmp_path / "m.mimo")  # fmt: skip
    assert verify_artifact(path, source=source, tokens=64, threads=1, pre_gates=gates).ok
    prompt = tools.prompt(33)
    eager = load_checkpoint(
        source, NONE, CONTEXT, attention=parse_policy(attention), pre_gate_file=gates
    ).decoder
    want = eager.generate_greedy(prompt, 24, stop=())
    module = mc.load(path, threads=1)
    assert [layer.chosen_by for layer in module.manifest.decoder.layers] == [
        "", "layers.0", "layers.1"
    ]  # fmt: skip
    for found in (module, limited(path, 0), limited(path, 1)):
        assert list(found.generate_ids(prompt, 24, stop_at_eos=False)) == want


def test_adapters_and_pages(case, tools, tmp_path):
    model, source, gates = case
    folders = {name: tmp_path / name for name in ("law", "med")}
    write_adapter(folders["law"], model, 3, ATTENTION, seed=1)
    write_adapter(folders["med"], model, 2, (*ATTENTION, "mlp.down_proj"), layers=(0, 1), seed=2)
    path = mc.compile(
        source, adapters=folders, pre_gates=gates, db=tmp_path / "r.db", max_context=CONTEXT,
        threads=1, batch=3, pages=6,
    ).save(tmp_path / "m.mimo")  # fmt: skip
    loaded = load_checkpoint(source, NONE, CONTEXT, pre_gate_file=gates)
    attach_adapters(loaded, folders, "exact")
    names, prompts = ("law", None, "med"), [tools.prompt(n, seed=n) for n in (20, 7, 13)]
    want = []
    for name, prompt in zip(names, prompts, strict=True):
        loaded.decoder.adapter = -1 if name is None else loaded.decoder.adapters.index(name)
        want.append(loaded.decoder.generate_greedy(prompt, 16, stop=()))
    for module in (mc.load(path, threads=1), limited(path, 0), limited(path, 1)):
        for name, prompt, text in zip(names, prompts, want, strict=True):
            found = module.generate_ids(prompt, 16, adapter=name, stop_at_eos=False)
            assert list(found) == text
        both: list[list[int]] = [[] for _ in names]
        for index, token in module.generate_batch_ids(
            prompts, 16, adapter=list(names), stop_at_eos=False
        ):
            both[index].append(token)
        assert both == want


def test_what_is_tuned_for_the_model_is_what_it_needs_with_gates(case, tmp_path):
    """`tune` takes no gates: they compute what routers compute."""
    _, source, gates = case
    cpu = local_cpu().with_threads(1)
    asked = {"quant": "w4g32a8", "max_context": CONTEXT, "hardware": cpu}
    plain, early = (
        tunable(open_source(source, **asked, pre_gates=file).graphs, cpu) for file in (None, gates)
    )
    assert early.keys() == plain.keys()


def test_another_plan_keeps_gates(saved, tmp_path):
    model, source = saved("mimo_v2_flash")
    gates = written(drawn(model), tmp_path)
    first = mc.compile(
        source, pre_gates=gates, db=tmp_path / "r.db", max_context=CONTEXT, threads=1
    ).save(tmp_path / "a.mimo")
    again = mc.compile(first, db=tmp_path / "r.db", threads=1).save(tmp_path / "b.mimo")
    one, other = (mc.load(path, threads=1).manifest for path in (first, again))
    assert one.pre_gates == other.pre_gates == gate_record(gates)
    assert one.decoder == other.decoder
    assert verify_artifact(again, source=source, threads=1, pre_gates=gates).ok
    with pytest.raises(UsageError, match="only its plan can change"):
        mc.compile(first, pre_gates=gates)
