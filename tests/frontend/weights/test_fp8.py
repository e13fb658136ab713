"""Block-FP8: every byte's value, short last blocks, both layouts of keys and values of MiMo-V2-Flash."""

import json
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mimo_compile.errors import InputError, MimoError
from mimo_compile.frontend.huggingface import load_checkpoint
from mimo_compile.frontend.weights import open_checkpoint
from mimo_compile.ir.formats import parse_scheme

pytestmark = pytest.mark.compile
NONE = parse_scheme("none")
GOOD = [code for code in range(256) if code & 127 != 127]


def value(code):
    """Return what a byte of E4M3 stands for."""
    sign, exponent, mantissa = -1 if code & 128 else 1, (code >> 3) & 15, code & 7
    if exponent:
        return sign * Fraction(8 + mantissa, 8) * Fraction(2) ** (exponent - 7)
    return sign * Fraction(mantissa, 8) * Fraction(1, 64)


VALUES = np.array([float(value(code)) if code in GOOD else np.nan for code in range(256)])


def draw(rng, n, k, rows, columns, spread=None):
    """Return bytes, scales, and the real weights that they make; ``spread``: row -> line of scales."""
    codes = rng.choice(np.array([c for c in GOOD if abs(value(c)) < 4], np.uint8), (n, k))
    scale = (rng.random((-(-n // rows), -(-k // columns))) * 0.02 + 0.005).astype(np.float32)
    real = VALUES[codes] * np.repeat(np.repeat(scale, rows, 0)[:n], columns, 1)[:, :k]
    return torch.from_numpy(codes).view(torch.float8_e4m3fn), scale, real.astype(np.float32)


def model(kit, rng, folder, block, **settings):
    plain, real, stored = kit.plain_tensors(rng), {}, {}
    for name, (n, k) in kit.matrix_shapes().items():
        stored[name], scale, real[name] = draw(rng, n, k, *block)
        stored[f"{name}_scale_inv"] = torch.from_numpy(scale)
    kit.write_folder(
        folder, {**plain, **stored}, quant_method="fp8", weight_block_size=list(block), **settings
    )
    return real, plain


@pytest.mark.parametrize(
    ("block", "fmt"),
    [((128, 128), "fp8b128"), ((96, 256), "fp8b128"), ((1, 4096), "fp8b128"), ((48, 48), "F32")],
)
def test_whole_models_equal_their_floats(kit, tmp_path, block, fmt):
    real, plain = model(kit, np.random.default_rng(1), tmp_path / "m", block)
    checkpoint = open_checkpoint(tmp_path / "m")
    for name, weight in real.items():
        assert np.array_equal(checkpoint.tensor(name).numpy(), weight)
        assert checkpoint.entries[name].dtype == fmt
    kit.same_model(tmp_path / "m", real, plain, tmp_path)


def test_every_byte(kit, tmp_path):
    codes = torch.tensor([GOOD], dtype=torch.uint8)
    scale = torch.tensor([[0.5, 2.0]])
    tensors = {"a.weight": codes.view(torch.float8_e4m3fn), "a.weight_scale_inv": scale}
    kit.write_folder(tmp_path, tensors, quant_method="fp8", weight_block_size=[128, 128])
    found = open_checkpoint(tmp_path).quantised("a.weight")
    assert found.codes.tolist() == [GOOD]
    wanted = [float(value(c)) * (0.5 if i < 128 else 2.0) for i, c in enumerate(GOOD)]
    assert found.dequantize().tolist() == [wanted]


FLASH = {
    "head_dim": 24, "v_head_dim": 16, "swa_head_dim": 24, "swa_v_head_dim": 16,
    "num_key_value_heads": 2, "swa_num_key_value_heads": 4,
}  # fmt: skip


@pytest.mark.parametrize("layout", ["uniform", "per head"])
@pytest.mark.parametrize(
    ("heads", "d", "dv", "b"), [(2, 24, 16, 16), (4, 24, 16, 16), (8, 192, 128, 128)]
)
def test_layouts_of_keys_and_values(kit, tmp_path, layout, heads, d, dv, b):
    """Head by head, blocks run down 24 rows of keys and on into 16 of values."""
    rng, k = np.random.default_rng(heads), 40
    both = rng.choice(np.array(GOOD, np.uint8), (heads, d + dv, k))
    columns = -(-k // b)
    total, of_keys = -(-(d + dv) // b), -(-d // b)
    blocks = (rng.random((heads, total, columns)) + 0.5).astype(np.float32)
    real = np.empty((heads, d + dv, k), np.float32)
    if layout == "per head":
        scales = blocks[:, :of_keys].reshape(-1, columns), blocks[:, of_keys:].reshape(-1, columns)
        for h in range(heads):
            for r in range(d + dv):
                for c in range(k):
                    real[h, r, c] = np.float32(VALUES[both[h, r, c]]) * blocks[h, r // b, c // b]
    else:
        counts = -(-heads * d // b), -(-heads * dv // b)
        scales = tuple((rng.random((n, columns)) + 0.5).astype(np.float32) for n in counts)
        for part, (low, width) in enumerate(((0, d), (d, dv))):
            for h in range(heads):
                for r in range(width):
                    line = np.repeat(scales[part][(h * width + r) // b], b)[:k]
                    real[h, low + r] = VALUES[both[h, low + r]].astype(np.float32) * line
    tensors = {}
    for part, name, rows in ((0, "k", slice(0, d)), (1, "v", slice(d, None))):
        codes = np.ascontiguousarray(both[:, rows].reshape(-1, k))
        tensors[f"a.{name}_proj.weight"] = torch.from_numpy(codes).view(torch.float8_e4m3fn)
        tensors[f"a.{name}_proj.weight_scale_inv"] = torch.from_numpy(scales[part].copy())
    kit.write_folder(tmp_path, tensors, quant_method="fp8", weight_block_size=[b, b])
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {**FLASH, "head_dim": d, "v_head_dim": dv, "num_key_value_heads": heads}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(tmp_path)
    for name, rows in (("k", slice(0, d)), ("v", slice(d, None))):
        found = checkpoint.tensor(f"a.{name}_proj.weight").numpy()
        assert np.array_equal(found, real[:, rows].reshape(-1, k))


def test_mimo_v2_flash(saved, tools, tmp_path):
    """A whole model, keys and values head by head where that can be told apart, in blocks of 16."""
    folder, twin = (Path(shutil.copytree(saved("mimo_v2_flash")[1], tmp_path / n)) for n in "ab")
    tensors, rng, kept = load_file(folder / "model.safetensors"), np.random.default_rng(5), {}
    b, d, dv = 16, 24, 16
    for name in sorted(n for n in tensors if n.endswith(("q_proj.weight", "k_proj.weight"))):
        n, k = tensors[name].shape
        tensors[name], scale, kept[name] = draw(rng, n, k, b, b)
        tensors[f"{name}_scale_inv"] = torch.from_numpy(scale)
    straddled = 0
    for name in sorted(n for n in tensors if n.endswith("v_proj.weight")):
        keys = name.replace("v_proj", "k_proj")
        heads, k = tensors[name].shape[0] // dv, tensors[name].shape[1]
        codes, scale, real = draw(rng, heads * dv, k, b, b)
        if heads > 1:
            straddled += 1
            blocks = (rng.random((heads, 3, -(-k // b))) * 0.02 + 0.005).astype(np.float32)
            lines = np.repeat(np.repeat(blocks, b, 1)[:, : d + dv], b, 2)[..., :k]
            kept[keys] = (
                VALUES[tensors[keys].view(torch.uint8).numpy()] * lines[:, :d].reshape(-1, k)
            ).astype(np.float32)
            real = VALUES[codes.view(torch.uint8).numpy()] * lines[:, d:].reshape(-1, k)
            tensors[f"{keys}_scale_inv"] = torch.from_numpy(blocks[:, :2].reshape(2 * heads, -1))
            scale = blocks[:, 2].copy()
        tensors[name], kept[name] = codes, real.astype(np.float32)
        tensors[f"{name}_scale_inv"] = torch.from_numpy(scale)
    assert straddled
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    tools.edit_json(
        folder / "config.json",
        quantization_config={"quant_method": "fp8", "weight_block_size": [b, b]},
        swa_num_key_value_heads=2, swa_head_dim=d, swa_v_head_dim=dv,
    )  # fmt: skip
    whole = load_file(twin / "model.safetensors")
    real = {n: torch.from_numpy(np.ascontiguousarray(w)) for n, w in kept.items()}
    save_file({**whole, **real}, twin / "model.safetensors")
    ids = tools.prompt(20)
    found, wanted = (load_checkpoint(f, NONE).decoder.prefill(ids)[1] for f in (folder, twin))
    assert torch.equal(found, wanted)


def test_no_kernel_is_said_and_nothing_requantised(kit, tmp_path):
    import mimo_compile as mc
    from mimo_compile.ir.hardware import local_cpu
    from mimo_compile.ir.ops import parse_workload
    from mimo_compile.schedules import schedules_for

    model(kit, np.random.default_rng(2), tmp_path / "m", (128, 128))
    if schedules_for(parse_workload("mpgemm:m=1,n=256,k=256,w=fp8b128,s=f32"), local_cpu()):
        kit.same_tokens(tmp_path / "m", tmp_path, "none")
        return
    with pytest.raises(MimoError, match=r"no schedule supports.*fp8b128"):
        mc.compile(tmp_path / "m", db=tmp_path / "records.db", max_context=32)


def test_refusals(kit, tmp_path):
    folder, name = tmp_path / "m", "model.layers.0.mlp.down_proj.weight"
    model(kit, np.random.default_rng(3), folder, (128, 128))
    good = load_file(folder / "model.safetensors")

    def refused(match, change=None, **settings):
        tensors = {**good, **(change or {})}
        base = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        kit.write_folder(folder, tensors, **{**base, **settings})
        with pytest.raises(InputError, match=match):
            load_checkpoint(folder, NONE)

    scale = f"{name}_scale_inv"
    refused(
        r"scales \[3, 4\] do not fit 256 x 512 in blocks of 128 x 128", {scale: torch.ones(3, 4)}
    )
    refused("must be matrices", {scale: torch.ones(8)})
    refused("not as E4M3", {name: good[name].float()})
    refused("not as E4M3", {scale: torch.ones(2, 4, dtype=torch.int32)})
    refused("not finite", {scale: torch.full((2, 4), float("inf"))})
    broken = good[name].view(torch.uint8).clone()
    broken[3, 5] = 0x7F
    refused("a code stands for NaN", {name: broken.view(torch.float8_e4m3fn)})
    for block in (None, [128], [0, 128], "128", [128, True], [10**30, 128]):
        refused("weight_block_size", weight_block_size=block)
    refused("fmt='e5m2'", fmt="e5m2")
