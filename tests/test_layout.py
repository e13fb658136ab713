"""The layout: rooms at the top of the repository, one installed name, a light import."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import mimo_compile

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ["ir", "schedules", "cost_models", "search"]
HEAVY = {"torch", "tvm", "tvm_ffi", "xgboost", "numpy", "scipy", "networkx", "transformers"}
SHIPPED = {".css", ".cu", ".cuh", ".html", ".js", ".json", ".jsonl", ".md", ".py"}
SHIPPED |= {".safetensors", ".typed"}


def python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that writes no bytecode."""
    return subprocess.run(
        [sys.executable, "-B", "-c", code], cwd=cwd, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("room", ROOMS)
def test_room_is_a_folder_at_the_top_and_a_relative_link_in_the_package(room: str) -> None:
    link = ROOT / "mimo_compile" / room
    assert (ROOT / room).is_dir() and not (ROOT / room).is_symlink()
    assert link.is_symlink() and os.readlink(link) == f"../{room}"


@pytest.mark.parametrize("room", ROOMS)
def test_room_has_one_name_only(room: str) -> None:
    done = python(f"import {room}", ROOT)
    assert done.returncode == 1
    assert f"ImportError: import mimo_compile.{room}, not {room}" in done.stderr
    assert f'if __name__ != "mimo_compile.{room}":' in (ROOT / room / "__init__.py").read_text()


def test_import_is_light(tmp_path: Path) -> None:
    code = f"""
import sys, time
start = time.process_time()
import mimo_compile
print(time.process_time() - start)
assert mimo_compile.__version__ and "compile" in dir(mimo_compile)
assert not {HEAVY!r} & set(sys.modules), sorted({HEAVY!r} & set(sys.modules))
"""
    seconds = []
    for _ in range(3):
        done = python(code, tmp_path)
        assert done.returncode == 0, done.stderr
        seconds.append(float(done.stdout))
    assert min(seconds) < 0.2


def test_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'tuna'"):
        _ = mimo_compile.tuna
    assert set(mimo_compile._HOME_OF) | {"__version__"} == set(mimo_compile.__all__)


def source_files(root: Path) -> set[str]:
    """Every file of the package that users need, by its path in a wheel."""
    found = set()
    for folder, folders, names in os.walk(root / "mimo_compile", followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]
        paths = (Path(folder, name) for name in names)
        found |= {str(p.relative_to(root)) for p in paths if p.suffix in SHIPPED}
    return found


def test_wheel_and_source_distribution_hold_the_package_and_nothing_else(tmp_path: Path) -> None:
    tree, out = tmp_path / "tree", tmp_path / "dist"
    tree.mkdir()
    for name in ["mimo_compile", *ROOMS]:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignore)
    for name in ["pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "MANIFEST.in"]:
        shutil.copy(ROOT / name, tree / name)
    for name in ["cost_models/pretrained/x.json", "schedules/mpgemm/x.cu", "ir/README.md"]:
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_text("data of a kind that must be packed wherever it lies")
    # by way of the source distribution, as an installer without wheels would
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run(build, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    expected = source_files(tree)
    assert expected >= {"mimo_compile/ir/__init__.py", "mimo_compile/cost_models/pretrained/x.json"}
    with zipfile.ZipFile(next(out.glob("*.whl"))) as wheel:
        packed = set(wheel.namelist())
        entries = wheel.read(next(n for n in packed if n.endswith("entry_points.txt"))).decode()
    assert {name for name in packed if ".dist-info/" not in name} == expected
    assert "mimo-compile = mimo_compile.cli:main" in entries
    assert "mimo = mimo_compile.frontend.dynamo:mimo_backend" in entries
    with tarfile.open(next(out.glob("*.tar.gz"))) as archive:
        members = archive.getmembers()
    assert not [m.name for m in members if m.issym() or m.islnk()]
    assert {m.name.split("/", 1)[1] for m in members if "/mimo_compile/" in m.name} >= expected


def test_base_dependencies_are_those_of_the_runtime() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[^a-z0-9-]", text)[0] for text in project["dependencies"]}
    runtime = {"apache-tvm", "apache-tvm-ffi", "apache-tvm-ffi-orcjit"}
    assert names == runtime | {"msgspec", "numpy", "tokenizers"}


def test_constraints_pin_everything_that_is_asked_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = ("compile", "dev", "hf", "predict", "ray")
    wanted = [*project["dependencies"], *(text for name in asked for text in extras[name])]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {re.split(r"[^a-z0-9-]", text)[0] for text in wanted} <= set(pins)
    assert pins["apache-tvm"] == "0.27.0.post1" and pins["apache-tvm-ffi"].startswith("0.1.14.post")
    assert pins["torch"] == "2.13.0"
