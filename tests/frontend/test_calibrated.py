"""Whole models calibrated: functions preserved by folding, tokens of experts, text, records, errors."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from mimo_compile.errors import InputError, UsageError
from mimo_compile.frontend.huggingface import load_checkpoint
from mimo_compile.frontend.models import get_family
from mimo_compile.frontend.models.build import Builder
from mimo_compile.frontend.models.calibrated import CalibratedBuilder, Observed, roles
from mimo_compile.frontend.models.family import Fields
from mimo_compile.frontend.weights import open_checkpoint
from mimo_compile.ir.formats import QuantScheme, parse_scheme
from mimo_compile.quantize.calibration import Calibration, repeat_calibration, token_sequences
from mimo_compile.quantize.gptq import gptq
from mimo_compile.runtime.program import Calibrated
from mimo_compile.tiny import corpus

CASES = ["llama-linear-mha", "qwen2", "qwen3", "mimo_v2_flash", "mimo_v2_flash-groups"]
FOLDED = [
    *((case, quant) for case in CASES for quant in ("w2g32", "w1.58")),
    ("qwen2_moe", "w2g32"),
    pytest.param("olmoe-clipped", "w2g32", marks=pytest.mark.slow),
]
IDS = torch.randint(0, 257, (6, 48), generator=torch.Generator().manual_seed(0), dtype=torch.int32)


def byte_tokenizer():
    """One token a byte, ids 0 to 255."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer.to_str().encode()


@pytest.fixture
def builder(saved):
    """Return a function: case, scheme, calibration -> a builder that calibrates on random tokens."""

    def make(case, quant, calibration, ids=IDS):
        checkpoint = open_checkpoint(saved(case)[1])
        fields = Fields(checkpoint.config, checkpoint.config_file)
        family = get_family(fields.get("model_type"), fields.file)
        config = family.configure(fields, checkpoint).with_context(64)
        scheme = parse_scheme(quant)
        return CalibratedBuilder(config, family, checkpoint, scheme, calibration, ids)

    return make


@pytest.mark.parametrize(("case", "quant"), FOLDED)
def test_folding_leaves_the_float_model_as_it_was(builder, case, quant):
    awq = builder(case, quant, Calibration("awq"))
    plain = Builder(awq.config, awq.family, awq._folded._base, QuantScheme(None)).build()
    kept = {}
    forget = awq._folded.forget
    awq._folded.forget = lambda: (kept.update(awq._folded._changed), forget())
    awq.build()
    awq._folded._changed.update(kept)
    folded = Builder(awq.config, awq.family, awq._folded, QuantScheme(None)).build()
    moved = [n for n, t in kept.items() if not torch.equal(t, awq._folded._base.real(n))]
    if quant == "w2g32":  # one scale for all makes scaling channels pay less often
        assert len(moved) > len(awq.config.layers)
    ids = [int(i) for i in IDS[0]]
    want, got = plain.prefill(ids)[1], folded.prefill(ids)[1]
    assert float((want - got).abs().max() / want.abs().max()) < 1e-5


def test_experts_see_the_tokens_that_are_routed_to_them(builder):
    gptq_builder = builder("mimo_v2_flash", "w3g32", Calibration("gptq"))
    names = gptq_builder.family.layer_names(
        gptq_builder.config.layers[1], "model.layers.1.", gptq_builder.checkpoint
    )
    found = roles(names, gptq_builder.config.layers[1])
    assert found[names["v"]] == ("attention.qkv", None)
    seen = {}
    original = Observed.done

    def done(self):
        original(self)
        if self.experts is not None and not seen:
            x, ids = self.routed[0]
            for e in range(len(self.experts.w13)):
                rows = x[(ids == e).any(1)]
                first = self._compute("w13", e)
                assert first.count == len(rows)
                torch.testing.assert_close(first.hessian * len(rows), rows.mT @ rows)
                up = rows @ self.experts.w13[e].mT
                gate, up = up.chunk(2, -1)
                hidden = torch.nn.functional.silu(gate) * up
                torch.testing.assert_close(
                    self._compute("w2", e).hessian * len(rows), hidden.mT @ hidden
                )
            seen["count"] = self.average("w13").count
            assert seen["count"] == ids.numel()

    Observed.done = done
    try:
        gptq_builder.build()
    finally:
        Observed.done = original
    assert seen


def test_rare_experts_take_the_average_and_the_log_says_so(builder):
    lines = []
    calibration = Calibration("gptq", log=lines.append)
    builder("mimo_v2_flash", "w3g32", calibration, IDS[:1, :9]).build()
    assert any("too few tokens reach experts" in line for line in lines)
    assert any(line.startswith("layers.0: squared error") for line in lines)
    lines.clear()
    builder("mimo_v2_flash", "w3g32", calibration).build()
    assert not any("too few" in line for line in lines)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_calibration_repeats_exactly(builder, method):
    first, second = (
        builder("mimo_v2_flash", "w3g32a8", Calibration(method)).build() for _ in range(2)
    )
    for a, b in zip(first.stages(), second.stages(), strict=True):
        for (name, x), (_, y) in zip(
            a.module.state_dict().items(), b.module.state_dict().items(), strict=True
        ):
            assert torch.equal(x, y), (a.name, name)


@pytest.mark.parametrize("quant", ["w2g32", "w2g32a8", "anf3g32"])
@pytest.mark.parametrize(
    "case", ["llama", "mimo_v2_flash", pytest.param("qwen2_moe", marks=pytest.mark.slow)]
)
def test_gptq_is_nearer_to_the_float_model(builder, saved, case, quant):
    calibrated = builder(case, quant, Calibration("gptq")).build()
    plain = load_checkpoint(saved(case)[1], parse_scheme("none"), 64).decoder
    rounded = load_checkpoint(saved(case)[1], parse_scheme(quant), 64).decoder
    off = []
    for model in (calibrated, rounded):
        total = 0.0
        for ids in IDS:
            want = plain.prefill([int(i) for i in ids])[0]
            total += float((model.prefill([int(i) for i in ids])[0] - want).square().sum())
        off.append(total)
    assert off[0] < off[1]


def test_a_layer_is_calibrated_on_what_the_quantised_ones_before_give(builder, saved, monkeypatch):
    """The second layer's moments are those of the first one's quantised outputs."""
    import mimo_compile.frontend.models.calibrated as module

    seen = {}

    def watch(weight, moments, fmt, what):
        seen[what] = moments
        return gptq(weight, moments, fmt, what)

    monkeypatch.setattr(module, "gptq", watch)
    model = builder("llama", "w2g32", Calibration("gptq")).build()
    total = torch.zeros(64, 64)

    def add(_, args):
        nonlocal total
        total = total + args[0].mT @ args[0]

    hook = model.stage("layers.1").module.attention.qkv.register_forward_pre_hook(add)
    for ids in IDS:
        model.prefill([int(i) for i in ids])
    hook.remove()
    want = seen["model.layers.1.self_attn.q_proj.weight"]
    torch.testing.assert_close(want.hessian, total / IDS.numel(), rtol=1e-3, atol=1e-4)


# -- text ---------------------------------------------------------------------------------------


def test_default_text_is_never_held_out(monkeypatch):
    files = [corpus.SourceFile(f"{c}.py", c * 400) for c in "abcdef"]
    split = corpus.Corpus(tuple(files[:3]), tuple(files[3:5]), tuple(files[5:]))
    monkeypatch.setattr(corpus, "collect", lambda: split)
    found = token_sequences(
        Calibration("gptq", sequences=40, length=50), byte_tokenizer(), 256, 64, 64
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    assert found.shape == (40, 50)
    assert {alphabet[i] for i in found.unique().tolist()} == set("abc")


def test_number_of_sequences_grows_with_the_model(tmp_path):
    (tmp_path / "book.txt").write_text("x" * 100_000)
    calibration = Calibration("gptq", tmp_path / "book.txt")
    sizes = [
        len(token_sequences(calibration, byte_tokenizer(), 256, hidden, 512))
        for hidden in (64, 1024, 1 << 14)
    ]
    assert sizes == [16, 32, 128]
    assert token_sequences(calibration, byte_tokenizer(), 256, 64, 100).shape == (16, 100)


def test_texts_follow_the_seed(tmp_path):
    text = "".join(chr(33 + i % 90) for i in range(5000))
    (tmp_path / "book.txt").write_text(text)

    def ids(seed):
        calibration = Calibration("awq", tmp_path / "book.txt", 4, 100, seed)
        return token_sequences(calibration, byte_tokenizer(), 256, 64, 512)

    assert torch.equal(ids(0), ids(0)) and not torch.equal(ids(0), ids(1))


def test_texts_that_cannot_be_used(tmp_path):
    def refused(match, path, tokenizer=None, vocab=256):
        given = byte_tokenizer() if tokenizer is None else tokenizer
        with pytest.raises(InputError, match=match):
            token_sequences(Calibration("gptq", path), given or None, vocab, 64, 512)

    (tmp_path / "short.txt").write_text("x" * 100)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe" * 600)
    (tmp_path / "good.txt").write_text("z" * 1000)
    refused("cannot be read", tmp_path / "absent.txt")
    refused("not a regular file", tmp_path)
    refused("has 100 tokens", tmp_path / "short.txt")
    refused("cannot be read", tmp_path / "bytes.txt")
    refused("needs a tokenizer", tmp_path / "good.txt", b"")
    refused("the model has 3", tmp_path / "good.txt", vocab=3)


# -- loading ------------------------------------------------------------------------------------


def test_loading_records_what_was_done(saved, tmp_path):
    import shutil

    folder = shutil.copytree(saved("llama")[1], tmp_path / "m")
    (folder / "tokenizer.json").write_bytes(byte_tokenizer())
    (tmp_path / "book.txt").write_text("It was the best of times, it was the worst. " * 40)
    calibration = Calibration("gptq", tmp_path / "book.txt", 3, 40, 5)
    loaded = load_checkpoint(folder, parse_scheme("w3g32"), 64, calibration)
    record = loaded.calibrated
    assert (record.method, record.text, record.sequences, record.length, record.seed) == (
        "gptq", "book.txt", 3, 40, 5,
    )  # fmt: skip
    rounded = load_checkpoint(folder, parse_scheme("w3g32"), 64, Calibration())
    assert rounded.calibrated is None
    codes = [m.decoder.stage("layers.0").module.attention.qkv.codes for m in (loaded, rounded)]
    assert not np.array_equal(*codes)


def test_what_cannot_be_calibrated(saved, tmp_path):
    import shutil

    folder = shutil.copytree(saved("llama")[1], tmp_path / "m")
    (folder / "tokenizer.json").write_bytes(byte_tokenizer())
    (tmp_path / "book.txt").write_text("word " * 400)
    calibration = Calibration("gptq", tmp_path / "book.txt", 3, 40)
    for quant in ("none", "complex2wl"):
        with pytest.raises(UsageError, match="--calibrate gptq"):
            load_checkpoint(folder, parse_scheme(quant), 64, calibration)
    with pytest.raises(InputError, match="needs a tokenizer"):
        load_checkpoint(saved("llama")[1], parse_scheme("w4g32"), 64, calibration)


def test_a_record_says_how_to_calibrate_again(tmp_path):
    def quiet(text):
        pass

    standard = Calibrated("gptq", "", 16, 512, 3, "0" * 64)
    assert repeat_calibration(standard, None, quiet) == Calibration("gptq", None, 16, 512, 3)
    assert repeat_calibration(None, None, quiet) is None
    assert repeat_calibration(None, Calibration(), quiet) is None
    book = Calibrated("awq", "book.txt", 4, 64, 0, "0" * 64)
    asked = Calibration("awq", tmp_path / "b.txt", seed=9)
    again = repeat_calibration(book, asked, quiet)
    assert again == Calibration("awq", tmp_path / "b.txt", 4, 64, 0)
    for record, other, match in (
        (book, None, "awq:path/to/book.txt"),
        (standard, Calibration("awq"), "chosen by gptq, not awq"),
        (None, Calibration("gptq"), "chosen by rtn, not gptq"),
        (standard, Calibration("gptq", tmp_path / "b.txt"), "not on a file"),
    ):
        with pytest.raises(UsageError, match=match):
            repeat_calibration(record, other, quiet)
