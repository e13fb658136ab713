"""Timing of several implementations in one interleaved run, so that load on the machine hits all alike.

Rounds go over all contestants; each turn warms up (the threads of the one before must go to sleep, this
one's must wake), then times a batch of calls. A row is the median of its batches with p10 and p90.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mimo_compile.search.meters import Meter, measure_energy

WARM_UP_S = 0.004
"""Seconds of warm-up before each batch."""
BATCH_S = 0.02
"""Seconds that a batch should take at least."""
SLOW_S = 1.0
"""A batch of more seconds is timed in `SLOW_ROUNDS` rounds alone."""
SLOW_ROUNDS = 3
SETTLE_S = 0.3
"""Seconds that a turn with threads waits at most for those of the turn before: TVM's and ONNX Runtime's look
for more work for about 0.1 s before they sleep, and would take the cores of whoever comes next."""


@dataclass(slots=True)
class Contestant:
    """One implementation of one workload, ready to be called."""

    op: str
    impl: str
    """``mimo``, or a peer's name and version."""
    threads: int
    cache: str
    """``hot`` or ``cold``."""
    call: Callable[[Any], object]
    """Computes once, with one of ``sets``."""
    sets: Sequence[Any]
    """Argument sets; cold ones hold together more than the caches do."""
    bytes: float
    """Bytes that no implementation with this storage can avoid to move."""
    operations: float
    """Arithmetic operations, a multiply-add counted as two."""
    schedule: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[], None] = lambda: None
    """Called before each turn: sets the number of threads, say."""
    peer: str = ""
    """Name of the peer it belongs to; nothing for ours and for the roof."""
    bits_per_weight: float | None = None
    """Stored bits of one weight, scales and zero points included, or of one number of a KV cache; None where
    that means nothing."""


@dataclass(frozen=True, slots=True)
class Row:
    """Figures of one contestant. Times are microseconds of one call."""

    contestant: Contestant
    median_us: float
    p10_us: float
    p90_us: float
    joules: float | None = None
    """Joules of one call, None where no meter works."""
    joules_source: str = ""
    roof_us: float | None = None
    """What the roof kernels needed in the same run: the longer of moving bytes and doing operations."""
    batches: tuple[float, ...] = ()
    """Seconds of one call in each round, in order: rounds of contestants of one run belong together."""
    foreign_cores: float | None = None
    """Cores that other programs used on average during the run of all contestants; None: not known."""
    ratio: tuple[float, float, float] | None = None
    """Its time over that of our fastest in the same run: median, p10 and p90 over rounds."""

    def json(self) -> dict[str, Any]:
        """Return the row as `bench --json` prints it."""
        c, us = self.contestant, self.median_us
        return {
            "op": c.op, "impl": c.impl, "threads": c.threads, "cache": c.cache, "median_us": us,
            "p10_us": self.p10_us, "p90_us": self.p90_us, "gb_per_s": c.bytes / us / 1e3,
            "gop_per_s": c.operations / us / 1e3,
            "roof_share": None if self.roof_us is None else self.roof_us / us,
            "joules": self.joules, "joules_source": self.joules_source or None,
            "schedule": c.schedule or None, "config": c.config or None,
            "foreign_cores": self.foreign_cores, "peer": c.peer or None, "bits_per_weight": c.bits_per_weight,
            **dict(zip(("ratio", "ratio_p10", "ratio_p90"), self.ratio or (None,) * 3, strict=True)),
        }  # fmt: skip


def compete(
    contestants: Sequence[Contestant],
    *,
    rounds: int = 11,
    batch_s: float = BATCH_S,
    meter: Meter | None = None,
) -> list[Row]:
    """Time all contestants, interleaved batch by batch.

    Args:
        contestants: At least one; their calls must be right already.
        rounds: Batches of each; the order turns by one each round.
        batch_s: Seconds of a batch.
        meter: Measures joules in windows of its own after the timing.
    """
    turns = [_Turn(c, batch_s) for c in contestants]
    begin = _foreign_seconds(), time.perf_counter()
    for number in range(rounds):
        at = number % len(turns)
        for turn in turns[at:] + turns[:at]:
            if number < SLOW_ROUNDS or turn.seconds[-1] * turn.number < SLOW_S:
                turn.batch()
    foreign = _foreign_cores(*begin)
    rows = []
    for turn in turns:
        times = sorted(turn.seconds)
        p10, p90 = quantile(times, 0.1), quantile(times, 0.9)
        joules = _energy(turn, meter) if meter is not None else None
        rows.append(
            Row(
                turn.contestant, statistics.median(times) * 1e6, p10 * 1e6, p90 * 1e6, joules,
                meter.name if meter is not None and joules is not None else "",
                batches=tuple(turn.seconds), foreign_cores=foreign,
            )
        )  # fmt: skip
    return rows


def _foreign_seconds(table: Path = Path("/proc/stat")) -> float | None:
    """Return the CPU seconds that all others have used since the machine started, steal included."""
    try:
        ticks = [int(t) for t in table.read_text().splitlines()[0].split()[1:9]]
    except (OSError, ValueError, IndexError):
        return None
    user, nice, system, _idle, _wait, irq, soft, steal = (*ticks, *[0] * (8 - len(ticks)))
    busy = (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")
    return busy - time.process_time()


def _foreign_cores(seconds: float | None, begin: float) -> float | None:
    now, elapsed = _foreign_seconds(), time.perf_counter() - begin
    if seconds is None or now is None or elapsed <= 0:
        return None
    return round(max(0.0, (now - seconds) / elapsed), 2)


def settle(limit_s: float = SETTLE_S) -> float:
    """Wait until the threads of this process sleep, and return the seconds that took; give up at a limit."""
    begin = time.perf_counter()
    while time.perf_counter() - begin < limit_s:
        used = time.process_time()
        time.sleep(0.004)
        if time.process_time() - used < 0.0005:
            break
    return time.perf_counter() - begin


def ratio_of(row: Row, base: Row) -> tuple[float, float, float]:
    """Return the time of a row over that of another of its run, round by round: median, p10 and p90."""
    # a slow one has its first rounds alone
    each = sorted(a / b for a, b in zip(row.batches, base.batches, strict=False))
    if not each:
        middle = row.median_us / base.median_us
        return middle, middle, middle
    return quantile(each, 0.5), quantile(each, 0.1), quantile(each, 0.9)


def quantile(ordered: Sequence[float], share: float) -> float:
    """Return a quantile of sorted numbers, linear between neighbours."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


class _Turn:
    """One contestant's place in the argument sets, and its times."""

    def __init__(self, contestant: Contestant, batch_s: float) -> None:
        self.contestant = contestant
        self.seconds: list[float] = []
        self.at = 0
        contestant.prepare()
        once = self._run(1)
        if once < SLOW_S:
            once = min(self._run(1) for _ in range(2))
        self.number = max(1, min(10_000, round(batch_s / max(once, 1e-7))))
        self.warm = max(1, round(min(WARM_UP_S, batch_s / 4) / max(once, 1e-7)))
        if once > 10 * WARM_UP_S:  # what waking up costs is lost in so long a call
            self.warm = 0

    def batch(self) -> None:
        if self.contestant.threads > 1:
            settle()
        self.contestant.prepare()
        self._run(min(self.warm, self.number))
        self.seconds.append(self._run(self.number))

    def spin(self, seconds: float) -> tuple[int, float]:
        self.contestant.prepare()
        begin, calls = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - begin) < seconds:
            self._run(self.number)
            calls += self.number
        return calls, elapsed

    def _run(self, number: int) -> float:
        """Return seconds per call of ``number`` calls over the next argument sets."""
        if not number:
            return 0.0
        call, sets = self.contestant.call, self.contestant.sets
        order = [sets[(self.at + i) % len(sets)] for i in range(number)]
        self.at += number
        begin = time.perf_counter_ns()
        for arguments in order:
            call(arguments)
        return (time.perf_counter_ns() - begin) / number / 1e9


def _energy(turn: _Turn, meter: Meter) -> float | None:
    reading = measure_energy(meter, turn.spin, window_s=max(2.0, 30 * meter.step_s))
    return None if reading.energy_mj is None else reading.energy_mj / 1e3
