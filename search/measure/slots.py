"""What a running child does with kernels, on whatever they run: check them, time them, call them for a while.

`run_worker` has kernels of CPUs, `gpu_worker` those of GPUs. What a kernel wrote goes back to the parent in
files; the parent compares, and the child never sees the expected result.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

PATTERNS = (0xFF, 0x5A)
"""Bytes that fill outputs and guards: 0xFF reads as NaN in every float format, 0x5A as large numbers."""


class Argument(Protocol):
    """One argument of a loaded kernel, in memory with guards on both sides."""

    name: str
    mutated: bool
    scratch: bool
    """Whether it is the kernel's own: nothing is compared there but the guards."""

    @property
    def written(self) -> bool:
        """True for what the kernel may write."""
        ...

    def restore(self) -> None:
        """Write the first contents again (outputs keep what they hold)."""
        ...

    def poison(self, pattern: int) -> None:
        """Fill the guards, and what the kernel must write without reading it, with a byte."""
        ...

    def guards_hold(self, pattern: int) -> bool:
        """True when no byte of the guards changed since `poison`."""
        ...

    def unchanged(self) -> bool:
        """True when the memory still holds the first contents, byte by byte."""
        ...

    def digest(self) -> bytes:
        """Return a hash of the memory."""
        ...

    def contents(self) -> Array:
        """Return what the memory holds."""
        ...


class Slot(Protocol):
    """One loaded kernel with its arguments."""

    most_calls: int
    """Of a batch."""
    results: dict[str, bytes]
    """Hash of what the first run left in each argument that it may write."""

    @property
    def buffers(self) -> Sequence[Argument]:
        """Its arguments."""
        ...

    def call(self) -> None:
        """Run it once on `buffers`, to its end."""
        ...

    def rotate(self, wanted_bytes: int, memory_bytes: int) -> int:
        """Make argument sets whose weights and states together exceed the caches; return their bytes."""
        ...

    def batch(self, number: int, start: int) -> float:
        """Return seconds per call over ``number`` calls, beginning with argument set ``start``."""
        ...

    def spin(self, seconds: float) -> tuple[int, float]:
        """Run it for so long; return how many calls and how long exactly."""
        ...

    def conditions(self) -> str:
        """Say on what it ran, and in which state that is just now; "": nothing is known."""
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


SLOTS: dict[str, Slot] = {}


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
    slot.call()
    for b in slot.buffers:
        if not b.guards_hold(pattern):
            seen.overrun.add(b.name)
        if b.scratch:
            continue
        if not b.written:
            if not b.unchanged():
                seen.modified.add(b.name)
            continue
        digest = b.digest()
        if slot.results.setdefault(b.name, digest) != digest:
            seen.differs.add(b.name)
        if folder is not None:
            np.save(folder / f"{b.name}.npy", b.contents(), allow_pickle=False)
    for b in slot.buffers:
        if b.mutated:
            b.restore()


def _has_children() -> bool:
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return False
    return True


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
            once = min(once, slot.batch(1, calls))
            calls += 1
            if calls >= 2 and time.perf_counter() - begin > 5 * request["warm_up_s"] + 0.5:
                break
        number = round(request["batch_s"] / max(once, 1e-7))
        numbers.append(max(1, min(slot.most_calls, number)))
    out: list[list[float]] = [[] for _ in slots]
    hopeless = request["stop_above_s"]
    begin = time.perf_counter()
    at = 0
    for batch in range(int(request["batches"])):
        late = time.perf_counter() - begin > request["budget_s"] * len(slots)
        if batch >= 3 and (late or min(min(o) for o in out) > hopeless):
            break
        for i, slot in enumerate(slots):
            out[i].append(slot.batch(numbers[i], at))
            at += numbers[i]
    return {
        "seconds": out,
        "calls": [n * len(o) for n, o in zip(numbers, out, strict=True)],
        "touched": touched,
        "device": slots[0].conditions(),
    }


def spin(request: dict[str, Any]) -> dict[str, Any]:
    """Run a slot for ``seconds``; return how many calls and how long exactly."""
    calls, seconds = SLOTS[request["slot"]].spin(request["seconds"])
    return {"calls": calls, "seconds": seconds}


def drop(request: dict[str, Any]) -> dict[str, Any]:
    """Forget all slots but ``keep``."""
    for name in [s for s in SLOTS if s not in request.get("keep", ())]:
        SLOTS.pop(name).close()
    return {}


def handlers(
    load: Callable[[dict[str, Any]], dict[str, Any]],
) -> dict[str, Callable[[dict[str, Any]], dict[str, Any]]]:
    """Return what a running child answers, given how it loads a kernel into a slot."""
    return {
        "load": load,
        "check": check,
        "again": again,
        "time": timing,
        "spin": spin,
        "drop": drop,
    }
