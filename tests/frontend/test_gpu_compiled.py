"""A whole model compiled for a GPU: its artifact, run from its CUDA text by emulation, or on a GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import mimo_compile as mc
from mimo_compile.errors import EnvironmentMismatch, UsageError
from mimo_compile.ir.hardware import CUDA
from mimo_compile.ir.ops import parse_workload
from mimo_compile.runtime import device_code, gpu_device, load
from mimo_compile.schedules.cuda import nvcc
from mimo_compile.schedules.cuda.emulate import compiler

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))

from emulated_device import EmulatedDevice

CONTEXT, BATCH = 16, 2
pytestmark = pytest.mark.compile


@pytest.fixture
def texts_alone(monkeypatch) -> None:
    """Let the emulator be all that needs code: nvcc is not asked."""

    def binary(kernel, hardware):
        usage = {launch.symbol: nvcc.Usage(32) for launch in kernel.device.launches}
        return nvcc.Binary(hardware.gpu.arch, b"\x7fELF no machine code", usage)

    monkeypatch.setattr(nvcc, "compile_device", binary)
    monkeypatch.setattr(nvcc, "find_compiler", lambda: Path("nvcc"))
    monkeypatch.setattr(nvcc, "release", lambda path: (13, 0))


def prompts(vocab: int) -> list[list[int]]:
    return [np.random.default_rng(n).integers(1, vocab, n).tolist() for n in (7, 5)]


def texts(module, count: int) -> list[list[int]]:
    """What a module says to prompts that it reads together."""
    out: dict[int, list[int]] = {}
    asked = prompts(module.manifest.decoder.vocab)
    for index, token in module.generate_batch_ids(asked, count, stop_at_eos=False):
        out.setdefault(index, []).append(token)
    return [out[index] for index in range(len(asked))]


def same_as_on_a_cpu(gpu, cpu) -> None:
    """Greedy texts are the same, alone and together; hidden states differ by roundings."""
    prompt = prompts(cpu.manifest.decoder.vocab)[0]
    ours, theirs = (m.session().append(prompt) for m in (gpu, cpu))
    assert np.abs(ours - theirs).max() < 0.02 * np.abs(theirs).max()
    alone = [list(m.generate_ids(prompt, 4, stop_at_eos=False)) for m in (gpu, cpu)]
    assert alone[0] == alone[1]
    assert texts(gpu, 3) == texts(cpu, 3)


@pytest.fixture(scope="module")
def cpu(saved, tmp_path_factory):
    """What a GPU's artifact is compared with: the same formats on a CPU."""
    folder, db = saved("llama-tied-llama3")[1], tmp_path_factory.mktemp("db") / "r.db"
    how = {"quant": "abf16kv16", "max_context": CONTEXT, "batch": BATCH, "db": db, "threads": 1}
    return mc.compile(folder, **how).module()


@pytest.mark.slow
@pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")
def test_a_model_emulated_is_what_it_is_on_a_cpu(
    saved, cpu, texts_alone, tmp_path, monkeypatch
) -> None:
    artifact = mc.compile(
        saved("llama-tied-llama3")[1], target="cuda:sm_90a", max_context=CONTEXT, batch=BATCH,
        db=tmp_path / "r.db",
    )  # fmt: skip
    manifest = artifact.manifest
    # what --quant leaves open: activations and caches in bfloat16
    assert manifest.quant == "abf16kv16" and {x.format for x in manifest.decoder.layers} == {"bf16"}
    assert manifest.target.kind == "cuda" and manifest.versions["cuda"] == "13.0"
    table = device_code.decode(artifact.code, "code").table
    assert {c.kernel for c in manifest.plan} == set(table.kernels)
    assert all(kernel.predicted_us >= 2 for kernel in table.kernels.values())
    path = artifact.save(tmp_path / "gpu.mimo")
    with pytest.raises(UsageError, match="only artifacts for CPUs get other plans"):
        mc.compile(path, objective="energy")
    if not Path("/dev/nvidiactl").exists():
        with pytest.raises(EnvironmentMismatch, match="has no GPU that can be used"):
            load(path)
    device = EmulatedDevice()
    monkeypatch.setattr(gpu_device, "open_device", lambda: device)
    same_as_on_a_cpu(load(path), cpu)
    assert set(device.launched) < set(table.kernels)


@pytest.mark.slow
@pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")
def test_forks_take_descriptors_of_their_pages_along(
    saved, texts_alone, tmp_path, monkeypatch
) -> None:
    """A sequence that was forked in the middle of a page goes on as one that was not."""
    artifact = mc.compile(
        saved("llama")[1], target="cuda:sm_90a", attention="quest:budget=32,dense=1", max_context=128,
        batch=2, pages=4, db=tmp_path / "r.db",
    )  # fmt: skip
    manifest = artifact.manifest
    described = [n for n in manifest.decoder.pool.states if n.endswith(".desc")]
    assert described and all(len(manifest.states[n].shape) == 4 for n in described)
    monkeypatch.setattr(gpu_device, "open_device", EmulatedDevice)
    module = load(artifact.save(tmp_path / "pages.mimo"))
    prompt = prompts(manifest.decoder.vocab)[0] * 8
    first = module.session(slot=0)
    first.append(prompt)
    forked = first.fork(1)
    found = forked.append([5]), first.append([5])
    assert module.pool.held(0) != module.pool.held(1)
    assert np.array_equal(*found)
    page, other = module.pool.held(0)[0], module.pool.held(1)[0]
    machine = module._machine
    for name in described:
        at, size = machine._states[name]
        bits = np.zeros(size, np.uint8)
        machine.device.read(at, bits)
        by_page = bits.reshape(manifest.decoder.pool.pages, -1)
        assert by_page[page].any() and np.array_equal(by_page[page], by_page[other])


@pytest.mark.gpu
def test_a_model_on_a_gpu_is_what_it_is_on_a_cpu(saved, cpu, tmp_path) -> None:
    folder = saved("llama-tied-llama3")[1]
    artifact = mc.compile(
        folder, target="cuda", max_context=CONTEXT, batch=BATCH, db=tmp_path / "r.db"
    )
    same_as_on_a_cpu(load(artifact.save(tmp_path / "gpu.mimo")), cpu)


@pytest.mark.slow
@pytest.mark.skipif(nvcc.find_tool("nvcc") is None, reason="nvcc is not installed")
def test_machine_code_is_in_the_artifact(tmp_path) -> None:
    import torch

    module = torch.nn.Sequential(torch.nn.LayerNorm(48), torch.nn.Linear(48, 32), torch.nn.SiLU())
    artifact = mc.compile(
        module, target="cuda:sm_80", example_inputs=(torch.zeros(5, 48),), db=tmp_path / "r.db"
    )
    code = device_code.decode(artifact.save(tmp_path / "m.mimo") and artifact.code, "code")
    assert code.table.arch == "sm_80" and code.table.kernels
    for name, kernel in code.table.kernels.items():
        assert code.cubin(name).startswith(b"\x7fELF") and "__global__" in code.text(name)
        assert set(kernel.usage) == {launch.symbol for launch in kernel.launches}
        assert all(u.registers >= 8 and not u.spill_bytes for u in kernel.usage.values())


def test_all_that_is_missing_is_told_at_once(monkeypatch) -> None:
    from mimo_compile.pipeline import choose

    texts = ("embed:t=1,v=8,d=8", "swiglu:t=1,f=8", "rms_norm:t=1,d=8,eps=1e-05")
    calls = {parse_workload(text): {"step_1": 1} for text in texts}
    model = SimpleNamespace(functions=dict, workloads=lambda: calls)
    choose.require_schedules(model, CUDA["cuda:sm_90a"])
    monkeypatch.setattr(choose, "schedules_for", lambda w, h: [w] if w.op == "embed" else [])
    with pytest.raises(UsageError, match=rf"supports {texts[2]}; {texts[1]} on cuda:sm_90a"):
        choose.require_schedules(model, CUDA["cuda:sm_90a"])
