"""Fairy2i's widely-linear codes: order of bits, stacks of matrices, what is refused."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mimo_compile.errors import InputError, UsageError
from mimo_compile.frontend.huggingface import load_checkpoint
from mimo_compile.frontend.weights import open_checkpoint
from mimo_compile.ir.formats import parse_scheme

pytestmark = pytest.mark.compile
ROOTS = (1, 1j, -1, -1j)
LAYER = "model.layers.0"
STACKED = {
    "self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "mlp.gate_up_proj": ("gate_proj", "up_proj"),
}


def packed(codes):
    """Return the bytes of rows of codes, four to a byte, first in the lowest bits."""
    return torch.tensor(
        [[sum(row[c + i] << (2 * i) for i in range(4)) for c in range(0, len(row), 4)]
         for row in codes], dtype=torch.uint8,
    )  # fmt: skip


def real_of(codes, scales):
    """Return the real matrix of stacked complex ones, by complex arithmetic on unit vectors."""
    n, k = codes[0].shape
    x = np.concatenate([np.eye(k), 1j * np.eye(k)])
    y = np.zeros((2 * k, n), complex)
    for term, (code, (re, im)) in enumerate(zip(codes, scales, strict=True)):
        roots = np.array(ROOTS)[code]
        w = roots.real * re + 1j * roots.imag * im
        y += (x.conj() if term % 2 else x) @ w.T
    return np.concatenate([y.real, y.imag], axis=1).T.astype(np.float32)


def model(kit, rng, folder, stages=2, stacked=True):
    plain, real, stored, stacks = kit.plain_tensors(rng), {}, {}, {}
    shapes = kit.matrix_shapes()
    groups = {}
    for name in shapes:
        stem, part = name.removesuffix(".weight").rsplit(".", 1)
        whole = next((s for s, p in STACKED.items() if part in p), f"x.{part}").split(".")[1]
        groups.setdefault(f"{stem}.{whole}" if stacked else f"{stem}.{part}", []).append(name)
    for stem, names in groups.items():
        n, k = sum(shapes[name][0] for name in names), shapes[names[0]][1]
        codes = [rng.integers(0, 4, (n // 2, k // 2)) for _ in range(2 * stages)]
        scales = kit.halves(rng, (2 * stages, 2), 0.02)
        stored[f"{stem}.codes"] = packed(np.concatenate(codes).tolist())
        stored[f"{stem}.scales"] = torch.from_numpy(scales).to(torch.float16)
        rows = np.split(real_of(codes, scales), np.cumsum([shapes[m][0] for m in names])[:-1])
        real |= dict(zip(names, rows, strict=True))
        if len(names) > 1:
            parts = [name.removesuffix(".weight").rsplit(".", 1)[1] for name in names]
            stacks[stem] = {p: shapes[m][0] for p, m in zip(parts, names, strict=True)}
    kit.write_folder(
        folder, {**plain, **stored}, quant_method="fairy2i", stages=stages, stacks=stacks
    )
    return real, plain


@pytest.mark.parametrize(("stages", "fmt"), [(1, "complex2wl"), (2, "complex2wl2")])
def test_whole_models_equal_their_floats(kit, tmp_path, stages, fmt):
    real, plain = model(kit, np.random.default_rng(stages), tmp_path / "m", stages)
    checkpoint = open_checkpoint(tmp_path / "m")
    for name, weight in real.items():
        assert np.allclose(checkpoint.real(name).numpy(), weight, rtol=0, atol=1e-7), name
        assert checkpoint.entries[name].fmt.name == fmt
    qkv = [f"{LAYER}.self_attn.{p}_proj.weight" for p in "qkv"]
    joined = checkpoint.joined(qkv)
    assert np.allclose(joined.dequantize(), np.concatenate([real[n] for n in qkv]), atol=1e-7)
    assert checkpoint.joined(qkv[:2]) is None
    loaded = kit.same_model(tmp_path / "m", real, plain, tmp_path, tolerance=1e-5)
    assert str(loaded.scheme) == "a8", "activations as in training"


def test_groups_of_activations_are_refused(kit, tmp_path):
    model(kit, np.random.default_rng(0), tmp_path)
    with pytest.raises(UsageError, match="no groups of activations"):
        load_checkpoint(tmp_path, parse_scheme("a8g64"))


def test_compiled_tokens(kit, tmp_path):
    model(kit, np.random.default_rng(3), tmp_path / "m")
    artifact = kit.same_tokens(tmp_path / "m", tmp_path, "none")
    assert artifact.manifest.quant == "a8"
    assert any("complex2wl2" in choice.workload for choice in artifact.manifest.plan)


def test_matrices_that_are_multiplied_as_one_must_be_stacks(kit, tmp_path):
    model(kit, np.random.default_rng(4), tmp_path / "m", stacked=False)
    with pytest.raises(InputError, match=r"q_proj.*complex2wl2.*stored as one"):
        load_checkpoint(tmp_path / "m", parse_scheme("none"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": 3}, "stages is 3, not 1 or 2"),
        ({"stages": 1}, r"scales \[4, 2\] do not fit complex2wl"),
        ({"stages": True}, "stages is True, not 1 or 2"),
        ({"stacks": 5}, "stacks is no object"),
        ({"stacks": {f"{LAYER}.self_attn.qkv_proj": {"q_proj": 5}}}, "has 512 rows, its parts"),
        ({"stacks": {f"{LAYER}.self_attn.qkv_proj": {"q_proj": 512.0}}}, "its parts"),
        ({"stacks": {"model.nothing": {"q_proj": 5}}}, "no tensor model.nothing.codes"),
        ({"stacks": {f"{LAYER}.self_attn.qkv_proj": {"o_proj": 512}}}, "o_proj.weight is there"),
    ],
)
def test_refused(kit, tmp_path, settings, message):
    import json

    model(kit, np.random.default_rng(5), tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"].update(settings)
    file.write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        open_checkpoint(tmp_path / "m")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{LAYER}.mlp.down_proj.scales"), "scales is missing"),
        (lambda t: t.update({f"{LAYER}.mlp.down_proj.scales": torch.zeros(4, 2)}), None),
        (lambda t: t[f"{LAYER}.mlp.down_proj.scales"].fill_(float("nan")), "the scales are"),
        (lambda t: t[f"{LAYER}.mlp.down_proj.scales"].neg_(), "the scales are"),
        (
            lambda t: t.update({f"{LAYER}.mlp.down_proj.codes": torch.zeros(512, 64)}),
            "stored as F32",
        ),
        (
            lambda t: t.update(
                {f"{LAYER}.mlp.down_proj.codes": torch.zeros(511, 64, dtype=torch.uint8)}
            ),
            "do not fit",
        ),
    ],
)
def test_damaged(kit, tmp_path, change, message):
    model(kit, np.random.default_rng(6), tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    if message is None:  # scales in float32 are read, too
        assert not open_checkpoint(tmp_path / "m").real(f"{LAYER}.mlp.down_proj.weight").any()
        return
    with pytest.raises(InputError, match=message):
        open_checkpoint(tmp_path / "m").real(f"{LAYER}.mlp.down_proj.weight")
