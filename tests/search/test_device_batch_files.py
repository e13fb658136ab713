"""The folder of a device batch: whatever is cut or changed on its way is found, and what is whole is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.errors import InputError
from mimo_compile.ir.hardware import CUDA
from mimo_compile.search.device_batch.files import (
    Batch,
    Folder,
    Header,
    Job,
    Result,
    Step,
    Unit,
    damage,
    files_of,
    torn,
)
from mimo_compile.search.measure import Limits, Timing
from mimo_compile.search.meters.base import Reading

HEADER = Header(
    id="0123456789abcdef", number=3, hardware=CUDA["cuda:sm_90a"], limits=Limits(), timing=Timing(),
    meter="nvml", version="0",
)  # fmt: skip


def batch_in(folder: Folder, units: int = 3) -> Batch:
    """Write a batch of so many units, each with a file of its own."""
    made = []
    for index in range(units):
        code, array = folder.keep(b"code", "cubin"), folder.keep(bytes([index]), "npy")
        job = Job(
            slot="s", schedule="a.b", schedule_version=1, config={"k": 1, "f": 0.5, "b": True},
            code=code, facts={"ops": {"x": 1.0}}, cases=({"x": array},),
        )  # fmt: skip
        made.append(Unit(index=index, workload="w:t=1", phase="search", seed=7, jobs=(job,)))
    batch = Batch(HEADER, tuple(made))
    folder.write(batch)
    return batch


def result(unit: int) -> Result:
    step = Step(do="joules", slots=("s",), reading=Reading(1.5, None, 2.0, ""))
    return Result(batch=HEADER.id, unit=unit, device="GPU", meter="nvml", steps=(step,), time=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Folder:
    made = Folder(tmp_path_factory.mktemp("batch"))
    with made.locked(create=True):
        batch_in(made)
    return made


def test_what_is_written_is_read(folder) -> None:
    batch = Folder(folder.path).read()
    assert (
        batch.header == HEADER
        and len(batch.units) == 3
        and batch.units[2].jobs[0].config["f"] == 0.5
    )
    assert damage(folder, batch.files()) == [] and len(batch.files()) == 4
    assert Folder(folder.path / "files").read() is None


@given(st.data())
def test_no_part_of_a_batch_passes_for_the_whole(folder, data) -> None:
    path = folder.path / "batch.jsonl"
    whole = path.read_bytes()
    if data.draw(st.booleans(), "cut"):
        broken = whole[: data.draw(st.integers(0, len(whole) - 2), "at")]
    else:
        at = data.draw(st.integers(0, len(whole) - 2), "at")
        broken = (
            whole[:at] + bytes([whole[at] ^ (1 << data.draw(st.integers(0, 7)))]) + whole[at + 1 :]
        )
    try:
        path.write_bytes(broken)
        with pytest.raises(InputError, match="Transfer the folder again"):
            Folder(folder.path).read()
    finally:
        path.write_bytes(whole)


@settings(max_examples=25)  # each syncs three files
@given(st.data())
def test_results_survive_a_cut_at_any_byte(folder, data) -> None:
    batch = folder.read()
    path = folder.results_path(HEADER.id)
    path.unlink(missing_ok=True)
    for unit in range(2):
        folder.add(result(unit))
    whole = path.read_bytes()
    first = whole.index(b"\n")
    at = data.draw(st.integers(0, len(whole)), "at")
    path.write_bytes(whole[:at])
    found, bad = folder.results(batch)
    assert set(found) == {u for u, end in ((0, first), (1, len(whole) - 1)) if at >= end}
    folder.add(result(2))  # goes on behind what was torn
    found, bad = folder.results(batch)
    assert found[2] == result(2) and len(found) + bad <= 3
    path.unlink()


def test_results_of_other_batches_and_units_do_not_count(folder) -> None:
    batch = folder.read()
    folder.add(result(7))
    path = folder.results_path(HEADER.id)
    other = Folder(folder.path)
    path.write_bytes(path.read_bytes().replace(b"joules", b"j0ules"))
    assert other.results(batch) == ({}, 1)
    path.unlink()


def test_files_are_what_their_names_say(folder) -> None:
    batch = folder.read()
    (array,) = files_of(batch.units[1]) - {batch.units[0].jobs[0].code}
    place = folder.file(array)
    place.write_bytes(b"other")
    fresh = Folder(folder.path)
    assert damage(fresh, batch.files()) == [f"{array} is not whole"]
    place.unlink()
    (problem,) = damage(Folder(folder.path), batch.files())
    assert problem == f"{array} cannot be read: No such file or directory"
    assert "missing or damaged" in str(torn(fresh, [problem, problem])) and "and 1 more" in str(
        torn(fresh, [problem, problem])
    )
    assert (
        fresh.keep(bytes([1]), "npy") == array and damage(Folder(folder.path), batch.files()) == []
    )
    with pytest.raises(InputError, match="names no file"):
        folder.file("../batch.jsonl")


def test_a_new_batch_takes_the_place_of_the_last(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "new")
    with folder.locked(create=True):
        batch_in(folder, 4)
        folder.add(result(0))
        batch_in(folder, 1)
        assert {p.name for p in (folder.path / "files").iterdir()} == folder.read().files()
        assert folder.results(folder.read())[0] == {0: result(0)}, "the same batch, written again"
        with (
            pytest.raises(InputError, match="another command works in this folder"),
            folder.locked(),
        ):
            pass
    with folder.locked():
        pass


def test_newer_folders_are_refused(tmp_path: Path) -> None:
    import msgspec

    folder = Folder(tmp_path)
    with folder.locked(create=True):
        folder.write(Batch(msgspec.structs.replace(HEADER, schema=2), ()))
        with pytest.raises(InputError, match="schema 2, this version reads 1"):
            folder.read()


@pytest.mark.parametrize("where", ["args", "cases", "id", "file"])
@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", "", "..", "a.b", "a/b", "ä"])
def test_names_lead_nowhere(tmp_path: Path, where: str, name: str) -> None:
    import msgspec

    folder = Folder(tmp_path)
    with folder.locked(create=True):
        batch = batch_in(folder, 1)
        (unit,), header = batch.units, batch.header
        (job,) = unit.jobs
        if where == "args":
            job = msgspec.structs.replace(job, facts={"args": [{"name": "x"}, {"name": name}]})
        elif where == "cases":
            job = msgspec.structs.replace(job, cases=({"x": job.cases[0]["x"]}, {name: job.code}))
        elif where == "id":
            header = msgspec.structs.replace(header, id=name)
        else:
            with pytest.raises(InputError, match="names no file"):
                folder.file(name)
            return
        folder.write(Batch(header, (msgspec.structs.replace(unit, jobs=(job,)),)))
        with pytest.raises(InputError, match="as a name"):
            folder.read()


def test_what_says_nothing_of_arguments_is_refused(tmp_path: Path) -> None:
    import msgspec

    folder = Folder(tmp_path)
    with folder.locked(create=True):
        batch = batch_in(folder, 1)
        (unit,) = batch.units
        job = msgspec.structs.replace(unit.jobs[0], facts={"args": [7]})
        folder.write(Batch(HEADER, (msgspec.structs.replace(unit, jobs=(job,)),)))
        with pytest.raises(InputError, match="has no arguments"):
            folder.read()
