"""What other distributions add: found on use, checked, and named when broken. Nothing is imported before."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from mimo_compile.cli import main
from mimo_compile.errors import EnvironmentMismatch, UsageError
from mimo_compile.plugins import Kind

STRATEGY = """
from mimo_compile.search.strategies.base import Known

class Backwards(Known):
    def ask(self, count):
        return self.seeds(count) or self.random(count)
"""
SCHEDULE = """
from mimo_compile.schedules.elementwise.x86_swiglu import X86SwiGlu

class Mine(X86SwiGlu):
    name = "swiglu.mine"

class Unnamed(X86SwiGlu):
    pass
"""


KIND = Kind("thing", "mimo_compile.things", "json")


def test_own_names_come_first_and_are_relative_to_the_room(site: Any) -> None:
    site.install("[mimo_compile.things]\nzz = far:Thing\naa = far:Thing\n", far="class Thing: ...")
    own = {"decode": "decoder:JSONDecoder", "given": dict}
    assert KIND.names(own) == ["decode", "given", "aa", "zz"]
    assert "far" not in sys.modules, "names are known without importing anything"
    assert KIND.get("aa", own).__module__ == "far"
    assert KIND.get("decode", own).__name__ == "JSONDecoder" and KIND.get("given", own) is dict
    with pytest.raises(UsageError, match=r"unknown thing 'x'\. Use one of decode, given, aa, zz"):
        KIND.get("x", own)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("import no_such_module_anywhere", "ModuleNotFoundError: No module named 'no_such_module"),
        ("raise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
        ("class Other: ...", "AttributeError.*Thing"),
        ("class Thing(", "SyntaxError"),
    ],
)
def test_broken_plug_ins_are_named_in_one_line(site: Any, module: str, words: str) -> None:
    site.install("[mimo_compile.things]\nbad = broken:Thing\n", name="ill-made", broken=module)
    assert KIND.names({}) == ["bad"]
    with pytest.raises(EnvironmentMismatch, match=words) as caught:
        KIND.get("bad", {})
    text = str(caught.value)
    assert "\n" not in text and "thing plug-in 'bad'" in text and "broken:Thing of ill-made" in text
    assert "pip uninstall ill-made" in text and caught.value.exit_code == 3


def test_names_that_are_taken(site: Any) -> None:
    site.install("[mimo_compile.things]\na = far:Thing\n", name="one")
    with pytest.raises(EnvironmentMismatch, match=r"'a' of one has the name of one of mimo_comp"):
        KIND.names({"a": "x:Y"})
    site.install("[mimo_compile.things]\na = far:Thing\n", name="two")
    sys.path.append(str(site.path / "nothing"))  # another path: it is searched again
    try:
        with pytest.raises(EnvironmentMismatch, match="'a' of two has the name of that of one"):
            KIND.names({})
    finally:
        sys.path.pop()


def test_schedules(site: Any) -> None:
    from mimo_compile.schedules import get_schedule, names_for

    entries = "\n".join(
        ["[mimo_compile.schedules]", "swiglu.mine = s:Mine", "swiglu.unnamed = s:Unnamed",
         "mpgemm.path = pathlib:Path"]
    )  # fmt: skip
    site.install(entries, s=SCHEDULE)
    assert names_for("swiglu") == [
        "swiglu.x86", "swiglu.cuda", "swiglu.mine", "swiglu.unnamed",
    ]  # fmt: skip
    assert names_for("mpgemm")[-1] == "mpgemm.path" and names_for("no_op") == []
    assert get_schedule("swiglu.mine").name == "swiglu.mine"
    for name in ("swiglu.unnamed", "mpgemm.path"):
        with pytest.raises(EnvironmentMismatch, match=f"is no Schedule named '{name}'.*addition"):
            get_schedule(name)
    with pytest.raises(UsageError, match=r"unknown schedule 'swiglu\.yours'.*swiglu.mine"):
        get_schedule("swiglu.yours")


def test_strategies(site: Any) -> None:
    from mimo_compile.search.strategies import get_strategy, strategy_names

    entries = "[mimo_compile.strategies]\nbackwards = s:Backwards\nnone = pathlib:Path\n"
    site.install(entries, s=STRATEGY)
    assert strategy_names() == ["evolutionary", "random", "grid", "backwards", "none"]
    assert get_strategy("backwards").__name__ == "Backwards"
    with pytest.raises(EnvironmentMismatch, match=r"strategy plug-in 'none'.* has no method ask"):
        get_strategy("none")


def run(site: Any, *args: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site.path), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, check=False, timeout=200, cwd=site.path,
        env={
            **os.environ, "PYTHONPATH": path, "XDG_DATA_HOME": str(site.path),
            "XDG_CACHE_HOME": str(site.path),
        },
    )  # fmt: skip


def test_nothing_is_imported_or_searched_with_the_package(site: Any) -> None:
    site.install("[mimo_compile.strategies]\nbad = bad:Bad\n", bad="raise SystemExit(9)")
    code = (
        "import sys, mimo_compile, mimo_compile.plugins\n"
        "assert not {'bad', 'torch', 'tvm', 'numpy'} & set(sys.modules)\n"
        "assert mimo_compile.plugins._all_entries.cache_info().misses == 0\n"
    )
    done = run(site, "-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.compile
def test_a_search_with_a_schedule_and_a_strategy_of_others(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way: command line, search, and the building process, which imports the schedule too."""
    entries = (
        "[mimo_compile.schedules]\nswiglu.mine = s:Mine\n"
        "[mimo_compile.strategies]\nbackwards = t:Backwards\n"
    )
    site.install(entries, s=SCHEDULE, t=STRATEGY)
    for folder in ("XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(folder, str(site.path))
    db = site.path / "r.db"
    tune = ["tune", "--op", "swiglu:t=2,f=64", "--db", str(db), "--threads", "1"]
    assert main([*tune, "--trials", "2", "--strategy", "backwards"]) == 0
    from mimo_compile.search.database import Database

    with Database(db) as records:
        assert {"swiglu.mine", "swiglu.x86"} == {r.schedule for r in records if r.ok}


@pytest.mark.compile
@pytest.mark.parametrize(
    ("option", "name", "words"),
    [
        ("--strategy", "annealing", "evolutionary, random, grid, backwards"),
        ("--meter", "wattmeter", "auto, modelled, nvml, rapl"),
    ],
)
def test_the_command_names_those_of_others_too(site: Any, capsys, option, name, words) -> None:
    site.install("[mimo_compile.strategies]\nbackwards = t:Backwards\n", t=STRATEGY)
    db = str(site.path / "r.db")
    tune = ["tune", "--op", "swiglu:t=2,f=64", "--db", db, "--trials", "4", "--threads", "1"]
    assert main([*tune, option, name]) == 2
    told = capsys.readouterr().err
    assert words in told and len(told.splitlines()) == 1
