"""Meters: absent ones say why, lying ones give no number."""

from __future__ import annotations

from pathlib import Path

import pytest

from mimo_compile.cost_models.analytic import DeviceModel
from mimo_compile.errors import InputError, UsageError
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import PRESETS
from mimo_compile.search.meters import METERS, available, measure_energy, open_meter
from mimo_compile.search.meters.modelled import ModelledEnergy
from mimo_compile.search.meters.nvml import NvmlMeter
from mimo_compile.search.meters.rapl import RaplMeter, probe
from mimo_compile.search.meters.replay import ReplayMeter

HW = PRESETS["x86-64-v3"].with_threads(2)


class Spin:
    def __init__(self, calls: int = 100) -> None:
        self.calls = calls
        self.asked: list[float] = []

    def __call__(self, seconds: float) -> tuple[int, float]:
        self.asked.append(seconds)
        return self.calls, seconds


def rapl_tree(root: Path, value: int = 1000, wrap: int = 10_000) -> Path:
    for name, label in (
        ("intel-rapl:0", "package-0"),
        ("intel-rapl:1", "package-1"),
        ("intel-rapl:0:0", "core"),
    ):
        folder = root / name
        folder.mkdir()
        (folder / "name").write_text(label + "\n")
        (folder / "energy_uj").write_text(f"{value}\n")
        (folder / "max_energy_range_uj").write_text(f"{wrap}\n")
    return root


def test_every_meter_says_what_it_is_or_why_not() -> None:
    found = {a.name: a for a in available()}
    assert list(found) == list(METERS)
    assert all(a.reason for a in found.values()) and found["modelled"].usable
    for a in found.values():
        if not a.usable and a.name in ("nvml", "rapl"):
            with pytest.raises(UsageError, match="cannot be used"):
                open_meter(HW, a.name)
    assert open_meter(HW, "modelled") is None
    with pytest.raises(UsageError, match="unknown meter"):
        open_meter(HW, "wattmeter")


def test_rapl_sums_packages_and_survives_a_wrap(tmp_path: Path) -> None:
    meter = RaplMeter(rapl_tree(tmp_path))
    assert meter.read_mj() == 2.0
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("9000")
    assert meter.read_mj() == 10.0
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("500")  # started again
    assert meter.read_mj() == 11.5
    assert probe(tmp_path).usable


def test_rapl_absent_or_forbidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no RAPL" in probe(tmp_path).reason
    rapl_tree(tmp_path)
    read = Path.read_text

    def forbidden(self: Path, *args: object, **more: object) -> str:
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(self))
        return read(self)

    monkeypatch.setattr(Path, "read_text", forbidden)
    outcome = probe(tmp_path)
    assert not outcome.usable and "sudo chmod a+r" in outcome.reason


class FakeNvml:  # names are those of pynvml
    """What of pynvml the meter uses."""

    NVML_TEMPERATURE_GPU = NVML_CLOCK_SM = 0

    class NVMLError(Exception):
        pass

    def __init__(self, energy: int | None = 5, gpus: int = 1) -> None:
        self.energy, self.gpus = energy, gpus

    def nvmlInit(self) -> None:  # noqa: N802
        if not self.gpus:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:  # noqa: N802
        if self.energy is None:
            raise self.NVMLError("Not Supported")
        return self.energy

    def nvmlDeviceGetTemperature(self, handle: int, kind: int) -> int:  # noqa: N802
        return 55

    def nvmlDeviceGetClockInfo(self, handle: int, kind: int) -> int:  # noqa: N802
        raise self.NVMLError("Not Supported")

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: int) -> int:  # noqa: N802
        return 0

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[int]:  # noqa: N802
        return [1, 2]


def test_nvml() -> None:
    meter = NvmlMeter(library=FakeNvml(energy=77))
    assert meter.read_mj() == 77.0
    assert meter.state() == {"temperature_c": 55.0, "throttle_reasons": 0.0, "processes": 2.0}
    for broken, words in (
        (FakeNvml(gpus=0), "Driver Not Loaded"),
        (FakeNvml(energy=None), "Not Supported"),
    ):
        with pytest.raises(OSError, match=words):
            NvmlMeter(library=broken)


def test_energy_of_a_call() -> None:
    meter = ReplayMeter([1000, 1500, 1500, 2100, 2200, 2600])
    reading = measure_energy(meter, Spin(100), window_s=6.0)
    assert (
        reading.energy_mj == 5.0
        and reading.window_s == 6.0
        and reading.spread_mj == pytest.approx(1.0)
    )
    spin = Spin()
    assert measure_energy(ReplayMeter([0, 100]), spin, window_s=3.0).energy_mj == 1.0
    assert spin.asked == [3.0]  # no room for a second window of 20 steps


@pytest.mark.parametrize(
    ("trace", "window_s", "calls", "words"),
    [
        ([5, 5], 2.0, 100, "did not advance"),  # stuck
        ([9, 5], 2.0, 100, "did not advance"),  # backwards, or wrapped
        ([5, float("nan")], 2.0, 100, "did not advance"),
        ([5, 50], 1.9, 100, "below 20 counter steps"),  # too short for steps of 100 ms
        ([5], 2.0, 100, "cannot be read"),
        ([5, 50], 2.0, 0, "did not run"),
    ],
)
def test_meters_that_lie_give_no_number(
    trace: list[float], window_s: float, calls: int, words: str
) -> None:
    reading = measure_energy(ReplayMeter(trace), Spin(calls), window_s)
    assert reading.energy_mj is None and words in reading.reason


def test_replay_from_file(tmp_path: Path) -> None:
    (tmp_path / "trace").write_text("1\n2.5\n")
    meter = ReplayMeter.from_file(tmp_path / "trace")
    assert [meter.read_mj(), meter.read_mj()] == [1.0, 2.5]
    with pytest.raises(InputError):
        ReplayMeter.from_file(tmp_path / "absent")


def test_modelled_energy_is_the_documented_sum() -> None:
    device = DeviceModel.guess(HW)
    energy = ModelledEnergy(device).energy_mj(Counts({"fma_f32": 1e6}, {"dram": 1e6}), 100.0)
    assert energy == pytest.approx(device.idle_w * 0.1 + 2.5e-3 + 0.12)
