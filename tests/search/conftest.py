import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from mimo_compile.search.measure import Measurer

# Measuring children import schedules by module name, on the parent's path.
sys.path.insert(0, str(Path(__file__).parent / "zoo"))


@pytest.fixture(autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the user's records and calibration out of the tests."""
    base = tmp_path_factory.mktemp("xdg")
    monkeypatch.setenv("XDG_DATA_HOME", str(base / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(base / "cache"))
    os.makedirs(base, exist_ok=True)


@pytest.fixture(scope="session")
def measurer(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Measurer]":
    """One measurer for all tests: its compilers take seconds to start."""
    from mimo_compile.cost_models.analytic import DeviceModel
    from mimo_compile.ir.hardware import local_cpu
    from mimo_compile.search.measure import Limits, Measurer, Timing

    timing = Timing(warm_up_s=0.001, batches=3, batch_s=0.001, budget_s=0.05, repeats=0)
    limits = Limits(build_s=60, run_s=4, time_s=10, memory_bytes=24 << 30)
    with Measurer(
        local_cpu(), device=DeviceModel.guess(local_cpu()), limits=limits, timing=timing, builders=2,
        scratch=tmp_path_factory.mktemp("scratch"),
    ) as m:  # fmt: skip
        yield m
