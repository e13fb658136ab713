"""The documentation is right: examples run, links lead somewhere, lists are complete.

(That the commands which the pages show can be parsed is tested in tests/cli/test_readme.py.)
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from subprocess import PIPE

import pytest

from mimo_compile import errors
from mimo_compile.cli import VERBS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
HOW_TO = ["an-op", "a-schedule", "a-model", "a-weight-format", "a-meter", "a-strategy"]
SLOW = {"mistral.py", "several_texts.py", "tune_an_op.py"}
"""Examples that take longest; tests of families and of the search are like them."""


def code_blocks(page: Path) -> list[str]:
    """Return the Python blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.M | re.S)


def example_name(block: str) -> str | None:
    """Return the file name that a block's first line gives; None for a mere excerpt."""
    found = re.match(r"# (\w+\.py)\b", block)
    return found[1] if found else None


EXAMPLES = {
    name: block for page in PAGES for block in code_blocks(page) if (name := example_name(block))
}


def without_blocks(text: str) -> str:
    """Return a text without its code blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def prose(page: Path) -> str:
    """Return a page without its code blocks."""
    return without_blocks(page.read_text())


def section(page: Path, title: str) -> str:
    """Return a section of a page, from its heading to the next one of the same level."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", page.read_text(), re.M | re.S)
    assert found, f"{page.name} has no section {title}"
    return found[1]


def quoted(text: str) -> set[str]:
    """Return everything between backquotes outside of code blocks, and the words in it."""
    spans = re.findall(r"`([^`\n]+)`", without_blocks(text))
    return {*spans, *(word for span in spans for word in re.split(r"[\s,=(]+", span))}


# -- examples ----------------------------------------------------------------------------------


@pytest.mark.parametrize("topic", HOW_TO)
def test_every_how_to_starts_from_one_complete_example(topic: str) -> None:
    page = DOCS / f"add-{topic}.md"
    blocks = code_blocks(page)
    assert len(blocks) == 1 and example_name(blocks[0]) in EXAMPLES
    assert "## What goes where" in page.read_text() or topic == "a-weight-format"


@pytest.fixture(scope="module")
def zygote() -> Iterator[subprocess.Popen[str]]:
    """Starts scripts that have nothing left to import (`example_zygote.py`)."""
    script = Path(__file__).with_name("example_zygote.py")
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        try:
            process.communicate(timeout=20)
        finally:
            process.kill()  # it waits for an example that hangs
    assert process.returncode == 0


@pytest.mark.compile
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in EXAMPLES]
)
def test_examples_run(name: str, tmp_path: Path, zygote: subprocess.Popen[str]) -> None:
    """As a person would: saved under the name that the page gives, in a folder of their own."""
    if "from transformers" in EXAMPLES[name]:
        pytest.importorskip("transformers")
    folder, out, err = tmp_path / "work", tmp_path / "out", tmp_path / "err"
    folder.mkdir()
    (folder / name).write_text(EXAMPLES[name])
    user = {"XDG_DATA_HOME": str(tmp_path / "data"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    order = {
        "script": name, "folder": str(folder), "out": str(out), "err": str(err),
        "environment": {**user, "HF_HUB_OFFLINE": "1"},
    }  # fmt: skip
    assert zygote.stdin is not None and zygote.stdout is not None
    zygote.stdin.write(json.dumps(order) + "\n")
    zygote.stdin.flush()
    assert zygote.stdout.readline() == "0\n", err.read_text()
    assert out.read_text()
    assert not (tmp_path / "data").exists(), "an example must not use the user's database"


def test_excerpts_are_python() -> None:
    for page in PAGES:
        for block in code_blocks(page):
            ast.parse(block)


# -- links -------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", t.lower()).strip().replace(" ", "-") for t in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page if not path else (page.parent / path).resolve()
        assert file.exists(), f"{page.name}: {target}"
        assert file.is_relative_to(ROOT), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target} is no heading"


def test_every_page_is_in_the_index() -> None:
    listed = set(re.findall(r"\]\((\S+\.md)\)", (DOCS / "index.md").read_text()))
    assert {p.name for p in DOCS.glob("*.md")} - {"index.md"} <= listed


@pytest.mark.parametrize("topic", HOW_TO)
def test_files_that_pages_name_exist(topic: str) -> None:
    """Those of the tables; what the example adds is not there yet."""
    text = (DOCS / f"add-{topic}.md").read_text()
    new = {Path(n).stem for n in EXAMPLES} | {"hwmon", "nibbles"}
    for name in re.findall(r"`((?:ir|schedules|search|tests|mimo_compile)/[\w/]+\.py)`", text):
        assert (ROOT / name).exists() or Path(name).stem in new, name


# -- lists -------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_command_line_page_has_every_option(verb: str) -> None:
    page = DOCS / "command-line.md"
    parser = argparse.ArgumentParser(add_help=False)
    import_module(f"mimo_compile.cli.{verb}").add_arguments(parser)
    here = quoted(section(page, verb))
    missing = [o for a in parser._actions for o in a.option_strings if o not in here]
    assert not missing, f"add {missing} to the section {verb} of {page.name}"
    known = {o for a in parser._actions for o in a.option_strings}
    common = quoted(section(page, "Common to all verbs"))
    stale = {w for w in here if re.fullmatch(r"--[a-z-]+", w)} - known - common
    assert not stale, f"{verb} has no {sorted(stale)}"
    assert {"--threads", "--seed", "--json", "--verbose", "--debug"} <= common
    assert f"mimo-compile {verb}" in section(page, verb)


def test_exit_codes() -> None:
    rows = re.findall(
        r"^\| (\d+) \|", section(DOCS / "command-line.md", "Common to all verbs"), re.M
    )
    kinds = [
        k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, errors.MimoError)
    ]
    assert {k.exit_code for k in kinds} | {0} == {int(code) for code in rows}
    table = dict(
        re.findall(r"^\| `(\w+)` \|.*\| (\d) \|$", section(DOCS / "python-api.md", "Errors"), re.M)
    )
    assert table == {k.__name__: str(k.exit_code) for k in kinds}


def test_python_page_has_every_argument_and_method() -> None:
    import inspect

    import mimo_compile as mc
    from mimo_compile.runtime import Module

    page = DOCS / "python-api.md"
    text = quoted(page.read_text())
    for function in (mc.compile, mc.tune, mc.load):
        missing = set(inspect.signature(function).parameters) - text
        assert not missing, f"{function.__name__}: {missing}"
    public = {n for n in vars(Module) if not n.startswith("_")}
    assert public - {"owns"} <= text, public - text
    assert {n for n in mc.__all__ if not n.startswith("_")} <= text


def test_artifact_page_has_every_field() -> None:
    from mimo_compile.runtime import program, zipform

    page = DOCS / "artifact.md"
    text = quoted(page.read_text())
    assert text >= zipform.KNOWN
    for kind in (
        "Manifest",
        "Target",
        "Member",
        "Choice",
        "Decoder",
        "Layer",
        "State",
        "Entry",
        "Buffer",
        "Call",
    ):
        missing = set(getattr(program, kind).__struct_fields__) - text
        assert not missing, f"{kind}: add {missing} to {page.name}"
    assert f"now {program.SCHEMA} |" in page.read_text()


def test_tuning_page_has_every_field_verdict_and_name() -> None:
    from mimo_compile.search.meters import METERS
    from mimo_compile.search.records import Record, Verdict
    from mimo_compile.search.strategies import STRATEGIES

    page = DOCS / "tuning.md"
    text = quoted(page.read_text())
    assert set(Record.__struct_fields__) <= text, set(Record.__struct_fields__) - text
    assert {str(v) for v in Verdict} <= text
    assert set(STRATEGIES) <= text
    assert set(METERS) - {"modelled", "replay"} <= text


def test_low_bit_page_has_every_format_and_kernel() -> None:
    from mimo_compile.ir.formats import ACT_NAMES, BASES, GROUPS
    from mimo_compile.schedules import names_for

    text = quoted((DOCS / "lowbit.md").read_text())
    kernels = {n.partition(".")[2] for n in names_for("mpgemm") if ".sim_" not in n}
    assert kernels <= text, kernels - text
    # zero points are told of once for all widths; float16 weights have no kernel
    formats = {b for b in BASES if not b.endswith("z") and b != "f16"} | {"w8z", *GROUPS}
    assert formats <= text, formats - text
    assert {a.partition("g")[0] for a in ACT_NAMES} <= text


def test_plug_in_page_has_every_group() -> None:
    from mimo_compile import schedules
    from mimo_compile.frontend import weights
    from mimo_compile.search import meters, strategies

    text = (DOCS / "plug-ins.md").read_text()
    for room in (schedules, strategies, meters, weights):
        group = room._KIND.group
        assert f'[project.entry-points."{group}"]' in text and f"| `{group}` |" in text


def test_limits_that_pages_state() -> None:
    """Numbers in prose go stale first."""
    from mimo_compile.runtime import container, weights
    from mimo_compile.search import ahead, budget, task, tuner
    from mimo_compile.search.device_batch import flow
    from mimo_compile.search.measure import Limits, Timing, gpu_slot
    from mimo_compile.search.measure.buffers import GUARD
    from mimo_compile.search.meters.base import MIN_STEPS

    text = " ".join((DOCS / "tuning.md").read_text().split())
    limits, timing = Limits(), Timing()
    for part in (
        f"with {limits.build_s:g} s and", f"nor take longer than {limits.run_s:g} s",
        f"{GUARD >> 10} KiB of guard bytes", f"At least {timing.warm_up_s * 1e3:g} ms of warm-up",
        f"{timing.batches} batches of about {timing.batch_s * 1e3:g} ms",
        f"a window of {timing.energy_window_s:g} s", f"at least {MIN_STEPS} steps",
        f"a first round of up to {ahead.FIRST} candidates", f"the next round of up to {tuner.BATCH}",
    ):  # fmt: skip
        assert part in text, part
    batch = f"up to {flow.ROUND} candidates of each workload ({flow.FIRST} in its first), at most {flow.MOST}"
    assert batch in text and gpu_slot.GUARD == GUARD
    assert (task.CONFIRM, timing.budget_s) == (4, 0.5)
    assert [budget.patience(n, 1) for n in (20, 20 * 50, 20 * 1000)] == [32, 50, 128]
    assert "as a twentieth of its space (32 at least, 128 at most)" in text
    artifact = " ".join((DOCS / "artifact.md").read_text().split())
    assert container.MAX_MANIFEST == 1 << 20 and "At most 1 MiB" in artifact
    assert weights.CHUNK == 1 << 20 and weights.ALIGNMENT == 64 and "64-byte boundary" in artifact


def test_glossary_is_sorted_and_defines_each_word_once() -> None:
    words = re.findall(r"^\| ([^|]+) \| ", (DOCS / "glossary.md").read_text(), re.M)[1:]
    assert words == sorted(set(words), key=str.lower)
    for word in (
        "workload",
        "schedule",
        "config",
        "space",
        "kernel",
        "plan",
        "record",
        "stage",
        "state",
    ):
        assert word in words
