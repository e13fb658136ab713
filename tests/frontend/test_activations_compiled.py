"""Activation formats, compiled: artifacts against eager torch that rounds and quantises the same."""

import pytest

import mimo_compile as mc
from mimo_compile.errors import UsageError
from mimo_compile.frontend.huggingface import load_checkpoint
from mimo_compile.ir.formats import parse_scheme
from mimo_compile.verify import verify_artifact

pytestmark = pytest.mark.compile
FAST = ("w4g32a8g32", "abf16")


def prove(saved, tmp_path, case, quant, context=96, tokens=64):
    source = saved(case)[1]
    artifact = mc.compile(source, quant=quant, db=tmp_path / "records.db", max_context=context)
    found = verify_artifact(artifact.save(tmp_path / "model.mimo"), source=source, tokens=tokens)
    assert found.ok and found.end_to_end is not None
    act = f"a{parse_scheme(quant).act}"
    assert artifact.manifest.quant == str(parse_scheme(quant))
    matmuls = [c for c in artifact.manifest.plan if c.workload.startswith(("mpgemm", "moe"))]
    assert sum(f"a={act}" in c.workload for c in matmuls) >= 4, "the router alone stays float"


@pytest.mark.parametrize("quant", FAST)
def test_compiled_is_eager(saved, tmp_path, quant):
    prove(saved, tmp_path, "llama-linear-mha", quant, context=32, tokens=32)  # no steps of 64


@pytest.mark.slow
@pytest.mark.parametrize("case", ["llama-linear-mha", "mimo_v2_flash"])
@pytest.mark.parametrize(
    "quant",
    [*FAST, "af16", "bf16abf16", "w4g32abf16", "w8a8g64", "w4zg32af16", "nf4abf16", "w2g32a8g64"],
)
def test_every_format(saved, tmp_path, case, quant):
    prove(saved, tmp_path, case, quant)


def test_float_weights_take_no_int8_activations(saved):
    source = saved("llama-linear-mha")[1]
    for quant in ("a8", "a8g64", "bf16a8"):
        with pytest.raises(UsageError, match="floats"):
            load_checkpoint(source, parse_scheme(quant))


def test_bf16_rounds_what_stays_float(saved):
    decoder = load_checkpoint(saved("llama-linear-mha")[1], parse_scheme("bf16abf16")).decoder
    layers = [m for stage in decoder.stages() for m in stage.module.modules()]
    matmuls = [m for m in layers if type(m).__name__ == "QuantLinear"]
    assert matmuls and {(m.w, m.a) for m in matmuls} == {("bf16", "abf16")}
