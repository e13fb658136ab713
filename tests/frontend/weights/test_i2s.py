"""I2_S of bitnet.cpp: three layouts that only its writer knows apart."""

import json
import struct

import numpy as np
import pytest

from mimo_compile.errors import InputError
from mimo_compile.frontend.huggingface import load_checkpoint
from mimo_compile.frontend.weights import open_checkpoint
from mimo_compile.ir.formats import parse_scheme

pytestmark = pytest.mark.compile


def packed(trits, layout, scale):
    """Return the bytes of a matrix, weight by weight."""
    n, k = len(trits), len(trits[0])
    out = [0] * (n * k // 4)
    for r, row in enumerate(trits):
        for c, t in enumerate(row):
            flat = r * k + c
            if layout == "rows":
                byte, field = r // 4 * k + c, r % 4
            else:
                stride = {"x86": 32, "arm": 16}[layout]
                block, inside = divmod(flat, 4 * stride)
                byte, field = block * stride + inside % stride, inside // stride
            out[byte] |= (t + 1) << (6 - 2 * field)
    return bytes(out) + struct.pack("<f", scale) + b"\0" * 28


def model(kit, folder, layout, said=None):
    folder.mkdir()
    rng = np.random.default_rng(2)
    plain, real, stored = kit.plain_tensors(rng), {}, {}
    for name, (n, k) in kit.matrix_shapes().items():
        trits = rng.integers(-1, 2, (n, k))
        scale = np.float32(rng.uniform(0.01, 0.04))
        real[name] = trits.astype(np.float32) * scale
        heads = {"q_proj": kit.HEADS, "k_proj": kit.KV}.get(name.split(".")[-2], 0)
        rows = kit.paired_rows(trits.tolist(), heads) if heads else trits.tolist()
        stored[kit.gguf_name(name)] = ((n, k), 36, packed(rows, layout, scale))
    floats = {kit.gguf_name(n): kit.floats_of(t) for n, t in plain.items()}
    kit.write_gguf(folder / "model.gguf", kit.gguf_metadata(), {**floats, **stored})
    settings = {"quant_method": "i2_s", "layout": said or layout}
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))
    return real, plain


@pytest.mark.parametrize("layout", ["x86", "arm", "rows"])
def test_whole_models_equal_their_floats(kit, tmp_path, layout):
    real, plain = model(kit, tmp_path / "m", layout)
    checkpoint = open_checkpoint(tmp_path / "m")
    for name, weight in real.items():
        assert np.array_equal(checkpoint.quantised(name).dequantize(), weight)
    loaded = kit.same_model(tmp_path / "m", real, plain, tmp_path)
    assert str(loaded.scheme) == "a8"


def test_refusals(kit, tmp_path):
    folder = tmp_path / "m"
    model(kit, folder, "x86")

    def refused(match):
        with pytest.raises(InputError, match=match):
            load_checkpoint(folder, parse_scheme("none"))

    file = folder / "model.gguf"
    with pytest.raises(InputError, match=r"number 36.*I2_S of bitnet.cpp in a folder"):
        load_checkpoint(file, parse_scheme("none"))
    (folder / "other.gguf").write_bytes(b"GGUF")
    refused("2 GGUF files")
    (folder / "other.gguf").unlink()
    good = file.read_bytes()
    file.write_bytes(good[:-1000])
    refused("cut off")
    file.write_bytes(good)
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "i2_s"}}')
    refused("layout of I2_S weights is None.*x86, arm, rows")
