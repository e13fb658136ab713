"""The benchmarks that record spaces and replay searches on them: interrupted, empty, and asked too often."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import sys
from pathlib import Path
from types import ModuleType

import msgspec
import pytest
from recordings import recording

from mimo_compile.errors import InputError
from mimo_compile.search.records import Verdict

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def tool(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:  # they import each other
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module(name)


def test_a_journal_goes_on_where_a_killed_run_left_it(tmp_path: Path) -> None:
    journal, path = tool("record_space").journal, tmp_path / "visits.jsonl"
    assert journal(path) == []
    path.write_text('{"key": "a"}\n{"key": "b"}\n{"key": "c", "us": 1')
    assert [r["key"] for r in journal(path)] == ["a", "b"]
    with path.open("a") as out:
        out.write('{"key": "d"}\n')
    assert [r["key"] for r in journal(path)] == ["a", "b", "d"]
    path.write_text('{"key": "a"}\n{"key": \n{"key": "c"}\n')
    with pytest.raises(InputError, match="line 2 is damaged"):
        journal(path)


def test_a_space_in_which_nothing_works_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    sound = recording()
    bad = tuple(
        msgspec.structs.replace(r, verdict=Verdict.WRONG, latency_us=None) for r in sound.records
    )
    describe = tool("record_space").describe
    describe("bad", dataclasses.replace(sound, records=bad))
    assert f"{len(bad)} configs, none of them ok" in capsys.readouterr().out
    describe("sound", sound)
    assert "best of each" in capsys.readouterr().out


def test_a_replay_without_spaces_or_searches_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quality = tool("search_quality")
    monkeypatch.setattr(quality, "SPACES", tmp_path)
    monkeypatch.setattr(sys, "argv", ["search_quality.py"])
    with pytest.raises(SystemExit) as left:
        quality.main()
    assert left.value.code == 2 and "no recordings" in capsys.readouterr().err
    (tmp_path / "a.jsonl.xz").touch()
    monkeypatch.setattr(sys, "argv", ["search_quality.py", "--only", "fortune"])
    with pytest.raises(SystemExit):
        quality.main()
    assert "no search is called fortune" in capsys.readouterr().err


def test_a_search_that_asks_without_end_is_cut_and_said_to_be(tmp_path: Path) -> None:
    quality, space = tool("search_quality"), recording()
    lookup = quality.Lookup(space, 5)
    for _ in range(lookup.most):
        assert lookup("no such", {}) is None
    with pytest.raises(quality.Enough):
        lookup("no such", {})
    assert lookup.cut and lookup.reached == [None, None] and not lookup.seen
    path = tmp_path / "small.jsonl.xz"
    space.save(path)
    reached, cut = quality.one((str(path), "random", 0, len(space.records), [], None))
    assert None not in reached and not cut


def test_files_for_kernel_tuner_go_with_the_space() -> None:
    space = tool("kernel_tuner_replay").Space(recording())
    folder = space.file.parent
    assert space.file.exists()
    del space
    gc.collect()
    assert not folder.exists()
