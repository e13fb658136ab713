"""TailorKV in decoders: what is kept, which layers are quantised, files of classes, compiled."""

from __future__ import annotations

import json
import os

import pytest
import torch

import mimo_compile as mc
from mimo_compile.cli import main
from mimo_compile.errors import InputError, UsageError
from mimo_compile.frontend.huggingface import load_checkpoint
from mimo_compile.frontend.models.calibrate_classes import QUERIES, Watching
from mimo_compile.frontend.models.calibrate_thresholds import measure
from mimo_compile.frontend.models.classes import Classes
from mimo_compile.frontend.models.found_files import read_found
from mimo_compile.frontend.models.retrieving import Retrieving
from mimo_compile.ir.formats import parse_scheme
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.policies import parse_policy
from mimo_compile.runtime import load
from mimo_compile.verify import verify_artifact

CONTEXT = 192
SMALL = "budget=24,sink=2,recent=6,channels=3,span=16"


def decoder(folder, text, scheme="none"):
    return load_checkpoint(
        folder, parse_scheme(scheme), CONTEXT, attention=parse_policy(text), hardware=local_cpu()
    ).decoder


def layers(model):
    return [s.module for s in model.stages() if hasattr(s.module, "caches")]


def classes_of(path, model="llama", **outside):
    Classes(model, {int(k[1:]): v for k, v in outside.items()}).save(path)
    return path


# -- what layers keep --------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["none", "kv16"])
def test_states_do_not_depend_on_how_a_prompt_is_cut(saved, tools, scheme):
    model = decoder(saved("llama")[1], f"tailorkv:quantised=0,{SMALL}", scheme)
    ids = tools.prompt(75)
    core = model.stage("layers.1").module
    found = []
    for cuts in ((75,), (16, 16, 43), (1, 30, 17, 27)):
        model.reset()
        at = 0
        for count in cuts:
            model.forward_step(torch.tensor(ids[at : at + count]), at)
            at += count
        copy, keys, peak = core.k_copy[:75], core.k_cache[:75], core.peak[:4]
        assert copy.dtype == peak.dtype == keys.dtype and torch.equal(copy, keys)
        spans = keys[:64].unflatten(0, (4, 16)).abs().amax(1)
        assert torch.equal(peak, spans) and not core.peak[4:].any()  # complete ones alone
        found.append(peak.float())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-2, atol=1e-2)


def test_quantised_layers_have_a_format_of_their_own(saved, tools):
    folder = saved("llama")[1]
    for quant, kept in (("none", "f32"), ("kv16", "bf16")):
        model = decoder(folder, f"tailorkv:quantised=2,bits=4,{SMALL}", quant)
        assert [m.caches.name for m in layers(model)] == ["i4", "i4", kept]
    one, few, many = (decoder(folder, f"tailorkv:quantised=3,bits={n}") for n in (1, 2, 8))
    ids = tools.prompt(140)
    exact = decoder(folder, "model").prefill(ids)[1]
    off = [float((m.prefill(ids)[1] - exact).norm()) for m in (one, few, many)]
    assert off[0] > off[1] > 4 * off[2] > 0


def test_windows_of_the_model_are_not_quantised(saved):
    model = decoder(saved("mimo_v2_flash")[1], f"tailorkv:quantised=2,{SMALL}")
    assert [role.kind for role in model.config.roles] == ["quantised", "window", "window", "select"]
    assert [m.caches.name for m in layers(model)] == ["i2", "f32", "f32", "f32"]


# -- classes -----------------------------------------------------------------------------------------


def test_masses_are_those_of_the_models_attention(saved, tools):
    transformers_model, folder = saved("llama")
    model = decoder(folder, "tailorkv:quantised=0")
    ids = torch.tensor([tools.prompt(96, seed=s) for s in (1, 2)])
    found = measure(model, ids, Retrieving, lambda _: Watching(96), lambda line: None)
    with torch.no_grad():
        weights = transformers_model(ids, output_attentions=True, use_cache=False).attentions
    assert sorted(found) == [0, 1, 2]
    for layer, watching in found.items():
        best = weights[layer][:, :, -QUERIES:].topk(96 * 5 // 100).values
        want = (1 - best.sum(-1).mean((1, 2))).double()
        torch.testing.assert_close(
            torch.tensor(watching.found).double(), want, rtol=1e-4, atol=1e-4
        )


def test_a_file_says_which_layers_are_quantised(saved, tmp_path):
    folder, path = saved("llama")[1], classes_of(tmp_path / "c.json", _0=0.1, _1=0.6, _2=0.3)
    for tau, kinds in ((0.2, "sqq"), (0.3, "sqs"), (0.05, "qqq")):
        config = decoder(folder, f"tailorkv:classes={path},tau={tau}").config
        assert "".join(role.kind[0] for role in config.roles) == kinds
        assert str(config.attention).endswith("classes=c.json")
        assert [config.attention.spread(i) for i in range(3)] == [0.1, 0.6, 0.3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.pop("outside"), "exactly the layers 0, 1, 2"),
        (lambda b: b["outside"].pop("1"), "exactly the layers 0, 1, 2"),
        (lambda b: b["outside"].update({"1": 1.5}), "layer 1 needs a mass from 0 to 1"),
        (lambda b: b["outside"].update({"2": True}), "layer 2 needs a mass from 0 to 1"),
        (lambda b: b.update(model="qwen3"), "those of a qwen3 model, this is a llama"),
        (lambda b: b.update(format=2), "no file of classes of format 1"),
    ],
)
def test_files_that_do_not_fit_are_named_with_what_is_wrong(saved, tmp_path, change, message):
    path = classes_of(tmp_path / "c.json", _0=0.1, _1=0.6, _2=0.3)
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))
    with pytest.raises(InputError, match=message) as error:
        decoder(saved("llama")[1], f"tailorkv:classes={path}")
    assert "c.json" in str(error.value)


def test_what_cannot_be(saved, tmp_path, capsys):
    with pytest.raises(UsageError, match=r"reads keys of single positions, which kv4 caches.*kv16"):
        mc.compile(saved("llama")[1], attention="tailorkv", quant="kv4")
    with pytest.raises(UsageError, match=r"tau=0\.3 does nothing without classes=FILE"):
        mc.compile(saved("llama")[1], attention="tailorkv:tau=0.3")
    with pytest.raises(UsageError, match=r"tau=0\.3 does nothing.*or leave out tau"):
        mc.compile(saved("llama")[1], attention="tailorkv:quantised=0,tau=0.3")
    with pytest.raises(UsageError, match=r"may have no \+ in its name"):
        parse_policy("tailorkv:classes=c+int8.json")
    out = str(tmp_path / "c.json")
    for words, message in (
        (["--theta", "0.3"], "--theta is for --attention sale"),
        (["--length", "40"], "sequences of 32 tokens hold nothing before the last 32"),
        (["--quant", "kv8"], "reads keys of single positions, which"),
    ):
        assert main(["calibrate", "tiny", "--attention", "tailorkv", "-o", out, *words]) in (1, 2)
        err = capsys.readouterr().err
        assert message in err and "Traceback" not in err


# -- compiled ----------------------------------------------------------------------------------------


@pytest.mark.compile
@pytest.mark.slow
def test_calibrate_writes_what_compile_reads(tmp_path, capsys):
    """The built-in model: one layer is quantised, the other one selects, and the artifact knows why."""
    out = tmp_path / "c.json"
    line = ["calibrate", "tiny", "--attention", "tailorkv", "--length", "512", "--sequences", "2"]
    assert main([*line, "-o", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    outside = json.loads(out.read_text())["outside"]
    assert outside == found["outside"] and len(outside) == 2
    assert found["quantised"] == [int(i) for i, mass in outside.items() if mass > 0.2]
    low, high = sorted(outside.values())
    text = f"tailorkv:{SMALL},tau={(low + high) / 2},classes={out}"
    artifact = mc.compile("tiny", attention=text, db=tmp_path / "r.db", max_context=256)
    path = artifact.save(tmp_path / "m.mimo")
    out.unlink()  # the artifact has the masses
    checked = verify_artifact(path, tokens=160)
    assert checked.ok and checked.end_to_end is not None
    kept = {x.name: x for x in artifact.manifest.decoder.layers if x.outside}
    assert {n: x.outside for n, x in kept.items()} == {f"layers.{i}": m for i, m in outside.items()}
    kinds = sorted((x.role, x.format) for x in kept.values())
    assert kinds == [("quantised", "i2"), ("select", "f32")]
    assert artifact.manifest.attention.endswith("classes=c.json")
    capsys.readouterr()
    assert main(["inspect", str(path)]) == 0
    name = next(iter(kept))
    assert (
        f"of the best 5 % of the keys: {name} {kept[name].outside:.2f}, " in capsys.readouterr().out
    )


@pytest.mark.parametrize("text", ['{"format": true', '{"format": 1.0', '{"format": 2', "[", "{}"])
def test_files_of_another_format_are_refused_with_a_remedy(tmp_path, text):
    path = tmp_path / "c.json"
    path.write_text(text + ', "model": "llama", "outside": {}}' if "format" in text else text)
    with pytest.raises(InputError, match="this is no file of classes") as refused:
        read_found(path, "classes", "llama")
    assert refused.value.remedy and str(refused.value).count("c.json") == 1


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("quant", ["none", "kv16"])
def test_compiled_is_eager_and_goes_back(saved, tools, tmp_path, monkeypatch, quant):
    folder, text = saved("llama-linear-mha")[1], f"tailorkv:quantised=0,{SMALL}"
    artifact = mc.compile(
        folder, quant=quant, attention=text, db=tmp_path / "r.db", max_context=CONTEXT
    )
    path = artifact.save(tmp_path / "m.mimo")
    found = verify_artifact(path, source=folder, tokens=150)
    assert found.ok and found.end_to_end is not None
    module = load(path)
    for layer in module.manifest.decoder.layers:
        names = [name.rpartition(".")[2] for name in layer.states]
        assert (layer.role, names) == ("select", ["k_cache", "v_cache", "k_copy", "peak"])
    for choice in module.manifest.plan:
        op, lay = choice.workload.partition(":")[0], "lay=rows" in choice.workload
        if op in ("kv_append", "cached_attention", "sparse_attention"):
            assert lay
        if op in ("score_keys", "select_blocks", "sparse_attention"):
            assert set(choice.calls) == {"decode_1"}
    prompt = tools.prompt(133)
    session = module.session()
    got = list(module.generate_ids(prompt, 20, session=session, stop_at_eos=False))
    if quant == "none":
        assert got == decoder(folder, text).generate_greedy(prompt, 20, stop=())
    far = load(path, kv_store=tmp_path)  # keys and values in a file
    assert list(far.generate_ids(prompt, 20, stop_at_eos=False)) == got
    with monkeypatch.context() as forked:
        forked.setattr(os, "getpid", lambda: 0)
        with pytest.raises(UsageError, match="from which this one was forked"):
            list(far.generate_ids(prompt, 20))
    # decoded keys are not those of a prompt; a prompt's are kept, and give the same text again
    assert session.keep_prefix([*prompt, *got]) == 133
    session.rewind(40)
    assert list(module.generate_ids(prompt, 20, session=session, stop_at_eos=False)) == got


@pytest.mark.compile
@pytest.mark.slow
def test_sequences_of_a_batch_are_what_they_are_alone(saved, tools, tmp_path):
    """One layer in single bits, two that look for tokens; more prompts than places, and a file for keys."""
    folder, text = saved("llama-linear-mha")[1], f"tailorkv:bits=1,{SMALL}"
    artifact = mc.compile(
        folder, quant="kv16", attention=text, db=tmp_path / "r.db", max_context=CONTEXT, batch=2
    )
    path = artifact.save(tmp_path / "m.mimo")
    found = verify_artifact(path, source=folder, tokens=150)
    assert found.ok and found.end_to_end is not None
    kinds = [(x.role, x.format) for x in artifact.manifest.decoder.layers]
    assert kinds[0] == ("quantised", "i1") and set(kinds[1:]) == {("select", "bf16")}
    scored = [c for c in artifact.manifest.plan if c.workload.startswith("index_keys")]
    assert any("b=2" in c.workload and set(c.calls) == {"batch_2"} for c in scored)
    prompts = [tools.prompt(n, seed=n) for n in (133, 9, 64)]
    module = load(path)
    alone = [list(module.generate_ids(p, 20, stop_at_eos=False)) for p in prompts]
    for place in (None, tmp_path):
        got, module = [[] for _ in prompts], load(path, kv_store=place)
        for index, token in module.generate_batch_ids(prompts, 20, stop_at_eos=False):
            got[index].append(token)
        assert got == alone
