"""The page: complete offline, well-formed, below its limit, and honest about where joules come from."""

import html.parser
import re
from pathlib import Path

import pytest

from mimo_compile.ir.hardware import local_cpu
from mimo_compile.report import MOST_BYTES, gather, page, write_report
from mimo_compile.report.svg import Axis, Bar, Plot, bars, short
from mimo_compile.search.database import Database
from mimo_compile.search.records import Record, Verdict

VOID = {"meta", "circle", "line", "rect", "polyline", "br"}


class Balance(html.parser.HTMLParser):
    """Checks that every element is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.found.add(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()


def make_record(workload: str, index: int, **changes) -> Record:
    hardware = local_cpu()
    fields = {
        "key": f"{abs(hash(workload)) % 16**8:08x}{index:056x}", "workload": workload,
        "schedule": "mpgemm.x86_vnni", "schedule_version": 1, "config": {"rows": index, "dot": "vnni512"},
        "hardware": hardware.id, "features": tuple(sorted(hardware.features)), "threads": hardware.threads,
        "cache": "cold", "versions": {}, "verdict": Verdict.OK, "latency_us": 50.0 + 400 / (index + 1),
        "modelled_mj": 0.5 + index * 0.01, "ops": {"dot_i8": 4.0e6}, "bytes": {"dram": 2.2e6},
        "time": float(index),
    }  # fmt: skip
    return Record(**{**fields, **changes})


def check(text: str) -> Balance:
    balance = Balance()
    balance.feed(text)
    balance.close()
    assert balance.open == []
    assert not re.search(r"(src|href)\s*=|url\(|@import|https?://|<script", text), (
        "something from outside"
    )
    assert "nan" not in re.sub(r"<style>.*?</style>", "", text, flags=re.S).lower().split()
    return balance


def write(tmp_path: Path, records) -> str:
    path = tmp_path / "r.db"
    with Database(path) as db:
        db.add(*records)
    return write_report(path, tmp_path / "r.html").read_text()


def test_a_database_of_modelled_joules(tmp_path) -> None:
    names = [f"mpgemm:m=1,n={64 * i},k=64,w=w4g64,a=a8" for i in range(1, 31)]
    records = [make_record(n, i) for n in names for i in range(40)]
    records.append(make_record(names[0], 99, verdict=Verdict.WRONG, latency_us=None))
    text = write(tmp_path, records)
    balance = check(text)
    assert {"svg", "polyline", "circle", "table"} <= balance.found
    assert "energy modelled" in text and "energy measured" not in text
    assert "1201 " in text.replace("<b>", "").replace("</b>", " "), "all records are counted"
    assert text.count("<h3>") <= 2 * 24 and len(text.encode()) < MOST_BYTES


def test_measured_joules_are_never_mixed_with_modelled_ones(tmp_path) -> None:
    some = "mpgemm:m=1,n=64,k=64,w=w4g64,a=a8"
    other = "mpgemm:m=1,n=128,k=64,w=w4g64,a=a8"
    measured = [
        make_record(some, i, energy_mj=7.0 + i, energy_source="rapl", modelled_mj=0.123)
        for i in range(5)
    ]
    partly = [
        make_record(other, i, **({"energy_mj": 9.0, "energy_source": "rapl"} if i else {}))
        for i in range(5)
    ]
    text = write(tmp_path, measured + partly)
    check(text)
    assert "energy measured" in text and "energy modelled" in text
    first, second = text.split("Pareto fronts, energy modelled")
    front = first.split("Pareto fronts, energy measured")[1]
    assert some in front and other not in front
    assert (
        other in second.split("All workloads")[0] and some not in second.split("All workloads")[0]
    )


def test_text_from_records_cannot_become_markup(tmp_path) -> None:
    evil = [make_record("<script>alert(1)</script>", i, schedule='"><b>') for i in range(4)]
    text = write(tmp_path, evil)
    check(text)
    assert "&lt;script&gt;" in text


def test_an_empty_database_makes_an_honest_page(tmp_path) -> None:
    check(write(tmp_path, []))


def test_axes_hold_their_values_and_ticks_are_round() -> None:
    for log in (False, True):
        axis = Axis.around([0.5, 3.0, 80.0], log=log)
        assert all(0 <= axis.place(v) <= 1 for v in (0.5, 80.0))
        ticks = axis.ticks()
        assert 2 <= len(ticks) <= 9 and all(axis.low <= t <= axis.high for t in ticks)
    assert Axis.around([], log=True).ticks()
    assert Axis.around([5.0]).low < 5 < Axis.around([5.0]).high
    assert [short(v) for v in (0, 1234, 0.00001, 3.456, 2e7)] == [
        "0",
        "1.23k",
        "1e-05",
        "3.46",
        "20M",
    ]


def test_plots_stand_inside_their_frame() -> None:
    plot = Plot(Axis(0, 10), Axis.around([1, 100], log=True), title="a < b")
    plot.points([(0, 1), (10, 100)], "rest", labels=["<one>"])
    plot.steps([(0, 10), (5, 2)], "curve")
    text = plot.svg()
    check(text)
    for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', text):
        assert plot.left <= float(x) <= plot.width and 0 <= float(y) <= plot.height
    long = bars([Bar("x" * 200, 3.0, "3"), Bar("none", 0.0, "0")], title="t")
    check(long)
    assert "…" in long


def test_gather_refuses_what_it_does_not_know(tmp_path) -> None:
    from mimo_compile.errors import InputError

    (tmp_path / "x").write_text("hello")
    with pytest.raises(InputError, match="neither an artifact nor a database"):
        gather(tmp_path / "x")
    assert page(gather(_empty(tmp_path / "e.db"))).startswith("<!DOCTYPE html>")


def _empty(path: Path) -> Path:
    Database(path).close()
    return path


def test_records_of_workloads_that_no_op_takes(tmp_path: Path) -> None:
    with Database(tmp_path / "odd.db") as db:
        db.add(make_record("mpgemm:m=x,n=1", 0), make_record("frob:m=1", 1))
    write_report(tmp_path / "odd.db", tmp_path / "r.html")
    assert "mpgemm:m=x" in (tmp_path / "r.html").read_text()
