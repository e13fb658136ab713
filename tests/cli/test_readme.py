"""Commands that people copy from the README and the documentation: they parse, and (slow) they run."""

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from mimo_compile.cli import VERBS, main

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
PLACEHOLDER = re.compile(r"path/to|\.\.\.|…|<[a-z]")


def blocks(page: Path) -> list[str]:
    """Return the sh blocks of a page."""
    return re.findall(r"^```sh\n(.*?)^```", page.read_text(), flags=re.M | re.S)


def commands(page: Path) -> list[str]:
    """Return the mimo-compile command lines of a page, without comments; continued lines joined."""
    text = "\n".join(blocks(page)).replace("\\\n", " ")
    lines = [re.split(r"\s+#\s", line)[0].strip() for line in text.splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [part for part in parts if part.startswith("mimo-compile ")]


def test_the_readme_shows_commands() -> None:
    shown = {line.split()[1] for line in commands(ROOT / "README.md")}
    assert shown >= {"compile", "run", "tune"}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_of_pages_parse(page: Path, monkeypatch, shell_words) -> None:
    seen: list[object] = []
    for verb in VERBS:
        module = import_module(f"mimo_compile.cli.{verb}")
        monkeypatch.setattr(module, "run", lambda args: seen.append(args) or 0)
    found = commands(page)
    for line in found:
        assert main(shell_words(line)) == 0, f"{page.name}: {line}"
    assert len(seen) == len(found)


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.compile
@pytest.mark.timeout(900)
def test_commands_of_the_readme_run(tmp_path: Path) -> None:
    """In their order, in an empty folder, tuning cut short."""
    bin_folder = Path(sys.executable).parent
    for line in commands(ROOT / "README.md"):
        if PLACEHOLDER.search(line):
            continue
        command = re.sub(r"--trials \d+", "--trials 8", re.sub(r"--time \w+", "--time 10s", line))
        done = subprocess.run(
            ["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False,
            env={"PATH": f"{bin_folder}:/usr/bin:/bin", "HOME": str(tmp_path)},
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stderr}"
