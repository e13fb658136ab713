"""Ctrl-C and SIGTERM between two steps, never within one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_HELD = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def finish_first() -> Iterator[None]:
    """Hold both signals back until the block is left; a second one is not held back.

    Python handles signals in its main thread only; elsewhere this does nothing.
    """
    before: dict[int, Any] = {}
    arrived: list[tuple[int, FrameType | None]] = []

    def hold(number: int, frame: FrameType | None) -> None:
        if arrived:
            before[number](number, frame)
        arrived.append((number, frame))

    if threading.current_thread() is threading.main_thread():
        before = {n: h for n in _HELD if callable(h := signal.getsignal(n))}
    for number in before:
        signal.signal(number, hold)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if arrived:
            number, frame = arrived[0]
            before[number](number, frame)
