"""GPUs as targets: presets, what a driver says of the one that is there, what is said where there is none."""

from __future__ import annotations

import ctypes

import pytest

from mimo_compile.errors import EnvironmentMismatch, UsageError
from mimo_compile.ir import gpu
from mimo_compile.ir.hardware import CUDA, built_for, local_cpu, local_cuda, resolve_target

H200 = {
    "clock_khz": 1980000, "sms": 132, "memory_khz": 3201000, "memory_bits": 6144, "l2_bytes": 60 << 20,
    "threads_per_sm": 2048, "major": 9, "minor": 0, "shared_per_sm": 233472, "registers_per_sm": 65536,
    "shared_per_block": 232448, "blocks_per_sm": 32, "shared_reserved": 1024,
}  # fmt: skip


class Driver:
    """Stands in for libcuda: one GPU, or a function that fails."""

    def __init__(self, values=H200, count=1, fails="", error=100):
        self.numbers = {gpu._ATTRIBUTES[k]: v for k, v in values.items()}
        self.count, self.fails, self.error = count, fails, error

    def __getattr__(self, name):
        def call(*arguments):
            if name == self.fails:
                return self.error
            if name == "cuDeviceGetCount":
                arguments[0]._obj.value = self.count
            if name == "cuDeviceGetName":
                ctypes.memmove(arguments[0], b"NVIDIA H200\0", 12)
            if name == "cuDeviceGetAttribute":
                arguments[0]._obj.value = self.numbers[arguments[1]]
            return 0

        return call


@pytest.fixture(autouse=True)
def forgotten():
    gpu.local_gpu.cache_clear()
    yield
    gpu.local_gpu.cache_clear()


def test_presets() -> None:
    for name, hardware in CUDA.items():
        assert resolve_target(name) is hardware
        assert hardware.kind == "cuda" and hardware.gpu is not None
        assert hardware.cores == hardware.threads and hardware.name == name
        # what a block takes and what the driver takes is what an SM has
        assert (
            hardware.gpu.shared_per_block + hardware.gpu.shared_reserved
            == hardware.gpu.shared_per_sm
        )
        assert hardware.features >= {"cuda", "mma", "cp_async", "sm_80"}
        assert built_for(name, "cuda", hardware.features, hardware.threads) == hardware
        with pytest.raises(UsageError, match=f"--threads means nothing to {name}"):
            resolve_target(name, 4)
    assert CUDA["cuda:sm_90a"].features > CUDA["cuda:sm_80"].features
    assert {"wgmma", "tma", "sm_90a"} <= CUDA["cuda:sm_90a"].features
    assert not CUDA["cuda:sm_90a"].missing(CUDA["cuda:sm_80"].features)


def test_tvm_takes_the_target() -> None:
    from mimo_compile._tvm import compiler

    for hardware in CUDA.values():
        target = compiler().target.Target(hardware.tvm_target())
        assert str(target.attrs["arch"]) == hardware.gpu.arch
        assert int(target.attrs["max_shared_memory_per_block"]) == hardware.gpu.shared_per_block


@pytest.mark.parametrize("text", ["cuda:sm_75", "cuda:", "cuda90"])
def test_unknown_ones_name_the_known(text: str) -> None:
    with pytest.raises(UsageError, match=r"use one of .*cuda:sm_80, cuda:sm_90a"):
        resolve_target(text)


def test_the_gpu_of_this_machine_is_what_its_driver_says(monkeypatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    found = local_cuda()
    preset = CUDA["cuda:sm_90a"]
    assert found == resolve_target("cuda") and found.name == "NVIDIA H200"
    assert (found.cores, found.l3_bytes, found.features) == (132, 60 << 20, preset.features)
    for field in (
        "arch",
        "shared_per_block",
        "shared_per_sm",
        "shared_reserved",
        "registers_per_sm",
    ):
        assert getattr(found.gpu, field) == getattr(preset.gpu, field)
    assert found.gpu.memory_bytes_per_s == pytest.approx(preset.gpu.memory_bytes_per_s, rel=0.03)
    assert found.gpu.clock_hz == 1.98e9
    with pytest.raises(UsageError, match="--threads means nothing to cuda"):
        resolve_target("cuda", 2)


def _no_library(name):
    raise OSError(f"{name}: cannot open shared object file")


@pytest.mark.parametrize(
    ("library", "text"),
    [
        (_no_library, "there is no NVIDIA driver"),
        (lambda name: Driver(fails="cuInit"), "answers cuInit with error 100"),
        (lambda name: Driver(fails="cuDeviceGetAttribute", error=1), "error 1"),
        (lambda name: Driver(count=0), "finds no GPU"),
        (lambda name: Driver({**H200, "major": 7, "minor": 5}), "compute capability 7.5"),
        (lambda name: Driver({**H200, "major": 12}), "there are kernels for 8.0, 9.0"),
    ],
)
def test_without_one_the_error_says_so(monkeypatch, library, text: str) -> None:
    monkeypatch.setattr(ctypes, "CDLL", library)
    with pytest.raises(EnvironmentMismatch, match=text) as caught:
        resolve_target("cuda")
    assert "--target cuda" in str(caught.value) and caught.value.exit_code == 3


def test_cpus_are_none() -> None:
    assert local_cpu().gpu is None
