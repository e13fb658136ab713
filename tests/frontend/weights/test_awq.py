"""AWQ's packing gemm: interleaved columns, zero points as they are; other packings are refused."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mimo_compile.errors import InputError
from mimo_compile.frontend.huggingface import load_checkpoint
from mimo_compile.frontend.weights import open_checkpoint
from mimo_compile.ir.formats import parse_scheme

pytestmark = pytest.mark.compile
V = "model.layers.0.self_attn.v_proj"
COLUMN_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)
SETTINGS = {"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True}


def interleaved(rows):
    """Return int32 words of rows of nibbles, placed one by one."""
    out = []
    for row in rows:
        words = []
        for start in range(0, len(row), 8):
            word = sum(int(row[start + c]) << (4 * i) for i, c in enumerate(COLUMN_OF_NIBBLE))
            words.append(word - (1 << 32) if word >= 1 << 31 else word)
        out.append(words)
    return torch.tensor(out, dtype=torch.int32)


def model(kit, rng, folder, group, **settings):
    plain, real, stored = kit.plain_tensors(rng), {}, {}
    for name, (n, k) in kit.matrix_shapes().items():
        size = k if group == -1 else group
        codes, zeros = rng.integers(0, 16, (n, k)), rng.integers(0, 16, (k // size, n))
        scale = kit.halves(rng, zeros.shape, 0.005)
        stem = name.removesuffix(".weight")
        stored[f"{stem}.qweight"] = interleaved(codes.T.tolist())
        stored[f"{stem}.qzeros"] = interleaved(zeros.tolist())
        stored[f"{stem}.scales"] = torch.from_numpy(scale).half()
        wide = [np.repeat(x.T.astype(np.float64), size, axis=1) for x in (scale, zeros)]
        real[name] = (wide[0] * (codes - wide[1])).astype(np.float32)
    kit.write_folder(folder, {**plain, **stored}, **SETTINGS, group_size=group, **settings)
    return real, plain


def test_order_of_columns(kit):
    # columns 0 to 7, written from the high nibble down: 7 5 3 1 6 4 2 0
    word = interleaved([[*range(8)]])
    assert int(word[0, 0]) == 0x75316420


@pytest.mark.parametrize(("group", "fmt"), [(128, "w4zg128"), (64, "w4zg64"), (-1, "w4zgrow")])
def test_whole_models_equal_their_floats(kit, tmp_path, group, fmt):
    real, plain = model(kit, np.random.default_rng(group + 9), tmp_path / "m", group)
    checkpoint = open_checkpoint(tmp_path / "m")
    for name, weight in real.items():
        found = checkpoint.quantised(name)
        assert found.fmt.name == fmt and np.array_equal(found.dequantize(), weight)
    loaded = kit.same_model(tmp_path / "m", real, plain, tmp_path)
    assert set(loaded.report.dtypes) == {"F32", fmt}


@pytest.mark.slow
def test_compiled_tokens(kit, tmp_path):
    model(kit, np.random.default_rng(2), tmp_path / "m", 64)
    kit.same_tokens(tmp_path / "m", tmp_path, "w4zg64a8")


def test_refusals(kit, tmp_path):
    folder = tmp_path / "m"
    model(kit, np.random.default_rng(3), folder, 64)
    good = load_file(folder / "model.safetensors")

    def refused(match, change=None, **settings):
        tensors = {**good, **(change or {})}
        kit.write_folder(folder, tensors, **{**SETTINGS, "group_size": 64, **settings})
        with pytest.raises(InputError, match=match):
            load_checkpoint(folder, parse_scheme("none"))

    for packing in ("gemv", "gemv_fast", "marlin"):
        refused(f"packing '{packing}' are not read.*gemm", version=packing)
    refused("zero_point=False is not read", zero_point=False)
    refused("bits=8", bits=8)
    refused("do not fit 256 rows of 512 columns in groups of 96", group_size=96)
    refused("do not fit", group_size=10**30)
    refused("group_size='a'", group_size="a")
    # what gemv would store: codes packed along K
    refused("do not fit", {f"{V}.qweight": torch.zeros(128, 32, dtype=torch.int32)})
    refused("do not fit", {f"{V}.scales": torch.ones(4, 127)})
    refused("stored as", {f"{V}.qzeros": good[f"{V}.qzeros"].to(torch.int64)})
    refused("not finite", {f"{V}.scales": torch.full((4, 128), float("inf"))})
