"""The running child: loads object code, runs it on guarded buffers, times it. Never sees the expected result.

Imports numpy and the TVM runtime only. What a kernel wrote goes back to the parent in files; the parent
compares.
"""

from __future__ import annotations

import os
import secrets
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mimo_compile import _tvm
from mimo_compile.search.measure.buffers import PATTERNS, Buffer
from mimo_compile.search.measure.child import serve


class Slot:
    """One loaded kernel with its arguments."""

    def __init__(self, request: dict[str, Any]) -> None:
        """Load the object file ``code`` and lay out the arguments ``args``."""
        self.module = _tvm.load_object(Path(request["code"]).read_bytes())
        self.function = self.module[request["symbol"]]
        self.buffers = [Buffer(spec) for spec in request["args"]]
        self.tensors = tuple(b.tensor() for b in self.buffers)
        self.sets: list[tuple[Any, ...]] = [self.tensors]
        self.results: dict[str, bytes] = {}
        """Hash of what the first run left in each argument that it may write."""

    def rotate(self, wanted_bytes: int, memory_bytes: int) -> int:
        """Make argument sets whose weights and states together exceed the caches; return their bytes."""
        cold = [b.role in ("weight", "state") for b in self.buffers]
        each = sum(b.view.nbytes for b, c in zip(self.buffers, cold, strict=True) if c)
        count = 1
        if each and wanted_bytes:
            count = min(-(-wanted_bytes // each) + 1, 256, max(1, memory_bytes // each))
        while len(self.sets) < count:
            self.sets.append(
                tuple(
                    b.copy() if c else t
                    for b, c, t in zip(self.buffers, cold, self.tensors, strict=True)
                )
            )
        return each * len(self.sets)


SLOTS: dict[str, Slot] = {}


def load(request: dict[str, Any]) -> dict[str, Any]:
    """Load a kernel into slot ``slot``."""
    _tvm.set_threads(int(request["threads"]))
    SLOTS[request["slot"]] = Slot(request)
    return {}


def check(request: dict[str, Any]) -> dict[str, Any]:
    """Run twice on poisoned outputs and restored states; write what came out to ``folder``."""
    slot, folder = SLOTS[request["slot"]], Path(request["folder"])
    seen = _Seen()
    for pattern in PATTERNS:
        _run_poisoned(slot, pattern, seen, folder if pattern == PATTERNS[0] else None)
    return seen.facts()


def again(request: dict[str, Any]) -> dict[str, Any]:
    """Run once more after timing, on outputs poisoned otherwise: what came out must be what `check` saw."""
    slot = SLOTS[request["slot"]]
    seen = _Seen()
    pattern = secrets.choice([p for p in range(256) if p not in PATTERNS])
    _run_poisoned(slot, pattern, seen, None)
    return seen.facts()


@dataclass
class _Seen:
    """Names of arguments by what a kernel did to them and must not."""

    overrun: set[str] = field(default_factory=set)
    modified: set[str] = field(default_factory=set)
    differs: set[str] = field(default_factory=set)

    def facts(self) -> dict[str, Any]:
        return {
            "overrun": sorted(self.overrun), "modified": sorted(self.modified),
            "differs": sorted(self.differs), "forked": _has_children(),
        }  # fmt: skip


def _run_poisoned(slot: Slot, pattern: int, seen: _Seen, folder: Path | None) -> None:
    """Call a slot's kernel once and look at all memory around it; the slot's first results are kept."""
    for b in slot.buffers:
        if b.mutated:
            b.restore()
        b.poison(pattern)
    slot.function(*slot.tensors)
    for b in slot.buffers:
        if not b.guards_hold(pattern):
            seen.overrun.add(b.name)
        if not b.written:
            if not b.unchanged():
                seen.modified.add(b.name)
            continue
        digest = b.digest()
        if slot.results.setdefault(b.name, digest) != digest:
            seen.differs.add(b.name)
        if folder is not None:
            np.save(folder / f"{b.name}.npy", b.view, allow_pickle=False)
    for b in slot.buffers:
        if b.mutated:
            b.restore()


def _has_children() -> bool:
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return False
    return True


def _batch(slot: Slot, number: int, start: int) -> float:
    """Return seconds per call over ``number`` calls, beginning with argument set ``start``."""
    function, sets = slot.function, slot.sets
    if len(sets) == 1:
        arguments = sets[0]
        begin = time.perf_counter_ns()
        for _ in range(number):
            function(*arguments)
        return (time.perf_counter_ns() - begin) / number / 1e9
    order = [sets[(start + i) % len(sets)] for i in range(number)]
    begin = time.perf_counter_ns()
    for arguments in order:
        function(*arguments)
    return (time.perf_counter_ns() - begin) / number / 1e9


def timing(request: dict[str, Any]) -> dict[str, Any]:
    """Time slots ``slots`` interleaved, batch by batch; return seconds per call of each batch."""
    slots = [SLOTS[s] for s in request["slots"]]
    touched = [
        s.rotate(request["rotate_bytes"], request["memory_bytes"] // len(slots)) for s in slots
    ]
    numbers = []
    for slot in slots:
        begin, calls, once = time.perf_counter(), 0, 1.0
        while calls < 2 or time.perf_counter() - begin < request["warm_up_s"]:
            once = min(once, _batch(slot, 1, calls))
            calls += 1
            if calls >= 2 and time.perf_counter() - begin > 5 * request["warm_up_s"] + 0.5:
                break
        numbers.append(max(1, min(10_000, round(request["batch_s"] / max(once, 1e-7)))))
    out: list[list[float]] = [[] for _ in slots]
    hopeless = request["stop_above_s"]
    begin = time.perf_counter()
    at = 0
    for batch in range(int(request["batches"])):
        late = time.perf_counter() - begin > request["budget_s"] * len(slots)
        if batch >= 3 and (late or min(min(o) for o in out) > hopeless):
            break
        for i, slot in enumerate(slots):
            out[i].append(_batch(slot, numbers[i], at))
            at += numbers[i]
    return {
        "seconds": out,
        "calls": [n * len(o) for n, o in zip(numbers, out, strict=True)],
        "touched": touched,
    }


def spin(request: dict[str, Any]) -> dict[str, Any]:
    """Run a slot for ``seconds``; return how many calls and how long exactly."""
    slot = SLOTS[request["slot"]]
    once = max(_batch(slot, 1, 0), 1e-7)
    number = max(1, min(1000, round(0.005 / once)))
    begin, calls = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - begin) < request["seconds"]:
        _batch(slot, number, calls)
        calls += number
    return {"calls": calls, "seconds": elapsed}


def drop(request: dict[str, Any]) -> dict[str, Any]:
    """Forget all slots but ``keep``."""
    for name in [s for s in SLOTS if s not in request.get("keep", ())]:
        del SLOTS[name]
    return {}


def _warm_up() -> None:
    sys.modules["torch"] = None  # type: ignore[assignment]  # never in this process
    _tvm.runtime()


if __name__ == "__main__":
    serve(
        {"load": load, "check": check, "again": again, "time": timing, "spin": spin, "drop": drop},
        _warm_up,
    )
