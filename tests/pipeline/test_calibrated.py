"""A calibrated model compiled: the artifact computes what the calibrated eager model does."""

import shutil

import pytest

import mimo_compile as mc
from mimo_compile.errors import InputError, UsageError
from mimo_compile.quantize.calibration import Calibration
from mimo_compile.verify import verify_artifact


@pytest.fixture
def folder(tmp_path):
    """The built-in model's folder under another name, with a text to calibrate on."""
    from mimo_compile.frontend.huggingface import resolve_source

    place = tmp_path / "model"
    place.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(resolve_source("tiny") / name, place)
    (tmp_path / "book.txt").write_text("def f(x):\n    return x + 1\n\n" * 60)
    return place


@pytest.mark.slow
def test_verify_calibrates_again(folder, tmp_path):
    text = tmp_path / "book.txt"
    calibration = Calibration("gptq", text, 2, 64)
    artifact = mc.compile(
        folder, quant="w4g64a16", calibrate=calibration, db=tmp_path / "r.db", max_context=64
    )
    path = artifact.save(tmp_path / "m.mimo")
    assert artifact.manifest.calibrated.text == "book.txt"
    found = verify_artifact(path, source=folder, calibration=calibration, tokens=24)
    assert found.ok and found.end_to_end.p95_error < 1e-3
    with pytest.raises(UsageError, match=r"gptq:path/to/book\.txt"):
        verify_artifact(path, source=folder, tokens=24)
    text.write_text(text.read_text()[::-1])
    with pytest.raises(InputError, match="differs from the one"):
        verify_artifact(path, source=folder, calibration=calibration, tokens=24)


@pytest.mark.slow
def test_the_builtin_model_compiled_equals_eager(tmp_path):
    artifact = mc.compile("tiny", quant="w2g64a8", calibrate="gptq", db=tmp_path / "r.db")
    found = verify_artifact(artifact.save(tmp_path / "t.mimo"), perplexity_tokens=4096)
    assert found.ok and abs(found.perplexity.difference) < 1e-3
    rounded = mc.compile("tiny", quant="w2g64a8", db=tmp_path / "r.db")
    plain = verify_artifact(rounded.save(tmp_path / "r.mimo"), perplexity_tokens=1024)
    assert found.perplexity.compiled < 0.6 * plain.perplexity.compiled


def test_modules_are_not_calibrated(tmp_path):
    import torch

    with pytest.raises(UsageError, match="--calibrate gptq is for model folders"):
        mc.compile(
            torch.nn.Linear(4, 4), example_inputs=(torch.zeros(1, 4),), calibrate="gptq",
            db=tmp_path / "r.db",
        )  # fmt: skip
