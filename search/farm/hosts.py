"""What runs on a farm's nodes: one object that builds, one that measures. Both keep their processes warm.

They answer with ``("ok", value, seconds)`` or ``("broken", error, seconds)``: what is wrong with a candidate
is part of the value, what is wrong with the node (disk full, package missing, device gone) is an error of the
node.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mimo_compile.errors import MimoError
from mimo_compile.ir.hardware import Hardware, local_cpu
from mimo_compile.schedules.base import Schedule
from mimo_compile.search.measure.base import Limits, Measurement, Timing
from mimo_compile.search.measure.build_worker import find_schedule, find_workload
from mimo_compile.search.measure.worker import Reply
from mimo_compile.search.records import versions
from mimo_compile.search.space import Candidate, JointSpace

LOCKS = Path("/tmp")
"""One folder for all users and processes of a machine, whatever their ``TMPDIR``."""
LOCK_WAIT_S = 600.0
Answer = tuple[str, Any, float]
"""Status, value, seconds that the worker was at it."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a node is, as far as it matters whether it may build and measure."""

    host: str
    hardware: Hardware
    versions: Mapping[str, str]
    """Of what decides which code a candidate becomes: mimo_compile, TVM, Python."""


def facts() -> Facts:
    """Describe the node on which this is called."""
    import mimo_compile

    python = ".".join(platform.python_version_tuple()[:2])
    known = {"mimo-compile": mimo_compile.__version__, "python": python, **versions()}
    return Facts(socket.gethostname(), local_cpu(), known)


# -- the device's lock -----------------------------------------------------------------------------


class DeviceLock:
    """The right to use a device of this machine alone, between processes and between farms.

    A lock on a file (``flock``): it ends with the process that holds it, so none is ever stale.
    """

    def __init__(self, device: str, folder: Path = LOCKS) -> None:
        """Name the device; ``folder`` is where all processes of the machine look."""
        self.device = device
        self.path = folder / f"mimo-compile-device-{device}.lock"

    def _open(self) -> int:
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            with contextlib.suppress(OSError):
                os.fchmod(fd, 0o666)  # whatever the umask: other users lock it too
            return fd
        except PermissionError:  # another user's, in a folder where only owners may write
            return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)

    @contextlib.contextmanager
    def held(self, wait_s: float = LOCK_WAIT_S) -> Iterator[None]:
        """Hold the lock.

        Raises:
            MimoError: others held it all the time, or the file cannot be opened.
        """
        try:
            fd = self._open()
        except OSError as error:
            raise MimoError(
                f"the device's lock cannot be opened: {error.strerror}", where=self.path
            ) from error
        try:
            end = time.monotonic() + wait_s
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= end:
                        raise MimoError(
                            f"device {self.device} was in use for {wait_s:g} s",
                            where=f"{socket.gethostname()}: {self.path}",
                            remedy="Find who holds it with: fuser " + str(self.path),
                        ) from None
                    time.sleep(0.02)
            yield
        finally:
            os.close(fd)  # and with it the lock


# -- candidates between processes ------------------------------------------------------------------


def reference(schedule: Schedule) -> str:
    """Return ``module:Class`` of a schedule, by which another process finds it."""
    kind = type(schedule)
    return f"{kind.__module__}:{kind.__qualname__}"


@dataclass(frozen=True, slots=True)
class BuildOrder:
    """A candidate to build."""

    workload: str
    schedule: str
    """See `reference`."""
    candidate: Candidate
    hardware: Hardware
    function: str = ""
    """Text of the function that a generic workload names."""


@dataclass(frozen=True, slots=True)
class Built:
    """What came of building: the reply of the compiling child, and the object code if it is ``ok``."""

    reply: Reply
    code: bytes = b""
    worker: str = ""
    """Who built it, see `coordinator.Result`."""


@dataclass(frozen=True, slots=True)
class MeasureOrder:
    """Candidates of one workload to measure, with their code."""

    workload: str
    schedules: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    built: tuple[Built, ...]
    seed: int
    energy: bool = True
    compare: bool = False
    """Time them against each other (`Measures.confirm`) rather than one by one."""
    function: str = ""
    """As in `BuildOrder`."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a measuring host is told once."""

    hardware: Hardware
    limits: Limits = field(default_factory=Limits)
    timing: Timing = field(default_factory=Timing)
    meter: str | None = None
    """As in `meters.open_meter`; ``modelled``: none."""
    device: str = "cpu"
    calibrate: bool = True
    """Measure the machine's rates, where that was not done before."""
    locks: Path = LOCKS


def guarded(serve: Callable[[], Any]) -> Answer:
    """Return what a function returns, or what is wrong with the node."""
    began = time.monotonic()
    try:
        status, value = "ok", serve()
    except MimoError as error:
        status, value = "broken", error
    except OSError as error:
        text = f"{type(error).__name__}: {error}"
        status = "broken"
        value = MimoError(f"a node failed: {text}", where=socket.gethostname())
    return status, value, time.monotonic() - began


class BuildHost:
    """One compiling child and its parent."""

    def __init__(self, limits: Limits) -> None:
        """Prepare; the child starts with the first order."""
        self._limits = limits
        self._scratch: Any = None
        self._builder: Any = None

    def run(self, order: BuildOrder) -> Answer:
        """Build; the answer's value is a `Built`."""
        return guarded(lambda: self._build(order))

    def _build(self, order: BuildOrder) -> Built:
        from mimo_compile.search.measure.builder import Builder, code_path
        from mimo_compile.search.measure.cases import Scratch

        if self._builder is None:
            self._scratch = Scratch()
            self._builder = Builder(self._limits, self._scratch, 1)
        schedules = [find_schedule(order.schedule)]
        space = JointSpace(find_workload(order.workload, order.function), order.hardware, schedules)
        (reply,) = self._builder.build(space, [order.candidate])
        path = code_path(self._scratch, order.candidate)
        try:
            return Built(reply, path.read_bytes() if reply.status == "ok" else b"")
        finally:
            self._builder.forget(order.candidate.key)

    def pid(self) -> int:
        """Return the id of the process this runs in."""
        return os.getpid()

    def close(self) -> None:
        """End the child and remove all files."""
        if self._builder is not None:
            self._builder.pool.close()
            self._scratch.close()


class MeasureHost:
    """One device: it verifies and times code that was built elsewhere, alone on the device."""

    def __init__(self, setup: Setup) -> None:
        """Prepare; the child starts with the first order."""
        self._setup = setup
        self._lock = DeviceLock(setup.device, setup.locks)
        self._measurer: Any = None
        self._meter: Any = None
        self._spaces: dict[tuple[str, tuple[str, ...]], JointSpace] = {}

    def _open(self) -> Any:
        if self._measurer is None:
            from mimo_compile.search.calibrate import device_model
            from mimo_compile.search.measure.measurer import Measurer, runnable_here
            from mimo_compile.search.meters import open_meter

            setup = self._setup
            if not runnable_here(setup.hardware):
                raise MimoError(
                    f"kernels for {setup.hardware.name} cannot run there",
                    where=socket.gethostname(),
                )
            os.environ.pop("OMP_NUM_THREADS", None)  # the cluster's, which would slow references
            self._meter = open_meter(setup.hardware, setup.meter)
            device = device_model(setup.hardware, measure=setup.calibrate)
            self._measurer = Measurer(
                setup.hardware, device=device, meter=self._meter, limits=setup.limits,
                timing=setup.timing, builders=1,
            )  # fmt: skip
        return self._measurer

    def ready(self) -> Answer:
        """Warm up; the answer's value is (the device's rates, the meter's name or "")."""
        return guarded(self._greet)

    def _greet(self) -> tuple[Any, str]:
        with self._lock.held():
            measurer = self._open()
        return measurer.device, "" if self._meter is None else self._meter.name

    def run(self, order: MeasureOrder) -> Answer:
        """Measure; the answer's value is a list of `Measurement`."""
        return guarded(lambda: self._measure(order))

    def _measure(self, order: MeasureOrder) -> list[Measurement]:
        with self._lock.held():
            measurer = self._open()
            space = self._space(order)
            try:
                for candidate, built in zip(order.candidates, order.built, strict=True):
                    measurer.builder.adopt(candidate, built.reply, built.code)
                if order.compare:
                    return list(measurer.confirm(space, order.candidates, order.seed))
                return list(
                    measurer.measure(space, order.candidates, order.seed, energy=order.energy)
                )
            finally:
                measurer.builder.forget(*(c.key for c in order.candidates))

    def _space(self, order: MeasureOrder) -> JointSpace:
        key = (order.workload, order.schedules)
        if key not in self._spaces:
            schedules: Sequence[Schedule] = [find_schedule(s) for s in order.schedules]
            self._spaces[key] = JointSpace(
                find_workload(order.workload, order.function), self._setup.hardware, schedules
            )
        return self._spaces[key]

    def pid(self) -> int:
        """Return the id of the process this runs in."""
        return os.getpid()

    def close(self) -> None:
        """End the child and remove all files."""
        if self._measurer is not None:
            self._measurer.close()
