"""Meters: absent ones say why, lying ones give no number."""

from __future__ import annotations

from pathlib import Path

import pytest

from mimo_compile.errors import EnvironmentMismatch, InputError, UsageError
from mimo_compile.ir.hardware import CUDA, PRESETS
from mimo_compile.search.meters import (
    METERS,
    available,
    check_meter,
    measure_energy,
    meter_names,
    open_meter,
)
from mimo_compile.search.meters.rapl import RaplMeter
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
    assert [*found] == [*METERS, "modelled"] and meter_names() == ["auto", "modelled", *METERS]
    assert all(a.reason for a in found.values()) and found["modelled"].usable
    assert "needs a recording" in found["replay"].reason
    for a in found.values():
        target = PRESETS["x86-64-v3"] if a.name == "rapl" else HW
        if not a.usable and a.name == "rapl":
            with pytest.raises(UsageError, match="rapl meter cannot be used"):
                open_meter(target, a.name)
    assert open_meter(HW, "modelled") is None
    with pytest.raises(
        UsageError, match=r"unknown meter 'wattmeter'\. Use one of auto, modelled, nv"
    ):
        open_meter(HW, "wattmeter")
    with pytest.raises(UsageError, match="nvml meter reads cuda, the target is cpu"):
        open_meter(HW, "nvml")

    target = CUDA["cuda:sm_90a"]
    for name in ("nvml", "modelled"):  # which need not work here
        check_meter(target, name)
    with pytest.raises(UsageError, match="rapl meter reads cpu, the target is cuda"):
        check_meter(target, "rapl")


class Gauge:
    """A meter that always works."""

    name = "gauge"
    measures: tuple[str, ...] = ("cpu",)
    reads = "a number"
    step_s = 0.001

    def read_mj(self) -> float:
        return 1.0


def test_auto_takes_the_first_meter_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Gauge):
        name = "broken"

        def __init__(self) -> None:
            raise OSError("no sensor")

    class Gpu(Gauge):
        name = "gpu"
        measures = ("cuda",)

    # a table of its own: entries that are taken out come back in another order
    monkeypatch.setattr("mimo_compile.search.meters.METERS", table := {})
    assert open_meter(HW) is None
    table.update({cls.name: cls for cls in (Broken, Gpu, Gauge)})
    assert isinstance(open_meter(HW), Gauge) and isinstance(open_meter(HW, "auto"), Gauge)
    assert isinstance(open_meter(HW, "gauge"), Gauge)
    with pytest.raises(UsageError, match="broken meter cannot be used: no sensor"):
        open_meter(HW, "broken")
    assert [(a.name, a.usable) for a in available()] == [
        ("broken", False), ("gpu", True), ("gauge", True), ("modelled", True),
    ]  # fmt: skip


def test_a_class_that_is_no_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METERS, "half", dict)
    monkeypatch.setitem(METERS, "other", Gauge)
    with pytest.raises(EnvironmentMismatch, match=r"'half' cannot be used.* has no member name"):
        open_meter(HW, "half")
    with pytest.raises(EnvironmentMismatch, match=r"'other' cannot be used.* is named 'gauge'"):
        open_meter(HW, "other")
    assert not {a.name: a for a in available()}["half"].usable


def test_rapl_sums_packages_and_survives_a_wrap(tmp_path: Path) -> None:
    meter = RaplMeter(rapl_tree(tmp_path))
    assert meter.read_mj() == 2.0
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("9000")
    assert meter.read_mj() == 10.0
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("500")  # started again
    assert meter.read_mj() == 11.5
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("")
    with pytest.raises(OSError, match="holds no number"):
        meter.read_mj()
    reading = measure_energy(meter, Spin(), window_s=1.0)
    assert reading.energy_mj is None and "cannot be read" in reading.reason
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert "cannot be read" in measure_energy(meter, Spin(), window_s=1.0).reason


def test_rapl_absent_or_forbidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="no RAPL"):
        RaplMeter(tmp_path)
    rapl_tree(tmp_path)
    read = Path.read_text

    def forbidden(self: Path, *args: object, **more: object) -> str:
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(self))
        return read(self)

    monkeypatch.setattr(Path, "read_text", forbidden)
    with pytest.raises(OSError, match=r"sudo chmod a\+r"):
        RaplMeter(tmp_path)


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
