"""Lines of results that a run adds to, and the tables made of them in the documentation."""

from __future__ import annotations

import json
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"


def read_lines(path):
    """Return the results in a file of JSON lines; what a killed run left of a line is cut off."""
    if not path.exists():
        return []
    data = path.read_text()
    whole = data[: data.rfind("\n") + 1]
    if whole != data:
        path.write_text(whole)
    return [json.loads(line) for line in whole.splitlines() if line.strip()]


def add_line(path, line):
    """Append one result."""
    with path.open("a") as out:
        out.write(json.dumps(line) + "\n")


def write_part(page, name, text):
    """Put a text between the marks of a page: ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``."""
    path = DOCS / page
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    before, rest = path.read_text().split(begin)
    path.write_text(before + begin + text + end + rest.split(end)[1])
