"""Attention policies on a small model: what they leave unchanged, what they choose, how they are judged."""

import importlib
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from micro_models import FOLDER, HYBRID, untrained

from mimo_compile.errors import UsageError
from mimo_compile.ir.policies import parse_policy
from mimo_compile.tiny import corpus as text
from mimo_compile.tiny import gates as seer
from mimo_compile.tiny import hysparse as hy
from mimo_compile.tiny import indexers as dsa
from mimo_compile.tiny.checkpoint import export
from mimo_compile.tiny.oracle import Oracle
from mimo_compile.tiny.recall import Answer, Sample
from mimo_compile.tiny.sparse import Run, dense_caches, roles_of
from mimo_compile.tiny.training_model import TinyModel

pytestmark = pytest.mark.compile

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LENGTH, PROMPT = 96, 60
SHAPE = seer.GateShape(block=4, width=16)
SMALL = [
    "stream:recent=12,sink=2", "stream:recent=12,rolling=0", "window:size=12,every=0",
    "quest:budget=16,page=4,dense=0", "quest:budget=16,page=4,dense=0,per=head",
    "seer:budget=16,block=4,gate=16", "seer:threshold=0.1,block=4,gate=16", "lessismore:budget=16,sink=2",
    "resa:p=0.2,block=4,least=1,f=8", "resa:p=0.2,block=4,least=1,f=0,heads=max",
    "sale:tau=0.5,bq=8,bk=4,sink=4,local=4,bits=8,least=16", "moba:block=8,k=2",
    "tailorkv:channels=3,budget=16,sink=2,recent=6,quantised=0,span=8", "dsa:k=16,heads=2,width=16",
]  # fmt: skip
"""Every system without weights of its own (and seer and dsa), small enough to drop something."""
PLENTY = [
    "stream:recent=500,sink=2", "window:size=500,every=0", "quest:budget=500,page=4,dense=0",
    "quest:dense=6", "seer:budget=500,block=4,gate=16", "seer:threshold=1e-30,block=4,gate=16",
    "lessismore:budget=500", "resa:p=1,block=4,f=8", "sale:tau=0,bq=8,bk=4,sink=4,local=4,least=0",
    "moba:block=8,k=100", "tailorkv:channels=3,budget=500,quantised=0", "full",
    "dsa:k=500,heads=2,width=16",
]  # fmt: skip


def micro(seed: int = 0, **changes) -> TinyModel:
    parts = ("q_proj", "k_proj", "o_proj", "v_proj")  # values that matter, too
    return untrained(replace(HYBRID, **changes), seed, by=12.0, parts=parts)


MODEL = micro()
IDS = torch.randint(0, 64, (LENGTH,), generator=torch.Generator().manual_seed(2))
GATES = seer.new_gates(MODEL, SHAPE, 0)
INDEXERS = dsa.new_indexers(MODEL, dsa.IndexerShape(2, 16), 0)


def run(policy, model=MODEL, ids=IDS, prompt=PROMPT) -> tuple[torch.Tensor, float]:
    policy = parse_policy(policy) if isinstance(policy, str) else policy
    made = Run(model, policy, prompt, GATES, INDEXERS)
    return made.rows(ids), made.share


@torch.no_grad()
def plain(model=MODEL, ids=IDS, prompt=PROMPT) -> torch.Tensor:
    return model(ids[None])[0][0, prompt:]


@pytest.mark.parametrize("policy", PLENTY)
def test_nothing_to_drop_is_the_model_itself(policy: str) -> None:
    found, share = run(policy)
    torch.testing.assert_close(found, plain(), rtol=1e-4, atol=1e-5)
    assert share == pytest.approx(1.0)


@pytest.mark.parametrize("policy", SMALL)
def test_something_to_drop_is_not(policy: str) -> None:
    found, share = run(policy)
    assert found.shape == (LENGTH - PROMPT, 32) and found.isfinite().all()
    assert 0.05 < share < 0.9
    assert (found - plain()).abs().amax() > 1e-3


@pytest.mark.parametrize("policy", SMALL)
def test_later_tokens_change_nothing_before(policy: str) -> None:
    """SALE's tiles peek at the prompt only; the prompt is not judged."""
    other = IDS.clone()
    other[80:] = (other[80:] + 7) % 64
    one, two = run(policy)[0], run(policy, ids=other)[0]
    torch.testing.assert_close(one[: 80 - PROMPT], two[: 80 - PROMPT], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(one[80 - PROMPT :], two[80 - PROMPT :], atol=1e-3)


@pytest.mark.parametrize("policy", SMALL)
def test_pieces_of_rows_do_not_matter(policy: str, monkeypatch) -> None:
    whole = run(policy)[0]
    monkeypatch.setattr("mimo_compile.tiny.sparse.CHUNK", 24 if policy.startswith("sale") else 11)
    if not policy.startswith("sale"):  # its means are those of a call
        torch.testing.assert_close(run(policy)[0], whole, rtol=1e-4, atol=1e-5)


ALONE = [p for p in SMALL if not p.startswith(("sale", "resa", "lessismore"))]
"""Systems whose rows depend on nothing but exact keys, if these are exact."""


@pytest.mark.parametrize("policy", ALONE)
def test_rows_are_tokens_decoded_one_by_one(policy: str) -> None:
    """A text's last row is the only row of the same text with a longer prompt, if that is exact.

    With one layer keys are exact; of a policy that is sparse from the first token on, they are the same.
    """
    model = MODEL
    if "prefill" not in parse_policy(policy).phases:
        model = micro(num_hidden_layers=1, hybrid_layer_pattern=(0,), moe_layer_freq=(0,))
    many, last = (run(policy, model, IDS, p)[0] for p in (PROMPT, LENGTH - 1))
    torch.testing.assert_close(many[-1:], last, rtol=1e-4, atol=1e-5)


def test_caches_may_be_given() -> None:
    caches = dense_caches(MODEL, IDS)
    policy = parse_policy("quest:budget=16,page=4,dense=0")
    made = Run(MODEL, policy, PROMPT)
    torch.testing.assert_close(made.rows(IDS, caches), run(policy)[0], rtol=0, atol=0)


def test_rectified_rows_read_what_a_dense_pass_wrote() -> None:
    """After a period the next token's keys are exact: with one-token periods only its own are not."""
    often = run("resa:p=0.2,block=4,least=1,f=1")[0]
    never = run("resa:p=0.2,block=4,least=1,f=0")[0]
    # a row with exact caches is the first row behind a longer prompt
    for at in (70, 90):
        alone = run("resa:p=0.2,block=4,least=1,f=0", prompt=at)[0][0]
        torch.testing.assert_close(often[at - PROMPT], alone, rtol=1e-4, atol=1e-5)
        assert (never[at - PROMPT] - alone).abs().amax() > 1e-4
    eight = run("resa:p=0.2,block=4,least=1,f=8")[0]
    later = run("resa:p=0.2,block=4,least=1,f=8", prompt=PROMPT + 16)[0]
    torch.testing.assert_close(eight[16:], later, rtol=1e-4, atol=1e-5)


def test_a_stream_rolls() -> None:
    """In one layer, rolling equals attention over the kept tokens counted from 0."""
    model = micro(num_hidden_layers=1, hybrid_layer_pattern=(0,), moe_layer_freq=(0,))
    found = run("stream:recent=10,sink=3", model)[0]
    for at in (70, 95):
        kept = torch.cat([IDS[:3], IDS[at - 9 : at + 1]])
        with torch.no_grad():
            alone = model(kept[None])[0][0, -1]
        torch.testing.assert_close(found[at - PROMPT], alone, rtol=1e-4, atol=1e-5)


def test_exact_blocks_keep_more_than_others() -> None:
    """Of one layer's exact weights, the oracle's tokens hold most; the output is nearest to dense."""
    model = micro(num_hidden_layers=1, hybrid_layer_pattern=(0,), moe_layer_freq=(0,))
    whole = plain(model)

    def off(policy) -> float:
        return (run(policy, model)[0] - whole).norm().item()

    best = off(Oracle(budget=16, block=1))
    assert best < off("quest:budget=16,page=4,dense=0") and best < off("stream:recent=14,sink=2")


def test_roles() -> None:
    kinds = lambda p: [r.kind for r in roles_of(parse_policy(p), MODEL)]  # noqa: E731
    assert kinds("quest:dense=0") == ["select", "window", "window", "select"]
    assert kinds("quest:dense=1") == ["full", "window", "window", "select"]
    assert kinds("window:size=9") == ["window"] * 4
    assert kinds("lessismore") == ["select", "window", "window", "reuse"]
    lists = roles_of(parse_policy("lessismore"), MODEL)
    assert lists[0].dense and (lists[3].list_of, lists[3].cache_of) == (0, 3)


@pytest.mark.parametrize(
    "policy, why",
    [
        ("hysparse", "trained for another"), ("nsa", "needs a model"), ("hysparse2", "needs a model"),
        ("tailorkv", "low-bit"),
    ],
)  # fmt: skip
def test_what_the_model_lacks_is_said(policy: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        run(policy)


@pytest.mark.parametrize("policy, what", [("seer", "gates"), ("dsa", "an indexer")])
def test_gates_and_indexers_are_needed(policy: str, what: str) -> None:
    with pytest.raises(UsageError, match=f"needs {what}"):
        Run(MODEL, parse_policy(policy), PROMPT).rows(IDS)


def hysparse_model(budget: int) -> hy.HySparseModel:
    model = hy.from_hybrid(MODEL, hy.HySparseShape(4, budget), torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in model.layers:
            if isinstance(layer, hy.SparseLayer):
                layer.self_attn.listed_sink_bias.normal_()
                layer.self_attn.listed_gate.weight.normal_()
                layer.self_attn.window_gate.weight.normal_()
    return model


@pytest.mark.parametrize("budget", [16, 400])
def test_hysparse_is_the_trained_model(budget: int) -> None:
    """The reference by the policy's own ops equals what was trained."""
    model = hysparse_model(budget)
    found, share = run(f"hysparse:budget={budget},block=4,every=4,window=8", model)
    torch.testing.assert_close(found, plain(model), rtol=1e-4, atol=1e-5)
    assert (share == pytest.approx(1.0)) == (budget == 400)
    with pytest.raises(UsageError, match="full layers"):
        run("hysparse:every=2", model)
    with pytest.raises(UsageError, match="another one"):
        run("full", model)


# --- the benchmark --------------------------------------------------------------------------


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("attention_quality")


def test_answers_are_judged_as_greedy_decoding_would(tool) -> None:
    with torch.no_grad():
        normed = plain(prompt=40)
        said = MODEL.logits(normed).argmax(-1)
    ids = IDS.clone()
    ids[51:53], ids[61], ids[62] = said[10:12], said[20], (said[21] + 1) % 64
    answers = (Answer(51, 53, 0.1, 9), Answer(61, 63, 0.7, 9))
    for kind, wanted in (("needles", [(0.1, 1.0), (0.7, 0.0)]), ("copy", [(0.1, 1.0), (0.7, 0.5)])):
        sample = Sample(kind, ids.numpy().astype(np.uint16), np.zeros(LENGTH, np.uint8), answers)
        loss, found = tool.told(MODEL, tool.Text(sample, ids, 40), normed)
        assert found == wanted and loss > 0


def test_bytes_at_decode(tool) -> None:
    length = 4096
    model = micro()
    read = lambda p: tool.decode_bytes(parse_policy(p), model, length)  # noqa: E731
    assert read("full") == 1.0
    assert read("window:size=512,every=0") == pytest.approx(1 / 8, rel=0.01)
    assert read("stream:recent=508") == pytest.approx(1 / 8, rel=0.01)
    few, many = read("quest:budget=256,dense=0"), read("quest:budget=1024,dense=0")
    assert 1 / 16 < few < many < 1 / 4 + 0.15
    assert read("lessismore:budget=256") > 0.5  # one of two layers is dense


def test_bench_goes_on_and_writes_its_tables(
    tool, tokenizer, tmp_path, monkeypatch, capsys
) -> None:
    files = [text.SourceFile(p.name, p.read_text()) for p in sorted(FOLDER.glob("t*.py"))]
    monkeypatch.setattr(tool.corpus, "collect", lambda: text.Corpus(tuple(files), (), tuple(files)))
    model = micro(vocab_size=4096)
    export(model, tokenizer.to_str(), tmp_path / "model")
    seer.save_gates(seer.new_gates(model, SHAPE, 0), tmp_path / "gates.safetensors", "model")
    made = dsa.new_indexers(model, dsa.IndexerShape(2, 16), 0)
    dsa.save_indexers(made, tmp_path / "indexers.safetensors", "model")
    hybrid = hy.from_hybrid(model, hy.HySparseShape(4, 16), torch.float32)
    hy.save_hysparse(hybrid, tmp_path / "hysparse.safetensors", "model")
    monkeypatch.setattr(tool, "policies", partial_policies(tool.policies))
    out, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    common = [
        "x", "--out", str(out), "--folder", str(tmp_path / "model"), "--texts", "1", "--length",
        "448", "--gates", str(tmp_path / "gates.safetensors"), "--hysparse",
        str(tmp_path / "hysparse.safetensors"), "--indexers", str(tmp_path / "indexers.safetensors"),
        "--budgets", "0.12", "0.008",
    ]  # fmt: skip

    kept: dict[tuple[str, float], dict] = {}

    def call(*more: str) -> list[dict]:
        monkeypatch.setattr("sys.argv", [*common, *more])
        tool.main()
        capsys.readouterr()
        every = [json.loads(line) for line in out.read_text().splitlines()]
        kept.update({(r["system"], r["budget"]): r for r in every if r["task"] == "memory"})
        return [r for r in every if r["task"] != "memory"]

    first = call("--tasks", "code", "--systems", "full,quest")
    assert [(r["system"], r["budget"]) for r in first] == [("full", 0), ("quest", 0.12)]
    rows = call("--tasks", "code,needles")
    assert rows[:2] == first, "what is known is not measured again"
    assert len({(r["system"], r["task"]) for r in rows}) == len(rows) == 2 * 14 + 2
    full, quest = rows[:2]
    assert full["perplexity"] > 1 and math.isfinite(quest["perplexity"]) and full["share"] == 1
    needles = next(r for r in rows if (r["system"], r["task"]) == ("moba", "needles"))
    assert needles["recall"] == 0 and needles["answers"] == 16 and len(needles["by_depth"]) == 4
    assert len(call("--tasks", "code,needles")) == len(rows)
    keeps = [json.loads(line) for line in out.read_text().splitlines() if '"memory"' in line]
    assert len({(r["system"], r["budget"], r["policy"]) for r in keeps}) == len(keeps)
    # what another shape keeps is noted as well, and not shown beside these
    other = keeps[0] | {"policy": "full:other", "keeps": 9.99}
    assert other["system"] == "full"
    with out.open("a") as file:
        file.write(json.dumps(other) + "\n")
    page.write_text(f"# Title\n\n{tool.BEGIN}\nold\n{tool.END}\n\nThe end.\n")
    call("--write", str(page))
    shown = page.read_text()
    assert "old" not in shown and shown.startswith("# Title") and shown.endswith("The end.\n")
    assert f"| full |  | {full['perplexity']:.3f} |" in shown
    assert "999 %" not in shown and "| 100 % | 100 % |" in shown
    assert "| hysparse | 12% |" in shown and "| system | budget | perplexity |" in shown
    share = lambda name: kept[name, 0.12]["keeps"]  # noqa: E731
    assert share("lessismore") == share("hysparse") == 1.0
    assert share("window") < 1 < share("quest") < share("dsa") < 2 and share("tailorkv") > 1
    page.write_text("nothing")
    with pytest.raises(SystemExit, match="lacks the marks"):
        call("--write", str(page))


def partial_policies(original):
    """The benchmark's policies, HySparse with the layers of the small model."""

    def made(*args):
        found = original(*args)
        for budget in found["hysparse"]:
            found["hysparse"][budget] = parse_policy("hysparse:budget=40,block=4,every=4,window=8")
        return found

    return made
