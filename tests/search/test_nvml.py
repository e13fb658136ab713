"""The GPU's counter, played by an object: what it measures, and each reason to give no number."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from mimo_compile._cuda import Driver
from mimo_compile.search.meters import measure_energy, nvml
from mimo_compile.search.meters.nvml import NvmlMeter
from mimo_compile.search.meters.watched import State, Watched, step_and_watts, steps, unsound

GPU = "GPU-00112233-4455-6677-8899-aabbccddeeff"
WATTS, IDLE_W, STEP_S = 300.0, 80.0, 0.004


class FakeNvml:
    """What of pynvml the meter uses, for a GPU that draws constant power while it is busy."""

    NVML_TEMPERATURE_GPU = NVML_CLOCK_SM = 0

    class NVMLError(Exception):
        pass

    def __init__(self, **changes: Any) -> None:
        self.energy: Callable[[float], float] | None = lambda mj: mj
        self.gpus, self.clock, self.temperature, self.power = 1, lambda: 1980.0, lambda: 55.0, None
        self.throttle, self.processes, self.busy = 0, 1, False
        self.watts = [WATTS]
        self.at, self.mj = time.perf_counter(), 1e6
        for name, value in changes.items():
            setattr(self, name, value)

    def advance(self) -> None:
        now = time.perf_counter()
        self.mj += 1e3 * (now - self.at) * (self.watts[0] if self.busy else IDLE_W)
        self.at = now

    def spin(self, seconds: float) -> tuple[int, float]:
        """Run for that long; a call takes a millisecond."""
        self.advance()
        self.busy, begin = True, time.perf_counter()
        time.sleep(seconds)
        self.advance()
        self.busy = False
        if seconds > 0.02 and len(self.watts) > 1:
            self.watts.pop(0)
        spent = time.perf_counter() - begin
        return round(spent * 1e3 + 0.5), spent

    def nvmlInit(self) -> None:  # noqa: N802
        if not self.gpus:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if uuid != GPU:
            raise self.NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> float:  # noqa: N802
        if self.energy is None:
            raise self.NVMLError("Not Supported")
        if time.perf_counter() - self.at > STEP_S:  # only now and then a new value
            self.advance()
        return self.energy(self.mj)

    def nvmlDeviceGetTemperature(self, handle: int, kind: int) -> float:  # noqa: N802
        return self.temperature()

    def nvmlDeviceGetClockInfo(self, handle: int, kind: int) -> float:  # noqa: N802
        if self.clock is None:
            raise self.NVMLError("Not Supported")
        return self.clock()

    def nvmlDeviceGetPowerUsage(self, handle: int) -> float:  # noqa: N802
        if self.power is None:
            raise self.NVMLError("Not Supported")
        return self.power

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: int) -> int:  # noqa: N802
        return self.throttle

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[int]:  # noqa: N802
        return [1] * self.processes


def ramp(start: float, by: float) -> Callable[[], float]:
    """A value that rises with each reading."""
    values = iter(start + by * i for i in range(10_000))
    return lambda: next(values)


def measured(window_s: float = 0.6, **changes: Any) -> Any:
    gpu = FakeNvml(**changes)
    meter = NvmlMeter(GPU, gpu)
    meter.warm_s, meter.poll_s, meter.longest_s = 0.02, 0.001, 0.3
    return measure_energy(meter, gpu.spin, window_s)


def test_a_gpu_without_a_counter_says_so() -> None:
    assert NvmlMeter(GPU, FakeNvml()).read_mj() == 1e6
    for broken, words in (
        (FakeNvml(gpus=0), "Driver Not Loaded"),
        (FakeNvml(energy=None), "Not Supported"),
    ):
        with pytest.raises(OSError, match=words):
            NvmlMeter(GPU, broken)


def test_the_gpu_is_the_one_that_the_driver_shows(monkeypatch) -> None:
    monkeypatch.setattr(nvml, "driver", lambda: SimpleNamespace(uuid=GPU))
    assert NvmlMeter(library=FakeNvml()).read_mj() == 1e6
    monkeypatch.setattr(nvml, "driver", lambda: SimpleNamespace(uuid="GPU-of-another-machine"))
    with pytest.raises(OSError, match="NVML: Not Found"):
        NvmlMeter(library=FakeNvml())
    monkeypatch.setattr(nvml, "driver", lambda: Driver("libcuda-that-is-not-there.so"))
    with pytest.raises(OSError, match="which GPU kernels run on is not known: there is no NVIDIA"):
        NvmlMeter(library=FakeNvml())


def test_state() -> None:
    gpu = FakeNvml(clock=None, throttle=0x48, processes=2, power=250_000)
    assert NvmlMeter(GPU, gpu).state() == State(
        55.0, None, 250.0, 2, ("hardware slowdown", "hardware thermal slowdown")
    )
    gpu.throttle = 0x1 | 0x2 | 0x4  # idle, set clocks, power cap: no reasons to refuse
    assert NvmlMeter(GPU, gpu).state().throttled == ()
    assert isinstance(NvmlMeter(GPU, gpu), Watched)


def test_energy_comes_from_the_steps_of_the_counter() -> None:
    meter_error = 0.3  # of a busy machine's clock: see the next test for exact numbers
    reading = measured(power=WATTS * 1e3)
    assert not reading.reason, reading
    assert reading.energy_mj == pytest.approx(WATTS, rel=meter_error)  # a millisecond each
    assert reading.spread_mj is not None and reading.window_s in (0.6, 1.2)


def test_idle_power_is_measured_with_the_step() -> None:
    gpu = FakeNvml()
    meter = NvmlMeter(GPU, gpu)
    meter.poll_s, meter.longest_s = 0.001, 0.3
    meter.prepare()
    assert meter.idle_w == pytest.approx(IDLE_W, rel=0.3) and meter.step_s >= STEP_S


def test_windows_are_stretched_to_the_steps_that_were_found() -> None:
    """Two windows with enough steps each, whatever was asked for: one alone has no spread."""
    for _ in range(8):  # a machine that is busy with other things may not look often enough
        gpu, spun = FakeNvml(), []

        def spin(
            seconds: float, gpu: FakeNvml = gpu, spun: list[float] = spun
        ) -> tuple[int, float]:
            spun.append(seconds)
            return gpu.spin(seconds)

        meter = NvmlMeter(GPU, gpu)
        meter.warm_s, meter.poll_s, meter.longest_s, meter.max_spread = 0.02, 0.001, 0.3, 10.0
        reading = measure_energy(meter, spin, 0.075)  # below 20 steps of 4 ms
        if "times only" not in reading.reason:
            break
    least = 1.1 * 20 * meter.step_s
    assert not reading.reason, reading
    assert reading.window_s == pytest.approx(2 * least) and reading.spread_mj is not None
    assert [s for s in spun if s > meter.step_s][-2:] == pytest.approx([least, least])


def test_power_between_first_and_last_step() -> None:
    samples = [(t / 100, 1000.0 * (t // 7) * 3) for t in range(100)]  # 3 J every 70 ms
    assert [round(t, 3) for t, _ in steps(samples)][:3] == [0.065, 0.135, 0.205]
    seconds, watts, count = step_and_watts(samples)
    assert seconds == pytest.approx(0.07) and watts == pytest.approx(3 / 0.07) and count == 14
    for bad, words in (
        ([(0.0, 1.0), (0.1, 1.0)], "moved 0 times"),
        ([*samples, (1.0, 0.0)], "backwards"),
        ([*samples, (1.0, float("nan"))], "no number"),
    ):
        with pytest.raises(ValueError, match=words):
            step_and_watts(bad)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"throttle": 0x20}, "throttles: software thermal slowdown"),
        ({"processes": 2}, "another process"),
        ({"clock": ramp(1980.0, -30)}, "clock moved from"),
        ({"temperature": ramp(50.0, 3)}, "temperature rose from"),
        ({"power": 150_000.0}, "power reading 150 W"),
        ({"energy": lambda mj: 5.0}, "moved 0 times"),
        ({"energy": lambda mj: -mj}, "backwards"),
        ({"energy": lambda mj: float("nan")}, "no number"),
        ({"watts": [100.0, 200.0, 400.0] * 3}, "windows differ by"),
    ],
)
def test_no_number_rather_than_a_wrong_one(changes: dict[str, Any], words: str) -> None:
    reading = measured(**changes)
    assert reading.energy_mj is None
    assert words in reading.reason, reading


def test_windows_too_short_and_kernels_that_fail() -> None:
    assert "below 20 counter steps" in measured(window_s=0.01).reason
    gpu = FakeNvml()
    meter = NvmlMeter(GPU, gpu)
    meter.warm_s, meter.longest_s = 0.02, 0.3
    assert "did not run" in measure_energy(meter, lambda s: (0, s), 1.0).reason
    gpu.energy = None
    assert "cannot be read: NVML: Not Supported" in measure_energy(meter, gpu.spin, 1.0).reason


def test_steady_devices_are_sound() -> None:
    steady = [State(60.0 + i / 2, 1980.0, 299.0, 1) for i in range(4)]
    assert unsound(steady, 300.0) == "" and unsound([], 300.0) == "" and unsound([State()], 1) == ""
    assert "300" in unsound([State(power_w=200.0)], 300.0)


@pytest.mark.gpu
def test_a_real_gpu() -> None:
    """A large matmul in a loop: its energy has a spread of at most 2 %, and is more than idling would use."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.float16)

    def spin(seconds: float) -> tuple[int, float]:
        begin, calls = time.perf_counter(), 0
        while (spent := time.perf_counter() - begin) < seconds:
            for _ in range(20):
                a @ a
            torch.cuda.synchronize()
            calls += 20
        return calls, spent

    meter = NvmlMeter()
    spin(2.0)
    torch.cuda.synchronize()
    time.sleep(1.0)
    reading = measure_energy(meter, spin, 9.0)
    print(f"\nstep {meter.step_s:.3f} s, {reading}")
    assert not reading.reason, reading
    assert reading.energy_mj is not None and reading.energy_mj > 0
    assert reading.spread_mj is not None and reading.spread_mj <= 0.02 * reading.energy_mj
