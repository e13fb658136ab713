"""The variants of the built-in model that were trained with a quantiser: small, importable, lossless."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import mimo_compile as mc
from mimo_compile import _tvm
from mimo_compile.bench.runnable import Runnable, hardware_of
from mimo_compile.frontend.huggingface import load_checkpoint
from mimo_compile.frontend.models.stages import Experts, QuantLinear
from mimo_compile.ir.formats import parse_scheme, parse_weight_format
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.numerics import real_matrix
from mimo_compile.ir.workload import Workload
from mimo_compile.runtime.container import open_artifact
from mimo_compile.schedules import get_schedule
from mimo_compile.search import Database
from mimo_compile.verify import reference_threads

pytestmark = pytest.mark.compile

ROOT = Path(__file__).resolve().parents[2] / "models"
VARIANTS = {"tiny-ternary": "w1.58", "tiny-complex": "complex2wl2"}


@pytest.fixture(params=sorted(VARIANTS))
def variant(request):
    return ROOT / request.param, parse_weight_format(VARIANTS[request.param])


def test_small_folder_with_a_card(variant) -> None:
    folder, _ = variant
    files = {file.name: file.stat().st_size for file in folder.iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert sum(files.values()) < 4_500_000


def test_every_matrix_but_router_and_output_projection_is_stored_as_codes(variant) -> None:
    folder, fmt = variant
    loaded = load_checkpoint(folder, parse_scheme("none"))
    assert str(loaded.scheme) == "a8", "activations as in training"
    found = [
        (name, part)
        for stage in loaded.decoder.stages()
        for name, part in stage.module.named_modules()
        if isinstance(part, QuantLinear | Experts)
    ]
    floats = {name for name, part in found if part.w in ("f32", "bf16")}
    assert floats == {"lm_head", "feed.router"}
    assert {(part.w, part.a, part.s) for name, part in found if name not in floats} == {
        (fmt.name, "a8", "f16")
    }


def integers(part: QuantLinear, fmt) -> np.ndarray:
    """The matrix [N, K] of a layer in units of its scales, of which complex ones are set to 1."""
    ones = torch.ones_like(part.scale, dtype=torch.float64)
    return real_matrix(fmt, part.codes, ones, None, torch.float64).numpy().astype(np.int64)


def matmul_inputs(part: QuantLinear, fmt, m: int, k: int, rng) -> dict[str, np.ndarray]:
    """Trained codes, and rows of integers up to 127 in each half, which int8 holds exactly."""
    x = rng.integers(-127, 128, (m, k)).astype(np.float32)
    x[:, 0], x[:, k // 2] = 127, -127
    scale = part.scale if fmt.is_integer else torch.ones_like(part.scale)
    return {"x": x, "codes": part.codes.numpy(), "scale": scale.numpy()}


@pytest.mark.slow
def test_compiled_sums_of_trained_weights_are_exact(variant, tmp_path: Path) -> None:
    """Every quantised matmul of the artifact gives the int64 sum times its scale, to the bit."""
    folder, fmt = variant
    with Database(tmp_path / "records.db") as db:
        artifact = mc.compile(folder, quant="a8", max_context=512, db=db)
    parts = open_artifact(artifact.save(tmp_path / "variant.mimo"))
    decoder = load_checkpoint(folder, parse_scheme("a8"), 512).decoder
    modules = [part for stage in decoder.stages() for part in stage.module.modules()]
    code, hardware = _tvm.load_object(parts.code), hardware_of(parts.manifest)
    rng, checked = np.random.default_rng(0), {"mpgemm": 0, "moe": 0}
    for choice in parts.manifest.plan:
        workload = Workload.parse(choice.workload)
        if workload.op not in checked:
            continue
        p = get_op(workload.op).full(workload)
        if p["w"] != fmt.name:
            continue
        arguments = get_schedule(choice.schedule), choice.config, hardware
        if workload.op == "moe":  # a non-linear function between two matmuls: within the op's bound
            experts = next(m for m in modules if isinstance(m, Experts))
            inputs = moe_inputs(experts, p, rng)
            reference_threads(1e8)
            assert Runnable(workload, *arguments, inputs, code, choice.kernel).check() <= 1
        else:
            shape = fmt.code_shape(int(p["n"]), int(p["k"]))
            fits = [m for m in modules if isinstance(m, QuantLinear) and m.w == fmt.name]
            for part in [m for m in fits if tuple(m.codes.shape) == shape][:2]:
                inputs = matmul_inputs(part, fmt, int(p["m"]), int(p["k"]), rng)
                runnable = Runnable(workload, *arguments, inputs, code, choice.kernel)
                runnable(runnable.tensors)
                sums = inputs["x"].astype(np.int64) @ integers(part, fmt).T
                wanted = sums.astype(np.float32)
                if fmt.is_integer:
                    wanted *= part.scale.numpy()[:, 0]
                assert np.array_equal(runnable.arrays["y"], wanted), choice.workload
        checked[workload.op] += 1
    assert checked["mpgemm"] >= 8 and checked["moe"] >= 2, checked


def moe_inputs(experts: Experts, p, rng) -> dict[str, np.ndarray]:
    """Random rows and routes for the trained codes of one layer's experts."""
    t, k, e = int(p["t"]), int(p["k"]), int(p["e"])
    return {
        "x": rng.standard_normal((t, int(p["d"])), dtype=np.float32),
        "ids": np.array([rng.choice(e, k, replace=False) for _ in range(t)], np.int32),
        "weights": rng.dirichlet(np.ones(k), t).astype(np.float32),
        "w13_codes": experts.w13.numpy(), "w13_scale": experts.w13_scale.numpy(),
        "w2_codes": experts.w2.numpy(), "w2_scale": experts.w2_scale.numpy(),
    }  # fmt: skip
