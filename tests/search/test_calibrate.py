"""Calibration: kept for each machine, damaged files are not believed, figures are those of this machine."""

from __future__ import annotations

import json

import pytest

from mimo_compile.ir.hardware import PRESETS, local_cpu
from mimo_compile.search.calibrate import (
    Calibration,
    _store,
    cache_path,
    calibrate,
    device_model,
    load,
)

HW = PRESETS["x86-64-v4"].with_threads(2)
RATES = Calibration(HW.id, {"fma_f32": 9e10}, {"l1": (4e11, 8e11), "dram": (2e10, 3e10)})


def test_kept_and_read_back() -> None:
    assert load(HW) is None and device_model(HW).measured == frozenset()
    _store(HW, RATES)
    assert load(HW) == RATES
    model = device_model(HW.with_threads(1))
    assert model.measured == {"fma_f32", "l1", "dram"} and model.bandwidth("dram", 2) == 3e10
    assert load(PRESETS["x86-64-v3"]) is None
    assert [p.name for p in cache_path(HW).parent.iterdir()] == [cache_path(HW).name]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"schema":2}',
        json.dumps(RATES.to_json()).replace("4", "-4"),
        json.dumps(RATES.to_json())[:-9],
    ],
)
def test_damaged_files_are_not_believed(text: str) -> None:
    _store(HW, RATES)
    cache_path(HW).write_text(text)
    assert load(HW) is None


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.compile
def test_this_machine() -> None:
    found = calibrate(local_cpu())
    assert load(local_cpu()) == found
    assert 1e9 < found.ops_per_s["fma_f32"] < 1e12
    for level in ("l1", "l2", "dram"):
        assert len(found.bytes_per_s[level]) == local_cpu().cores
        assert 1e9 < found.bytes_per_s[level][0] < 1e13
    assert found.bytes_per_s["l1"][0] > found.bytes_per_s["dram"][0]
