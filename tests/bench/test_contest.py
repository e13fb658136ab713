"""Interleaved timing: ratios belong to rounds, the slow ones sit out, cells find the fastest."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from mimo_compile.bench import contest
from mimo_compile.bench.contest import Contestant, Row, compete, ratio_of
from mimo_compile.bench.runner import with_ratio
from mimo_compile.bench.summary import Cell, cells


def entry(impl: str, peer: str = "", op: str = "op", cache: str = "hot") -> Contestant:
    return Contestant(op, impl, 1, cache, lambda _: None, [()], 1.0, 1.0, peer=peer)


def row(impl: str, us: float, peer: str = "", **changes: str) -> Row:
    batches = (us * 1e-6, 2 * us * 1e-6, us * 1e-6)
    return Row(entry(impl, peer, **changes), us, us, us, roof_us=1.0, batches=batches)


def test_ratios_are_those_of_rounds() -> None:
    base, other = row("mimo", 10), row("torch", 30, "torch")
    assert ratio_of(other, base) == pytest.approx((3.0, 3.0, 3.0))
    late = replace(other, batches=(10e-6, 80e-6, 30e-6))
    middle, low, high = ratio_of(late, base)
    assert (middle, low, high) == pytest.approx((3.0, 1.4, 3.8))
    # a machine that turned slow after the only round of a slow one says nothing about it
    assert ratio_of(replace(other, batches=(20e-6,)), base) == pytest.approx((2.0, 2.0, 2.0))


def test_the_base_is_our_fastest_and_the_roof_has_no_ratio() -> None:
    rows = with_ratio([row("mimo", 20), row("mimo", 10), row("x 1", 5, "x"), row("roof: read", 1)])
    assert [r.ratio and round(r.ratio[0], 3) for r in rows] == [2.0, 1.0, 0.5, None]
    assert [r.ratio for r in with_ratio([row("x 1", 5, "x"), row("roof: read", 1)])] == [None, None]


def test_cells_have_our_fastest_beside_the_fastest_peer() -> None:
    hot = with_ratio([row("mimo", 20), row("mimo", 10), row("a", 30, "a"), row("b", 9, "b")])
    cold = with_ratio(
        [
            row("mimo", 20, cache="cold"),
            row("a", 30, "a", cache="cold"),
            row("roof: read", 1, cache="cold"),
        ]
    )
    alone = [row("mimo", 5, op="other")]
    no_kernel = [row("a", 5, "a", op="third")]
    first, second, third = cells([*hot, *cold, *alone, *no_kernel])
    assert (first.ours.median_us, first.slower) == (10, True)
    assert first.json()["best_peer"] == "b"
    assert first.json()["ratio"] == pytest.approx(0.9)
    assert (first.sure, second.sure, third.sure) == (True, True, False)
    doubtful = replace(first.peer, ratio=(0.9, 0.7, 1.2))
    assert not Cell(first.ours, doubtful).sure
    assert (second.json()["cache"], second.slower) == ("cold", False)
    assert second.json()["roof_share"] == pytest.approx(0.05)
    assert (third.peer, third.slower, third.json()["best_peer"]) == (None, False, None)


def test_a_contestant_whose_batches_are_long_is_timed_in_few_rounds(monkeypatch) -> None:
    monkeypatch.setattr(contest, "SLOW_S", 0.02)
    slow = replace(entry("x", "x"), call=lambda _: time.sleep(0.05))
    rows = compete([entry("mimo"), slow], rounds=6, batch_s=1e-4)
    assert [len(r.batches) for r in rows] == [6, contest.SLOW_ROUNDS]
    assert rows[1].median_us >= 50_000


class Clock:
    """Time that passes in sleep alone; threads burn all of it until ``busy_s``."""

    def __init__(self, busy_s: float) -> None:
        self.now, self.busy_s = 0.0, busy_s

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return min(self.now, self.busy_s)


def test_settling_waits_for_threads_that_still_work_but_not_for_ever(monkeypatch) -> None:
    monkeypatch.setattr(contest, "time", Clock(0.1))
    assert 0.1 <= contest.settle() < 0.12
    monkeypatch.setattr(contest, "time", Clock(9))
    assert contest.SETTLE_S <= contest.settle() < contest.SETTLE_S + 0.01
    monkeypatch.setattr(contest, "time", Clock(0))
    assert contest.settle() < 0.01


def test_what_other_programs_use_is_told(tmp_path, monkeypatch) -> None:
    table = tmp_path / "stat"
    tick = contest.os.sysconf("SC_CLK_TCK")
    table.write_text(f"cpu  {tick} 0 {tick} 500 70 0 0 {tick} 0 0\ncpu0 1\n")
    monkeypatch.setattr(contest, "time", Clock(0.5))
    contest.time.sleep(1)
    assert contest._foreign_seconds(table) == 2.5
    assert contest._foreign_seconds(tmp_path / "none") is None
    monkeypatch.setattr(contest, "_foreign_seconds", lambda: 4.0)
    assert contest._foreign_cores(3.0, 0.5) == 2.0
    assert contest._foreign_cores(None, 0.5) is None
