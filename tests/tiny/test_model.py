"""The built-in model: its files, its tokenizer, its training code and its yardstick."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

torch = pytest.importorskip("torch")

from micro_models import FOLDER, MICRO, untrained

safetensors = pytest.importorskip("safetensors")

from mimo_compile.tiny import corpus as text
from mimo_compile.tiny.checkpoint import export, load, to_tensors
from mimo_compile.tiny.evaluate import greedy_chain, guesses, perplexity, teacher_forced
from mimo_compile.tiny.ngram import KneserNeyTrigram
from mimo_compile.tiny.optimizer import orthogonalise
from mimo_compile.tiny.train import HEADS_AHEAD, Settings, Trainer
from mimo_compile.tiny.training_config import TinyConfig, read_config
from mimo_compile.tiny.training_model import TinyModel, attend, rotary_tables, rotate
from mimo_compile.tiny.training_ops import grouped_linear, linear_cross_entropy, route

pytestmark = pytest.mark.compile

FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


@pytest.fixture(scope="module")
def shipped() -> TinyModel:
    return load(FOLDER)


# --- the shipped folder ---------------------------------------------------------------------


def test_files_are_there_and_small() -> None:
    for name in FILES:
        assert (FOLDER / name).stat().st_size > 0, name
    shipped_files = [f for f in FOLDER.iterdir() if f.is_file()]
    assert sum(f.stat().st_size for f in shipped_files) <= 15_000_000


def test_config_has_the_published_fields() -> None:
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["MiMoV2FlashForCausalLM"]
    assert config["model_type"] == "mimo_v2_flash"
    assert config["hybrid_layer_pattern"] == [0, 1, 1, 1, 1, 0]
    assert config["moe_layer_freq"] == [0, 1, 1, 1, 1, 1]
    assert config["sliding_window"] == 128
    assert config["topk_method"] == "noaux_tc"
    assert config["scoring_func"] == "sigmoid"
    assert config["tie_word_embeddings"] is True
    assert config["routed_scaling_factor"] is None
    assert config["n_shared_experts"] is None
    assert "num_nextn_predict_layers" not in config
    for name in ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size"):
        assert config[name] % 64 == 0, name
    assert read_config(FOLDER) == TinyConfig()


def test_tensor_names_shapes_and_types() -> None:
    from safetensors import safe_open

    with safe_open(FOLDER / "model.safetensors", framework="pt") as file:
        found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        shapes = {name: tuple(s.get_shape()) for name, s in found.items()}
        types = {name: s.get_dtype() for name, s in found.items()}
    expected = {
        "model.embed_tokens.weight": (4096, 256),
        "model.norm.weight": (256,),
    }
    for layer in range(6):
        stem, windowed = f"model.layers.{layer}.", 1 <= layer <= 4
        expected |= attention(stem, windowed)
        expected[stem + "input_layernorm.weight"] = (256,)
        expected[stem + "post_attention_layernorm.weight"] = (256,)
        if layer == 0:
            expected |= mlp(stem + "mlp.", 512)
            continue
        expected[stem + "mlp.gate.weight"] = (8, 256)
        expected[stem + "mlp.gate.e_score_correction_bias"] = (8,)
        for expert in range(8):
            expected |= mlp(f"{stem}mlp.experts.{expert}.", 128)
    for head in range(3):
        stem = f"model.mtp.layers.{head}."
        expected |= attention(stem, windowed=True)
        expected |= mlp(stem + "mlp.", 64)
        expected[stem + "eh_proj.weight"] = (256, 512)
        for norm in ("enorm", "hnorm", "input_layernorm", "pre_mlp_layernorm", "final_layernorm"):
            expected[f"{stem}{norm}.weight"] = (256,)
    assert shapes == expected
    f32 = {name for name, kind in types.items() if kind == "F32"}
    assert f32 == {name for name in shapes if ".mlp.gate." in name}
    assert {kind for name, kind in types.items() if name not in f32} == {"BF16"}


def attention(stem: str, windowed: bool) -> dict[str, tuple[int, ...]]:
    """Expected attention tensors of one layer."""
    kv = 2 if windowed else 1
    shapes: dict[str, tuple[int, ...]] = {
        stem + "self_attn.q_proj.weight": (256, 256),
        stem + "self_attn.k_proj.weight": (64 * kv, 256),
        stem + "self_attn.v_proj.weight": (32 * kv, 256),
        stem + "self_attn.o_proj.weight": (256, 128),
    }
    if windowed:
        shapes[stem + "self_attn.attention_sink_bias"] = (4,)
    return shapes


def mlp(stem: str, width: int) -> dict[str, tuple[int, ...]]:
    """Expected SwiGLU tensors."""
    return {
        stem + "gate_proj.weight": (width, 256),
        stem + "up_proj.weight": (width, 256),
        stem + "down_proj.weight": (256, width),
    }


def test_weights_are_finite_and_trained(shipped: TinyModel) -> None:
    for name, parameter in shipped.named_parameters():
        assert torch.isfinite(parameter).all(), name
        assert parameter.std() > 0, name


PROGRAM = '''def read_config(path):
    """Read the configuration file and return a dictionary."""
    with open(path, encoding="utf-8") as file:
        lines = file.readlines()
    result = {}
    for line in lines:
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        key, value = line.split("=", 1)
        result[key.strip()] = value.strip()
    return result


class Reader:
    def __init__(self, stream):
        self.stream = stream
        self.closed = False

    def close(self):
        if not self.closed:
            self.stream.close()
            self.closed = True
'''


def test_shipped_model_knows_python(shipped: TinyModel, tokenizer: Tokenizer) -> None:
    ids = np.asarray([0, *tokenizer.encode(PROGRAM).ids], dtype=np.uint16)
    assert perplexity(shipped, ids, 512, 256) < 6.0
    agreement = teacher_forced(shipped, ids, length=len(ids))
    assert agreement[0] > 0.5


# --- the tokenizer --------------------------------------------------------------------------


def test_tokenizer_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == 4096
    assert sorted(tokenizer.get_vocab().values()) == list(range(4096))
    assert tokenizer.token_to_id(text.END_OF_TEXT) == 0


@settings(max_examples=200)
@given(st.text())
def test_tokenizer_round_trip(tokenizer: Tokenizer, sample: str) -> None:
    ids = tokenizer.encode(sample, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == sample


@settings(max_examples=100)
@given(st.text(alphabet=" \t\n\r_.()abZ09é€"))
def test_tokenizer_round_trip_of_white_space(tokenizer: Tokenizer, sample: str) -> None:
    ids = tokenizer.encode(sample, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == sample


def test_tokenizer_makes_indentation_cheap(tokenizer: Tokenizer) -> None:
    for depth in (4, 8, 12):
        assert len(tokenizer.encode("\n" + " " * depth + "return").ids) == 2
    ids = tokenizer.encode(PROGRAM).ids
    assert len(PROGRAM) / len(ids) > 3.0


# --- the corpus -----------------------------------------------------------------------------


def test_split_is_by_path_and_leaves_no_leak(tmp_path: Path) -> None:
    names = [f"module{i}.py" for i in range(200)]
    for name in names:
        (tmp_path / name).write_text(f"# {name}\nx = 1\n", encoding="utf-8")
    (tmp_path / "copy.py").write_text("# module0.py\nx = 1\n", encoding="utf-8")
    (tmp_path / "broken.py").write_bytes(b"\xff\xfe")
    (tmp_path / "test").mkdir()
    for name in names:
        (tmp_path / "test" / f"test_{name}").write_text(f"# t {name}\n", encoding="utf-8")
    (tmp_path / "idlelib").mkdir()
    (tmp_path / "idlelib" / "editor.py").write_text("pass\n", encoding="utf-8")
    corpus = text.collect(tmp_path)
    held = {f.path for f in corpus.held_out}
    kept = {f.path for f in corpus.train}
    assert held == {n for n in names if text.is_held_out(n)}
    assert 2 <= len(held) <= 25
    assert not held & kept
    assert not {f"test/test_{n}" for n in held} & {f.path for f in corpus.tests}
    assert len(corpus.tests) == len(names) - len(held)
    assert not any("idlelib" in p or "broken" in p for p in held | kept)
    assert len(kept) + len(held) == len(names)  # of two equal files one is kept
    assert text.provenance(corpus) == text.provenance(text.collect(tmp_path))


def test_tables_are_told_from_code() -> None:
    assert text.looks_like_table("x = [" + "0x12, 0xff, " * 1000 + "]")
    assert not text.looks_like_table(PROGRAM * 10)


# --- the mathematics ------------------------------------------------------------------------


@pytest.mark.parametrize("length", [5, 8, 16, 24])
@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("with_sink", [False, True])
def test_attention_against_loops(length: int, window: int | None, with_sink: bool) -> None:
    torch.manual_seed(length)
    q = torch.randn(2, 4, length, 6, dtype=torch.float64)
    k = torch.randn(2, 2, length, 6, dtype=torch.float64)
    v = torch.randn(2, 2, length, 3, dtype=torch.float64)
    sink = torch.tensor([-1.0, 0.0, 2.0, 5.0]) if with_sink else None
    got = attend(q.float(), k.float(), v.float(), window, sink)
    for b in range(2):
        for h in range(4):
            for i in range(length):
                first = 0 if window is None else max(0, i - window + 1)
                scores = k[b, h // 2, first : i + 1] @ q[b, h, i]
                weights = torch.exp(scores)
                total = weights.sum() + (0.0 if sink is None else math.exp(float(sink[h])))
                want = (weights / total) @ v[b, h // 2, first : i + 1]
                torch.testing.assert_close(got[b, h, i].double(), want, rtol=1e-4, atol=1e-5)


def test_rotation_leaves_the_rest_alone_and_keeps_lengths() -> None:
    x = torch.randn(1, 2, 5, 16)
    y = rotate(x, *rotary_tables(5, 8, 10_000.0))
    assert torch.equal(y[..., 8:], x[..., 8:])
    assert torch.equal(y[:, :, 0], x[:, :, 0])
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    # scores depend on the distance only
    one = rotate(x[:, :, :1].expand(1, 2, 5, 16), *rotary_tables(5, 8, 10_000.0))
    dots = one @ one.transpose(-1, -2)
    torch.testing.assert_close(dots[0, 0, 0, 1], dots[0, 0, 3, 4], rtol=1e-5, atol=1e-5)


def test_router_bias_changes_the_choice_only() -> None:
    x, router = torch.randn(50, 8), torch.randn(6, 8)
    bias = torch.tensor([0.0, 0.0, 9.0, 0.0, 0.0, 0.0])
    weights, chosen = route(x, router, bias, 2)
    assert (chosen == 2).any(-1).all()
    scores = torch.sigmoid(x @ router.T).gather(1, chosen)
    torch.testing.assert_close(weights, scores / scores.sum(-1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_linear_with_an_empty_group(dtype: torch.dtype) -> None:
    x, w = torch.randn(24, 16).to(dtype), torch.randn(3, 32, 16).to(dtype)
    got = grouped_linear(x, w, torch.tensor([8, 8, 24], dtype=torch.int32))
    want = torch.cat((x[:8] @ w[0].T, x[8:] @ w[2].T))
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-1 if dtype == torch.bfloat16 else 1e-5)


def test_cross_entropy_and_its_gradients() -> None:
    x = torch.randn(30, 8, requires_grad=True)
    table = torch.randn(20, 8, requires_grad=True)
    target = torch.randint(0, 20, (30,))
    got = linear_cross_entropy(x, table, target, chunk=7)
    want = torch.nn.functional.cross_entropy(x @ table.T, target)
    torch.testing.assert_close(got, want)
    for a, b in zip(
        torch.autograd.grad(got * 3, (x, table)),
        torch.autograd.grad(want * 3, (x, table)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 16, 8), (1, 8, 16), (3, 8, 8)])
def test_orthogonalise(shape: tuple[int, int, int]) -> None:
    singular = torch.linalg.svdvals(orthogonalise(torch.randn(shape)).float())
    assert singular.min() > 0.4
    assert singular.max() < 1.4


def test_window_bounds_what_a_token_can_reach() -> None:
    """In a model of sliding-window layers only, influence ends after layers x (window - 1)."""
    config = TinyConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        hybrid_layer_pattern=(1,),
        moe_layer_freq=(0,),
        sliding_window=8,
        intermediate_size=32,
        mtp_layers=0,
    )
    model = TinyModel(config, torch.float32)
    model.initialise(0)
    ids = torch.randint(0, 64, (1, 20))
    other = ids.clone()
    other[0, 4] = (other[0, 4] + 1) % 64
    changed = (model(ids)[0] - model(other)[0]).abs().amax(-1)[0] > 1e-7
    assert changed.nonzero().flatten().tolist() == list(range(4, 12))


def test_mtp_head_reads_the_token_first() -> None:
    model = untrained()
    hidden, ids = torch.randn(1, 6, 32), torch.randint(0, 64, (1, 6))
    before = model.draft(0, hidden, ids)
    with torch.no_grad():
        model.mtp[0].eh_proj.weight[:, 32:] = 0.0  # the hidden state's half
    torch.testing.assert_close(model.draft(0, hidden, ids), model.draft(0, hidden * 2, ids))
    assert not torch.allclose(before, model.draft(0, hidden, ids))


# --- training, export, evaluation -----------------------------------------------------------


def test_training_lowers_the_loss_and_goes_on_from_its_state(tmp_path: Path) -> None:
    tokens = np.tile(np.arange(1, 33, dtype=np.uint16), 40)
    options = Settings(length=16, micro_batch=4, accumulate=1, compiled=False, tests_share=0.0)
    trainer = Trainer(untrained(compute=torch.bfloat16), tokens, tokens[:0], options)
    trainer.progress.minutes = 0.3 * options.minutes  # past the warm-up
    losses = [trainer.step() for _ in range(20)]
    assert losses[-1]["loss"] < losses[0]["loss"] - 1.0
    assert losses[-1]["mtp0"] < losses[0]["mtp0"]
    trainer.save(tmp_path / "state")
    again = Trainer(untrained(seed=1, compute=torch.bfloat16), tokens, tokens[:0], options)
    again.resume(tmp_path / "state")
    assert again.progress == trainer.progress
    assert abs(again.step()["loss"] - losses[-1]["loss"]) < 0.5


def test_windows_hold_the_targets_of_all_heads() -> None:
    assert TinyConfig().mtp_layers == HEADS_AHEAD


def test_balancing_moves_the_bias_towards_idle_experts() -> None:
    trainer = Trainer(
        untrained(),
        np.zeros(200, dtype=np.uint16),
        np.zeros(0, dtype=np.uint16),
        Settings(length=16, compiled=False),
    )
    trainer._balance(torch.tensor([[10.0, 2, 2, 2], [4, 4, 4, 4]]), 0.5)
    biases = [trainer.model.layers[i].mlp.e_score_correction_bias.tolist() for i in (1, 2)]
    assert biases == [[-0.5, 0.5, 0.5, 0.5], [0.0] * 4]


def test_export_and_load_round_trip(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = untrained()
    export(model, tokenizer.to_str(), tmp_path)
    again = load(tmp_path)
    assert again.config == MICRO
    first, second = to_tensors(model), to_tensors(again)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {f.name for f in tmp_path.iterdir()} == set(FILES)


def test_perplexity_does_not_depend_on_the_windows_when_they_hold_all() -> None:
    model = untrained()
    tokens = np.random.default_rng(0).integers(0, 64, 33).astype(np.uint16)
    whole = perplexity(model, tokens, 64, 64)
    ids = torch.from_numpy(tokens.astype(np.int64))
    loss = torch.nn.functional.cross_entropy(model.logits(model(ids[None, :-1])[0])[0], ids[1:])
    assert whole == pytest.approx(math.exp(loss.item()), rel=1e-5)
    assert perplexity(model, tokens, 16, 8) == pytest.approx(whole, rel=0.1)


def test_a_head_that_copies_the_model_is_always_accepted() -> None:
    """Heads whose answer is the model's own give an acceptance length of heads + 1."""
    model = untrained()
    tokens = np.random.default_rng(1).integers(1, 64, 400).astype(np.uint16)
    with torch.no_grad():
        model.embed_tokens[7] = 10.0 * torch.ones(32)
        for norm in (model.norm, *(head.final_layernorm for head in model.mtp)):
            norm.weight.zero_()  # all logits equal: every argmax is token 0
    main, heads = guesses(model, torch.from_numpy(tokens[:50].astype(np.int64)))
    assert not main.any() and not heads.any()
    assert teacher_forced(model, tokens, length=64) == [1.0, 1.0, 1.0]


def test_greedy_chain_counts() -> None:
    model = untrained(seed=3)
    tokens = np.random.default_rng(2).integers(1, 64, 400).astype(np.uint16)
    found = greedy_chain(model, tokens, prompts=2, prompt=16, count=20)
    assert 1.0 <= found.mean_length <= 4.0
    assert found.mean_length == pytest.approx(1.0 + sum(found.chain_rates))
    assert found.chain_rates == sorted(found.chain_rates, reverse=True)


def test_kneser_ney_sums_to_one_and_beats_a_uniform_guess() -> None:
    rng = np.random.default_rng(0)
    stream = np.cumsum(rng.integers(0, 3, 4000)) % 37
    model = KneserNeyTrigram([stream[:3000]], vocab=40)
    words = np.arange(40)
    for before, last in ((1, 2), (5, 7), (39, 38), (0, 39)):
        p = model.probability(np.full(40, before), np.full(40, last), words)
        assert (p > 0).all()
        assert p.sum() == pytest.approx(1.0, abs=1e-12)
    assert model.perplexity(stream[3000:]) < 5.0


def test_bad_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="one entry per layer"):
        TinyConfig(num_hidden_layers=5)
    with pytest.raises(ValueError, match="even"):
        TinyConfig(partial_rotary_factor=0.334)
