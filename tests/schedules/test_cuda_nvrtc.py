"""NVRTC in the place of nvcc: the same words and kernels, with the same instructions."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from cuda_sample import CudaSwiglu
from test_cuda_emulator import SYNC
from test_cuda_headers import WORDS
from test_cuda_tensor import GROUP, MMA

from mimo_compile.errors import EnvironmentMismatch, MimoError
from mimo_compile.ir.hardware import CUDA
from mimo_compile.ir.ops import parse_workload
from mimo_compile.schedules import get_schedule
from mimo_compile.schedules.cuda import nvcc, nvrtc, sass
from mimo_compile.schedules.cuda.code import DeviceCode, Launch

A100, H200 = CUDA["cuda:sm_80"], CUDA["cuda:sm_90a"]
SAMPLE, WORKLOAD = CudaSwiglu(), parse_workload("swiglu:t=8,f=512")
KERNEL = SAMPLE.lower(WORKLOAD, SAMPLE.config(), H200)
needs_nvrtc = pytest.mark.skipif(nvcc.find_library() is None, reason="NVRTC is not installed")


@pytest.fixture
def no_nvcc(tmp_path, monkeypatch) -> None:
    """Only NVRTC is installed, and nothing is kept."""
    real = nvcc.find_tool
    monkeypatch.setattr(nvcc, "find_tool", lambda name: None if name == "nvcc" else real(name))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# -- finding it --------------------------------------------------------------------------------


def test_the_library_is_found_where_toolkits_and_packages_put_it(tmp_path, monkeypatch) -> None:
    places = ["home/lib64", "home/lib", "path/lib64", "usual/lib64", "site/nvidia/cu13/lib"]
    for place in places:
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / nvrtc.NAMES[0]).touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "path"))
    monkeypatch.setattr(nvcc, "USUAL", tmp_path / "usual")
    monkeypatch.setattr(nvcc.sys, "path", [str(tmp_path / "site")])
    for place in places:
        assert nvcc.find_library() == tmp_path / place / nvrtc.NAMES[0]
        shutil.rmtree(tmp_path / place)
    assert nvcc.find_library() is None
    older = tmp_path / places[-1] / nvrtc.NAMES[1]
    older.parent.mkdir(parents=True)
    older.touch()
    assert nvcc.find_library() == older


def test_one_that_cannot_be_loaded_says_why(tmp_path, monkeypatch) -> None:
    library = tmp_path / nvrtc.NAMES[0]
    library.write_text("no library")
    monkeypatch.setattr(nvcc, "find_tool", lambda name: None)
    monkeypatch.setattr(nvcc, "find_library", lambda: library)
    with pytest.raises(EnvironmentMismatch, match=r"NVRTC cannot be used: .*: file too short"):
        nvcc.find_compiler()


def test_what_lies_beside_one_of_another_release_or_broken_is_let_be(tmp_path, monkeypatch) -> None:
    for name in ("13.0", "12.9", "12.8"):
        (tmp_path / f"libnvrtc-builtins.so.{name}").touch()
    loaded = []

    def load(path):
        loaded.append(Path(path).name)
        if path.endswith(".8"):
            raise OSError("broken")
        return MagicMock()

    monkeypatch.setattr(nvrtc.ctypes, "CDLL", load)
    nvrtc.Nvrtc(tmp_path / "libnvrtc.so.12")
    assert loaded == [f"libnvrtc{x}" for x in ("-builtins.so.12.8", "-builtins.so.12.9", ".so.12")]


def test_nvcc_comes_first_where_it_is_new_enough(tmp_path, monkeypatch) -> None:
    library = tmp_path / nvrtc.NAMES[0]
    monkeypatch.setattr(nvcc, "find_tool", lambda name: Path("nvcc"))
    monkeypatch.setattr(nvcc, "find_library", lambda: library)
    releases = {"nvcc": (13, 0), library.name: (13, 5)}
    monkeypatch.setattr(nvcc, "release", lambda path: releases[path.name])
    assert nvcc.find_compiler() == Path("nvcc")
    releases["nvcc"] = (11, 8)
    assert nvcc.find_compiler() == library
    releases[library.name] = (11, 8)
    with pytest.raises(EnvironmentMismatch, match=r"nvcc of CUDA 11\.8 is too old"):
        nvcc.find_compiler()


# -- the real one --------------------------------------------------------------------------------


@pytest.mark.slow
@needs_nvrtc
def test_a_real_kernel_without_nvcc(no_nvcc) -> None:
    pick = """extern "C" __global__ void pick(const int* at, float* y) {
      float v[16];
      for (int i = 0; i < 16; i++) v[i] = y[i];
      for (int i = 0; i < 16; i++) v[at[i]] += 1.0f;
      for (int i = 0; i < 16; i++) y[i] = v[at[i + 16]];
    }\n"""
    code = dataclasses.replace(KERNEL.device, text=KERNEL.device.text + pick)
    kernel = dataclasses.replace(KERNEL, device=code)
    binary = nvcc.compile_device(kernel, H200)
    assert binary.cubin[:4] == b"\x7fELF"
    assert binary.usage["gate"].registers >= 8 and binary.usage["gate"].shared_bytes == 512
    assert binary.usage["gate"].spill_bytes == binary.usage["gate"].stack_bytes == 0
    assert binary.usage["pick"].stack_bytes == 64 == binary.local_bytes
    assert any("pick" in line for line in binary.warnings)
    wide = (dataclasses.replace(code.launches[0], threads=1024), code.launches[1])
    with pytest.raises(MimoError, match=r"1024 threads, its __launch_bounds__ are 128"):
        nvcc.compile_device(
            dataclasses.replace(kernel, device=dataclasses.replace(code, launches=wide)), H200
        )
    wrong = dataclasses.replace(KERNEL, device=dataclasses.replace(code, text="int x = q;"))
    with pytest.raises(MimoError, match=rf"NVRTC refuses {KERNEL.name} for sm_90a: kernel.cu\(1\)"):
        nvcc.compile_device(wrong, H200)
    assert ".visible .entry gate" in nvcc.ptx_of(KERNEL, H200)
    before = nvcc.compile_device(KERNEL, H200)
    assert nvcc.compile_device(KERNEL, H200) == before


KERNELS = (
    ("embed.cuda", "embed:t=64,v=32000,d=4096,w=bf16", A100),
    ("kv_append.cuda", "kv_append:t=1,h=32,kv=8,d=128,dv=128,cap=4096,rot=128,c=bf16", A100),
    ("cached_attention.cuda_decode", "cached_attention:t=1,h=32,kv=8,d=128,dv=128,cap=4096,c=bf16", H200),
    ("cached_attention.cuda_prefill", "cached_attention:t=512,h=32,kv=8,d=128,dv=128,cap=4096,c=bf16", A100),
    ("mpgemm.cuda_gemv", "mpgemm:m=1,n=4096,k=4096,w=w4g64,a=a8", A100),
    ("mpgemm.cuda_wgmma", "mpgemm:m=512,n=4096,k=4096,w=bf16,a=abf16", H200),
    ("mpgemm.cuda_mma_codes", "mpgemm:m=64,n=4096,k=4096,w=w4g128,a=abf16", H200),
    ("route.cuda", "route:t=4,e=64,k=8", A100),
)  # fmt: skip


def _seen(kernel, hardware, compiler) -> tuple[nvcc.Binary, sass.Instructions]:
    made = nvcc._run(compiler, kernel.device.text, hardware.gpu.arch, "cubin", kernel.name)
    binary = nvcc.Binary(hardware.gpu.arch, made.data, nvcc.usage_of(made.log))
    return binary, sass.instructions(kernel, hardware, binary)


@pytest.mark.slow
@needs_nvrtc
@pytest.mark.skipif(
    nvcc.find_tool("nvcc") is None or nvcc.find_tool("nvdisasm") is None,
    reason="nvcc or nvdisasm is not installed",
)
@pytest.mark.parametrize(("name", "text", "hardware"), KERNELS, ids=[n for n, _, _ in KERNELS])
def test_kernels_have_the_instructions_that_nvcc_gives_them(name, text, hardware) -> None:
    schedule, workload = get_schedule(name), parse_workload(text)
    kernel = schedule.lower(workload, schedule.space(workload, hardware).default, hardware)
    tools = nvcc.find_tool("nvcc"), nvcc.find_library()
    (theirs, usual), (ours, found) = (_seen(kernel, hardware, tool) for tool in tools)
    assert set(ours.usage) == set(theirs.usage) and not ours.local_bytes
    assert not found.missing and not found.local
    heads = [{n.partition(".")[0] for n in x.opcodes} & set(HEADS) for x in (usual, found)]
    assert (
        heads[0] == heads[1]
    )  # the rest is the optimiser's, which of other releases is another one


HEADS = (
    "HGMMA", "IGMMA", "HMMA", "IMMA", "LDSM", "LDGSTS", "UTMALDG", "SYNCS", "USETMAXREG", "IDP", "MUFU",
    "SHFL", "BAR",
)  # fmt: skip
"""Opcodes that a text asks for by a word of its own, whatever else a compiler makes of it."""


@pytest.mark.slow
@needs_nvrtc
@pytest.mark.parametrize("hardware", [A100, H200], ids=["sm_80", "sm_90a"])
def test_words_of_the_headers(no_nvcc, hardware) -> None:
    parts = {"rest": SYNC + MMA + WORDS} | ({"multiply": GROUP} if hardware is H200 else {})
    for symbol, text in parts.items():
        code = DeviceCode(text, (Launch(symbol, (1, 1, 1), 32, ()),))
        kernel = dataclasses.replace(KERNEL, args=(), features=frozenset(), device=code)
        binary = nvcc.compile_device(kernel, hardware)
        assert all(u.spill_bytes == 0 for u in binary.usage.values())
        assert "sync.aligned" in nvcc.ptx_of(kernel, hardware)
