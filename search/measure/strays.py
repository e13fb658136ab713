"""Find what measuring children left behind: processes that a kernel started, and the kernel's OOM kills."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

MARK = "MIMO_MEASURING"
"""Environment variable of all measuring children: the scratch folder, ``#``, and which child it is."""


def marked(value: str) -> list[int]:
    """Return the ids of processes whose mark begins with ``value``, whatever group or session they are in."""
    wanted = b"\0" + f"{MARK}={value}".encode()
    out = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            with contextlib.suppress(OSError):  # it is gone, or another user's
                if wanted in b"\0" + Path(f"/proc/{name}/environ").read_bytes():
                    out.append(int(name))
    return out


def kill_marked(value: str) -> int:
    """Kill these processes until none is left that could start another; return how many there were."""
    killed: set[int] = set()  # one that takes a while to die is found again
    for _ in range(100):
        found = marked(value)
        if not found:
            break
        killed.update(found)
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
    return len(killed)


def oom_kills() -> int:
    """Return how many processes the system has killed for want of memory since it started (0: unknown)."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
