"""Threads of kernels: TVM's pools, which belong to the thread that calls, and do not survive a fork."""

from __future__ import annotations

import os
import threading

from mimo_compile import _tvm
from mimo_compile.errors import MimoError, UsageError

_PER_THREAD = threading.local()
_pool = False  # threads of kernels were started
_pool_lost = False  # in a parent of this process: they did not come along


def _note_fork() -> None:
    global _pool_lost
    _pool_lost = _pool


os.register_at_fork(after_in_child=_note_fork)


def use_threads(count: int) -> None:
    """Set the number of kernel threads of the calling thread, unless it is set so already.

    Raises:
        MimoError: This process was forked from one that had such threads; a kernel would wait for
            them for ever.
    """
    global _pool
    if count > 1:
        if _pool_lost:
            raise MimoError(
                "this process was forked after kernels had run, whose threads did not come along",
                remedy="Start processes by spawn, or fork before the first call.",
            )
        _pool = True
    if getattr(_PER_THREAD, "count", None) != count:
        _tvm.set_threads(count)
        _PER_THREAD.count = count


def thread_count(asked: int | None, tuned: int) -> int:
    """Return how many threads kernels use: as many as asked for, or as they were tuned for and there are.

    Raises:
        UsageError: More are asked for than there are.
    """
    _tvm.configure()
    most = _tvm.max_threads()
    if asked is None:
        return max(1, min(tuned, most))
    if not 1 <= asked <= most:
        raise UsageError(
            f"{asked} threads asked for, 1 to {most} are possible",
            remedy="Set TVM_NUM_THREADS before the start to raise the limit.",
        )
    return asked
