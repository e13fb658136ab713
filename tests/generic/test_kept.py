"""Functions kept beside a database: who finds them, what damage does; models without anything to tune."""

from __future__ import annotations

import json

import pytest
import torch
from generic_cases import legalised

import mimo_compile as mc
from mimo_compile.cli import main
from mimo_compile.errors import UsageError
from mimo_compile.ir import functions
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import parse_workload
from mimo_compile.pipeline.plans import problem_of_artifact
from mimo_compile.pipeline.replan import check
from mimo_compile.search import kept_functions
from mimo_compile.search.database import Database, open_records
from mimo_compile.search.space import JointSpace

pytestmark = pytest.mark.compile
CPU = local_cpu().with_threads(1)


def workload(name):
    return functions.workload_of(legalised(name)[0][0])


@pytest.fixture
def forgotten(tmp_path, monkeypatch):
    """A workload whose function is kept beside a database, and known nowhere else."""
    w, db = workload("mean"), tmp_path / "r.db"
    Database(db).close()
    assert kept_functions.keep(db, [w]) == 1 and kept_functions.keep(db, [w]) == 0
    monkeypatch.setattr(functions, "_KNOWN", {})
    monkeypatch.setattr(functions, "_SOURCES", [])
    monkeypatch.setattr(kept_functions, "_USED", set())
    return w, db


def test_whoever_opens_records_finds_the_functions_beside_them(forgotten):
    w, db = forgotten
    with pytest.raises(UsageError, match="not known here"):
        JointSpace(w, CPU)
    with open_records(db):
        assert JointSpace(w, CPU).workload == w
    # what follows from the hash is put right
    assert parse_workload(f"tir:hash={w.text('hash')},does=nothing,out=f32.1") == w


def test_inspect_shows_a_kept_function(forgotten, capsys):
    w, db = forgotten
    spec = f"tir:hash={w.text('hash')},does=x,out=y"
    assert main(["inspect", "--op", spec, "--db", str(db), "--threads", "1", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["workload"] == str(w) and len(value["candidates"]) == 3


def test_a_function_that_is_nowhere_is_named(forgotten, capsys):
    assert main(["inspect", "--op", "tir:hash=h1,does=x,out=y", "--db", str(forgotten[1])]) == 2
    assert "the function of tir:hash=h1,does=x,out=y is not known here" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["", "{}", "[1, 2", "another"])
def test_damaged_kept_functions_are_absent_and_made_anew(tmp_path, caplog, damage):
    w, db = workload("mean"), tmp_path / "r.db"
    text = functions.text_of(workload("gelu")) if damage == "another" else damage
    kept_functions.keep(db, [w])
    path = kept_functions.folder_of(db) / f"{w.text('hash')}.json"
    path.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functions, "_KNOWN", {})
        patch.setattr(functions, "_SOURCES", [])
        patch.setattr(kept_functions, "_USED", set())
        kept_functions.use(db)
        assert not functions.known(w)
    assert str(path) in caplog.text
    assert kept_functions.keep(db, [w]) == 1 and kept_functions.keep(db, [w]) == 0
    assert path.read_text() == functions.text_of(w)


def test_functions_of_an_artifact_have_no_choice(tmp_path):
    artifact = mc.compile(
        Cancelled(), example_inputs=(torch.ones(4, 16),), threads=1, db=tmp_path / "no.db"
    )
    problem = problem_of_artifact(artifact)
    assert problem.built == {}
    with pytest.raises(UsageError, match=r"1 kernels of .* are generic"):
        check(artifact, problem, "energy")


class Cancelled(torch.nn.Module):
    """Nothing that can be verified."""

    def forward(self, x):
        return (x + 1e8) - 1e8


def test_a_model_without_anything_to_tune_is_compiled(tmp_path, caplog):
    x = torch.ones(4, 16)
    artifact = mc.compile(
        Cancelled(), example_inputs=(x,), trials=2, threads=1, db=tmp_path / "r.db"
    )
    assert "can be tuned" in caplog.text
    assert [c.source for c in artifact.manifest.plan] == ["default"]


@pytest.mark.slow
def test_a_kept_function_is_tuned_by_its_name(forgotten):
    w, db = forgotten
    result = mc.tune(str(w), trials=3, threads=1, db=db, meter="modelled")
    assert result.workloads[0].best is not None
