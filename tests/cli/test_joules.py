"""Joules are called modelled, or by their meter, wherever they are printed, in columns of their own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import runtime_samples

from mimo_compile.artifact import Artifact
from mimo_compile.cli.console import Console, number
from mimo_compile.cli.tune import show
from mimo_compile.cost_models.analytic import DeviceModel
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import parse_workload
from mimo_compile.runtime.program import Choice, Target
from mimo_compile.search.database import Database
from mimo_compile.search.lookup import best, summarise
from mimo_compile.search.objective import parse_objective
from mimo_compile.search.records import Record, Verdict, encode, record_key, versions
from mimo_compile.search.result import TuningResult, WorkloadResult
from mimo_compile.search.space import JointSpace

pytestmark = pytest.mark.compile
SPECS = ("swiglu:t=1,f=64", "swiglu:t=4,f=64")
METER = "replay"
MEASURED = {spec: (31.7 + 10 * i, 31.3 + 10 * i, 31.1 + 10 * i) for i, spec in enumerate(SPECS)}
MODELLED = {
    spec: (0.917 + i / 100, 0.913 + i / 100, 0.911 + i / 100) for i, spec in enumerate(SPECS)
}
"""Of each workload's candidates, the fastest first: no number is in both."""


@pytest.fixture(autouse=True)
def no_calibration(monkeypatch) -> None:
    guess = DeviceModel.guess(local_cpu())
    monkeypatch.setattr("mimo_compile.search.calibrate.device_model", lambda *_, **__: guess)


def records_of(spec: str, metered: bool) -> list[Record]:
    hardware = local_cpu()
    space = JointSpace(parse_workload(spec), hardware)
    out = []
    for i, c in enumerate([c for _, c in zip(range(3), space, strict=False)]):
        version = space.schedules[c.schedule].version
        key = record_key(spec, c.schedule, version, c.config, hardware, "cold", versions())
        out.append(
            Record(
                key=key, workload=spec, schedule=c.schedule, schedule_version=version, config=c.config,
                hardware=hardware.id, features=tuple(sorted(hardware.features)),
                threads=hardware.threads, cache="cold", versions=versions(), verdict=Verdict.OK,
                latency_us=100.0 + i, modelled_mj=MODELLED[spec][i],
                energy_mj=MEASURED[spec][i] if metered else None,
                energy_source=METER if metered else "", energy_window_s=1.0 if metered else None,
            )
        )  # fmt: skip
    return out


def artifact_of(metered: dict[str, bool]) -> Artifact:
    """Two kernels; choices as a plan of these records leaves them: by one meter, or all modelled."""
    hardware, source = local_cpu(), METER if all(metered.values()) else "modelled"
    rows = {spec: records_of(spec, metered[spec]) for spec in SPECS}
    plan = tuple(
        Choice(
            spec, r.schedule, r.config, f"k{i}", "measured", r.latency_us,
            (MEASURED if source == METER else MODELLED)[spec][0], source, {"main": 2}, r.schedule_version,
        )
        for i, (spec, (r, *_)) in enumerate(rows.items())
    )  # fmt: skip
    made = runtime_samples.plain()
    target = Target("cpu", hardware.name, tuple(sorted(hardware.features)), hardware.threads)
    manifest = msgspec.structs.replace(made.manifest, plan=plan, target=target)
    lines = "".join(f"{encode(r)}\n" for some in rows.values() for r in some)
    return Artifact(manifest, made.programs, made.code, made.weights, records=lines.encode())


def objects(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from objects(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from objects(inner)


def check_json(value: Any, sources: set[str]) -> int:
    """Every figure of energy has its source beside it, or in its name; return how many there are."""
    count = 0
    for row in objects(value):
        for key, found in row.items():
            if found is None or not re.search(r"_mj$|joules", key) or isinstance(found, str):
                continue
            count += 1
            if key == "energy_mj":
                assert row["energy_source"] in sources, row
            elif key == "measured_mj":
                assert found in {mj for some in MEASURED.values() for mj in some}
            else:
                assert key == "modelled_mj", key
    return count


def column(text: str, title: str) -> list[str]:
    """Return the cells of a table's column; columns are two spaces apart."""
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if title in re.split(r"\s{2,}", line.strip()))
    place = re.split(r"\s{2,}", lines[at].strip()).index(title)
    cells = []
    for line in lines[at + 1 :]:
        parts = re.split(r"\s{2,}", line.strip())
        if len(parts) <= place:
            break
        cells.append(parts[place])
    return cells


def check_text(text: str, sources: set[str]) -> None:
    """No line speaks of joules without their source, and none of a source there is nothing of."""
    for line in text.splitlines():
        for words in re.findall(r".{0,24}\bmJ\b.{0,24}", line):
            assert re.search(r"modelled|measured|" + METER, words), line
    assert ("mJ, modelled" in text) == ("modelled" in sources)
    assert (f"mJ, {METER}" in text) == (METER in sources)


CASES = {
    "modelled": dict.fromkeys(SPECS, False),
    "measured": dict.fromkeys(SPECS, True),
    "mixed": dict(zip(SPECS, (True, False), strict=True)),
}


@pytest.fixture(params=CASES)
def case(request, tmp_path: Path) -> tuple[dict[str, bool], Path]:
    metered = CASES[request.param]
    path = tmp_path / "r.db"
    with Database(path) as db:
        for spec in SPECS:
            db.add(*records_of(spec, metered[spec]))
    return metered, path


def test_tune_and_inspect_of_one_workload(cli, case) -> None:
    metered, path = case
    for spec in SPECS:
        sources = {METER if metered[spec] else "modelled"}
        known = (MEASURED if metered[spec] else MODELLED)[spec]
        command = ("tune", "--op", spec, "--trials", 3, "--objective", "energy", "--db", path)
        found = json.loads(cli(*command, "--meter", "modelled", "--json").out)
        (w,) = found["workloads"]
        assert found["new_trials"] == 0 and check_json(found, sources) >= 3
        assert w["best"]["energy_mj"] == known[-1] and w["best"]["energy_source"] in sources
        text = cli(*command, "--meter", "modelled").out
        check_text(text, sources)
        (source,) = sources
        assert column(text, f"mJ, {source}") == [number(known[-1])]
        command = ("inspect", "--op", spec, "--objective", "energy", "--db", path)
        found = json.loads(cli(*command, "--json").out)
        assert check_json(found, sources) >= 3
        text = cli(*command).out
        assert set(column(text, "modelled mJ")) >= {number(mj) for mj in MODELLED[spec]}
        given = set(column(text, "measured mJ")) - {"-"}
        assert given == ({number(mj) for mj in MEASURED[spec]} if metered[spec] else set())
        why = " ".join(loser["reason"] for loser in found["why"]["losers"] or ())
        assert "the energy, measured" not in why or metered[spec]


def test_a_table_of_many_workloads(case, capsys) -> None:
    """What one meter read and what the model says never stand in one column."""
    metered, _ = case
    goal, rows = parse_objective("energy"), []
    for spec in SPECS:
        results = summarise(records_of(spec, metered[spec]))
        chosen = best(results, goal)
        rows.append(
            WorkloadResult(parse_workload(spec), 1.0, 9, tuple(results), None, chosen, 3, 0, {}, ())  # type: ignore[arg-type]
        )
    result = TuningResult(tuple(rows), goal, "trials", 1.0, None)
    assert check_json(result.to_json(), {METER, "modelled"}) >= 2
    show(Console(json=False), result)
    text = capsys.readouterr().out
    sources = {METER if metered[spec] else "modelled" for spec in SPECS}
    check_text(text, sources)
    for source in sources:
        mine = [s for s in SPECS if (METER if metered[s] else "modelled") == source]
        numbers = MEASURED if source == METER else MODELLED
        cells = [c for c in column(text, f"mJ, {source}") if c != "-"]
        assert sorted(cells) == sorted(number(numbers[s][-1]) for s in mine)


def test_artifacts_and_their_plans(cli, case, tmp_path) -> None:
    metered, db = case
    source = METER if all(metered.values()) else "modelled"
    path = artifact_of(metered).save(tmp_path / "a.mimo")
    numbers = MEASURED if source == METER else MODELLED
    text = cli("inspect", path).out
    check_text(text, {source})
    assert column(text, f"mJ, {source}") == [number(numbers[s][0]) for s in SPECS]
    found = json.loads(cli("inspect", path, "--json").out)
    assert check_json(found, {source}) == 2
    found = json.loads(cli("inspect", path, "--kernel", "k0", "--db", db, "--json").out)
    assert check_json(found, {source}) >= 1
    plan = ("inspect", path, "--plan", "--objective", "edp", "--db", db)
    text = cli(*plan).out
    check_text(text, {source})
    assert f"energy mJ, {source}" in text
    found = json.loads(cli(*plan, "--json").out)
    assert check_json(found, {source}) >= 4 * 2
    assert {p["energy_source"] for p in found["plans"]} == {source}
    least = next(p for p in found["plans"] if p["objective"] == "energy")
    assert least["energy_mj"] == pytest.approx(2 * sum(numbers[s][-1] for s in SPECS))


def test_reports(cli, case, tmp_path) -> None:
    metered, db = case
    path = artifact_of(metered).save(tmp_path / "a.mimo")
    for source in (db, path):
        assert cli("report", source, "-o", tmp_path / "r.html").code == 0
        page = (tmp_path / "r.html").read_text()
        table = page.rsplit("All workloads</h2>", 1)[1].split("</table>")[0]
        assert ("mJ, measured" in table) == any(metered.values())
        assert ("mJ, modelled" in table) == (not all(metered.values()))
        rows = {s: r for r in table.split("<tr>") for s in SPECS if f"<code>{s}</code>" in r}
        for spec in SPECS:
            cells = [re.sub("<[^>]*>", "", c) for c in rows[spec].split("</td>")]
            assert (any(METER in c for c in cells)) == metered[spec]
            assert all(c.endswith(METER) for c in cells if c.startswith(f"{MEASURED[spec][0]:.3g}"))
        assert ('-pareto-measured"' in page) == any(metered.values())
        assert ("no meter" in page) == (not any(metered.values()))
        if source == path:
            kind = "measured" if all(metered.values()) else "modelled"
            assert f"Energy by kernel, {kind}" in page
