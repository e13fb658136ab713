"""Ctrl-C and SIGTERM: both interrupt the verb as KeyboardInterrupt, and the exit code tells which came."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_WATCHED = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Handles both signals while a verb runs; ``signal`` is the number of the first that came."""

    def __init__(self) -> None:
        """Nothing has come yet."""
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        """Install the handlers (in the main thread only; a signal that is ignored stays so)."""
        if threading.current_thread() is threading.main_thread():
            for number in _WATCHED:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._arrived)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Put the former handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number
        raise KeyboardInterrupt
