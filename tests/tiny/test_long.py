"""Training the built-in model on long texts: the tasks, the loop, gates and the HySparse shape."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from tokenizers import Tokenizer

torch = pytest.importorskip("torch")

from micro_models import FOLDER, HYBRID, untrained

from mimo_compile.tiny import corpus as text
from mimo_compile.tiny import gates as seer
from mimo_compile.tiny import hysparse as hy
from mimo_compile.tiny import indexers as dsa
from mimo_compile.tiny import long_context as long
from mimo_compile.tiny.recall import ANSWER, CODE, KINDS, Mixture, Writer
from mimo_compile.tiny.training_loop import Progress, run, vars_of
from mimo_compile.tiny.training_model import TinyModel, attend, attend_tiled
from mimo_compile.tiny.training_ops import linear_cross_entropy, weighted_cross_entropy

pytestmark = pytest.mark.compile

CONFIG = replace(HYBRID, vocab_size=4096)


@pytest.fixture(scope="module")
def code(tokenizer: Tokenizer) -> np.ndarray:
    paths = sorted(FOLDER.glob("t*.py"))
    files = [text.SourceFile(f"{i}.py", p.read_text()) for i, p in enumerate(paths)]
    return text.encode(tokenizer, tuple(files))


@pytest.fixture
def writer(tokenizer: Tokenizer, code: np.ndarray) -> Writer:
    return Writer(tokenizer, [code], [1.0], 0)


def micro(seed: int = 0) -> TinyModel:
    return untrained(CONFIG, seed, by=20.0)


# --- texts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [320, 1024])
def test_samples_are_as_long_as_asked_and_answers_stand_before(writer, kind: str, n: int) -> None:
    for _ in range(5):
        sample = writer.sample(kind, n)
        assert len(sample.ids) == len(sample.labels) == n
        assert bool(sample.answers) == (kind != "code")
        marked = np.zeros(n, bool)
        for a in sample.answers:
            assert a.distance > 0 and 0 <= a.depth <= 1
            before = slice(a.start - a.distance, a.stop - a.distance)
            assert np.array_equal(sample.ids[a.start : a.stop], sample.ids[before])
            marked[a.start : a.stop] = True
        assert np.array_equal(sample.labels == ANSWER, marked)
        assert (sample.labels == CODE).sum() >= (0 if kind == "pairs" else n // 4)


def test_questions_at_the_end_ask_for_every_note_once(writer) -> None:
    sample = writer.needles(1024, 8, at_end=True, separator=1)
    assert len(sample.answers) == 8
    assert sorted(int(a.depth * 8 * 0.999) for a in sample.answers) == pytest.approx(
        range(8), abs=1
    )
    first = min(a.start for a in sample.answers)
    assert (sample.labels[first:] != CODE).all()
    places = [a.start - a.distance for a in sample.answers]
    assert len(set(places)) == 8 and max(places) < first


def test_the_same_key_has_one_value(writer) -> None:
    sample = writer.pairs(1024, 20)
    width = 2
    found: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for a in sample.answers:
        source = a.start - a.distance
        found.setdefault((source,), set()).add(tuple(sample.ids[a.start : a.start + width]))
    assert len(found) > 5
    assert all(len(values) == 1 for values in found.values())


def test_samples_repeat_with_the_seed_and_differ_without(tokenizer, code) -> None:
    def first(seed: int) -> list[int]:
        return Writer(tokenizer, [code], [1.0], seed).sample("needles", 256).ids.tolist()

    assert first(3) == first(3) != first(4)


def test_mixture_draws_all_kinds(writer) -> None:
    mixture = Mixture(writer, {"code": 0.5, "needles": 0.25, "pairs": 0.25})
    batches = [mixture.take(4, 320) for _ in range(10)]
    assert {k for b in batches for k in b.kinds} == {"code", "needles", "pairs"}
    assert batches[0].ids.shape == batches[0].labels.shape == (4, 320)


def test_too_many_facts_are_refused(writer) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        writer.needles(128, 20)
    with pytest.raises(ValueError, match="do not fit"):
        writer.pairs(128, 40, at_end=True)
    with pytest.raises(ValueError, match="no kind"):
        writer.sample("riddles", 128)


def test_many_keys_differ_though_words_return(writer) -> None:
    facts = writer.words.facts(2000, np.random.default_rng(0))
    assert len({tuple(key) for key, _ in facts}) == 2000


# --- loss, attention, loop ------------------------------------------------------------------


def test_weighted_cross_entropy_and_its_gradients() -> None:
    x = torch.randn(30, 8, requires_grad=True)
    table = torch.randn(20, 8, requires_grad=True)
    target, weights = torch.randint(0, 20, (30,)), torch.rand(30)
    weights[::3] = 0.0
    got, losses = weighted_cross_entropy(x, table, target, weights, chunk=7)
    rows = torch.nn.functional.cross_entropy(x @ table.T, target, reduction="none")
    want = (rows * weights).sum() / weights.sum()
    torch.testing.assert_close(losses, rows.detach())
    assert not losses.requires_grad
    for a, b in zip(
        (got, *torch.autograd.grad(got * 3, (x, table))),
        (want, *torch.autograd.grad(want * 3, (x, table))),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    none, _ = weighted_cross_entropy(x, table, target, torch.zeros(30))
    assert none == 0 and not any(g.any() for g in torch.autograd.grad(none, (x, table)))
    torch.testing.assert_close(
        linear_cross_entropy(x, table, target),
        weighted_cross_entropy(x, table, target, torch.full((30,), 0.5))[0],
    )


def test_tiled_attention_is_attention() -> None:
    q, k, v = torch.randn(2, 4, 50, 16), torch.randn(2, 2, 50, 16), torch.randn(2, 2, 50, 8)
    torch.testing.assert_close(attend_tiled(q, k, v), attend(q, k, v, None, None))
    q, k, v = (x[:1, :, :1].expand(1, -1, 1024, -1).contiguous() for x in (q, k, v))
    v = v * torch.arange(1024.0)[:, None]
    out = attend(q, k, v, None, None)  # the tiled way by its length: the mean of all before
    wanted = v.repeat_interleave(2, 1).cumsum(2) / torch.arange(1.0, 1025)[:, None]
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)


def settings(**changes) -> long.LongSettings:
    small = long.LongSettings(
        budget=4096, stages=((0.0, 128), (0.5, 256)), tokens_per_step=512, tokens_at_once=256,
        compiled=False, decay_from=0.9,
    )  # fmt: skip
    return replace(small, **changes)


def test_lengths_grow_and_the_run_ends_with_its_tokens(tokenizer, code, tmp_path) -> None:
    trainer = long.LongTrainer(
        micro(), lambda seed: Writer(tokenizer, [code], [1.0], seed), settings()
    )
    lengths, tests = [], []
    original = trainer.micro_step

    def spy():
        lengths.append(trainer.length())
        return original()

    trainer.micro_step = spy
    run(trainer, lambda: tests.append(1) or {"judged": 1.0}, tmp_path / "state", every=1e9)
    assert lengths == [128] * 8 + [256] * 8
    assert trainer.progress.tokens == 4096 and trainer.progress.steps == 8
    assert trainer.done() == 1.0 and tests == [1]
    assert trainer.progress.log[-1]["judged"] == 1.0
    assert (tmp_path / "state").exists()


def test_a_stopped_run_goes_on_where_it_was(tokenizer, code, tmp_path) -> None:
    make = lambda seed: Writer(tokenizer, [code], [1.0], seed)  # noqa: E731
    one = long.LongTrainer(micro(), make, settings(), "words")
    for _ in range(4):
        one.step()
    one.save(tmp_path / "state")
    two = long.LongTrainer(micro(seed=1), make, settings(), "words")
    two.resume(tmp_path / "state")
    assert vars_of(two.progress) == vars_of(one.progress)
    assert two.rate() == one.rate() and two.length() == one.length() == 256
    for (name, a), (_, b) in zip(
        one.model.named_parameters(), two.model.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name
    one.new_data(9)
    two.new_data(9)
    assert one.step() == two.step()


def test_learning_recall_is_seen(tokenizer, code) -> None:
    """A model that is trained on one text gives its answers, an untrained one does not."""
    sample = Writer(tokenizer, [code], [1.0], 0).pairs(128, 4, at_end=True, separator=0)
    model = micro()
    assert not any(long.recall(model, [sample])[0])
    writer = type("Same", (Writer,), {"sample": lambda self, kind, n: sample})
    run_ = settings(
        budget=10**9, stages=((0.0, 127),), tokens_at_once=127, tokens_per_step=127,
        rest_rate=0.03,
    )  # fmt: skip
    trainer = long.LongTrainer(
        model, lambda seed: writer(tokenizer, [code], [1.0], seed), run_, shares={"pairs": 1.0}
    )
    trainer.progress.tokens = 10**8  # past the warm-up
    logs = [trainer.step() for _ in range(40)]
    assert logs[-1]["pairs"] < 0.3 < logs[0]["pairs"]
    assert all(long.recall(model, [sample])[0])


def test_judge_names_every_length(writer) -> None:
    found = long.judge(micro(), writer, (384,))
    assert set(found) == {"code_384", "needles_384", "pairs_384"}
    assert 7 < found["code_384"] < 10 and found["needles_384"] == 0


# --- gates ----------------------------------------------------------------------------------


def observed(n: int = 70):
    model = micro()
    ids = torch.randint(0, 4096, (n,), generator=torch.Generator().manual_seed(1))
    return model, seer.observe(model, ids, [0, 3])


def test_targets_against_loops() -> None:
    model, seen = observed(20)
    rope = model.rope(20, False)
    found = seer.target(seen[3], rope, range(13, 20), 4)
    from mimo_compile.tiny.training_model import rotate

    q, k = (rotate(x.transpose(0, 1), *rope).double() for x in (seen[3].q, seen[3].k))
    for t in range(13, 20):
        best = torch.zeros(5, dtype=torch.float64)
        for h in range(4):
            p = torch.softmax(k[0, : t + 1] @ q[h, t] / 4.0, -1)
            for j in range(t + 1):
                best[j // 4] = max(best[j // 4], p[j])
        torch.testing.assert_close(
            found[t - 13, 0].double(), best / best.sum(), rtol=1e-4, atol=1e-6
        )


def test_gates_learn_what_attention_does() -> None:
    model, seen = observed(256)
    gates = seer.new_gates(model, seer.GateShape(block=8, width=16), 0)
    assert sorted(gates) == [0, 3]
    gate, rope, rows = gates[3], model.rope(256, False), range(128, 256)
    adam = torch.optim.Adam(gate.parameters(), 1e-2)
    losses = []
    before = seer.coverage(gate, seen[3], rope, rows, 6)
    for _ in range(40):
        loss = seer.divergence(gate, seen[3], rope, rows)
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    after = seer.coverage(gate, seen[3], rope, rows, 6)
    assert losses[-1] < 0.8 * losses[0] and min(losses) > 0
    assert before[1] == after[1] and before[0] < after[0] <= after[1] + 1e-6


def test_a_gate_sees_no_later_token() -> None:
    model, seen = observed(64)
    gate = seer.new_gates(model, seer.GateShape(block=8, width=16), 0)[0]
    k = seen[0].k.clone()
    k[41:] += 3.0
    one, two = (gate.scores(seen[0].q[32:42], gate.keys(x), 32, True) for x in (seen[0].k, k))
    assert torch.equal(one[:9], two[:9])
    assert one.shape == (10, 1, 6)
    assert (one[:8, :, 5] == -torch.inf).all()  # not begun yet
    torch.testing.assert_close(one.clamp(min=0).sum(-1), torch.ones(10, 1))


def test_gates_round_trip(tmp_path) -> None:
    gates = seer.new_gates(micro(), seer.GateShape(block=8, width=16), 0)
    seer.save_gates(gates, tmp_path / "gates.safetensors", "tiny-4k")
    again = seer.load_gates(CONFIG, tmp_path / "gates.safetensors")
    assert again.keys() == gates.keys() and again[0].shape == gates[0].shape
    for i, gate in gates.items():
        for name, value in gate.state_dict().items():
            assert torch.equal(value.bfloat16().float(), again[i].state_dict()[name])


def test_training_of_gates_goes_on_and_ends(tokenizer, code) -> None:
    model = micro()
    gates = seer.new_gates(model, seer.GateShape(block=8, width=16), 0)
    progress, saved = Progress(), []
    frozen = {n: p.detach().clone() for n, p in model.named_parameters()}
    writer = Writer(tokenizer, [code], [1.0], 0)
    save = lambda: saved.append(progress.steps)  # noqa: E731
    long.train_gates(model, gates, writer, progress, 3, 320, 1e-2, save)
    assert progress.steps == 3 and saved == [3] and progress.tokens == 960
    assert progress.log[-1]["kl0"] > 0 and progress.log[-1]["kept3_4"] <= 1
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters())


# --- indexers -------------------------------------------------------------------------------


def test_indexers_learn_what_attention_does() -> None:
    """Their target is the mean of the heads' exact weights; single tokens are kept."""
    model, seen = observed(192)
    made = dsa.new_indexers(model, dsa.IndexerShape(heads=3, width=16), 0)
    assert sorted(made) == [0, 3]
    indexer, rope, rows = made[3], model.rope(192, False), range(128, 192)
    wanted = indexer.wanted(seen[3], rope, rows)
    torch.testing.assert_close(wanted.sum(-1), torch.ones(64, 1))
    weights = seer.exact_weights(seen[3], rope, rows)
    torch.testing.assert_close(wanted[:, 0], weights.sum(1) / weights.shape[1])
    adam = torch.optim.Adam(indexer.parameters(), 1e-2)
    losses, before = [], seer.coverage(indexer, seen[3], rope, rows, 12)
    for _ in range(40):
        loss = seer.divergence(indexer, seen[3], rope, rows)
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    after = seer.coverage(indexer, seen[3], rope, rows, 12)
    assert losses[-1] < 0.8 * losses[0] and min(losses) > 0
    assert before[1] == after[1] and before[0] < after[0] <= after[1] + 1e-6


def test_an_indexer_sees_no_later_token() -> None:
    model, seen = observed(64)
    indexer = dsa.new_indexers(model, dsa.IndexerShape(heads=2, width=16), 0)[0]
    y = seen[0].y.clone()
    y[41:] += 3.0
    one, two = (indexer.scores(x, range(32, 44)) for x in (seen[0].y, y))
    assert torch.equal(one[:9], two[:9]) and not torch.equal(one[9:], two[9:])
    assert one.shape == (12, 1, 44) and (one[0, 0, 33:] == -torch.inf).all()


def test_indexers_round_trip(tmp_path) -> None:
    made = dsa.new_indexers(micro(), dsa.IndexerShape(heads=2, width=24), 0)
    dsa.save_indexers(made, tmp_path / "indexers.safetensors", "tiny-4k")
    again = dsa.load_indexers(CONFIG, tmp_path / "indexers.safetensors")
    assert again.keys() == made.keys() and again[0].shape == made[0].shape
    for i, indexer in made.items():
        for name, value in indexer.state_dict().items():
            want = value if "norm" in name else value.bfloat16().float()
            assert torch.equal(want, again[i].state_dict()[name])


# --- HySparse -------------------------------------------------------------------------------


SHAPE = hy.HySparseShape(block=4, budget=16)


def test_hysparse_starts_as_the_hybrid_model() -> None:
    model = micro()
    made = hy.from_hybrid(model, SHAPE, torch.float32)
    ids = torch.randint(0, 4096, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for layer in made.layers:
            if isinstance(layer, hy.SparseLayer):
                layer.self_attn.listed_sink_bias += 40.0  # silent, not merely quiet
        torch.testing.assert_close(made(ids)[0], model(ids)[0], rtol=1e-4, atol=1e-5)


def test_hysparse_selects_the_best_blocks_and_nothing_later() -> None:
    torch.manual_seed(0)
    q, k = 3 * torch.randn(2, 4, 21, 16), torch.randn(2, 1, 21, 16)
    seen = hy.select(q / 4, k, SHAPE, rows=8)
    for b in range(2):
        for t in range(21):
            weights = torch.softmax(q[b, :, t] / 4 @ k[b, 0, : t + 1].T, -1).amax(0)
            blocks = [weights[i : i + 4].max().item() for i in range(0, t + 1, 4)]
            best = sorted(range(len(blocks)), key=lambda i: -blocks[i])[:4]
            wanted = [j // 4 in best and j <= t for j in range(21)]
            assert seen[b, 0, t].tolist() == wanted


def test_hysparse_reaches_beyond_the_window_only_by_its_list() -> None:
    config = replace(
        CONFIG, num_hidden_layers=2, hybrid_layer_pattern=(0, 1), moe_layer_freq=(0, 0)
    )
    plain = TinyModel(config, torch.float32)
    plain.initialise(0)
    model = hy.from_hybrid(plain, hy.HySparseShape(4, 4), torch.float32)
    with torch.no_grad():
        model.layers[0].self_attn.o_proj.weight.zero_()  # the full layer itself adds nothing
        model.layers[1].self_attn.listed_sink_bias.zero_()
    ids = torch.randint(0, 4096, (1, 40), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, 2] = 77
    far = slice(20, None)  # the window is 8
    assert not torch.equal(plain(ids)[0][:, 2:10], plain(other)[0][:, 2:10])
    torch.testing.assert_close(
        _without_far(model, ids)[:, far], _without_far(model, other)[:, far], rtol=0, atol=0
    )
    wide = hy.from_hybrid(plain, hy.HySparseShape(4, 400), torch.float32)
    assert wide.layers[1].self_attn.listed_gate.weight.requires_grad  # a sparse last layer learns
    with torch.no_grad():
        wide.layers[0].self_attn.o_proj.weight.zero_()
        wide.layers[1].self_attn.listed_sink_bias.zero_()
    assert (wide(ids)[0][:, far] - wide(other)[0][:, far]).abs().amax() > 1e-6


def _without_far(model, ids):
    with torch.no_grad():
        model.layers[1].self_attn.listed_sink_bias.fill_(1e4)
        return model(ids)[0]


def test_hysparse_learns_only_attention_and_round_trips(tokenizer, code, tmp_path) -> None:
    base = micro()
    model = hy.from_hybrid(base, SHAPE)
    learned = {n for n, p in model.named_parameters() if p.requires_grad}
    assert learned and all(".self_attn." in n and not n.startswith("layers.3") for n in learned)
    trainer = long.LongTrainer(
        model, lambda seed: Writer(tokenizer, [code], [1.0], seed),
        settings(bias_rate=0.0, budget=10**6),
    )  # fmt: skip
    trainer.progress.tokens = 10**5
    trainer.step()
    trainer.step()
    before = dict(base.state_dict())
    moved = {
        n for n, p in model.state_dict().items() if n not in before or not torch.equal(p, before[n])
    }
    assert moved == learned
    hy.save_hysparse(model, tmp_path / "hysparse.safetensors", "tiny-4k")
    again = hy.load_hysparse(base, tmp_path / "hysparse.safetensors")
    assert again.shape == SHAPE
    for name, value in model.named_parameters():
        kept = value.detach().bfloat16().float() if name in learned else value
        assert torch.equal(kept, dict(again.named_parameters())[name]), name


def test_hysparse_needs_fitting_shapes() -> None:
    with pytest.raises(ValueError, match="draft"):
        hy.HySparseModel(replace(CONFIG, mtp_layers=1), SHAPE)
    with pytest.raises(ValueError, match="global"):
        hy.HySparseModel(replace(CONFIG, hybrid_layer_pattern=(1, 1, 1, 0)), SHAPE)
    with pytest.raises(ValueError, match="shape"):
        hy.HySparseModel(replace(CONFIG, swa_head_dim=32), SHAPE)
    for block, budget, message in (
        (4, 18, "no whole number"),
        (0, 16, "counts"),
        (4, "16", "counts"),
    ):
        with pytest.raises(ValueError, match=message):
            hy.HySparseShape(block, budget)


# --- the command ----------------------------------------------------------------------------


def test_command_trains_everything_from_small_weights(
    tokenizer, code, tmp_path, monkeypatch, capsys
) -> None:
    """`base`, then `gates`, `indexers` and `hysparse` on it, each stopped and taken up again."""
    from mimo_compile.tiny.checkpoint import export, load

    make = lambda seed: Writer(tokenizer, [code], [1.0], seed)  # noqa: E731
    monkeypatch.setattr(long, "writers", lambda tokenizer: (make, make))
    monkeypatch.setattr(long, "judge", lambda model, writer: {"judged": 0.0})
    small = {"stages": ((0.0, 128),), "tokens_at_once": 128, "tokens_per_step": 256}
    monkeypatch.setattr(long, "LongSettings", partial(long.LongSettings, **small))
    start = TinyModel(replace(CONFIG, mtp_layers=1), torch.float32)
    start.initialise(0)
    export(start, tokenizer.to_str(), tmp_path / "start")
    common = ["--work", str(tmp_path / "work"), "--no-compile", "--resume"]

    def command(*args: str) -> list[dict[str, float]]:
        monkeypatch.setattr("sys.argv", ["long_context", *args, *common])
        long.main()
        lines = capsys.readouterr().out.splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    base = ("base", "--init", str(tmp_path / "start"), "--out", str(tmp_path / "base"))
    short = command(*base, "--tokens", "256")
    longer = command(*base, "--tokens", "512")
    assert (short[-1]["step"], longer[-1]["step"]) == (1, 2)
    assert load(tmp_path / "base").config.mtp_layers == 0
    gates = ("gates", "--init", str(tmp_path / "base"), "--out", str(tmp_path / "g.safetensors"))
    more = ("--length", "256", "--block", "8", "--width", "16", "--steps")
    assert command(*gates, *more, "1")[-1]["step"] == 0
    assert command(*gates, *more, "2")[-1]["step"] == 1
    assert sorted(seer.load_gates(CONFIG, tmp_path / "g.safetensors")) == [0, 3]
    found = ("indexers", "--init", str(tmp_path / "base"), "--out", str(tmp_path / "i.safetensors"))
    assert command(*found, *more, "1")[-1]["step"] == 0
    assert command(*found, *more, "2")[-1]["step"] == 1
    assert sorted(dsa.load_indexers(CONFIG, tmp_path / "i.safetensors")) == [0, 3]
    sparse = (
        "hysparse",
        "--init",
        str(tmp_path / "base"),
        "--out",
        str(tmp_path / "h.safetensors"),
    )
    command(*sparse, "--tokens", "256", "--block", "8", "--budget", "32")
    found = hy.load_hysparse(load(tmp_path / "base"), tmp_path / "h.safetensors")
    assert found.shape == hy.HySparseShape(8, 32)
    monkeypatch.setattr("sys.argv", ["long_context", "gates", "--out", "x", *common])
    with pytest.raises(SystemExit):
        long.main()
