"""The running child of a GPU: owns its context, and takes it along when it ends.

After an illegal address or the like the context answers everything with an error: the child is replaced, as
one is that hangs. Imports neither torch nor TVM.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

from mimo_compile._cuda import driver
from mimo_compile.search.measure.child import serve
from mimo_compile.search.measure.gpu_slot import GpuSlot
from mimo_compile.search.measure.slots import SLOTS, handlers


def load(request: dict[str, Any]) -> dict[str, Any]:
    """Load a kernel into slot ``slot``."""
    if (old := SLOTS.pop(request["slot"], None)) is not None:
        old.close()
    SLOTS[request["slot"]] = GpuSlot(driver(), request)
    return {}


def _warm_up() -> None:
    sys.modules["torch"] = None  # type: ignore[assignment]  # never in this process
    driver().enter()
    with contextlib.suppress(ChildProcessError):  # what the driver started is no kernel's doing
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


if __name__ == "__main__":
    serve(handlers(load), _warm_up)
