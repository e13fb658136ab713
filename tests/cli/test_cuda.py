"""`--target cuda...` on the command line: kernels can be inspected, and all else says what is missing."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from mimo_compile import _cuda
from mimo_compile.ir import gpu
from mimo_compile.runtime import gpu as runtime_gpu
from mimo_compile.schedules.cuda import nvcc
from mimo_compile.search import space

sys.path.insert(0, str(Path(__file__).parents[1] / "schedules"))
sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))

from cuda_sample import CudaSwiglu
from gpu_samples import TEXT, plain_gpu

pytestmark = pytest.mark.compile

SPEC = "swiglu:t=256,f=4096"


@pytest.fixture
def sample(monkeypatch) -> None:
    """Let one small CUDA schedule be all there is."""
    monkeypatch.setattr(space, "schedules_for", lambda workload, hardware: [CudaSwiglu()])


@pytest.mark.skipif(nvcc.find_tool("nvcc") is None, reason="nvcc is not installed")
def test_inspect_compiles_and_predicts(cli, sample) -> None:
    done = cli("inspect", "--op", SPEC, "--target", "cuda:sm_90a", "--json")
    assert done.code == 0, done.err
    value = json.loads(done.out)
    assert value["target"] == "cuda-sm-90a.132c" and value["measured"] == 0
    (row,) = value["kernels"]
    assert row["schedule"] == "swiglu.cuda_sample" and row["config"] == {"threads": 128}
    gate, up = row["launches"]
    assert gate["symbol"] == "gate" and gate["grid"] == [256, 1, 1] and gate["shared_bytes"] == 512
    assert 8 <= gate["registers"] <= 64 and gate["spill_bytes"] == up["spill_bytes"] == 0
    assert gate["blocks_per_sm"] == 16 and gate["limit"] == "threads" and gate["occupancy"] == 1
    assert gate["waves"] == pytest.approx(256 / (16 * 132))
    # 12 bytes an element are as long in memory as the op's necessary ones, and there are two launches
    assert row["parts_us"]["dram"] == pytest.approx(1e6 * 12 * 256 * 4096 / 4.8e12)
    assert row["predicted_us"] >= value["roofline_us"] and row["scratch_bytes"] == 4 * 256 * 4096
    found = row["instructions"]
    assert found["local"] == 0 and not found["missing"] and row["not_compiled"] is None
    page = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text()
    told = set(
        re.findall(r"`(\w+)`", page[page.index("With `--op` and a GPU:") :].partition("\n\n")[0])
    )
    assert {*value, *row, *gate, *found} == told - {"sass", "ptx", "text", "name"} | {"ok"}
    text = cli("inspect", "--op", SPEC, "--target", "cuda:sm_90a").out  # from the cache
    assert "predicted" in text and "256x1x1" in text and "No GPU has run this" in text
    ptx = cli("inspect", "--op", SPEC, "--target", "cuda:sm_90a", "--ptx").out
    assert ptx.startswith("// swiglu.cuda_sample threads=128\n") and ".visible .entry gate" in ptx


def test_inspect_without_nvcc_shows_what_is_known(cli, sample, monkeypatch) -> None:
    monkeypatch.setattr(nvcc, "find_tool", lambda name: None)
    monkeypatch.setattr(nvcc, "find_library", lambda: None)
    text = cli("inspect", "--op", SPEC, "--target", "cuda:sm_80").out
    assert "not compiled: compiling CUDA kernels needs nvcc" in text and "256x1x1" in text
    for flag in ("--ptx", "--sass"):
        done = cli("inspect", "--op", SPEC, "--target", "cuda:sm_80", flag)
        assert done.code == 3 and "needs nvcc" in done.error


def test_what_cannot_be_done_yet_is_one_line(cli, tmp_path, monkeypatch) -> None:
    out = tmp_path / "t.mimo"
    target = ("--target", "cuda:sm_90a")
    for arguments, text in (
        (("inspect", "--op", SPEC, "--objective", "energy", *target), "nothing was"),
        (
            ("inspect", "--op", SPEC, "--threads", 2, *target),
            "--threads means nothing to cuda:sm_90a",
        ),
        (("inspect", "--op", SPEC, "--sass"), "--ptx and --sass show code of GPUs"),
        (("inspect", "x.mimo", "--ptx"), "go with --op and a GPU as --target, or with --kernel"),
        (("inspect", "x.mimo", "--cuda"), "need --kernel NAME"),
        (("inspect", "--op", "key_mean:t=2,kv=1,d=6,cap=300", *target), "no schedule supports"),
        (("bench", "mpgemm", "--op", SPEC, *target), "--target must be cpu"),
        (("inspect", "--op", SPEC, "--target", "cuda:sm_75"), "cuda:sm_80, cuda:sm_90a"),
    ):
        done = cli(*arguments)
        assert done.code == 2 and text in done.error, done.err
    assert not out.exists()


def test_a_machine_without_gpu_says_so(cli, monkeypatch) -> None:
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(gpu.ctypes, "CDLL", missing)
    gpu.local_gpu.cache_clear()
    try:
        done = cli("inspect", "--op", SPEC, "--target", "cuda")
        value = json.loads(cli("targets", "--json").out)
        shown = cli("targets").out
    finally:
        gpu.local_gpu.cache_clear()
    assert (
        done.code == 3 and "no GPU that can be used" in done.error and "cuda:sm_90a" in done.error
    )
    assert value["gpu"]["name"] is None and "driver" in value["gpu"]["reason"]
    assert (
        set(value["gpus"]) == {"cuda:sm_80", "cuda:sm_90a"}
        and "wgmma" in value["gpus"]["cuda:sm_90a"]
    )
    assert "GPUs      cuda:sm_80, cuda:sm_90a; this machine has no GPU" in shown


def test_an_artifact_is_shown_and_not_run(cli, tmp_path, monkeypatch) -> None:
    path = plain_gpu().save(tmp_path / "p.mimo")
    text = cli("inspect", path).out
    assert "cuda:sm_90a" in text and "code.cuda" in text and "No GPU has run this" in text
    assert "sm_90a, by CUDA 13.0, 1 cubins for 2 kernels" in text and "scratch 512 B" in text
    whole = json.loads(cli("inspect", path, "--json").out)
    value = whole["device"]
    assert value["arch"] == "sm_90a" and whole["planned_bytes"]["scratch"] == 512
    add = next(row for row in value["kernels"] if row["kernel"] == "add")
    assert [x["symbol"] for x in add["launches"]] == ["plus", "plus"]
    assert [x["shared_bytes"] for x in add["launches"]] == [0, 1024] and add["predicted_us"] == 2.5
    page = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text()
    told = re.findall(r"`(\w+)`", page[page.index("JSON of an artifact:") :].partition("\n\n")[0])
    assert {*value, *add, *add["launches"][0]} <= set(told)
    done = cli("inspect", path, "--kernel", "double", "--cuda")
    assert done.code == 0 and TEXT in done.out
    done = cli("inspect", path, "--kernel", "double", "--tir")
    assert done.code == 2
    monkeypatch.setattr(_cuda, "LIBRARY", "libcuda-that-is-not-there.so")
    _cuda.driver.cache_clear()
    done = cli("run", path, "--prompt", "x")
    assert done.code == 3 and "is for cuda:sm_90a, and this machine has no GPU" in done.error
    assert "compute capability 9.0 (H100, H200)" in done.error and "--target cpu" in done.error
    monkeypatch.setattr(runtime_gpu, "check", lambda *_: None)  # as where there is one
    done = cli("bench", "model", path)
    assert done.code == 2 and "bench model is for CPUs, and" in done.error
    assert "is for cuda:sm_90a" in done.error and "`mimo-compile run`" in done.error


def test_compiling_needs_nvcc_before_all_else(cli, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(nvcc, "find_tool", lambda name: None)
    monkeypatch.setattr(nvcc, "find_library", lambda: None)
    out = tmp_path / "t.mimo"
    done = cli("compile", tmp_path / "no-model", "-o", out, "--target", "cuda:sm_80")
    assert done.code == 3 and "needs nvcc" in done.error and "mimo-compile[cuda]" in done.error
    assert not out.exists()
