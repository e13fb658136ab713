"""How long a kernel takes on a GPU of this process, timed as a search times it in a child."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from mimo_compile._cuda import Driver
from mimo_compile.errors import MimoError
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops.base import Array
from mimo_compile.schedules.base import Kernel
from mimo_compile.schedules.cuda.nvcc import Binary
from mimo_compile.schedules.cuda.table import table_of
from mimo_compile.search.measure import slots
from mimo_compile.search.measure.base import Timing
from mimo_compile.search.measure.clock import Stopwatch
from mimo_compile.search.measure.gpu_slot import GpuSlot
from mimo_compile.search.measure.worker import Reply

_NAME = "timed here"
_LIMIT_S = 60.0


def times_of(
    kernel: Kernel, binary: Binary, hardware: Hardware, arrays: Mapping[str, Array], on: Driver,
    timing: Timing | None = None,
) -> list[float]:  # fmt: skip
    """Return the seconds of a call, one number for each batch of calls.

    Args:
        kernel: One with CUDA code.
        binary: Its machine code.
        hardware: The GPU, whose L2 weights and states are to exceed.
        arrays: Its inputs, packed weights and packed states, by the names of `Kernel.args`.
        on: The driver, entered.
        timing: None: that of a search.

    Raises:
        CudaError: the driver refuses something.
        MimoError: there are no batches to tell of.
    """
    with tempfile.TemporaryDirectory(prefix="mimo-") as name:
        folder = Path(name)
        (folder / "code").write_bytes(binary.cubin)
        args = []
        for a in kernel.args:
            file = None
            if a.name in arrays:
                np.save(folder / f"{a.name}.npy", arrays[a.name], allow_pickle=False)
                file = str(folder / f"{a.name}.npy")
            args.append({**asdict(a), "file": file})
        request = {
            "code": str(folder / "code"), "args": args, "bytes": dict(kernel.counts.bytes),
            "device": msgspec.to_builtins(table_of(kernel, binary)),
        }  # fmt: skip
        slots.SLOTS[_NAME] = GpuSlot(on, request)
        try:
            watch = Stopwatch(timing or Timing(), hardware, _LIMIT_S)
            reply = watch.time(_here, [_NAME])
        finally:
            slots.SLOTS.pop(_NAME).close()
    if not reply.value["seconds"][0]:
        raise MimoError(f"{kernel.name} was not timed")
    return [float(s) for s in reply.value["seconds"][0]]


def _here(request: Mapping[str, Any], _: float) -> Reply:
    """Do in this process what a child is asked to do."""
    return Reply("ok", slots.timing(dict(request)))
