"""The benchmark of readings: figures are what they say, limits are kept, modelled joules are called so."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from recordings import recording

pytestmark = pytest.mark.compile
CAP = "energy@latency:1.05"


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def machines() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("energy_machines")


@pytest.fixture(scope="module")
def bench(machines) -> ModuleType:
    path = BENCHMARKS / "energy_search.py"
    spec = importlib.util.spec_from_file_location("benchmark_energy_search", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_figures_of_a_row(bench) -> None:
    few = bench.Found(100.0, 2.0, 2.0, 1.6, 3.0, False, 30, 100, "replay")
    every = dataclasses.replace(few, value=1.6, readings=60)
    m = bench.summary([(few, every), (dataclasses.replace(few, value=1.6, over=True), every)])
    assert m["readings"] == 0.3 and m["of_near"] == 0.5 and m["over"] == 1
    assert m["loss"] == pytest.approx(0.125) and m["worst_loss"] == pytest.approx(0.25)
    assert m["missed"] == pytest.approx(0.125) and m["saved"] == pytest.approx((0.5 + 0.875) / 2)
    assert "| twins | energy | 2 | 30 % | 30 % | 50 % | 12.50 %" in bench.row("twins", "energy", m)


def test_machines_differ_by_seed_and_hide_their_joules(machines) -> None:
    space = machines.Paper().space(machines.WORKLOAD, machines.HW)
    some = machines.Candidate(machines.WORKLOAD, machines.Paper.name, space.default)
    one, other = (machines.Machine(machines.LAWS["rugged"], seed) for seed in (1, 2))
    assert one._find(some).latency_us != other._find(some).latency_us
    assert (
        one._find(some).energy_mj
        == machines.Machine(machines.LAWS["rugged"], 1)._find(some).energy_mj
    )
    twin = machines.Machine(machines.LAWS["twins"], 3)
    config = {**dict(space.default), "layout": twin.frugal}
    frugal = machines.Candidate(machines.WORKLOAD, machines.Paper.name, machines.make(**config))
    plain = {v for v in machines.CHOICES["layout"] if v != twin.frugal}
    for layout in plain:
        c = machines.Candidate(
            machines.WORKLOAD, machines.Paper.name, machines.make(**{**config, "layout": layout})
        )
        ratio = twin._find(frugal).energy_mj / twin._find(c).energy_mj
        assert ratio == pytest.approx(1 - machines.GAP, abs=0.02)


def test_a_search_without_a_meter_reads_nothing(bench) -> None:
    found = bench.search("modelled", 5, CAP, 24, every=False)
    assert (found.readings, found.source, found.over) == (0, "modelled", False)
    assert found.value == found.least_value <= found.fastest_value


@pytest.mark.slow
def test_the_gap_that_was_planted(bench, tmp_path: Path) -> None:
    few, every = bench.pair(("twins", 102, CAP, 128, False))
    assert few.value <= 1.01 * few.least_value and not few.over and few.source == "replay"
    assert few.readings < 0.5 * few.timed and few.readings < every.readings
    path = tmp_path / "space.jsonl.xz"
    recording().save(path)
    replayed = bench.search(str(path), 1, "energy", 24, every=False)
    assert replayed.readings > 0 and replayed.value <= 1.1 * replayed.least_value
