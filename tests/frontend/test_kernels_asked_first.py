"""Schemes that a target has no kernels for are refused before any matrix is quantised."""

import pytest

import mimo_compile as mc
from mimo_compile.errors import UsageError
from mimo_compile.frontend.models import build
from mimo_compile.ir.hardware import resolve_target
from mimo_compile.pipeline.source import open_source
from mimo_compile.verify import verify_artifact

pytestmark = pytest.mark.compile


class Quantised(Exception):
    """Something was quantised."""


@pytest.fixture
def untouched(monkeypatch):
    """Fail if anything is quantised."""

    def refuse(*args, **kwargs):
        raise Quantised

    monkeypatch.setattr(build, "quantize", refuse)


@pytest.mark.parametrize(
    ("quant", "named"),
    [("w1.58d", "a16"), ("w1.58dg64a8", "w1.58dg64"), ("w1.58da8g64", "a8g64")],
)
def test_what_has_no_kernel_is_refused_at_once(untouched, tmp_path, quant, named):
    for ask in (mc.compile, mc.tune):
        with pytest.raises(UsageError, match="no kernel") as caught:
            ask("tiny", quant=quant, db=tmp_path / "records.db")
        assert named in str(caught.value) and "targets --formats" in str(caught.value)


@pytest.mark.parametrize(
    ("quant", "target", "what", "other"),
    [
        ("fp8b128", "cuda:sm_90a", "qkv of 352 x 256, 16 tokens, with a16", "fp8b128abf16kv16"),
        ("w6g64a8", "cuda:sm_80", "qkv of 352 x 256, 16 tokens, with a8", "w6g64abf16kv16"),
        ("w4g64a8g64", "cuda:sm_80", "experts of 128 x 256, 16 tokens, with a8g64", "w4g64a8kv16"),
        ("w1.58d", "x86-64-v3", "qkv of 352 x 256 with a16", "w1.58da8"),
    ],
)
def test_activations_that_have_kernels_are_named(untouched, quant, target, what, other):
    """Steps of any number of tokens are asked for: those of few may have kernels that others have not."""
    how = {"max_context": 64, "hardware": resolve_target(target)}
    with pytest.raises(UsageError, match=rf"{what} .* --quant {other} has kernels") as caught:
        open_source("tiny", quant=quant, **how)
    assert "\n" not in str(caught.value)
    with pytest.raises(Quantised):
        open_source("tiny", quant=other, **how)


def test_experts_are_asked_for_too(untouched, tmp_path, monkeypatch):
    from mimo_compile import schedules

    found = schedules.schedules_for
    monkeypatch.setattr(
        schedules, "schedules_for", lambda w, h: [] if w.op == "moe" else found(w, h)
    )
    with pytest.raises(UsageError, match="experts of 128 x 256"):
        mc.compile("tiny", quant="w4g64a8", db=tmp_path / "records.db")


def test_what_has_kernels_is_quantised(untouched, tmp_path):
    for quant, target in (("w1.58da8", "x86-64-v3"), ("w2g64a8", "x86-64-v4"), ("w4", "cpu")):
        with pytest.raises(Quantised):
            mc.compile("tiny", quant=quant, target=target, db=tmp_path / "records.db")


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["w1.58da8", "w2g32a8", "w4g32abf16", "w3g64a8"])
def test_experts_compiled_are_eager(saved, tmp_path, quant):
    source = saved("mimo_v2_flash")[1]
    artifact = mc.compile(source, quant=quant, db=tmp_path / "records.db", max_context=96)
    found = verify_artifact(artifact.save(tmp_path / "model.mimo"), source=source, tokens=64)
    assert found.ok and found.end_to_end is not None
