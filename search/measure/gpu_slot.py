"""A kernel in the child that owns the GPU: arguments in guarded device memory, calls timed by events.

Calls are captured in graphs, so that the time is the GPU's and not that of whoever queues launches. Argument
sets rotate: weights and states come from memory when what calls read of all sets together exceeds L2.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from ctypes import byref, c_float, c_size_t, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from mimo_compile._cuda import Driver, Launches, captured
from mimo_compile.runtime.device_code import DeviceKernel
from mimo_compile.schedules.cuda.memory import carrier
from mimo_compile.search.meters.nvml import NvmlMeter

Array = npt.NDArray[Any]

GUARD = 16 << 10
"""Bytes of guard on each side of each argument; a multiple of the 256 to which memory is aligned."""
SETS = 1024
"""Most argument sets."""
GRAPHS = 16
"""Most graphs kept of one kernel."""
_SPIN_S = 0.02
"""Least seconds of work that is queued at a time while joules are read."""


class DeviceArgument:
    """One argument, or a scratch array, in device memory."""

    def __init__(self, on: Driver, spec: dict[str, Any], cleanup: ExitStack) -> None:
        """Allocate for an argument ``{name, role, shape, dtype, mutated, file}``.

        ``file`` names the ``.npy`` file of its first contents; outputs and scratch arrays have none.

        Raises:
            ValueError: the file holds something else than the kernel wants.
            CudaError: there is no memory.
        """
        self.name: str = spec["name"]
        self.role: str = spec["role"]
        self.mutated: bool = bool(spec["mutated"])
        self.scratch = self.role == "scratch"
        self._on, self._cleanup = on, cleanup
        self._shape, self._dtype = tuple(spec["shape"]), carrier(spec["dtype"])
        self.nbytes: int = math.prod(self._shape) * self._dtype.itemsize
        self._base = self._allocate(self.nbytes + 2 * GUARD)
        self.address = self._base + GUARD
        self._origin: Array | None = None
        if spec["file"]:
            origin = np.load(spec["file"], mmap_mode="r", allow_pickle=False)
            if origin.shape != self._shape or origin.dtype.itemsize != self._dtype.itemsize:
                raise ValueError(
                    f"argument {self.name}: the kernel wants {spec['dtype']}{list(self._shape)}, "
                    f"packing gave {origin.dtype}{list(origin.shape)}"
                )
            self._origin = np.ascontiguousarray(origin)
        self.restore()

    def _allocate(self, size: int) -> int:
        place = c_uint64()
        self._on("cuMemAlloc_v2", byref(place), max(size, 1))
        self._cleanup.callback(self._on.release, "cuMemFree_v2", place)
        return int(place.value)

    def _write(self, address: int) -> None:
        if self._origin is not None and self.nbytes:
            self._on("cuMemcpyHtoD_v2", address, self._origin.ctypes.data, self.nbytes)

    def _read(self, address: int, size: int) -> Array:
        host = np.empty(size, np.uint8)
        if size:
            self._on("cuMemcpyDtoH_v2", host.ctypes.data, address, size)
        return host

    @property
    def written(self) -> bool:
        """True for what the kernel may write."""
        return self.role == "output" or self.mutated

    def restore(self) -> None:
        """Write the first contents again (outputs keep what they hold)."""
        self._write(self.address)

    def poison(self, pattern: int) -> None:
        """Fill the guards, and an output or scratch array, with a byte."""
        for place in (self._base, self.address + self.nbytes):
            self._on("cuMemsetD8Async", place, pattern, GUARD, None)
        if (self.scratch or self.role == "output") and self.nbytes:
            self._on("cuMemsetD8Async", self.address, pattern, self.nbytes, None)

    def guards_hold(self, pattern: int) -> bool:
        """True when no byte of the guards changed since `poison`."""
        places = (self._base, self.address + self.nbytes)
        return all(bool((self._read(place, GUARD) == pattern).all()) for place in places)

    def unchanged(self) -> bool:
        """True when the memory still holds the first contents, byte by byte."""
        assert self._origin is not None
        first = self._origin.reshape(-1).view(np.uint8)
        return np.array_equal(self._read(self.address, self.nbytes), first)

    def digest(self) -> bytes:
        """Return a hash of the memory."""
        return hashlib.blake2b(self._read(self.address, self.nbytes).data).digest()

    def contents(self) -> Array:
        """Return what the memory holds."""
        return self._read(self.address, self.nbytes).view(self._dtype).reshape(self._shape)

    def copy(self, like: int | None = None) -> int:
        """Return the address of a copy of the first contents, without guards (to have cold data).

        ``like``: another copy, which nothing has been run on.
        """
        address = self._allocate(self.nbytes)
        if like is None:
            self._write(address)
        elif self.nbytes:
            self._on("cuMemcpyDtoDAsync_v2", address, like, self.nbytes, None)
        return address


class GpuSlot:
    """One loaded kernel with its arguments."""

    most_calls = 1000

    def __init__(self, on: Driver, request: dict[str, Any]) -> None:
        """Load the machine code ``code`` and lay out the arguments ``args``.

        ``device`` has launches and scratch arrays (`DeviceKernel`).

        Raises:
            CudaError: the driver refuses something.
            ValueError: an argument's file holds something else than the kernel wants.
        """
        self.results: dict[str, bytes] = {}
        self._on, self._cleanup = on, ExitStack()
        self._graphs: dict[tuple[int, int], c_void_p] = {}
        kernel = msgspec.convert(request["device"], DeviceKernel)
        try:
            # a blocking stream: copies from and to arguments, of the default one, wait for it and it for them
            self._stream = self._made("cuStreamCreate", "cuStreamDestroy_v2", 0)
            self._events = [self._made("cuEventCreate", "cuEventDestroy_v2", 0) for _ in range(2)]
            self._module = c_void_p()
            on("cuModuleLoadData", byref(self._module), Path(request["code"]).read_bytes())
            self._cleanup.callback(on.release, "cuModuleUnload", self._module)
            self._launches = kernel.launches
            own: dict[str, Any] = {"role": "scratch", "mutated": False, "file": None}
            scratch = [
                own | {"name": s.name, "shape": s.shape, "dtype": s.dtype} for s in kernel.scratch
            ]
            specs = [*request["args"], *scratch]
            self.buffers = [DeviceArgument(on, a, self._cleanup) for a in specs]
            self._moved_bytes = _moved(self.buffers, request.get("bytes", {}))
            zeroed = {s.name for s in kernel.scratch if s.zeroed}
            self._zeroed = [a for a in self.buffers if a.name in zeroed]
            self._places = {a.name: a.address for a in self.buffers}
            self._sets = [self._prepared(self._places)]
        except BaseException:
            self.close()
            raise

    def _made(self, create: str, destroy: str, flags: int) -> c_void_p:
        handle = c_void_p()
        self._on(create, byref(handle), flags)
        self._cleanup.callback(self._on.release, destroy, handle)
        return handle

    def _prepared(self, places: dict[str, int]) -> Launches:
        return Launches(self._on, self._module, self._launches, places.__getitem__)

    def _queue(self, which: int) -> None:
        """Queue one call on an argument set."""
        for a in self._zeroed:
            self._on("cuMemsetD8Async", a.address, 0, a.nbytes, self._stream)
        self._sets[which % len(self._sets)](self._stream)

    def call(self) -> None:
        """Run it once on `buffers`, to its end."""
        self._on("cuCtxSynchronize")
        self._queue(0)
        self._on("cuCtxSynchronize")

    def rotate(self, wanted_bytes: int, memory_bytes: int) -> int:
        """Make argument sets whose weights and states together exceed the caches.

        Each set has the same indices in it, so that what a call does not read of one is never read: bytes
        count that the kernel declares to move. Returns those of all sets.
        """
        cold = [a for a in self.buffers if a.role in ("weight", "state")]
        whole = sum(a.nbytes for a in cold)
        each = min(whole, max(1, self._moved_bytes)) if whole else 0
        count = 1
        if each and wanted_bytes:
            most = max(1, self._room(memory_bytes) // whole)
            count = min(-(-wanted_bytes // each) + 1, SETS, most)
        like: dict[str, int] = {}  # copies to copy from: host memory is farther away
        while len(self._sets) < count:
            made = {a.name: a.copy(like.get(a.name)) for a in cold}
            like = like or made
            self._sets.append(self._prepared(self._places | made))
        return each * len(self._sets)

    def _room(self, memory_bytes: int) -> int:
        """Return how many of so many bytes there are for copies: half of what is free at most."""
        free, total = c_size_t(), c_size_t()
        self._on("cuMemGetInfo_v2", byref(free), byref(total))
        held = sum(a.nbytes for a in self.buffers if a.role in ("weight", "state"))
        return min(memory_bytes, held * len(self._sets) + free.value // 2)

    def batch(self, number: int, start: int) -> float:
        """Return seconds per call over ``number`` calls, beginning with argument set ``start``.

        As many calls on the sets before it run first, untimed: the GPU is at work when the first event
        comes, and what the host takes to launch a graph passes meanwhile.
        """
        before = self._graph(number, (start - number) % len(self._sets))
        graph = self._graph(number, start % len(self._sets))
        begin, end = self._events
        self._on("cuGraphLaunch", before, self._stream)
        self._on("cuEventRecord", begin, self._stream)
        self._on("cuGraphLaunch", graph, self._stream)
        self._on("cuEventRecord", end, self._stream)
        self._on("cuEventSynchronize", end)
        passed = c_float()
        self._on("cuEventElapsedTime", byref(passed), begin, end)
        return float(passed.value) * 1e-3 / number

    def _graph(self, number: int, start: int) -> c_void_p:
        """Return calls one after the other as one graph."""
        if (ready := self._graphs.pop((number, start), None)) is not None:
            self._graphs[number, start] = ready  # the last of them: those used longest ago go first
            return ready
        if len(self._graphs) >= GRAPHS:
            self._on.release("cuGraphExecDestroy", self._graphs.pop(next(iter(self._graphs))))

        def calls() -> None:
            for i in range(number):
                self._queue(start + i)

        ready = captured(self._on, self._stream, calls)
        self._graphs[number, start] = ready
        return ready

    def spin(self, seconds: float) -> tuple[int, float]:
        """Run it for so long; return how many calls and how long exactly.

        The GPU never waits for the host: while one graph runs the next one is queued.
        """
        once = max(self.batch(1, 0), 1e-7)
        number = max(round(_SPIN_S / once), len(self._sets))
        number = max(1, min(self.most_calls, number))
        graph = self._graph(number, 0)
        begin, queued = time.perf_counter(), 0
        while queued < 2 or time.perf_counter() - begin < seconds:
            self._on("cuGraphLaunch", graph, self._stream)
            self._on("cuEventRecord", self._events[queued % 2], self._stream)
            queued += 1
            if queued > 1:
                self._on("cuEventSynchronize", self._events[queued % 2])
        self._on("cuStreamSynchronize", self._stream)
        return queued * number, time.perf_counter() - begin

    def conditions(self) -> str:
        """Name the GPU, with its clock and temperature just now as far as NVML tells."""
        text = self._on.name
        if (meter := _nvml()) is not None:
            state = meter.state()
            if state.clock_mhz is not None:
                text += f", {state.clock_mhz:.0f} MHz"
            if state.temperature_c is not None:
                text += f", {state.temperature_c:.0f} °C"
        return text

    def close(self) -> None:
        """Free everything on the GPU."""
        for ready in self._graphs.values():
            self._on.release("cuGraphExecDestroy", ready)
        self._graphs.clear()
        self._cleanup.close()


def _moved(arguments: Iterable[DeviceArgument], declared: Mapping[str, float]) -> int:
    """Return how many bytes of weights and states a call moves, of those that its kernel declares.

    Inputs and outputs are the same in each call: what is declared of them comes from no other set.
    """
    held = {kind: 0 for kind in ("cold", "other")}
    for a in arguments:
        if not a.scratch:
            held["cold" if a.role in ("weight", "state") else "other"] += a.nbytes
    if "dram" not in declared:
        return held["cold"]
    return int(declared["dram"]) - held["other"]


@cache
def _nvml() -> NvmlMeter | None:
    try:
        return NvmlMeter()
    except OSError:
        return None
