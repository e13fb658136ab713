"""Attention policies, compiled: artifacts against eager torch under the same policy."""

from __future__ import annotations

import pytest

import mimo_compile as mc
from mimo_compile.frontend.huggingface import load_checkpoint
from mimo_compile.ir.formats import parse_scheme
from mimo_compile.ir.policies import parse_policy
from mimo_compile.runtime import load
from mimo_compile.verify import verify_artifact

pytestmark = [
    pytest.mark.compile,
    pytest.mark.filterwarnings("ignore::mimo_compile.errors.CheckpointWarning"),
]
CONTEXT = 96


@pytest.fixture(scope="module")
def deep(tools, tmp_path_factory):
    """The folder of a Llama of five layers."""
    folder = tmp_path_factory.mktemp("deep")
    tools.make_model("llama", num_hidden_layers=5).save_pretrained(folder)
    return folder


def prove(source, tmp_path, tools, text, quant="none"):
    """Compile, save, verify, load, and generate what the eager model generates."""
    artifact = mc.compile(
        source, quant=quant, attention=text, db=tmp_path / "records.db", max_context=CONTEXT
    )
    path = artifact.save(tmp_path / "model.mimo")
    found = verify_artifact(path, source=source, tokens=64)
    assert found.ok and found.end_to_end is not None
    module = load(path)
    assert module.manifest.attention == str(parse_policy(text))
    prompt = tools.prompt(33)
    got = list(module.generate_ids(prompt, 24, stop_at_eos=False))
    if quant == "none":
        eager = load_checkpoint(
            source, parse_scheme(quant), CONTEXT, attention=parse_policy(text)
        ).decoder
        assert got == eager.generate_greedy(prompt, 24, stop=())
    return module


def ops(module):
    return {choice.workload.partition(":")[0] for choice in module.manifest.plan}


@pytest.mark.slow
def test_quest_decodes_apart_and_reads_prompts_densely(saved, tmp_path, tools):
    source = saved("llama-linear-mha")[1]
    module = prove(source, tmp_path, tools, "quest:budget=12,page=4,dense=1")
    decoder = module.manifest.decoder
    assert decoder.decode == (1,) and "decode_1" in module.entries and not decoder.rerun
    assert [(x.role, x.states) for x in decoder.layers] == [
        ("full", ("layers.0.k_cache", "layers.0.v_cache")),
        ("select", ("layers.1.k_cache", "layers.1.v_cache", "layers.1.desc")),
    ]
    assert {"describe_blocks", "score_blocks", "select_blocks", "sparse_attention"} <= ops(module)
    calls = {c.workload: set(c.calls) for c in module.manifest.plan}
    for workload, entries in calls.items():
        if workload.startswith(("score_blocks", "select_blocks", "sparse_attention")):
            assert entries == {"decode_1"}
    # decoded keys are not those of a prompt, so they are not kept as one
    session = module.session()
    out = list(module.generate_ids(tools.prompt(20), 6, session=session, stop_at_eos=False))
    assert session.keep_prefix([*tools.prompt(20), *out]) == 20


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "full", "window:size=8,every=3", "stream:sink=3,recent=8", "stream:sink=3,recent=8,rolling=0",
        "stream:sink=0,recent=8", "quest:budget=16,page=16,dense=0,per=head",
        "lessismore:budget=12,correct=4", "moba:block=8,k=2", "moba:block=16,k=2",
        "resa:p=0.1,block=16,least=2,f=4", "full+int8", "window:size=8,every=3+int8half",
    ],
)  # fmt: skip
def test_every_policy(deep, tmp_path, tools, text):
    module = prove(deep, tmp_path, tools, text)
    assert module.manifest.decoder.rerun == (4 if text.startswith("resa") else 0)
    single = [c.workload for c in module.manifest.plan if "lay=rows" in c.workload]
    # keys by themselves where tokens are listed
    assert bool(single) == text.startswith("lessismore")


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", ["quest:budget=32,page=16,dense=1", "stream:sink=4,recent=16", "moba:block=16,k=2"]
)
def test_sixteen_bit_caches(saved, tmp_path, tools, text):
    # few layers: what bfloat16 rounds grows from layer to layer of random weights
    module = prove(saved("llama-linear-mha")[1], tmp_path, tools, text, "kv16")
    kept = {n: s.dtype for n, s in module.manifest.states.items()}
    assert {d for n, d in kept.items() if n.endswith("_cache")} == {"uint16"}


@pytest.mark.slow
def test_a_hybrid_model_keeps_its_rings(saved, tmp_path, tools):
    module = prove(saved("mimo_v2_flash")[1], tmp_path, tools, "quest:budget=16,page=4,dense=0")
    roles = [layer.role for layer in module.manifest.decoder.layers]
    assert roles == ["select", "window", "window", "select"]


@pytest.mark.slow
def test_a_text_across_the_rings_end(deep, tmp_path, tools):
    """The window policy's rings hold 272 positions."""
    folder, text = tmp_path / "m.mimo", "window:size=8,every=4"
    mc.compile(deep, attention=text, db=tmp_path / "r.db", max_context=320).save(folder)
    eager = load_checkpoint(deep, parse_scheme("none"), 320, attention=parse_policy(text)).decoder
    prompt = tools.prompt(262)
    module = load(folder)
    got = list(module.generate_ids(prompt, 24, stop_at_eos=False))
    assert got == eager.generate_greedy(prompt, 24, stop=())
    assert {layer.slots for layer in module.manifest.decoder.layers} == {272, 320}


@pytest.mark.slow
@pytest.mark.parametrize("rolling", [0, 1])
@pytest.mark.parametrize("quant", ["none", "kv16"])
def test_a_text_across_the_seam_of_a_streams_ring(saved, tmp_path, tools, rolling, quant):
    """Its caches hold 16 first positions and a ring of 272."""
    source, folder = saved("llama-linear-mha")[1], tmp_path / "m.mimo"
    text = f"stream:sink=3,recent=8,rolling={rolling}"
    mc.compile(source, attention=text, quant=quant, db=tmp_path / "r.db", max_context=400).save(
        folder
    )
    module, prompt = load(folder), tools.prompt(290)
    assert {(x.slots, x.first) for x in module.manifest.decoder.layers} == {(288, 16)}
    session = module.session()
    got = list(module.generate_ids(prompt, 24, session=session, stop_at_eos=False))
    if quant == "none":
        eager = load_checkpoint(
            source, parse_scheme(quant), 400, attention=parse_policy(text)
        ).decoder
        assert got == eager.generate_greedy(prompt, 24, stop=())
    assert session.position == 313 and session.can_rewind(48) and not session.can_rewind(47)
    session.rewind(290)
    assert list(module.generate_ids(prompt, 24, session=session, stop_at_eos=False)) == got
