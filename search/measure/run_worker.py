"""The running child of CPUs: loads object code, runs it on guarded buffers, times it.

Imports numpy and the TVM runtime only.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from mimo_compile import _tvm
from mimo_compile.search.measure.buffers import Buffer
from mimo_compile.search.measure.child import serve
from mimo_compile.search.measure.slots import SLOTS, handlers


class CpuSlot:
    """One loaded kernel with its arguments."""

    most_calls = 10_000

    def __init__(self, request: dict[str, Any]) -> None:
        """Load the object file ``code`` and lay out the arguments ``args``."""
        self.module = _tvm.load_object(Path(request["code"]).read_bytes())
        self.function = self.module[request["symbol"]]
        self.buffers = [Buffer(spec) for spec in request["args"]]
        self.tensors = tuple(b.tensor() for b in self.buffers)
        self.sets: list[tuple[Any, ...]] = [self.tensors]
        self.results: dict[str, bytes] = {}

    def call(self) -> None:
        """Run it once."""
        self.function(*self.tensors)

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

    def batch(self, number: int, start: int) -> float:
        """Return seconds per call over ``number`` calls, beginning with argument set ``start``."""
        function, sets = self.function, self.sets
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

    def spin(self, seconds: float) -> tuple[int, float]:
        """Run it for so long; return how many calls and how long exactly."""
        once = max(self.batch(1, 0), 1e-7)
        number = max(1, min(1000, round(0.005 / once)))
        begin, calls = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - begin) < seconds:
            self.batch(number, calls)
            calls += number
        return calls, elapsed

    def conditions(self) -> str:
        """Nothing is known: the record's hardware says what the CPU is."""
        return ""

    def close(self) -> None:
        """Nothing that does not go with the object."""


def load(request: dict[str, Any]) -> dict[str, Any]:
    """Load a kernel into slot ``slot``."""
    _tvm.set_threads(int(request["threads"]))
    SLOTS[request["slot"]] = CpuSlot(request)
    return {}


def _warm_up() -> None:
    sys.modules["torch"] = None  # type: ignore[assignment]  # never in this process
    _tvm.runtime()


if __name__ == "__main__":
    serve(handlers(load), _warm_up)
