"""The built-in model for a GPU, by emulation of its CUDA text: the tokens that a CPU's artifact says."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from test_gpu_compiled import texts_alone  # noqa: F401

import mimo_compile as mc
from mimo_compile.cli.run_routing import routed
from mimo_compile.errors import UsageError
from mimo_compile.runtime import gpu_device, load
from mimo_compile.schedules.cuda.emulate import compiler
from mimo_compile.verify import verify_artifact

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))

from emulated_device import EmulatedDevice

PROMPT = "def __init__(self"
pytestmark = pytest.mark.compile


@pytest.mark.slow
@pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")
def test_the_built_in_model_emulated(texts_alone, tmp_path, monkeypatch) -> None:  # noqa: F811
    """Four tokens of a prompt and a step for one more, with its experts and int8 activations.

    Kernels of GPUs round queries and weights of attention to bfloat16, those of CPUs do not. That is as many
    roundings of the same size as keys and values have in the caches, whose effect is seen without a GPU:
    twice as much is allowed, of all logits together.
    """
    how = {"quant": "w4g64a8kv16", "max_context": 64, "db": tmp_path / "r.db"}
    cpu = mc.compile("tiny", threads=1, **how).module()
    path = mc.compile("tiny", target="cuda:sm_90a", **how).save(tmp_path / "tiny.mimo")
    monkeypatch.setattr(gpu_device, "open_device", EmulatedDevice)
    gpu = load(path)
    ids = cpu.tokenizer.encode(PROMPT).ids
    assert len(ids) == 4
    exact = mc.compile("tiny", threads=1, **how | {"quant": "w4g64a8"}).module()
    told: list[list[np.ndarray]] = []
    for module in (cpu, gpu, exact):
        session = module.session()
        logits = [np.array(session.append(ids))]
        following = int((told[0] if told else logits)[0].argmax())
        logits.append(np.array(session.append([following])))
        told.append(logits)
    for theirs, ours, plain in zip(*told, strict=True):
        assert ours.argmax() == theirs.argmax()
        off, rounded = np.linalg.norm(ours - theirs), np.linalg.norm(theirs - plain)
        print(f"off by {off / rounded:.2f} of what caches in bfloat16 change")
        assert off < 2 * rounded < 0.1 * np.linalg.norm(theirs)
    # what routers choose stays on a GPU
    (note,) = verify_artifact(path).notes
    assert "which experts tokens get is not looked at on a GPU" in note
    for option in ("route_log", "route_replay"):
        args = Namespace(**{"route_log": None, "route_replay": None, option: tmp_path / "log"})
        name = "--" + option.replace("_", "-")
        with pytest.raises(UsageError, match=f"{name}: the artifact is for"), routed(args, gpu, 1):
            pass
