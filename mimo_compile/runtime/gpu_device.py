"""This machine's GPU as the runtime uses it: memory, kernels and graphs of them, on one stream.

What is queued takes place in its order; `Device.wait` waits until it has. Entry points become CUDA graphs by
capturing the stream: the very calls that queue their kernels one by one are recorded, so that there is one
way to launch, and tensor maps, copies and fills need no nodes of their own making.
"""

from __future__ import annotations

import ctypes
import gc
import os
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from ctypes import byref, c_float, c_size_t, c_uint64, c_void_p
from functools import partial
from typing import Protocol

import numpy as np

from mimo_compile import _cuda
from mimo_compile.errors import MimoError
from mimo_compile.runtime.device_code import Code
from mimo_compile.runtime.memory import Bytes

_NON_BLOCKING = 1
"""Of CUstream_flags: others in this process may use the default stream, also while this one is captured."""

Work = Callable[[], None]


class Device(Protocol):
    """What runs kernels on memory of its own; tests have one that emulates them on the CPU."""

    name: str
    capability: tuple[int, int]
    cuda: tuple[int, int]
    """Release of CUDA that it can run code of."""

    def enter(self) -> None:
        """Make it usable in the calling thread.

        Raises:
            MimoError: This process was forked from the one that uses it.
        """

    def allocate(self, size: int, what: str) -> int:
        """Return the address of memory, on a boundary of 256 bytes, that goes with the device.

        Raises:
            MimoError: There is not as much; the message has ``what``, and how much there is.
        """

    def host(self, size: int) -> Bytes:
        """Return memory of this process from and to which copies are fast and can be recorded.

        Raises:
            MimoError: There is not as much.
        """

    def write(self, address: int, data: Bytes) -> None:
        """Queue a copy to the device; the data must stay until it has taken place."""

    def read(self, address: int, into: Bytes) -> None:
        """Queue a copy from the device."""

    def copy(self, address: int, source: int, size: int) -> None:
        """Queue a copy within the device."""

    def zero(self, address: int, size: int) -> None:
        """Queue filling with zeros."""

    def kernel(self, name: str, code: Code, places: Mapping[str, int]) -> Work:
        """Return what queues a call of a kernel on arrays at these addresses, scratch arrays among them."""

    def record(self, work: Work) -> Work:
        """Return what queues at once all that some work would queue; nothing takes place now.

        Raises:
            MimoError: It cannot be recorded; all else is as it was.
        """

    def wait(self) -> None:
        """Wait for all that was queued."""

    def seconds(self, work: Work) -> float:
        """Return how long what some work queues takes; without gaps between kernels if it was recorded."""


class CudaDevice:
    """See `Device`: the first GPU, through its driver."""

    def __init__(self, on: _cuda.Driver) -> None:
        """Look at the GPU; its memory is not touched before `enter`."""
        self._on = on
        self.name, self.capability, self.cuda = on.name, on.capability, on.release_of_cuda
        self._cleanup = ExitStack()
        self._stream: c_void_p | None = None
        self._modules: dict[str, c_void_p] = {}

    def enter(self) -> None:
        """Make the GPU's context current."""
        self._on.enter()
        if self._stream is None:
            gone = weakref.finalize(self, _left, self._on, self._cleanup)
            gone.atexit = False  # a process that ends gives everything back
            stream = c_void_p()
            self._on("cuStreamCreate", byref(stream), _NON_BLOCKING)
            self._cleanup.callback(self._on.release, "cuStreamDestroy_v2", stream)
            self._stream = stream

    def allocate(self, size: int, what: str) -> int:
        """Return device memory."""
        place = c_uint64()
        try:
            self._taken("cuMemAlloc_v2", place, size)
        except _cuda.CudaError as error:
            if error.code != _cuda.OUT_OF_MEMORY:
                raise
            free, total = c_size_t(), c_size_t()
            self._on("cuMemGetInfo_v2", byref(free), byref(total))
            mine, left, all_of_it = (n / 2**30 for n in (size, free.value, total.value))
            raise MimoError(
                f"{what} take {mine:.2f} GiB, and {left:.2f} of {all_of_it:.2f} GiB of {self.name} are free",
                remedy="Use fewer bits (--quant), a shorter --max-context or a smaller --batch, or end what "
                "else uses the GPU.",
            ) from error
        self._cleanup.callback(self._on.release, "cuMemFree_v2", place)
        return place.value

    def _taken(self, function: str, place: c_uint64 | c_void_p, size: int) -> None:
        """Take memory; if there is none, once more without modules that nobody has any more."""
        try:
            self._on(function, byref(place), max(size, 1))
        except _cuda.CudaError as error:
            if error.code != _cuda.OUT_OF_MEMORY:
                raise
            gc.collect()
            self._on(function, byref(place), max(size, 1))

    def host(self, size: int) -> Bytes:
        """Return memory that the system does not move."""
        place = c_void_p()
        try:
            self._taken("cuMemAllocHost_v2", place, size)
        except _cuda.CudaError as error:
            if error.code != _cuda.OUT_OF_MEMORY:
                raise
            raise MimoError(
                f"{size / 2**20:.2f} MiB of this machine's memory are not to be had, from and to which "
                f"{self.name} copies inputs and outputs",
                remedy="End what else takes memory that the system must not move, or use a smaller --batch.",
            ) from error
        memory = (ctypes.c_ubyte * max(size, 1)).from_address(place.value or 0)
        gone = weakref.finalize(memory, _free_host, self._on, place)  # with the last view
        gone.atexit = False
        made: Bytes = np.frombuffer(memoryview(memory), np.uint8, size)
        return made

    def write(self, address: int, data: Bytes) -> None:
        """Queue a copy to the GPU."""
        self._on("cuMemcpyHtoDAsync_v2", address, data.ctypes.data, data.nbytes, self._stream)

    def read(self, address: int, into: Bytes) -> None:
        """Queue a copy from the GPU."""
        self._on("cuMemcpyDtoHAsync_v2", into.ctypes.data, address, into.nbytes, self._stream)

    def copy(self, address: int, source: int, size: int) -> None:
        """Queue a copy within the GPU."""
        self._on("cuMemcpyDtoDAsync_v2", address, source, size, self._stream)

    def zero(self, address: int, size: int) -> None:
        """Queue filling with zeros."""
        if size:
            self._on("cuMemsetD8Async", address, 0, size, self._stream)

    def kernel(self, name: str, code: Code, places: Mapping[str, int]) -> Work:
        """Load a kernel's code, and encode its tensor maps for these addresses."""
        table = code.table.kernels[name]
        fills = [(places[s.name], s.bytes) for s in table.scratch if s.zeroed]
        launches = _cuda.Launches(
            self._on, self._module(name, code), table.launches, places.__getitem__
        )

        def queue() -> None:
            for address, size in fills:
                self.zero(address, size)
            launches(self._stream)

        return queue

    def _module(self, name: str, code: Code) -> c_void_p:
        # kernels of one code may ask for different shared memory: each has a module of its own
        module = self._modules.get(name)
        if module is None:
            module = c_void_p()
            self._on("cuModuleLoadData", byref(module), code.cubin(name))
            self._cleanup.callback(self._on.release, "cuModuleUnload", module)
            self._modules[name] = module
        return module

    def record(self, work: Work) -> Work:
        """Capture what some work queues as a CUDA graph."""
        assert self._stream is not None, "enter comes first"
        made = _cuda.captured(self._on, self._stream, work)
        self._cleanup.callback(self._on.release, "cuGraphExecDestroy", made)
        return partial(self._on, "cuGraphLaunch", made, self._stream)

    def wait(self) -> None:
        """Wait for the stream."""
        self._on("cuStreamSynchronize", self._stream)

    def seconds(self, work: Work) -> float:
        """Return the time between two events around what some work queues."""
        with ExitStack() as cleanup:
            begin, end = c_void_p(), c_void_p()
            for event in (begin, end):
                self._on("cuEventCreate", byref(event), 0)
                cleanup.callback(self._on.release, "cuEventDestroy_v2", event)
            self._on("cuEventRecord", begin, self._stream)
            work()
            self._on("cuEventRecord", end, self._stream)
            self._on("cuEventSynchronize", end)
            passed = c_float()
            self._on("cuEventElapsedTime", byref(passed), begin, end)
        return passed.value * 1e-3


def _left(on: _cuda.Driver, cleanup: ExitStack) -> None:
    """Give everything back; a process that was forked has nothing of it."""
    if os.getpid() == on.process:
        with suppress(MimoError):
            on.enter()  # in whatever thread this is
        cleanup.close()


def _free_host(on: _cuda.Driver, place: c_void_p) -> None:
    """Give back what `CudaDevice.host` returned; see `_left`."""
    if os.getpid() == on.process:
        with suppress(MimoError):
            on.enter()
        on.release("cuMemFreeHost", place)


def open_device() -> Device:
    """Return this machine's GPU; its memory is not touched yet.

    Raises:
        MimoError: There is none, or its driver is missing, too old, or fails.
    """
    return CudaDevice(_cuda.driver())
