"""Meters that lie, wrap, stop or are absent: a measured number or none, with the reason."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mimo_compile._cuda import Driver
from mimo_compile.runtime import energy
from mimo_compile.runtime.energy import Counter, Meter, nvml_meter, rapl_meter


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def measure(values: list[float], seconds: float = 10.0, range_j: float = 0.0) -> tuple:
    clock, trace = Clock(), iter(values)
    meter = Meter("rapl", [Counter(lambda: next(trace), range_j)], 1e-3, clock=clock)
    meter.start()
    for _ in values[2:]:
        clock.now += 31
        meter.keep()
    clock.now += seconds
    return meter.stop(), meter.reason


def test_a_window_is_the_difference() -> None:
    assert measure([5.0, 12.5]) == (7.5, "")


def test_counters_that_wrap_are_followed() -> None:
    assert measure([90.0, 10.0], range_j=100.0) == (20.0, "")
    assert measure([90.0, 10.0, 95.0, 5.0], range_j=100.0) == (115.0, "")


@pytest.mark.parametrize(
    ("values", "seconds", "reason"),
    [
        ([5.0, 5.0], 10.0, "stood still for 10.000 s"),
        ([5.0, 4.0], 10.0, "went backwards"),
        ([5.0, 6.0], 0.01, "0.010 s is shorter than 20 steps"),
        ([5.0], 10.0, "cannot be read"),
        ([], 10.0, "cannot be read"),
    ],
)
def test_doubtful_windows_give_no_number(values: list, seconds: float, reason: str) -> None:
    joules, why = measure(values, seconds)
    assert joules is None
    assert reason in why


def zone(root: Path, name: str, label: str, energy: str | None = "1000000") -> Path:
    folder = root / name
    folder.mkdir()
    (folder / "name").write_text(label + "\n")
    (folder / "max_energy_range_uj").write_text("262143328850\n")
    if energy is not None:
        (folder / "energy_uj").write_text(energy)
    return folder


def test_rapl_adds_packages_and_memory_once(tmp_path: Path) -> None:
    zones = [
        zone(tmp_path, "intel-rapl:0", "package-0"),
        zone(tmp_path, "intel-rapl:1", "package-1"),
        zone(tmp_path, "intel-rapl:0:1", "dram"),
        zone(tmp_path, "intel-rapl:0:0", "core"),  # part of the package
        zone(tmp_path, "intel-rapl:2", "psys"),  # holds the packages
    ]
    meter = rapl_meter(tmp_path)
    clock = Clock()
    meter.clock = clock
    meter.start()
    for folder in zones:
        (folder / "energy_uj").write_text("3500000")
    clock.now += 1
    assert meter.stop() == pytest.approx(7.5)
    assert meter.source == "rapl"


def test_absent_counters_have_a_reason(tmp_path: Path) -> None:
    for root in (tmp_path / "none", tmp_path):
        meter = rapl_meter(root)
        meter.start()
        meter.keep()
        assert meter.stop() is None
        assert meter.reason == "this machine shows no RAPL counters"
    zone(tmp_path, "intel-rapl:0", "package-0", energy=None)
    assert "intel-rapl:0 cannot be read: No such file" in rapl_meter(tmp_path).reason


def test_counters_that_only_root_may_read_name_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0")
    real = Path.read_text

    def read_text(path: Path) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(Path, "read_text", read_text)
    meter = rapl_meter(tmp_path)
    assert meter.source is None
    assert "Permission denied; as root: chmod a+r" in meter.reason


def fake_nvml(**changes: object) -> SimpleNamespace:
    energy = iter(range(1000, 99999, 500))
    facts = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": {"GPU-1": 1}.__getitem__,
        "nvmlDeviceGetTotalEnergyConsumption": lambda handle: handle * next(energy),
    }
    return SimpleNamespace(**{**facts, **changes})


def test_nvml_reads_the_gpu_that_the_driver_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "driver", lambda: SimpleNamespace(uuid="GPU-1"))
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    meter, clock = nvml_meter(), Clock()
    meter.clock = clock
    meter.start()
    clock.now += 5
    assert meter.stop() == pytest.approx(0.5)
    meter.start()
    clock.now += 1.9  # 19 steps of 100 ms
    assert meter.stop() is None
    assert "shorter than 20 steps" in meter.reason


def test_nvml_that_does_not_work_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("Not Supported")

    monkeypatch.setattr(energy, "driver", lambda: SimpleNamespace(uuid="GPU-1"))
    for changes in ({"nvmlInit": fails}, {"nvmlDeviceGetTotalEnergyConsumption": fails}):
        monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(**changes))
        assert nvml_meter().reason == "NVML does not work here: Not Supported"
    monkeypatch.setattr(energy, "driver", lambda: Driver("libcuda-that-is-not-there.so"))
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    assert "there is no NVIDIA driver" in nvml_meter().reason
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "NVML does not work here" in nvml_meter().reason
