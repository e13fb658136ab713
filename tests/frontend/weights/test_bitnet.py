"""BitNet as transformers packs it: order of rows, both meanings of the scale, int8 activations."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mimo_compile.errors import InputError
from mimo_compile.frontend.huggingface import load_checkpoint
from mimo_compile.frontend.weights import open_checkpoint
from mimo_compile.ir.formats import parse_scheme

pytestmark = pytest.mark.compile
K = "model.layers.0.self_attn.k_proj"


def packed(trits):
    """Return bytes [ceil(N/4), K] of ternary rows, weight by weight."""
    n, k = len(trits), len(trits[0])
    rows = -(-n // 4)
    out = [[0] * k for _ in range(rows)]
    for r, row in enumerate(trits):
        for c, t in enumerate(row):
            out[r % rows][c] |= (t + 1) << (2 * (r // rows))
    return torch.tensor(out, dtype=torch.uint8)


def model(kit, rng, folder, *, inverse, **settings):
    plain, real, stored = kit.plain_tensors(rng), {}, {}
    for name, (n, k) in kit.matrix_shapes().items():
        trits = rng.integers(-1, 2, (n, k))
        gamma = torch.tensor([rng.uniform(0.01, 0.04)]).to(torch.bfloat16)
        scale = (1 / gamma) if inverse else gamma
        stored[name] = packed(trits.tolist())
        stored[name.removesuffix("weight") + "weight_scale"] = scale
        value = np.float32(1) / np.float32(scale.item()) if inverse else np.float32(scale.item())
        real[name] = trits.astype(np.float32) * value
    kit.write_folder(folder, {**plain, **stored}, quant_method="bitnet", **settings)
    return real, plain


@pytest.mark.parametrize(
    ("inverse", "settings"),
    [
        (True, {}),
        (True, {"linear_class": "bitlinear"}),
        (False, {"linear_class": "autobitlinear", "quantization_mode": "offline"}),
    ],
)
def test_whole_models_equal_their_floats(kit, tmp_path, inverse, settings):
    real, plain = model(kit, np.random.default_rng(1), tmp_path / "m", inverse=inverse, **settings)
    checkpoint = open_checkpoint(tmp_path / "m")
    for name, weight in real.items():
        found = checkpoint.quantised(name)
        assert found.fmt.name == "w1.58" and np.array_equal(found.dequantize(), weight)
    loaded = kit.same_model(tmp_path / "m", real, plain, tmp_path)
    assert str(loaded.scheme) == "a8", "activations as in training"


def test_matrices_multiplied_as_one_keep_their_scales(kit, tmp_path):
    model(kit, np.random.default_rng(2), tmp_path / "m", inverse=True)
    loaded = load_checkpoint(tmp_path / "m", parse_scheme("none"))
    (qkv,) = {
        m
        for n, m in loaded.decoder.stage("layers.0").module.named_modules()
        if n == "attention.qkv"
    }
    assert len(set(qkv.scale.flatten().tolist())) == 3


def test_compiled_tokens(kit, tmp_path):
    model(
        kit, np.random.default_rng(3), tmp_path / "m", inverse=False, linear_class="autobitlinear"
    )
    artifact = kit.same_tokens(tmp_path / "m", tmp_path, "none")
    assert artifact.manifest.quant == "a8"


def test_rows_that_fill_no_byte(kit, tmp_path):
    """5 and 7 rows: the extents of the model say how many of 8 are real."""
    trits = [[(r * c) % 3 - 1 for c in range(8)] for r in range(7)]
    tensors = {"a.weight": packed(trits), "a.weight_scale": torch.tensor([20.0])}
    for extent in (5, 7):
        tensors["a.weight"] = packed(trits[:extent])
        kit.write_folder(tmp_path, tensors, quant_method="bitnet")
        from mimo_compile.frontend.weights.bitnet import Bitnet

        config = {"quantization_config": {"quant_method": "bitnet"}, "hidden_size": extent}
        found = Bitnet(tmp_path, config).quantised("a.weight")
        assert (found.codes.astype(int) - 1).tolist() == trits[:extent]


def test_refusals(kit, tmp_path):
    folder = tmp_path / "m"
    model(kit, np.random.default_rng(4), folder, inverse=False)
    good = load_file(folder / "model.safetensors")

    def refused(match, change=None, **settings):
        tensors = {n: t for n, t in {**good, **(change or {})}.items() if t is not None}
        kit.write_folder(folder, tensors, quant_method="bitnet", **settings)
        with pytest.raises(InputError, match=match):
            load_checkpoint(folder, parse_scheme("none"))

    refused(r'may be gamma or 1/gamma.*Add "linear_class"')
    auto = {"linear_class": "autobitlinear"}
    refused("the code 3", {f"{K}.weight": torch.full((32, 256), 3, dtype=torch.uint8)}, **auto)
    refused(r"weight_scale is 0", {f"{K}.weight_scale": torch.zeros(1)}, linear_class="bitlinear")
    refused("weight_scale is nan", {f"{K}.weight_scale": torch.tensor([float("nan")])}, **auto)
    refused("do not fit", {f"{K}.weight_scale": torch.ones(3)}, **auto)
    refused("packed BitNet weights are bytes", {f"{K}.weight": torch.ones(128, 256)}, **auto)
    floats = {
        n: torch.ones(t.shape[0] * 4, t.shape[1]) for n, t in good.items() if t.dtype == torch.uint8
    }
    bare = {n: None for n in good if n.endswith("weight_scale")}
    refused("no tensor ends in .weight_scale", {**floats, **bare}, quantization_mode="online")
    refused("use_rms_norm", use_rms_norm=True, **auto)
    refused("class 'odd' are not known", linear_class="odd")
    refused("has shape", {f"{K}.weight": torch.zeros(33, 256, dtype=torch.uint8)}, **auto)
