"""The page: complete offline, well-formed, below its limit, and honest about where joules come from."""

import html.parser
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from mimo_compile.errors import MimoError
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.report import MOST_BYTES, gather, page, write_report
from mimo_compile.report.charts import by_kernel
from mimo_compile.report.data import Subject
from mimo_compile.report.parts import Bar, bars
from mimo_compile.report.svg import Axis, Plot, duration, short
from mimo_compile.runtime import container
from mimo_compile.runtime.program import Choice, Manifest, Target
from mimo_compile.search.database import Database
from mimo_compile.search.lookup import summarise
from mimo_compile.search.records import Record, Verdict

OUTSIDE = {"script", "img", "link", "iframe", "object", "embed", "base", "form"}
VOID = {"meta", "circle", "line", "rect", "polyline", "br"}


class Balance(html.parser.HTMLParser):
    """Checks that every element is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.found.add(tag)
        assert tag not in OUTSIDE, f"<{tag}> may bring something from outside"
        for name, value in attrs:
            assert name not in ("src", "srcset", "data") and not name.startswith("on"), (tag, name)
            assert name != "href" or value.startswith("#"), value
            assert name != "style" or re.fullmatch(r"(width|max-width):[\d.]+(%|px)", value), value
        if tag not in VOID:
            self.open.append(tag)

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            assert not re.findall(r"url\(|@import|https?:", data)

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
    assert text.count("<figure") <= 2 * 24 + 3 and len(text.encode()) < MOST_BYTES


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
    third = "mpgemm:m=1,n=256,k=64,w=w4g64,a=a8"
    both = [
        make_record(third, i, energy_mj=5.0, energy_source="rapl" if i % 2 else "nvml")
        for i in range(4)
    ]
    text = write(tmp_path, measured + partly + both)
    check(text)
    first, second = text.split('modelled</h2><p class="soft">Latency')
    front = first.split('measured</h2><p class="soft">Latency')[1]
    rest = second.split("All workloads")[0]
    assert some in front and other in front and third not in front
    assert third in rest and some not in rest and other not in rest
    assert front.count("1 without measured joules left out") == 1
    assert "14 rapl" not in text and "11 rapl, 2 nvml" in text, "where joules come from"


def test_bars_of_joules_are_of_one_meter_or_modelled() -> None:
    """A kernel without joules, or with another meter's, is not left out of the measured ones in silence."""

    def subject(name: str, **energy: object) -> Subject:
        fields = {"energy_mj": 4.0, "energy_source": "rapl", "modelled_mj": 1.0, **energy}
        results = summarise([make_record(name, 0, **fields)])
        joules = results[0].measured_mj is not None
        return Subject(name, [], results, results, joules, results[0], None, {"step_1": 2})

    first, second = (f"mpgemm:m=1,n={n},k=64,w=w4g64,a=a8" for n in (64, 128))
    both = by_kernel([subject(first), subject(second)])
    assert "Energy by kernel, measured" in both and both.count("4 mJ") == 0 and "8 mJ" in both
    planned = Subject(
        second, [], [], [], False, None, None, {"step_1": 2},
        Choice(second, "s", {}, "k", "modelled", 10.0, 0.5, "modelled"),
    )  # fmt: skip
    for other in (
        subject(second, energy_source="nvml"),
        subject(second, energy_mj=None, energy_source=""),
        planned,
    ):
        page = by_kernel([subject(first), other])
        assert "Energy by kernel, modelled" in page and second in page.split("Energy by kernel")[1]


HOSTILE = """</style></title>"><img src=x onerror=alert(1)><script>alert('1')</script>&lt;b>"""


def test_a_decoding_step_is_that_of_artifacts_that_decode_apart(monkeypatch, tmp_path) -> None:
    """A dense kernel that only prompts still use does not count as work of a decoded token."""
    dense, sparse = (f"mpgemm:m=1,n={n},k=64,w=w4g64,a=a8" for n in (64, 128))
    plan = tuple(
        Choice(name, "s", {}, "k", "modelled", 10.0, calls=calls)
        for name, calls in ((dense, {"step_1": 3}), (sparse, {"decode_1": 2, "head_1": 1}))
    )
    for entries, expected in (
        (("step_1", "decode_1", "head_1"), {dense: 0, sparse: 3}),
        (("step_1", "head_1"), {dense: 3, sparse: 1}),
    ):
        target = Target("llvm", "cpu", (), 1)
        manifest = Manifest(1, "m", target, {}, "none", "latency", entries, {}, {}, plan)
        parts = SimpleNamespace(manifest=manifest, texts={})
        monkeypatch.setattr(container, "open_artifact", lambda *_, p=parts, **__: p)
        file = tmp_path / "m.mimo"
        file.write_bytes(b"PK and more")
        (machine,) = gather(file).machines
        assert {s.workload: s.step_calls for s in machine.subjects} == expected


def test_text_from_records_cannot_become_markup(tmp_path) -> None:
    """Workloads, schedules, knobs, machines, versions, meters and file names are shown as they are."""
    evil = [
        make_record(
            f"mpgemm:{HOSTILE}", i, schedule=HOSTILE, config={HOSTILE: HOSTILE}, hardware=HOSTILE,
            features=(HOSTILE,), versions={HOSTILE: HOSTILE}, message=HOSTILE, energy_mj=1.0 + i,
            energy_source=HOSTILE, cache="cold",
        )
        for i in range(12)
    ]  # fmt: skip
    path = tmp_path / f"{HOSTILE.replace('/', '')}.db"
    with Database(path) as db:
        db.add(*evil)
    text = write_report(path, tmp_path / "r.html").read_text()
    check(text)  # told, not done
    assert "&lt;script&gt;" in text and text.count("</style>") == 1


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
    assert "width:100.0%" in long and "width:0.4%" in long, "nothing is not invisible"
    assert [duration(v) for v in (0.5, 41.26, 1500.0)] == ["0.5 µs", "41.3 µs", "1.5 ms"]


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


REAL = "mpgemm:m=1,n=256,k=256,w=w4g64,a=a8"


@pytest.fixture(scope="module")
def real_records() -> list[Record]:
    """What a search might have left of three workloads, by two schedules that exist."""
    from mimo_compile.ir.ops import parse_workload
    from mimo_compile.search.space import JointSpace

    out = []
    for name in (REAL, REAL.replace("m=1", "m=4"), "swiglu:t=1,f=64"):
        space = JointSpace(parse_workload(name), local_cpu())
        some = [*space.defaults(), *(c for i, c in enumerate(space) if i % 37 == 0)][:40]
        for i, c in enumerate(some):
            schedule = space.schedules[c.schedule]
            work = schedule.work(space.workload, space.config(c), local_cpu())
            us = 20.0 + 7 * ((i * 7) % 11) + (9 if "vnni" in c.schedule else 0)
            out.append(
                make_record(
                    str(space.workload), i, schedule=c.schedule, schedule_version=schedule.version,
                    config=c.config, latency_us=us, ops=dict(work.ops), bytes=dict(work.bytes),
                    modelled_mj=us / 70 + (i % 5) * 0.05, versions={"apache-tvm": "0.27"},
                )
            )  # fmt: skip
    return out


@pytest.mark.compile
def test_what_a_page_says_of_a_search(tmp_path, real_records) -> None:
    text = write(tmp_path, real_records)
    check(text)
    for part in (
        "Which algorithm wins", "mpgemm m=1,w=w4g64,a=a8", "share of the roof", "line-default", "line-roof",
        "ring chosen", "analytic model", "learned model", "Rank correlation", "Typical error",
        "apache-tvm 0.27", "measured: none; modelled:", f"{len(real_records)} search",
    ):  # fmt: skip
        assert part in text, part
    names = re.findall(r'<h2 id="([^"]+)"', text)
    assert names == list(dict.fromkeys(names)) and set(re.findall(r'href="#([^"]+)"', text)) == set(
        names
    )


@pytest.mark.compile
def test_predictions_are_ranked_within_workloads(tmp_path, real_records) -> None:
    from mimo_compile.report.models import study

    with Database(tmp_path / "r.db") as db:
        db.add(*real_records)
    data = gather(tmp_path / "r.db")
    found = study(data.machines[0]).calibrations
    assert set(found) == {"analytic", "learned"}
    assert found["analytic"].within >= 1 and -1 <= found["analytic"].rho <= 1
    assert len(found["learned"].pairs) == len(found["analytic"].pairs) <= len(real_records)
    assert [p.predicted_us for p in found["learned"].pairs] != [
        p.predicted_us for p in found["analytic"].pairs
    ]


def test_a_page_that_would_be_too_large_has_fewer_charts(tmp_path, monkeypatch) -> None:
    names = [f"mpgemm:m=1,n={64 * i},k=64,w=w4g64,a=a8" for i in range(1, 31)]
    records = [make_record(n, i) for n in names for i in range(10)]
    whole = write(tmp_path, records)
    monkeypatch.setattr("mimo_compile.report.MOST_BYTES", len(whole.encode()) * 2 // 3)
    less = write_report(tmp_path / "r.db", tmp_path / "r2.html").read_text()
    check(less)
    assert 0 < less.count("<figure") < whole.count("<figure") and "left out to keep" in less
    monkeypatch.setattr("mimo_compile.report.MOST_BYTES", 5000)
    with pytest.raises(MimoError, match="more than 5000"):
        write_report(tmp_path / "r.db", tmp_path / "r3.html")


def test_workers_of_farms_are_shown(tmp_path):
    from mimo_compile.search.farm_runs import Worker, store

    path = tmp_path / "r.db"
    text = write(tmp_path, [make_record("mpgemm:m=1,n=64,k=64,w=w4g64,a=a8", 0, worker="lab/cpu")])
    assert "What the workers did" not in text
    names = [f"lab<{i}>" for i in range(3)]
    rows = [
        Worker(
            name=n, search="s", hardware="x", threads=2, began=9e8, seconds=40.0, tuner_s=3.0,
            busy_s=10.0 * i, idle_s=40.0 - 10.0 * i, measured=7 * i, started=2, waited_s=1.0,
        )
        for i, n in enumerate(names)
    ]  # fmt: skip
    with Database(path) as db:
        store(db, rows)
        store(db, [Worker(name="old", search=f"s{i}", began=float(i)) for i in range(20)])
    text = page(gather(path))
    check(text)
    assert "What the workers did" in text and "13 older ones are left out" in text
    assert "lab&lt;2&gt;" in text and "50 % of 40 s" in text and "lab<" not in text
    assert 'style="width:50.0%"' in text and 'style="width:25.0%"' in text
    assert "1 lab/cpu" in text
    assert len(text) < MOST_BYTES
