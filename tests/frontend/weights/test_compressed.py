"""compressed-tensors: packed integers with and without zero points, any order of columns, int8, FP8."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mimo_compile.errors import InputError
from mimo_compile.frontend.huggingface import load_checkpoint
from mimo_compile.frontend.weights import open_checkpoint
from mimo_compile.ir.formats import parse_scheme

pytestmark = pytest.mark.compile
UP = "model.layers.0.mlp.up_proj"


def config(form="pack-quantized", inputs=None, **weights):
    base = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
    group = {"targets": ["Linear"], "weights": {**base, **weights}, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }  # fmt: skip


def model(kit, rng, folder, *, bits=4, group=64, symmetric=True, order=False, **more):
    plain, real, stored = kit.plain_tensors(rng), {}, {}
    middle = 1 << (bits - 1)
    for name, (n, k) in kit.matrix_shapes().items():
        size = group or k
        codes = rng.integers(-middle, middle, (n, k))
        zeros = (
            np.zeros((n, k // size), int)
            if symmetric
            else rng.integers(-middle, middle, (n, k // size))
        )
        scale = kit.halves(rng, zeros.shape, 0.06 / (1 << bits))
        index = np.arange(k) // size
        if order:
            index = np.random.default_rng(k).permutation(index)
            stored[f"{name}_g_idx"] = torch.from_numpy(index.astype(np.int32))
        stored[f"{name}_packed"] = torch.tensor(
            [kit.words_of(row, bits) for row in (codes + middle).tolist()], dtype=torch.int32
        )
        stored[f"{name}_scale"] = torch.from_numpy(scale).half()
        stored[f"{name}_shape"] = torch.tensor([n, k])
        if not symmetric:
            down = [kit.words_of(column, bits) for column in (zeros + middle).T.tolist()]
            stored[f"{name}_zero_point"] = torch.tensor(down, dtype=torch.int32).T
        wide = scale.astype(np.float64)[:, index], zeros[:, index]
        real[name] = (wide[0] * (codes - wide[1])).astype(np.float32)
    settings = config(
        num_bits=bits, symmetric=symmetric, strategy="group" if group else "channel",
        group_size=group or None, **more,
    )  # fmt: skip
    kit.write_folder(folder, {**plain, **stored}, **settings)
    return real, plain


@pytest.mark.parametrize(
    ("kind", "fmt"),
    [
        ({}, "w4g64"),
        ({"symmetric": False, "group": 128}, "w4zg128"),
        ({"bits": 8, "group": 0}, "w8grow"),
        ({"order": True}, "w4g64"),
    ],
)
def test_packed_models_equal_their_floats(kit, tmp_path, kind, fmt):
    real, plain = model(kit, np.random.default_rng(1), tmp_path / "m", **kind)
    checkpoint = open_checkpoint(tmp_path / "m")
    for name, weight in real.items():
        found = checkpoint.quantised(name)
        assert found.fmt.name == fmt and np.array_equal(found.dequantize(), weight)
    loaded = kit.same_model(tmp_path / "m", real, plain, tmp_path, 1e-5 if kind.get("order") else 0)
    assert loaded.report.unused == ()


@pytest.mark.parametrize("form", ["int-quantized", "float-quantized"])
def test_plain_numbers(kit, tmp_path, form):
    rng = np.random.default_rng(2)
    plain, real, stored = kit.plain_tensors(rng), {}, {}
    for name, (n, k) in kit.matrix_shapes().items():
        raw = torch.from_numpy(rng.integers(-128, 128, (n, k)).astype(np.int8))
        if form == "float-quantized":
            raw = (raw.float() / 64).to(torch.float8_e4m3fn)
        per_row = "mlp" in name or form == "int-quantized"
        scale = torch.from_numpy(
            rng.random((n, 1) if per_row else 1).astype(np.float32) * 0.001 + 1e-4
        )
        if form == "float-quantized":
            scale = scale * 50
        stored[name], stored[f"{name}_scale"] = raw, scale
        real[name] = (raw.float() * scale).numpy()
    kind = {"type": "float"} if form == "float-quantized" else {}
    inputs = None if kind else {"type": "int", "num_bits": 8, "strategy": "token", "dynamic": True}
    settings = config(form, inputs, num_bits=8, strategy="channel", group_size=None, **kind)
    kit.write_folder(tmp_path / "m", {**plain, **stored}, **settings)
    loaded = kit.same_model(tmp_path / "m", real, plain, tmp_path)
    assert str(loaded.scheme) == ("none" if kind else "a8")
    assert set(loaded.report.dtypes) == {"F32", "fp8b128" if kind else "w8grow"}


def test_refusals(kit, tmp_path):
    folder = tmp_path / "m"
    model(kit, np.random.default_rng(3), folder)
    good = load_file(folder / "model.safetensors")

    def refused(match, change=None, settings=None):
        tensors = {n: t for n, t in {**good, **(change or {})}.items() if t is not None}
        kit.write_folder(folder, tensors, **(settings or config()))
        with pytest.raises(InputError, match=match):
            load_checkpoint(folder, parse_scheme("none"))

    refused("format 'marlin-24'", settings=config("marlin-24"))
    refused("num_bits=3", settings=config(num_bits=3))
    refused("strategy='block'", settings=config(strategy="block"))
    refused("group_size=0", settings=config(group_size=0))
    refused("in several ways", settings={**config(), "config_groups": {}})
    refused("in several ways", settings={**config(), "config_groups": {"a": 5}})
    two = {
        "a": config()["config_groups"]["group_0"],
        "b": config(num_bits=8)["config_groups"]["group_0"],
    }
    refused("in several ways", settings={**config(), "config_groups": two})
    refused("its zero points are missing", settings=config(symmetric=False))
    refused("no I32 codes", {f"{UP}.weight_packed": None})
    refused("no I32 codes", {f"{UP}.weight_packed": good[f"{UP}.weight_packed"].float()})
    refused("do not fit", {f"{UP}.weight_scale": torch.ones(512, 3)})
    refused("not finite", {f"{UP}.weight_scale": torch.full((512, 4), float("nan"))})
    refused("groups outside 0 to 3", {f"{UP}.weight_g_idx": torch.full((256,), 4)})
