"""The page as a browser draws it: nothing asked of a network, nothing beyond the page, no label on another.

Needs Chromium (Debian: ``apt-get install chromium``); skipped where there is none.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import zlib
from pathlib import Path

import pytest

from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import parse_workload
from mimo_compile.report import write_report
from mimo_compile.search.database import Database
from mimo_compile.search.records import Record, Verdict
from mimo_compile.search.space import JointSpace

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.compile,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
]
HOSTILE = "mpgemm:<img src=x onerror=document.title='owned'>"

# Looks at the page in frames of several widths and writes what it finds into its own document.
LOOK = """<!DOCTYPE html><meta charset="utf-8"><body><pre id="out">waiting</pre><script>
const found = {};
function overlaps(doc) {
  const out = [];
  for (const svg of doc.querySelectorAll('svg')) {
    const boxes = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
    for (let i = 0; i < boxes.length; i++) for (let j = 0; j < i; j++) {
      const [a, b] = [boxes[i][1], boxes[j][1]];
      const w = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const h = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (w > 1 && h > 2) out.push(boxes[i][0] + ' | ' + boxes[j][0]);
    }
  }
  return out;
}
function look(doc, win, width) {
  const shown = [...doc.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().width > 0);
  const texts = shown.flatMap(s => [...s.querySelectorAll('text')]);
  const outside = texts.filter(t => {
    const a = t.getBoundingClientRect(), b = t.ownerSVGElement.getBoundingClientRect();
    return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1;
  });
  const marks = s => s.querySelectorAll('circle, polyline').length;
  found[width] = {
    wide: doc.documentElement.scrollWidth, overlaps: overlaps(doc), svgs: shown.length,
    empty: shown.filter(s => !marks(s)).length, outside: outside.map(t => t.textContent),
    small: Math.min(...texts.map(t => t.getBoundingClientRect().height).filter(h => h > 0)),
    named: shown.filter(s => s.getAttribute('aria-label')).length,
    asked: win.performance.getEntriesByType('resource').map(r => r.name), title: doc.title,
    strange: doc.querySelectorAll('script, img, iframe, link, object').length,
    ink: win.getComputedStyle(doc.body).color, paper: win.getComputedStyle(doc.body).backgroundColor,
  };
}
const widths = [1200, 768, 360];
let left = widths.length;
for (const width of widths) {
  const frame = document.createElement('iframe');
  frame.style.cssText = `width:${width}px;height:900px;border:0`;
  frame.onload = () => {
    for (const d of frame.contentDocument.querySelectorAll('details')) d.open = true;
    look(frame.contentDocument, frame.contentWindow, width);
    if (!--left) document.getElementById('out').textContent = JSON.stringify(found);
  };
  frame.src = 'report.html';
  document.body.append(frame);
}
</script></body>"""


def chromium(*options: str) -> str:
    """Run it without a window or a network; return its standard output."""
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--host-resolver-rules=MAP * ~NOTFOUND", "--allow-file-access-from-files", *options,
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def records() -> list[Record]:
    """A search over several kernels on this machine, with a default, rejected ones and joules."""
    hardware, out = local_cpu(), []
    names = [f"mpgemm:m={m},n=256,k=256,w=w4g64,a=a8" for m in (1, 4, 16)]
    for at, name in enumerate([*names, "swiglu:t=1,f=64", "rms_norm:t=1,d=256", HOSTILE]):
        if name == HOSTILE:
            pairs = [(HOSTILE, {HOSTILE: i}, 1, {}, {}) for i in range(12)]
        else:
            space = JointSpace(parse_workload(name), hardware)
            some = [*space.defaults(), *(c for i, c in enumerate(space) if i % 29 == 0)][:30]
            pairs = []
            for c in some:
                schedule = space.schedules[c.schedule]
                work = schedule.work(space.workload, space.config(c), hardware)
                pairs.append((c.schedule, c.config, schedule.version, work.ops, work.bytes))
            name = str(space.workload)
        for i, (schedule, config, version, ops, moved) in enumerate(pairs):
            us = (3.0 + 40 * at) * (1 + ((i * 7) % 13) / 6)
            out.append(
                Record(
                    key=f"{zlib.crc32(name.encode()):08x}{i:056x}", workload=name, schedule=schedule,
                    schedule_version=version, config=config, hardware=hardware.id,
                    features=tuple(sorted(hardware.features)), threads=hardware.threads, cache="cold",
                    versions={"apache-tvm": "0.27"}, verdict=Verdict.OK, latency_us=us,
                    modelled_mj=us / 70 + 0.02 * (i % 3), ops=dict(ops), bytes=dict(moved), time=float(i),
                    energy_mj=us / 50 + 0.1 * (i % 4) if at == 1 else None,
                    energy_source="rapl" if at == 1 else "",
                )
            )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page, and one that looks at it."""
    path = tmp_path_factory.mktemp("seen")
    with Database(path / "records.db") as db:
        db.add(*records())
    write_report(path / "records.db", path / "report.html")
    (path / "look.html").write_text(LOOK)
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_finds_nothing_amiss(folder: Path, scheme: str) -> None:
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    dom = chromium(
        *dark, "--virtual-time-budget=20000", "--dump-dom", (folder / "look.html").as_uri()
    )
    out = re.search(r'<pre id="out">(.*?)</pre>', dom, re.S)
    assert out and out[1] != "waiting"
    found = json.loads(html.unescape(out[1]))
    assert set(found) == {"1200", "768", "360"}
    for width, seen in found.items():
        assert seen["wide"] <= int(width), f"at {width} the page is {seen['wide']} wide"
        assert seen["overlaps"] == [] and seen["outside"] == [], (width, seen)
        assert seen["asked"] == [] and seen["strange"] == 0
        assert seen["title"] == "records.db – kernel report"
        assert seen["svgs"] >= 12 and seen["empty"] == 0 and seen["named"] == seen["svgs"]
        assert seen["small"] >= 8, f"text of {seen['small']} px at {width}"
    lightness = [sum(map(int, re.findall(r"\d+", found["1200"][k])[:3])) for k in ("ink", "paper")]
    assert (lightness[0] > lightness[1]) == (scheme == "dark")


def test_it_is_painted(folder: Path) -> None:
    shot = folder / "shot.png"
    chromium("--window-size=1200,900", f"--screenshot={shot}", (folder / "report.html").as_uri())
    data = shot.read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 20_000, "an empty page compresses to less"
