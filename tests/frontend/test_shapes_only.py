"""Models of which only shapes are read: the same stages, graphs and artifacts as with weights."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

import mimo_compile as mc
from mimo_compile.artifact import Artifact
from mimo_compile.errors import InputError, UsageError
from mimo_compile.frontend.huggingface import load_checkpoint
from mimo_compile.frontend.weights.shapes import blank
from mimo_compile.ir.formats import parse_scheme
from mimo_compile.runtime import load
from mimo_compile.runtime.zipform import WEIGHTS
from mimo_compile.verify import verify_artifact

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))

from runtime_samples import plain

pytestmark = pytest.mark.compile


def tensors(loaded) -> dict[str, tuple[object, ...]]:
    """Types and shapes of all that a decoder holds, and which of it is one tensor."""
    first: dict[int, str] = {}
    out: dict[str, tuple[object, ...]] = {}
    for stage in loaded.decoder.stages():
        held = {**dict(stage.module.named_parameters()), **dict(stage.module.named_buffers())}
        for name, tensor in held.items():
            own = f"{stage.name}.{name}"
            same = first.setdefault(tensor.data_ptr(), own) if tensor.numel() else own
            out[own] = (tensor.dtype, tuple(tensor.shape), same)
    return out


@pytest.mark.parametrize(
    ("case", "quant"),
    [
        ("llama-tied-llama3", "w4zg32a8"),
        ("llama", "none"),
        ("qwen2", "w1.58a8"),
        ("mimo_v2_flash", "w4g32abf16kv16"),
        ("qwen3_moe", "afp4g32"),
        ("mixtral", "bf16abf16"),
        ("llama-linear-mha", "complex2wl"),
        ("qwen3_moe", "fp8b128"),
        ("llama", "nf4"),
    ],
)
def test_stages_are_those_of_weights(saved, case, quant) -> None:
    folder, scheme = saved(case)[1], parse_scheme(quant)
    loaded = load_checkpoint(folder, scheme, 64)
    shaped = load_checkpoint(folder, scheme, 64, shapes_only=True)
    assert tensors(shaped) == tensors(loaded)
    for ours, theirs in zip(shaped.decoder.stages(), loaded.decoder.stages(), strict=True):
        assert (ours.name, ours.kind, ours.states) == (theirs.name, theirs.kind, theirs.states)
    assert shaped.decoder.config == loaded.decoder.config
    matrices = [
        (n, t)
        for s in shaped.decoder.stages()
        for n, t in [*s.module.named_parameters(), *s.module.named_buffers()]
        if t.dim() > 1 and t.numel() > 1 and not t.is_meta and "router" not in n
    ]
    assert any(n.endswith(("qkv.codes", "qkv.weight")) for n, _ in matrices)
    for name, matrix in matrices:
        assert matrix.untyped_storage().nbytes() == matrix.element_size() < matrix.nbytes, name


def test_formats_that_cannot_hold_a_matrix_are_refused(saved, tmp_path) -> None:
    """With and without weights alike."""
    said = json.loads((saved("llama")[1] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(said | {"intermediate_size": 97}))
    with pytest.raises(UsageError, match=r"complex2wl needs even extents, got \d+ x 97"):
        load_checkpoint(tmp_path, parse_scheme("complex2wl"), 64, shapes_only=True)


def test_draft_layers_are_those_of_the_configuration(tmp_path) -> None:
    config = {
        "model_type": "mimo", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 256, "num_nextn_predict_layers": 1,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_checkpoint(tmp_path, parse_scheme("w4g64a8"), shapes_only=True)
    assert [s.name for s in loaded.decoder.stages() if s.name.startswith("mtp.")] == ["mtp.0"]
    assert not loaded.report.notes


def test_what_needs_weights_is_refused(tmp_path) -> None:
    with pytest.raises(UsageError, match="--calibrate needs weights"):
        mc.compile("tiny", quant="w4g64a8", shapes_only=True, calibrate="gptq")
    with pytest.raises(UsageError, match="--gates needs weights"):
        mc.compile("tiny", shapes_only=True, gates="gates.safetensors")
    with pytest.raises(UsageError, match="for model folders"):
        mc.compile(torch.nn.Linear(4, 4), shapes_only=True, example_inputs=(torch.zeros(1, 4),))
    with pytest.raises(InputError, match=r"config\.json is missing"):
        mc.compile(tmp_path, shapes_only=True)
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}'
    )
    with pytest.raises(InputError, match=r"stored quantised \(gptq\)"):
        mc.compile(tmp_path, shapes_only=True)


def test_each_blank_tensor_has_memory_of_its_own() -> None:
    a, b = blank((3, 1 << 40), torch.bfloat16), blank((3, 1 << 40), torch.bfloat16)
    assert a.data_ptr() != b.data_ptr() and a._base is None
    assert a.untyped_storage().nbytes() == 2 and float(a[2, -1]) == 0.0


def test_zeros_are_holes_of_the_file(tmp_path) -> None:
    usual = plain()
    manifest = msgspec.structs.replace(usual.manifest, shapes_only=True)
    large = {**usual.weights, "large": np.ones(4 << 20, np.uint8)}
    usual = Artifact(usual.manifest, usual.programs, usual.code, large)
    shaped = Artifact(manifest, usual.programs, usual.code, large)
    path = shaped.save(tmp_path / "shapes.mimo")
    (tmp_path / "hole").write_bytes(b"")
    os.truncate(tmp_path / "hole", 4 << 20)
    if (tmp_path / "hole").stat().st_blocks == 0:  # the file system knows them
        assert path.stat().st_blocks * 512 < 1 << 20
    found = Artifact.load(path)
    assert found.manifest.shapes_only
    with pytest.warns(RuntimeWarning, match="all weights are zeros"):
        load(path, verify="full")
    assert all(not value.make().any() for value in found.weights.values())
    assert any(value.any() for value in usual.weights.values())
    with pytest.warns(RuntimeWarning, match="all weights are zeros"):
        unsaved = shaped.module()
    given = np.ones(64, np.float32)
    np.testing.assert_array_equal(
        unsaved.call("main", given), np.full((8, 8), 4.0)
    )  # bias and all: zeros
    assert usual.save(tmp_path / "usual.mimo").stat().st_size == pytest.approx(
        path.stat().st_size, abs=100
    )


@pytest.mark.slow
def test_artifacts_are_those_of_weights(saved, tmp_path) -> None:
    folder, db = saved("mimo_v2_flash")[1], tmp_path / "r.db"
    how = {"quant": "w4g32a8", "max_context": 64, "db": db}
    usual = mc.compile(folder, **how)
    shaped = mc.compile(folder, shapes_only=True, **how)
    assert msgspec.structs.replace(shaped.manifest, shapes_only=False) == usual.manifest
    assert shaped.programs == usual.programs
    types = [{n: (w.dtype, w.shape) for n, w in a.weights.items()} for a in (shaped, usual)]
    assert types[0] == types[1]
    path, other = shaped.save(tmp_path / "shapes.mimo"), usual.save(tmp_path / "usual.mimo")
    sizes = [Artifact.load(p).manifest.members[WEIGHTS].bytes for p in (path, other)]
    assert sizes[0] == sizes[1] > 0
    with pytest.warns(RuntimeWarning, match="all weights are zeros"):
        found = verify_artifact(path, source=folder)
    assert found.ok and found.end_to_end is None and "weights are zeros" in found.notes[-1]
