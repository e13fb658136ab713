"""SALE in decoders: what prompts see, thresholds from files and from calibration, compiled."""

from __future__ import annotations

import json
import math

import pytest
import torch

import mimo_compile as mc
from mimo_compile.cli import main
from mimo_compile.errors import InputError, UsageError
from mimo_compile.frontend.huggingface import load_checkpoint
from mimo_compile.frontend.models.calibrate_thresholds import Measuring, ladder
from mimo_compile.frontend.models.estimate import scores
from mimo_compile.frontend.models.thresholds import Thresholds
from mimo_compile.ir.formats import parse_scheme
from mimo_compile.ir.policies import parse_policy
from mimo_compile.runtime import load
from mimo_compile.verify import verify_artifact

NONE = parse_scheme("none")
CONTEXT = 192
SMALL = "bq=16,bk=4,sink=4,local=8,least=32"
TAU = f"sale:tau=0.6,{SMALL}"


def decoder(folder, text, scheme=NONE):
    return load_checkpoint(folder, scheme, CONTEXT, attention=parse_policy(text)).decoder


def table_of(path, folder, rows, text=f"sale:{SMALL}"):
    """Write thresholds of a model; returns the policy's text that names them."""
    config = decoder(folder, text).config
    found = Thresholds(config.name, str(config.attention.estimate), 0.4, rows)
    found.save(path)
    return f"{text},thresholds={path}"


def code(x):
    """Return 4-bit codes of rows times their scales."""
    most = x.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    return torch.round(x / most * 7) * most / 7


def seen_by(q, k, start, tau):
    """Return what a call's queries see by the published rule, bool ``[H, T, L]``; q, k float64 by token."""
    (count, heads, dim), end = q.shape, start + q.shape[0]
    at, key = torch.arange(start, end), torch.arange(end)
    causal = key <= at[:, None]
    if end <= 32 or count < 5:  # few keys, or a call of fewer tokens than a tile
        return causal.expand(heads, -1, -1)
    keys = k[:end] - k[:end].mean(0)
    near, mean = q - q.mean(0), q.mean(0)
    out = []
    for h in range(heads):
        own = keys[:, h * k.shape[1] // heads]
        guess = (code(near[:, h]) @ code(own).T + mean[h] @ own.T) / math.sqrt(dim)
        exact = q[:, h] @ own.T / math.sqrt(dim)
        rows = []
        for first in range(0, count, 16):
            tile = slice(first, min(first + 16, count))
            block = key // 4
            forced = (block < 1) | (block > (start + first) // 4 - 3)
            sure = (forced & causal[tile]).double().log()
            lse = torch.logsumexp(exact[tile] + sure, -1, keepdim=True)
            passes = (guess[tile] - lse >= math.log(tau)).any(0)
            kept = torch.stack([passes[block == b].any() for b in range(int(block[-1]) + 1)])
            rows.append((kept[block] | forced) & causal[tile])
        out.append(torch.cat(rows))
    return torch.stack(out)


def test_prompts_see_what_the_published_rule_says(saved, tools):
    """Layer by layer: given a layer's queries and cache, its output is that of the plain rule."""
    model, ids = decoder(saved("llama")[1], TAU), tools.prompt(160)
    found = []

    class Spy:
        def __init__(self, attend):
            self.attend, self.kind, self.look = attend, attend.kind, attend.look

        def __call__(self, layer, q, pos, lists):
            out = self.attend(layer, q, pos, lists)
            k, v = (c[: int(pos.sum())].double() for c in (layer.k_cache, layer.v_cache))
            found.append((q.double(), k, v, int(pos[0]), out[0].double()))
            return out

    for stage in model.stages():
        if hasattr(stage.module, "attend"):
            stage.module.attend = Spy(stage.module.attend)
    for at, end in ((0, 96), (96, 146), (146, 150), (150, 160)):
        model.forward_step(torch.tensor(ids[at:end]), at)
    kept = []
    for q, k, v, start, out in found:
        seen = seen_by(q, k, start, 0.6)
        logits = torch.einsum("thd,shd->hts", q, k.repeat_interleave(2, 1)) / math.sqrt(16)
        weights = logits.masked_fill(~seen, -math.inf).softmax(-1)
        want = torch.einsum("hts,shd->thd", weights, v.repeat_interleave(2, 1))
        off = (want - out).abs().amax((1, 2))
        # a code or an estimate that rounds the other way may move one tile
        assert (off < 1e-4).float().mean() > 0.9
        causal = torch.arange(k.shape[0]) <= start + torch.arange(len(q))[:, None]
        kept.append(float(seen.sum()) / (4 * float(causal.sum())))
    assert len(found) == 12 and min(kept) < 0.9


def test_thresholds_of_zero_are_dense_and_huge_ones_leave_the_exact_region(saved, tools):
    folder, ids = saved("llama")[1], tools.prompt(150)
    whole, none, huge = (
        decoder(folder, t).prefill(ids)[1]
        for t in ("model", f"sale:tau=0,{SMALL}", f"sale:tau=1e8,{SMALL}")
    )
    torch.testing.assert_close(none, whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(huge[:16], whole[:16], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(huge[60:], whole[60:], rtol=1e-2, atol=1e-2)


def test_decoding_is_dense(saved, tools):
    folder, ids = saved("llama")[1], tools.prompt(60)
    model = decoder(folder, f"sale:tau=1e8,{SMALL}")
    model.prefill(ids[:32])  # so few keys are seen by all
    dense = decoder(folder, "model")
    dense.prefill(ids[:32])
    for at in range(32, 60):
        got, want = (m.decode(ids[: at + 1], 32) for m in (model, dense))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_file_gives_each_head_its_own_threshold(saved, tools, tmp_path):
    folder, ids = saved("llama")[1], tools.prompt(150)
    rows = {i: (0.0, 0.0, 1e8, 1e8) for i in range(3)}
    model = decoder(folder, table_of(tmp_path / "t.json", folder, rows))
    assert str(model.config.attention).endswith("thresholds=t.json")
    half = model.prefill(ids)[1]
    others = [decoder(folder, f"sale:tau={tau},{SMALL}").prefill(ids)[1] for tau in ("0", "1e8")]
    assert all((half - other).abs().amax() > 1e-3 for other in others)
    zeros = {i: (0.0,) * 4 for i in range(3)}
    dense = decoder(folder, table_of(tmp_path / "t.json", folder, zeros)).prefill(ids)[1]
    torch.testing.assert_close(dense, others[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.pop("layers"), "exactly the layers 0, 1, 2"),
        (lambda b: b["layers"].pop("1"), "exactly the layers 0, 1, 2"),
        (lambda b: b["layers"].update({"1": [0.1]}), "layer 1 needs 4 thresholds"),
        (lambda b: b["layers"].update({"2": [0.1, 0.1, 0.1, -1]}), "layer 2 needs 4 thresholds"),
        (lambda b: b["layers"].update({"2": [0.1, 0.1, 0.1, True]}), "numbers of at least 0"),
        (
            lambda b: b["layers"].update({"2": [0.1, 0.1, 0.1, 10**400]}),
            "at least 0 and at most 1e\\+38",
        ),
        (lambda b: b.update(policy="sale:bq=32"), "calibrated for sale:bq=32, not for sale:bq=16"),
        (lambda b: b.update(model="qwen3"), "those of a qwen3 model, this is a llama"),
        (lambda b: b.update(format=2), "no file of thresholds of format 1"),
    ],
)
def test_files_that_do_not_fit_are_named_with_what_is_wrong(saved, tmp_path, change, message):
    folder, path = saved("llama")[1], tmp_path / "t.json"
    text = table_of(path, folder, {i: (0.1,) * 4 for i in range(3)})
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))
    with pytest.raises(InputError, match=message) as error:
        decoder(folder, text)
    assert "t.json" in str(error.value)


def test_files_that_cannot_be_read(saved, tmp_path):
    folder, path = saved("llama")[1], tmp_path / "t.json"
    for content, message in ((None, "cannot be read"), ("[", "malformed JSON"), ("[]", "no file")):
        if content is not None:
            path.write_text(content)
        with pytest.raises(InputError, match=message):
            decoder(folder, f"sale:{SMALL},thresholds={path}")


def test_tiles_divide_the_steps_of_prompts(saved):
    with pytest.raises(UsageError, match="bq=48 does not divide the 256 tokens"):
        mc.compile(saved("llama")[1], attention="sale:bq=48")
    with pytest.raises(UsageError, match="every=65 is above bq=64"):
        parse_policy("sale:every=65")


def test_a_threshold_beside_a_file_of_them_is_refused():
    with pytest.raises(UsageError, match=r"tau=0\.02 does nothing beside thresholds=t\.json"):
        parse_policy("sale:tau=0.02,thresholds=t.json")
    assert parse_policy("sale:thresholds=t.json").thresholds == "t.json"


# -- calibration -----------------------------------------------------------------------------------


def test_candidates_halve_down_to_dense():
    assert ladder(0.008) == pytest.approx([0.008 / 2**i for i in range(7)])
    assert ladder(1e-4) == ()


def test_a_larger_error_allows_larger_thresholds(saved, tools):
    """Thresholds are the largest whose measured error is allowed, by attention written down plainly."""
    policy = parse_policy(f"sale:tau=0.4,{SMALL}")
    model = decoder(saved("llama")[1], str(policy))
    stage = model.stage("layers.1")
    measuring = stage.module.attend = Measuring(policy, ladder(0.4))
    layer, taken = stage.module, []

    original = measuring._measure

    def spy(layer, q, pos):
        keys, values = (c[: int(pos.sum())].clone() for c in (layer.k_cache, layer.v_cache))
        taken.append((q, keys, values, pos))
        original(layer, q, pos)

    measuring._measure = spy
    ids = torch.tensor(tools.prompt(128))
    for at in (0, 64):
        model.forward_step(ids[at : at + 64], at)
    errors = torch.zeros_like(measuring.error)
    for q, k, v, pos in taken:
        score = scores(policy, q, k, pos, 16**-0.5)
        start, end = int(pos[0]), int(pos.sum())
        causal = torch.arange(end) <= torch.arange(start, end)[:, None]
        for h in range(4):
            logits = (q[:, h] @ k[:, h // 2].T / 4).masked_fill(~causal, -math.inf)
            full = logits.softmax(-1) @ v[:, h // 2]
            for j, tau in enumerate(measuring.taus):
                kept = (score[:, h] >= tau).repeat_interleave(4, 1).repeat_interleave(16, 0)
                part = logits.masked_fill(~kept[:, :end], -math.inf).softmax(-1) @ v[:, h // 2]
                errors[h, j] += float((full - part).abs().sum())
    torch.testing.assert_close(measuring.error, errors, rtol=1e-3, atol=1e-3)
    assert measuring.tokens == 128 and (measuring.error.diff(dim=1) <= 1e-3).all()
    loose, tight = (measuring.choose(theta)[0] for theta in (1e9, 0.0))
    assert loose == (0.4,) * 4 and tight == (0.0,) * 4
    middle = float(measuring.error.median() / 128)
    taus, shares = measuring.choose(middle)
    for h in range(4):
        fits = (measuring.error[h] / 128 < middle).tolist()
        assert taus[h] == (measuring.taus[fits.index(True)] if any(fits) else 0.0)
        assert 0 < shares[h] <= 1
    assert layer.attend is measuring


@pytest.mark.slow
def test_calibrate_writes_what_compile_reads(tmp_path, capsys):
    out = tmp_path / "t.json"
    text = "sale:bq=16,bk=16,sink=16,local=16,least=64"
    line = ["calibrate", "tiny", "--attention", text, "--length", "160", "--sequences", "2"]
    assert main([*line, "--theta", "0.05", "-o", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    body = json.loads(out.read_text())
    assert body["layers"] == found["layers"] and body["text"]["length"] == 160
    policy = f"{text},thresholds={out}"
    artifact = mc.compile("tiny", attention=policy, db=tmp_path / "r.db", max_context=512)
    path = artifact.save(tmp_path / "m.mimo")
    out.unlink()  # the artifact has them
    checked = verify_artifact(path)
    assert checked.ok and checked.end_to_end is not None
    layers = {x.name: x.thresholds for x in artifact.manifest.decoder.layers if x.thresholds}
    assert layers == {f"layers.{i}": tuple(row) for i, row in body["layers"].items()}
    assert artifact.manifest.attention == f"{text},thresholds=t.json"


def test_what_cannot_be_calibrated(tmp_path, capsys):
    out = str(tmp_path / "t.json")
    for words, message in (
        (["--attention", "quest"], "quest has no thresholds"),
        (["--theta", "0"], "--theta 0 is not a positive number"),
        (["--quant", "kv8"], "reads keys of single positions, which"),
        (["--length", "512"], "nothing is left out of 512 tokens"),
        (["--text", str(tmp_path / "no.txt"), "--length", "1280"], "cannot be read"),
    ):
        assert main(["calibrate", "tiny", "-o", out, *words]) in (1, 2)
        err = capsys.readouterr().err
        assert message in err and "Traceback" not in err


# -- compiled --------------------------------------------------------------------------------------


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("quant", ["none", "kv16"])
@pytest.mark.parametrize("case", ["llama-linear-mha", "mimo_v2_flash"])
def test_compiled_prompts_are_those_of_the_eager_model(saved, tools, tmp_path, case, quant):
    folder = saved(case)[1]
    rows = {0: (0.02, 0.05, 0.1, 0.0), 1: (0.05,) * 4}
    if case == "mimo_v2_flash":
        rows = {0: rows[0], 3: rows[1]}
    text = table_of(tmp_path / "t.json", folder, rows)
    artifact = mc.compile(
        folder, quant=quant, attention=text, db=tmp_path / "r.db", max_context=CONTEXT
    )
    path = artifact.save(tmp_path / "m.mimo")
    found = verify_artifact(path, source=folder, tokens=140)
    assert found.ok and found.end_to_end is not None
    module = load(path)
    for op in ("score_lowbit", "key_mean", "select_blocks", "sparse_attention"):
        calls = [c.calls for c in module.manifest.plan if c.workload.startswith(f"{op}:")]
        assert {entry for c in calls for entry in c} == {"step_16", "step_64"}
    assert module.manifest.decoder.decode == (1,)
    prompt = tools.prompt(100)
    got = list(module.generate_ids(prompt, 12, stop_at_eos=False))
    if quant == "none":
        assert got == decoder(folder, text).generate_greedy(prompt, 12, stop=())
    # a prefix is kept and what is behind it read again: nothing of the policy is a state
    session = module.session()
    list(module.generate_ids(prompt, 4, session=session, stop_at_eos=False))
    again = list(module.generate_ids(prompt, 12, session=session, stop_at_eos=False))
    assert again == got
