"""When loaded kernels are timed, and when again: the same wherever the child is that has them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mimo_compile.ir.hardware import Hardware
from mimo_compile.search.measure.base import Timing
from mimo_compile.search.measure.worker import Reply
from mimo_compile.search.meters.base import Meter, Reading, measure_energy

HOST_COPIES = 1 << 30
GPU_COPIES = 64 << 30
"""Most bytes of copies where nothing else is asked for: a kernel that reads a few rows or experts of its
weights needs many to go beyond L2."""

Call = Callable[[Mapping[str, Any], float], Reply]
"""Asks a running child something, with a limit of seconds."""


def spread(values: Sequence[float]) -> float:
    """Return the difference of the quartiles over the median: noise, whatever single batches did."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle


@dataclass(frozen=True, slots=True)
class Stopwatch:
    """How slots of a child are timed."""

    timing: Timing
    hardware: Hardware
    limit_s: float
    """Longest that timing one slot may take."""

    def time(
        self, call: Call, slots: Sequence[str], rounds: int = 1, stop_above_us: float = math.inf
    ) -> Reply:
        """Time loaded slots against each other; the reply has seconds per call of each batch.

        Where the batches of one spread too widely all are timed again, and all batches count.
        """
        reply = self._once(call, slots, rounds, stop_above_us)
        for _ in range(self.timing.repeats):
            if reply.status != "ok" or not self._noisy(reply.value["seconds"], stop_above_us):
                break
            more = self._once(call, slots, rounds, stop_above_us)
            if more.status != "ok":
                return more
            for name in ("seconds", "calls"):
                both = zip(reply.value[name], more.value[name], strict=True)
                reply.value[name] = [a + b for a, b in both]
        return reply

    def _noisy(self, seconds: Sequence[Sequence[float]], stop_above_us: float) -> bool:
        if min(min(s) for s in seconds) * 1e6 > stop_above_us:
            return False  # too slow to be looked at more closely
        return any(spread(s) > self.timing.max_spread for s in seconds)

    def _once(self, call: Call, slots: Sequence[str], rounds: int, stop_above_us: float) -> Reply:
        p = self.timing
        rotate = 0
        if p.cache == "cold":
            rotate = p.rotate_bytes or 2 * self.hardware.l3_bytes
        most = GPU_COPIES if self.hardware.kind == "cuda" else HOST_COPIES
        request = {
            "do": "time", "slots": list(slots), "batches": p.batches * rounds, "batch_s": p.batch_s,
            "warm_up_s": p.warm_up_s, "budget_s": p.budget_s * rounds, "rotate_bytes": rotate,
            "memory_bytes": p.memory_bytes or most, "stop_above_s": min(stop_above_us * 1e-6, 1e9),
        }  # fmt: skip
        return call(request, self.limit_s * rounds * len(slots))

    def joules(self, call: Call, meter: Meter, slot: str) -> Reading:
        """Read the energy of a call of a loaded slot."""

        def spin(seconds: float) -> tuple[int, float]:
            request = {"do": "spin", "slot": slot, "seconds": seconds}
            reply = call(request, self.limit_s + seconds)
            if reply.status != "ok":
                return 0, 0.0
            return int(reply.value["calls"]), float(reply.value["seconds"])

        return measure_energy(meter, spin, self.timing.energy_window_s)
