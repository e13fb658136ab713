"""An entry point on a GPU: copies in, the launches of its kernels, copies out; recorded as one graph."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from mimo_compile.errors import ArtifactWarning, DeviceLost, MimoError, UsageError
from mimo_compile.runtime import dtypes
from mimo_compile.runtime.entry import Array, Timing
from mimo_compile.runtime.memory import as_array
from mimo_compile.runtime.program import Call, Entry

if TYPE_CHECKING:
    from mimo_compile.runtime.gpu import GpuMachine
    from mimo_compile.runtime.gpu_device import Work

GRAPHS = "MIMO_CUDA_GRAPHS"
"""Variable of the environment: 0 lets kernels run one by one, with a wait after each."""


class DeviceEntry:
    """See `machine.Bound`; its inputs and outputs are in memory of this process, all else is on the GPU."""

    def __init__(self, name: str, program: Entry, machine: GpuMachine, slot: int) -> None:
        """Bring the entry's weights to the GPU, and prepare what is queued in a run."""
        self.name, self.program = name, program
        self._machine, self._device = machine, machine.device
        used = {index for call in program.calls for index in call.args}
        used.update(program.inputs.values(), program.outputs.values())
        machine.prepare(program.buffers[index] for index in used)
        self._places = {i: machine.place(program.buffers[i], slot) for i in sorted(used)}
        staged = {i: self._staged(i) for i in {*program.inputs.values(), *program.outputs.values()}}
        self.inputs: dict[str, Array] = {n: staged[i] for n, i in program.inputs.items()}
        self.outputs: dict[str, Array] = {n: staged[i] for n, i in program.outputs.items()}
        self._steps: list[tuple[Call | None, Work]] = [
            *self._copies_in(staged, slot),
            *((call, self._called(call)) for call in program.calls),
            *(
                (None, partial(self._device.read, self._places[i], _bytes(staged[i])))
                for i in dict.fromkeys(program.outputs.values())
            ),
        ]
        self._replay: Work | None = None
        self._timed: list[tuple[Call | None, Work]] | None = None

    def _staged(self, index: int) -> Array:
        buffer = self.program.buffers[index]
        data = self._device.host(dtypes.size(buffer.dtype, buffer.shape))
        return as_array(data, buffer.dtype, buffer.shape)

    def _copies_in(self, staged: dict[int, Array], slot: int) -> Iterable[tuple[None, Work]]:
        """Yield copies of the block tables that kernels look into, and of the inputs."""
        tables = {}
        for index, address in self._places.items():
            data = self._machine.table(self.program.buffers[index], slot)
            if data is not None:
                tables[address] = data
        for address, data in tables.items():
            yield None, partial(self._device.write, address, data)
        for index in dict.fromkeys(self.program.inputs.values()):
            yield None, partial(self._device.write, self._places[index], _bytes(staged[index]))

    def _called(self, call: Call) -> Work:
        """Return what queues one call."""
        table = self._machine.code.table.kernels[call.kernel]
        places = {a.name: self._places[i] for a, i in zip(table.args, call.args, strict=True)}
        places |= {s.name: self._machine.scratch + s.offset for s in table.scratch}
        try:
            return self._device.kernel(call.kernel, self._machine.code, places)
        except MimoError as error:
            raise self._failure(call, error) from error

    @property
    def calls(self) -> NoReturn:
        """Refused: kernels of a graph cannot be exchanged."""
        self._not_here()

    def array(self, buffer: int) -> NoReturn:
        """Refused: buffers are in the GPU's memory."""
        self._not_here()

    def _not_here(self) -> NoReturn:
        raise UsageError(
            f"what lies between the kernels of {self.name} is not looked at on a GPU: they run as one graph",
            remedy="Compile for a CPU where routing is logged, replayed or forced.",
        )

    def fill(self, arrays: Iterable[Array]) -> None:
        """Copy the inputs, in their order, to where runs take them from."""
        for place, array in zip(self.inputs.values(), arrays, strict=True):
            place[...] = array

    def run(self) -> None:
        """Run all kernels in their order, and wait until the outputs are there.

        Raises:
            DeviceLost: A kernel did what it must not, or the GPU failed: it answers nothing more.
            MimoError: The driver refuses something. In a first run the message names the kernel's call.
        """
        if self._replay is None:
            self._run_each()
            if _graphs():
                self._record()
            return
        try:
            self._replay()
            self._device.wait()
        except MimoError as error:
            raise self._failure(None, error) from error

    def _record(self) -> None:
        """Make the graph of later runs; the run before has succeeded, so that a failure is no error."""
        try:
            self._replay = self._device.record(self._queue)
        except MimoError as error:
            warnings.warn(
                f"entry {self.name} of {self._machine.where} still runs kernel by kernel: no graph of it "
                f"could be made: {error}",
                ArtifactWarning,
                stacklevel=2,
            )

    def _queue(self) -> None:
        for _, work in self._steps:
            work()

    def _run_each(self) -> None:
        for call, work in self._steps:
            try:
                work()
                self._device.wait()
            except MimoError as error:
                raise self._failure(call, error) from error

    def timings(self, arrays: Sequence[Array], repeat: int) -> list[Timing]:
        """Run `repeat` times on these inputs; returns the median time of each kernel call, by events.

        Each call is a graph of its own, unless there are to be none: else events would tell how long it takes
        to queue its launches.
        """
        calls = self.program.calls
        if self._timed is None:
            self._timed = [(c, w if c is None else self._recorded(c, w)) for c, w in self._steps]
        times = np.empty((repeat, len(calls)))
        for row in times:
            self.fill(arrays)
            taken = []
            for call, work in self._timed:
                try:
                    if call is None:
                        work()
                    else:
                        taken.append(self._device.seconds(work))
                except MimoError as error:
                    raise self._failure(call, error) from error
            self._device.wait()
            row[:] = taken
        return [
            Timing(call.label, call.kernel, float(seconds))
            for call, seconds in zip(calls, np.median(times, 0), strict=True)
        ]

    def _recorded(self, call: Call, work: Work) -> Work:
        """Return a call as a graph."""
        try:
            return self._device.record(work) if _graphs() else work
        except MimoError as error:
            raise self._failure(call, error) from error

    def _failure(self, call: Call | None, error: MimoError) -> MimoError:
        """Return what to raise for an error in a call, or in what can be told of the entry alone."""
        lost = isinstance(error, DeviceLost)
        where, what = self._machine.where, f"entry {self.name}"
        if call is not None:
            at = next(i for i, one in enumerate(self.program.calls) if one is call)
            label = f"{call.label}, " if call.label else ""
            where = f"{label}call {at} of entry {self.name} of {where}"
            what = f"kernel {call.kernel}"
        remedy = error.remedy
        if lost and call is None and self._replay is not None:
            remedy = f"Set {GRAPHS}=0 and try again: then kernels run one by one, and it is named"
        kind = DeviceLost if lost else MimoError
        return kind(f"{what} failed: {error.what}", where=where, remedy=remedy)


def _graphs() -> bool:
    """Return whether kernels are to be launched as graphs."""
    return os.environ.get(GRAPHS) != "0"


def _bytes(array: Array) -> Any:
    """View an array's memory as bytes."""
    return array.reshape(-1).view(np.uint8)
