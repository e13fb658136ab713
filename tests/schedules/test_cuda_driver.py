"""Launching through the driver's library, with one in its place whose device memory is the host's."""

from __future__ import annotations

import ctypes
import dataclasses
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from cuda_sample import CudaSwiglu

from mimo_compile.errors import MimoError, VerificationError
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import CUDA
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.ir.ops.base import Arg
from mimo_compile.pipeline.device import predicted_us
from mimo_compile.schedules.cuda import driver
from mimo_compile.schedules.cuda.code import DeviceCode, Launch, TensorMap
from mimo_compile.schedules.cuda.nvcc import USUAL, Binary, Usage, find_tool
from mimo_compile.search.measure.base import Timing
from mimo_compile.search.measure.emulated import check_emulated
from mimo_compile.search.measure.gpu_times import times_of

H200 = CUDA["cuda:sm_90a"]
SAMPLE, WORKLOAD = CudaSwiglu(), parse_workload("swiglu:t=3,f=50")
KERNEL = SAMPLE.lower(WORKLOAD, SAMPLE.config(), H200)
TOOLKITS = [path.parents[1] for path in [find_tool("nvcc")] if path] + [USUAL]
HEADERS = next((p / "include" for p in TOOLKITS if (p / "include" / "cuda.h").is_file()), None)
pytestmark = pytest.mark.skipif(
    HEADERS is None or shutil.which("gcc") is None, reason="cuda.h or gcc is not installed"
)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """The stand-in, compiled against cuda.h."""
    path = tmp_path_factory.mktemp("driver") / "libfake.so"
    source = Path(__file__).with_name("fake_driver.c")
    flags = ["-O1", "-shared", "-fPIC", "-Wall", "-Werror", f"-I{HEADERS}"]
    subprocess.run(["gcc", *flags, source, "-o", path, "-lm"], check=True)
    return path


@pytest.fixture
def on(library, monkeypatch) -> driver.Driver:
    """The driver of this machine is the stand-in, and machine code nothing but its first bytes."""
    made = driver.Driver(str(library))
    binary = Binary("sm_90a", b"\x7fELF\0\1", {name: Usage(8) for name in ("gate", "up")})
    monkeypatch.setattr(driver, "driver", lambda: made)
    monkeypatch.setattr(driver, "compile_device", lambda kernel, hardware: binary)
    return made


def held(library: Path) -> int:
    """Return what was allocated and not given back."""
    return int(ctypes.CDLL(str(library)).fake_held())


def test_results_are_those_of_the_launches(on, library) -> None:
    found = check_emulated(WORKLOAD, SAMPLE, None, H200, run=driver.run)
    assert 0 < found.error_ratio < 1 and set(found.outputs) == {"y"}
    x = found.inputs["x"] + 1
    again = driver.run(KERNEL, H200, {"x": x})["y"]
    expected = get_op("swiglu").reference(WORKLOAD, {"x": x})["y"]
    assert np.allclose(again, expected, rtol=1e-5) and not np.array_equal(again, found.outputs["y"])
    assert held(library) == 0


def test_what_no_launch_wrote_is_found(on) -> None:
    code = dataclasses.replace(KERNEL.device, launches=KERNEL.device.launches[:1])
    half = dataclasses.replace(KERNEL, device=code)
    y = driver.run(half, H200, {"x": np.ones((3, 100), np.float32)})["y"]
    assert np.isnan(y).all()

    class Half(CudaSwiglu):
        def lower(self, workload, config, hardware):
            return half

    with pytest.raises(VerificationError):
        check_emulated(WORKLOAD, Half(), None, H200, run=driver.run)


def test_parameters_of_every_kind(on, library) -> None:
    map_ = TensorMap("x", "bfloat16", 40, 64, 32, 16, 32)
    args = (Arg("x", "input", (40, 64), "bfloat16"), Arg("y", "output", (64,), "float32"))
    launch = Launch("show", (1, 1, 1), 32, (map_, 0.5, "y", "count"), shared_bytes=4096)
    counters = {"count": Arg("count", "input", (2,), "float32")}
    code = DeviceCode("", (launch,), counters, frozenset({"count"}))
    kernel = dataclasses.replace(KERNEL, args=args, device=code)
    with driver.loaded(kernel, H200, on) as ready:
        ready.fill({"x": np.zeros((40, 64), np.uint16)})
        ready.call()
        ready.call()  # counters are zero again
        y = ready.results()["y"]
        assert held(library) == 4
    assert held(library) == 0
    kind, rank, place, *rest = y[:28].view(np.int64).tolist()
    assert (kind, rank) == (9, 2) and place > 2**32
    # columns, rows, bytes of a row, box, steps, no interleave, 32 bytes of swizzle, 256 of L2, zeros outside
    assert rest == [64, 40, 128, 16, 32, 1, 1, 0, 1, 3, 0] and y[40] == 0.5


def test_times_are_those_of_a_search(on, library) -> None:
    """Twice L2 is rotated over where the stand-in, whose events are 0.25 ms apart, has such kernels."""
    binary = driver.compile_device(KERNEL, H200)
    on.enter()
    timing = Timing(warm_up_s=0.0, batches=3, batch_s=0.25e-3)
    seconds = times_of(KERNEL, binary, H200, {"x": np.ones((3, 100), np.float32)}, on, timing)
    assert seconds == [0.25e-3] * 3 and held(library) == 0
    with pytest.raises(ValueError, match="the kernel wants"):
        times_of(KERNEL, binary, H200, {"x": np.ones((3, 99), np.float32)}, on, timing)
    assert held(library) == 0


def test_errors_are_named_and_nothing_stays_behind(on, library) -> None:
    first, then = KERNEL.device.launches
    for symbol, text in (
        ("wild", r"answers cuLaunchKernel with CUDA_ERROR_ILLEGAL_ADDRESS \(700\)"),
        ("absent", r"answers cuModuleGetFunction with an unknown error \(500\)"),
    ):
        launches = (first, dataclasses.replace(then, symbol=symbol))
        kernel = dataclasses.replace(
            KERNEL, device=dataclasses.replace(KERNEL.device, launches=launches)
        )
        with pytest.raises(MimoError, match=text):
            driver.run(kernel, H200, {"x": np.ones((3, 100), np.float32)})
        assert held(library) == 0
    with pytest.raises(MimoError, match="there is no NVIDIA driver"):
        driver.Driver("libcuda-that-is-not-there.so")


def test_clusters_are_those_that_were_compiled(on, library) -> None:
    first, then = KERNEL.device.launches
    for launch, text in (
        (
            dataclasses.replace(first, grid=(2, 1, 1), cluster=2),
            "gate is launched in clusters of 2 .* for 1",
        ),
        (dataclasses.replace(first, symbol="pair"), "pair is launched in clusters of 1 .* for 2"),
    ):
        code = dataclasses.replace(KERNEL.device, launches=(launch, then))
        kernel = dataclasses.replace(KERNEL, device=code)
        with pytest.raises(MimoError, match=text):
            driver.run(kernel, H200, {"x": np.ones((3, 100), np.float32)})
        assert held(library) == 0
    launch = Launch("pair", (2, 1, 1), 32, ("x", "y", 100), cluster=2)
    code = DeviceCode("", (launch,))
    args = (Arg("x", "input", (100,), "float32"), Arg("y", "output", (100,), "float32"))
    x = np.arange(100, dtype=np.float32)
    got = driver.run(dataclasses.replace(KERNEL, args=args, device=code), H200, {"x": x})["y"]
    assert np.array_equal(got, 2 * x)


def test_arrays_of_other_shapes_are_refused(on) -> None:
    with pytest.raises(ValueError, match="instead of float32"):
        driver.run(KERNEL, H200, {"x": np.ones((3, 99), np.float32)})


def test_what_counts_do_not_tell_is_not_predicted() -> None:
    """Such a kernel, of a plug-in, is compiled like any other; one that no SM can hold is not."""
    usage = {name: Usage(8) for name in ("gate", "up")}
    assert predicted_us(KERNEL, usage, H200) > 0
    untold = dataclasses.replace(KERNEL, counts=Counts({}, {"dram": 1200.0}))
    assert predicted_us(untold, usage, H200) == 0
    with pytest.raises(ValueError, match="no SM of"):
        predicted_us(KERNEL, {"gate": Usage(8), "up": Usage(8, shared_bytes=1 << 20)}, H200)
