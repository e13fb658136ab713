"""NF4 of bitsandbytes: order of nibbles, blocks, scales quantised once more; other tables."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mimo_compile.errors import InputError
from mimo_compile.frontend.huggingface import load_checkpoint
from mimo_compile.frontend.weights import open_checkpoint
from mimo_compile.ir.formats import parse_scheme

pytestmark = pytest.mark.compile
# the table of QLoRA's paper (appendix E)
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
SETTINGS = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
O = "model.layers.1.self_attn.o_proj.weight"  # noqa: E741


def pack(rng, n, k, block, *, nested=False, table=NF4, kind="nf4"):
    """Return the tensors of one matrix by ending, and its real weights."""
    codes = rng.integers(0, 16, n * k).tolist()
    data = bytes(codes[i] << 4 | codes[i + 1] for i in range(0, n * k, 2))
    blocks = -(-n * k // block)
    state = {
        "quant_type": kind, "blocksize": block, "dtype": "float16", "shape": [n, k],
        "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.0423,
    }  # fmt: skip
    out = {
        "": torch.frombuffer(bytearray(data), dtype=torch.uint8)[:, None],
        ".quant_map": torch.tensor(table, dtype=torch.float32),
        f".quant_state.bitsandbytes__{kind}": torch.frombuffer(
            bytearray(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }
    if nested:
        inner = rng.integers(0, 256, blocks)
        outer = (rng.random(-(-blocks // 256)) * 0.01).astype(np.float32)
        codebook = np.sort(rng.standard_normal(256)).astype(np.float32)
        out[".absmax"] = torch.from_numpy(inner.astype(np.uint8))
        out[".nested_absmax"] = torch.from_numpy(outer)
        out[".nested_quant_map"] = torch.from_numpy(codebook)
        scale = [codebook[inner[i]] * outer[i // 256] + np.float32(0.0423) for i in range(blocks)]
    else:
        scale = (rng.random(blocks) * 0.05).astype(np.float32)
        out[".absmax"] = torch.from_numpy(scale)
    real = [np.float32(table[c]) * np.float32(scale[i // block]) for i, c in enumerate(codes)]
    return out, np.array(real, np.float32).reshape(n, k)


def model(kit, rng, folder, block=64, **kind):
    plain, real, stored = kit.plain_tensors(rng), {}, {}
    for name, (n, k) in kit.matrix_shapes().items():
        parts, real[name] = pack(rng, n, k, block, **kind)
        stored |= {name + end: t for end, t in parts.items()}
    kit.write_folder(folder, {**plain, **stored}, **SETTINGS)
    return real, plain


@pytest.mark.parametrize(
    ("block", "nested", "fmt"), [(64, False, "nf4g64"), (128, True, "nf4g128"), (512, False, "F32")]
)
def test_whole_models_equal_their_floats(kit, tmp_path, block, nested, fmt):
    real, plain = model(kit, np.random.default_rng(block), tmp_path / "m", block, nested=nested)
    checkpoint = open_checkpoint(tmp_path / "m")
    for name, weight in real.items():
        assert np.array_equal(checkpoint.tensor(name).numpy(), weight)
        if weight.shape[1] % block == 0:
            found = checkpoint.quantised(name)
            assert np.array_equal(found.dequantize(), weight)
    assert checkpoint.entries[O].dtype == fmt
    kit.same_model(tmp_path / "m", real, plain, tmp_path)


@pytest.mark.parametrize("odd", ["table", "blocks"])
def test_what_has_no_canonical_form_gives_real_values(kit, tmp_path, odd):
    rng = np.random.default_rng(8)
    table = [0.0, 0.0052, 0.6667, 1.0, 0.3333, 0.5, 0.1667, 0.25]
    table += [-v for v in table]
    more = {"table": table, "kind": "fp4"} if odd == "table" else {}
    parts, real = pack(rng, 6, 40 if odd == "blocks" else 64, 64, **more)
    tensors = {f"a.weight{end}": t for end, t in parts.items()}
    kit.write_folder(tmp_path, tensors, **SETTINGS)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.entries["a.weight"].fmt is None
    assert np.array_equal(checkpoint.tensor("a.weight").numpy(), real)


def test_refusals(kit, tmp_path):
    folder = tmp_path / "m"
    model(kit, np.random.default_rng(3), folder, nested=True)
    good = load_file(folder / "model.safetensors")

    def refused(match, change=None, **settings):
        tensors = {**good, **(change or {})}
        tensors = {n: t for n, t in tensors.items() if t is not None}
        kit.write_folder(folder, tensors, **{**SETTINGS, **settings})
        with pytest.raises(InputError, match=match):
            load_checkpoint(folder, parse_scheme("none"))

    key = f"{O}.quant_state.bitsandbytes__nf4"

    def state(**changes):
        found = json.loads(good[key].numpy().tobytes()) | changes
        return {key: torch.frombuffer(bytearray(json.dumps(found).encode()), dtype=torch.uint8)}

    refused("8-bit weights", load_in_8bit=True)
    refused("weights in blocks of 64 have 32768 of U8", {O: good[O][:-1].clone()})
    refused("have 1024 of U8", {f"{O}.absmax": good[f"{O}.absmax"][:5].clone()})
    refused("have 256 of F32", {f"{O}.nested_quant_map": torch.ones(255)})
    refused("quant_map is missing", {f"{O}.nested_quant_map": None})
    refused("quant_state is missing", {key: None})
    refused("quant_state is damaged", {key: torch.zeros(9, dtype=torch.uint8)})
    for change in (
        {"shape": [-1, 5]}, {"shape": [1 << 60, 5]}, {"blocksize": 0}, {"shape": 5},
        {"nested_blocksize": "x"}, {"nested_offset": []}, {"blocksize": 1 << 39},
    ):  # fmt: skip
        refused("quant_state is damaged|weights in blocks", state(**change))
    refused("not finite", {f"{O}.nested_absmax": torch.full((4,), float("nan"))})
