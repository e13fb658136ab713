"""CUDA text to machine code: finding nvcc, what its log says, what is kept; limits of launches."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
from cuda_functions import parsed
from cuda_sample import CudaSwiglu
from test_cuda_every import WORKLOADS

from mimo_compile.errors import EnvironmentMismatch, MimoError
from mimo_compile.ir.hardware import CUDA, PRESETS, SIMULATED, local_cpu
from mimo_compile.ir.ops import load_all, parse_workload
from mimo_compile.ir.ops.base import Arg
from mimo_compile.pipeline.device import compile_device_code
from mimo_compile.pipeline.isolate import Origin
from mimo_compile.schedules import SCHEDULES, get_schedule
from mimo_compile.schedules.cuda import kept, nvcc, sass
from mimo_compile.schedules.cuda.code import TensorMap
from mimo_compile.schedules.cuda.limits import array_bytes, check, fits, refusal

A100, H200 = CUDA["cuda:sm_80"], CUDA["cuda:sm_90a"]
SAMPLE, WORKLOAD = CudaSwiglu(), parse_workload("swiglu:t=8,f=512")
KERNEL = SAMPLE.lower(WORKLOAD, SAMPLE.config(), H200)
needs_nvcc = pytest.mark.skipif(nvcc.find_tool("nvcc") is None, reason="nvcc is not installed")

LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'up' for 'sm_90a'
ptxas info    : Function properties for up
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 18 registers, used 0 barriers
ptxas info    : Compile time = 2.035 ms
ptxas info    : Compiling entry function 'gate' for 'sm_90a'
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized
ptxas info    : Function properties for gate
    64 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 512 bytes smem
/tmp/mimo-x/kernel.cu(3): warning #177-D: variable "a" was declared but never referenced
"""


@pytest.fixture
def caches(tmp_path, monkeypatch) -> Path:
    """A cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """A toolkit whose nvcc writes its arguments down and does as it is told."""
    folder = tmp_path / "toolkit"
    (folder / "bin").mkdir(parents=True)
    monkeypatch.setenv("CUDA_HOME", str(folder))
    monkeypatch.setattr(nvcc, "find_library", lambda: None)

    def install(release="13.0", *, log=LOG, code=0, name="nvcc"):
        calls, words = folder / "calls", folder / "log"
        words.write_text(log)
        (folder / "bin" / name).write_text(
            "#!/bin/sh\n"
            f'if [ "$1" = --version ]; then echo "release {release}, V{release}.88"; exit; fi\n'
            f'echo "$@" >> {calls}\n'
            'while [ "$1" ]; do [ "$1" = -o ] && printf "ELF x" > "$2"; shift; done\n'
            f"cat {words} >&2; exit {code}\n"
        )
        (folder / "bin" / name).chmod(0o755)
        nvcc._asked.cache_clear()
        return lambda: calls.read_text().splitlines() if calls.exists() else []

    yield install
    nvcc._asked.cache_clear()


# -- finding it --------------------------------------------------------------------------------


def test_tools_are_found_where_toolkits_and_packages_put_them(tmp_path, monkeypatch) -> None:
    places = ["home/bin", "path/bin", "onpath", "usual/bin", "site/nvidia/cu13/bin"]
    for place in places:
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "nvcc").write_text("#!/bin/sh\n")
        (tmp_path / place / "nvcc").chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "path"))
    monkeypatch.setenv("PATH", str(tmp_path / "onpath"))
    monkeypatch.setattr(nvcc, "USUAL", tmp_path / "usual")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    for place in places:
        assert nvcc.find_tool("nvcc") == tmp_path / place / "nvcc"
        (tmp_path / place / "nvcc").chmod(0o644)  # what cannot be executed is not it
    assert nvcc.find_tool("nvcc") is None is nvcc.find_library()
    with pytest.raises(EnvironmentMismatch, match=r"needs nvcc.*CUDA_HOME.*mimo-compile\[cuda\]"):
        nvcc.compile_device(KERNEL, H200)


def test_an_old_one_is_refused(toolkit) -> None:
    toolkit("11.8")
    with pytest.raises(EnvironmentMismatch, match=r"CUDA 11\.8 is too old .*toolkit/bin/nvcc"):
        nvcc.find_compiler()


# -- what it says and what is kept ---------------------------------------------------------------


def test_the_log_says_what_functions_take() -> None:
    assert nvcc.usage_of(LOG) == {
        "up": nvcc.Usage(18),
        "gate": nvcc.Usage(255, shared_bytes=512, stack_bytes=64, spill_bytes=20),
    }
    serialised, unused = nvcc.warnings_of(LOG)
    assert "C7510" in serialised and unused.startswith("kernel.cu(3): warning #177-D")


def test_a_kernel_is_compiled_once(caches, toolkit, tmp_path, monkeypatch) -> None:
    calls = toolkit()
    first = nvcc.compile_device(KERNEL, H200)
    assert first.local_bytes == 84 and first.cubin.startswith(b"ELF ")
    (command,) = calls()
    assert "-gencode arch=compute_90a,code=sm_90a" in command and "fast_math" not in command
    assert nvcc.compile_device(KERNEL, H200) == first and len(calls()) == 1
    # another architecture, text, header or compiler is another binary
    nvcc.compile_device(KERNEL, A100)
    assert len(calls()) == 2
    nvcc.compile_device(SAMPLE.lower(WORKLOAD, SAMPLE.config(threads=32), H200), H200)
    assert len(calls()) == 3
    monkeypatch.setattr(nvcc, "HEADERS", tmp_path)
    (tmp_path / "mine.cuh").write_text("#define ONE 1\n")
    nvcc.compile_device(KERNEL, H200)
    assert len(calls()) == 4
    toolkit("13.1")
    nvcc.compile_device(KERNEL, H200)
    assert len(calls()) == 5


def test_damage_is_compiled_again_and_old_files_go(caches, toolkit, monkeypatch) -> None:
    calls = toolkit()
    first = nvcc.compile_device(KERNEL, H200)
    (path,) = kept.folder().iterdir()
    for data in (path.read_bytes().replace(b"gate", b"late"), b"", path.read_bytes()[:-20]):
        path.write_bytes(data)
        before = len(calls())
        assert nvcc.compile_device(KERNEL, H200) == first and len(calls()) == before + 1
    monkeypatch.setattr(kept, "_MOST", 3)
    for i in range(4):
        kept.store(kept.digest([str(i)]), nvcc.Usage(i))
    assert len(list(kept.folder().iterdir())) == 3  # five, without the older two
    assert kept.load(kept.digest(["3"]), nvcc.Usage) == nvcc.Usage(3)
    assert kept.digest(["a", "b"]) != kept.digest(["ab", ""])


def test_without_a_place_for_caches(toolkit, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    calls = toolkit()
    assert nvcc.compile_device(KERNEL, H200) == nvcc.compile_device(KERNEL, H200)
    assert len(calls()) == 2


def test_what_nvcc_refuses_is_named(caches, toolkit) -> None:
    toolkit(log='x\n/tmp/a/kernel.cu(7): error: identifier "q" is undefined\n1 error\n', code=2)
    with pytest.raises(
        MimoError, match=rf"nvcc refuses {KERNEL.name} for sm_90a: kernel\.cu\(7\): error"
    ):
        nvcc.compile_device(KERNEL, H200)
    toolkit(log="", code=1)
    with pytest.raises(MimoError, match="it does not say why"):
        nvcc.ptx_of(KERNEL, H200)
    toolkit()  # 255 registers of 1024 threads
    large = SAMPLE.lower(WORKLOAD, SAMPLE.config(threads=1024), H200)
    with pytest.raises(
        MimoError, match=r"cannot launch gate of .* with 255 registers, an SM has 65536"
    ):
        nvcc.compile_device(large, H200)
    toolkit(log="")  # it compiles, but what is launched is not in it
    with pytest.raises(ValueError, match="has no function gate, up"):
        nvcc.compile_device(KERNEL, H200)


def test_what_can_only_be_slow_is_in_no_artifact(caches, toolkit) -> None:
    toolkit()
    origin = Origin(str(WORKLOAD), SAMPLE.name, "{}")
    with pytest.raises(
        MimoError,
        match=r"kernel of swiglu:t=8,f=512 can only be slow: it uses local memory: 84 bytes of stack and "
        rf"spills \(schedule {SAMPLE.name}, config {{}}\).*tune --op swiglu:t=8,f=512 --target cuda:sm_90a",
    ):
        compile_device_code([KERNEL], [origin], H200)
    toolkit(
        "13.1", log=LOG.replace("64 bytes stack", "0 bytes stack").replace("8 bytes", "0 bytes")
    )
    with pytest.raises(MimoError, match=r"12 bytes of stack"):
        compile_device_code([KERNEL], [origin], H200)
    quiet = LOG.replace("64 bytes stack", "0 bytes stack").replace("8 bytes", "0 bytes")
    toolkit("13.2", log=quiet.replace("12 bytes", "0 bytes"))
    with pytest.raises(
        MimoError, match=r"can only be slow: .*wgmma.mma_async instructions are serial"
    ):
        compile_device_code([KERNEL], [origin], H200)


# -- the real one --------------------------------------------------------------------------------


@needs_nvcc
def test_a_real_kernel(caches, monkeypatch) -> None:
    spills = """extern "C" __global__ void pick(const int* at, float* y) {
      float v[16];
      for (int i = 0; i < 16; i++) v[i] = y[i];
      for (int i = 0; i < 16; i++) v[at[i]] += 1.0f;
      for (int i = 0; i < 16; i++) y[i] = v[at[i + 16]];
    }\n"""
    code = dataclasses.replace(KERNEL.device, text=KERNEL.device.text + spills)
    kernel = dataclasses.replace(KERNEL, device=code)
    binary = nvcc.compile_device(kernel, H200)
    assert binary.cubin[:4] == b"\x7fELF"
    assert binary.usage["gate"].registers >= 8 and binary.usage["gate"].shared_bytes == 512
    assert binary.usage["gate"].spill_bytes == binary.usage["gate"].stack_bytes == 0
    assert binary.usage["pick"].stack_bytes == 64 == binary.local_bytes
    assert any("pick" in line for line in binary.warnings)
    wide = (dataclasses.replace(code.launches[0], threads=1024), code.launches[1])
    with pytest.raises(
        MimoError, match=r"launch gate of .* 1024 threads, its __launch_bounds__ are 128"
    ):
        nvcc.compile_device(
            dataclasses.replace(kernel, device=dataclasses.replace(code, launches=wide)), H200
        )
    found = sass.instructions(kernel, H200, binary)
    assert not found.missing and found.local > 0
    monkeypatch.setattr(sass, "find_tool", lambda name: None)
    with pytest.raises(EnvironmentMismatch, match="pip install nvidia-cuda-nvdisasm"):
        sass.disassemble(binary)
    expected = ("MUFU.EX2", "HGMMA", "LDG")
    other = dataclasses.replace(kernel, device=dataclasses.replace(code, expected=expected))
    found = sass.instructions(other, H200, binary)
    assert (found.read, found.missing, found.unknown, found.local) == (
        "ptx",
        ("HGMMA",),
        ("LDG",),
        64,
    )


def test_opcodes_of_sass() -> None:
    text = """.text.gate:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/               @P0 EXIT ;
        /*0020*/              @!PT STL.64 [R1], R2 ;
        /*0030*/             @UP1  UTMALDG.2D [UR8], [UR4] ;
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0050*/                   EXIT ;
"""
    assert sass.opcodes(text) == {
        "LDC": 1, "EXIT": 2, "STL.64": 1, "UTMALDG.2D": 1, "HGMMA.64x128x16.F32.BF16": 1,
    }  # fmt: skip


# -- limits --------------------------------------------------------------------------------------


def test_what_a_block_may_take() -> None:
    assert fits(H200, threads=384, shared_bytes=232448, registers=168)
    assert fits(H200, threads=128, cluster=2)
    for hardware, asked, text in (
        (H200, {"threads": 1056}, "1 to 1024"),
        (H200, {"threads": 48}, "whole warps"),
        (H200, {"threads": 128, "shared_bytes": 232449}, "a block has 232448"),
        (A100, {"threads": 128, "shared_bytes": 166913}, "a block has 166912"),
        (H200, {"threads": 128, "registers": 256}, "a thread has 255"),
        (H200, {"threads": 512, "registers": 129}, "an SM has 65536"),  # 136, in eights
        # 9 warps of 7168 registers are 64512, but a quarter of 16384 holds 2
        (H200, {"threads": 288, "registers": 224}, "in quarters: for 256 threads"),
        (A100, {"threads": 128, "cluster": 2}, "sm_80 does not have"),
        (H200, {"threads": 128, "cluster": 16}, "may be 8"),
    ):
        assert text in refusal(hardware, **asked) and not fits(hardware, **asked)


def _launch(**changes):
    first, *rest = KERNEL.device.launches
    launches = (dataclasses.replace(first, **changes), *rest)
    return dataclasses.replace(KERNEL, device=dataclasses.replace(KERNEL.device, launches=launches))


MAP = TensorMap("x", "float32", 8, 1024, 64, 32)


@pytest.mark.parametrize(
    ("kernel", "hardware", "text"),
    [
        (_launch(grid=(1, 70000, 1)), H200, "a grid of"),
        (_launch(threads=2048), H200, "launch of gate: 2048 threads"),
        (_launch(cluster=3), H200, "no whole clusters of 3"),
        (_launch(operands=("x", "quarter", 512)), H200, "the operand quarter is no array"),
        (_launch(operands=("x", "half", 2**31)), H200, "is no int32"),
        (_launch(operands=(MAP,)), A100, "which cuda:sm_80 cannot read"),
        (_launch(operands=(dataclasses.replace(MAP, array="w"),)), H200, "which is no array"),
        (_launch(operands=(dataclasses.replace(MAP, rows=9),)), H200, "36864 bytes over the 32768"),
        (_launch(operands=(dataclasses.replace(MAP, box_columns=64),)), H200, "256 bytes in a row"),
        (_launch(operands=(dataclasses.replace(MAP, box_columns=16),)), H200, "64 bytes in a row"),
        (_launch(operands=(dataclasses.replace(MAP, box_rows=257),)), H200, "each at most 256"),
        (_launch(operands=(dataclasses.replace(MAP, columns=1023),)), H200, "a multiple of 16"),
        (dataclasses.replace(KERNEL, features=frozenset({"wgmma"})), A100, "needs wgmma"),
        (dataclasses.replace(KERNEL, device=None), H200, "has no CUDA code"),
        (KERNEL, PRESETS["x86-64-v3"], "needs cuda of x86-64-v3"),
    ],
)
def test_mistakes_of_schedules_are_found_before_compiling(kernel, hardware, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        check(kernel, hardware)


def test_a_tensor_map_that_fits() -> None:
    assert check(_launch(operands=(MAP,)), H200).launches[0].operands == (MAP,)
    sizes = {"float32": 4, "bfloat16": 2, "float8_e4m3fn": 1, "int32": 4, "uint8": 1}
    for dtype, size in sizes.items():
        assert array_bytes(Arg("x", "input", (3, 5), dtype)) == 15 * size


def test_no_schedule_of_another_machine_takes_a_gpu() -> None:
    load_all()
    texts = (
        "mpgemm:m=1,n=256,k=256,w=w4g64,a=a8", "mpgemm:m=64,n=256,k=256,w=bf16,a=abf16",
        "mpgemm:m=1,n=256,k=256,w=complex2,a=a8", "mpgemm:m=1,n=256,k=256,w=nf4,a=a16",
        "cached_attention:t=1,h=4,kv=2,d=64,dv=64,cap=256", "rms_norm:t=4,d=64", "swiglu:t=1,f=64",
        "kv_append:t=1,h=4,kv=2,d=64,dv=64,cap=256,rot=64", "route:t=4,e=8,k=2",
        "moe:t=4,e=8,k=2,d=256,f=256,w=w4g64,a=a8", *(t for texts in WORKLOADS.values() for t in texts),
    )  # fmt: skip
    names = [n for entries in SCHEDULES.values() for n in entries]
    asked = 0
    for text in texts:
        workload = parsed(text)
        here = [get_schedule(n) for n in names if n.startswith(f"{workload.op}.")]
        for schedule in here:
            on_gpu = ".cuda" in schedule.name
            asked += schedule.supports(workload, local_cpu())
            machines = [*CUDA.values()] if not on_gpu else [local_cpu(), *SIMULATED.values()]
            for hardware in machines:
                assert not schedule.supports(workload, hardware), (schedule.name, hardware.name)
    assert asked >= len(texts)
