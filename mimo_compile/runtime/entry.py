"""An entry point made ready to run: tensors on the arena, functions, one flat list of calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mimo_compile.errors import ArtifactError, MimoError, UsageError
from mimo_compile.runtime import dtypes
from mimo_compile.runtime.memory import Bytes, as_array, as_tensor
from mimo_compile.runtime.program import Buffer, Entry, State
from mimo_compile.runtime.weights import WeightSource

if TYPE_CHECKING:
    from mimo_compile.runtime.expert_memory import Experts

Array = npt.NDArray[Any]


class Memory:
    """Where the buffers of all entries of a module lie.

    The entries share one arena, since only one of them runs at a time; what they have in common
    (weights, states) is made into tensors once. A state's memory holds those of all sequences that may
    be in progress, one after the other.
    """

    def __init__(
        self,
        arena: Bytes,
        states: dict[str, Bytes],
        weights: WeightSource,
        code: Any,
        where: str,
        sequences: int = 1,
        shared: Collection[str] = (),
        experts: Experts | None = None,
    ) -> None:
        """Put together what exists; `code` is the linked module of kernels, states are of all `sequences`.

        Those that are `shared` all sequences have together. Weights of ``experts`` are where these say.
        """
        self._arena = arena
        self._states = states
        self._sequences = sequences
        self._shared = shared
        self._weights = weights
        self._experts = experts
        self._code = code
        self._where = where
        self._functions: dict[str, Callable[..., Any]] = {}
        self._made: dict[tuple[Buffer, int], tuple[Array, Any]] = {}

    def prepare(self, buffers: list[Buffer]) -> None:
        """Check the weights among these buffers against their hashes."""
        names = {buffer.source: None for buffer in buffers if buffer.kind == "weight"}
        self._weights.prepare(name for name in names if self._holder(name) is None)

    def limit(self, bound: BoundEntry) -> None:
        """Make an entry point have its experts before it runs them, where these come and go."""
        if self._experts is not None:
            self._experts.limit(bound)

    def broken_off(self) -> None:
        """Stop what goes on beside an entry point that does not come to its end."""
        if self._experts is not None:
            self._experts.residency.forget()

    def _holder(self, weight: str) -> Experts | None:
        """Return who has a weight, where it comes and goes."""
        experts = self._experts
        return experts if experts is not None and experts.holds(weight) else None

    def place(self, buffer: Buffer, slot: int = 0) -> tuple[Array, Any]:
        """Return a buffer as an array and as a tensor for kernels, both on the same memory.

        Args:
            buffer: Which.
            slot: Of a state: whose, where it is that of one sequence.
        """
        key = (buffer, slot if buffer.kind == "state" else 0)
        made = self._made.get(key)
        if made is None and buffer.kind == "weight" and (holder := self._holder(buffer.source)):
            made = self._made[key] = holder.place(buffer.source)
        if made is None:
            before = 0
            if buffer.kind == "arena":
                data = self._arena
            elif buffer.kind == "state":
                data = self._states[buffer.source]
                before = 0 if buffer.source in self._shared else self._each(buffer.source) * slot
            else:
                data = self._weights.data(buffer.source)
            array = as_array(data, buffer.dtype, buffer.shape, buffer.offset + before)
            made = array, as_tensor(array)
            if buffer.kind != "arena":  # those of arenas are seldom shared
                self._made[key] = made
        return made

    def copy_states(self, source: int, slot: int) -> None:
        """Copy what a sequence keeps by itself to another one's place."""
        for name, data in self._states.items():
            if name not in self._shared:
                size = self._each(name)
                data[slot * size : (slot + 1) * size] = data[source * size : (source + 1) * size]

    def _each(self, state: str) -> int:
        """Return the bytes of a state of one sequence."""
        return len(self._states[state]) // self._sequences

    def function(self, kernel: str) -> Callable[..., Any]:
        """Return a kernel's function.

        Raises:
            ArtifactError: The code has no such kernel.
        """
        found = self._functions.get(kernel)
        if found is None:
            try:
                found = self._code[kernel]
            except (AttributeError, KeyError, RuntimeError, ValueError) as error:
                raise ArtifactError(
                    f"kernel {kernel} is missing in the code", where=self._where
                ) from error
            self._functions[kernel] = found
        return found


class BoundEntry:
    """An entry point that can be run; its inputs and outputs are arrays on the arena.

    Attributes:
        inputs: Name to array; write these, then `run`.
        outputs: Name to array; valid until any entry of the module runs again.
    """

    def __init__(
        self, name: str, program: Entry, memory: Memory, where: str, slot: int = 0
    ) -> None:
        """Check the entry's weights against their hashes and bind buffers and kernels.

        ``slot`` says which sequence's states it works on, of several that may be in progress.
        """
        self.name = name
        self._where = where
        used = {index for call in program.calls for index in call.args}
        used.update(program.inputs.values(), program.outputs.values())
        memory.prepare([program.buffers[index] for index in sorted(used)])
        placed = {index: memory.place(program.buffers[index], slot) for index in sorted(used)}
        self.inputs: dict[str, Array] = {n: placed[i][0] for n, i in program.inputs.items()}
        self.outputs: dict[str, Array] = {n: placed[i][0] for n, i in program.outputs.items()}
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
            (memory.function(call.kernel), tuple(placed[index][1] for index in call.args))
            for call in program.calls
        ]
        self.program = program
        self._arrays = {index: array for index, (array, _) in placed.items()}
        self._memory = memory
        memory.limit(self)

    def array(self, buffer: int) -> Array:
        """Return one of the program's buffers that calls use, by its index, as an array on its memory."""
        return self._arrays[buffer]

    def fill(self, arrays: Iterable[Array]) -> None:
        """Copy the inputs, in their order, to where the calls expect them."""
        for place, array in zip(self.inputs.values(), arrays, strict=True):
            place[...] = array

    def run(self) -> None:
        """Call all kernels in their order.

        Raises:
            MimoError: A kernel failed, or experts could not be loaded for it; the message names the call.
        """
        position = -1
        try:
            for position, (function, arguments) in enumerate(self.calls):  # noqa: B007
                function(*arguments)
        except BaseException as error:
            self._memory.broken_off()
            if isinstance(error, MimoError) or not isinstance(error, Exception):
                raise  # of what a call does besides: it says where
            raise self._failure(position, error) from error

    def timings(self, arrays: Sequence[Array], repeat: int) -> list[Timing]:
        """Run `repeat` times on these inputs; returns the median time of each kernel call."""
        times = np.empty((repeat, len(self.calls)))
        for row in times:
            self.fill(arrays)  # the run before may have put other data in their place
            for column, (function, arguments) in enumerate(self.calls):
                start = time.perf_counter()
                function(*arguments)
                row[column] = time.perf_counter() - start
        return [
            Timing(call.label, call.kernel, float(seconds))
            for call, seconds in zip(self.program.calls, np.median(times, 0), strict=True)
        ]

    def _failure(self, position: int, error: Exception) -> MimoError:
        call = self.program.calls[position]
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        label = f"{call.label}, " if call.label else ""
        return MimoError(
            f"kernel {call.kernel} failed: {reason}",
            where=f"{label}call {position} of entry {self.name} of {self._where}",
        )


class Signature(NamedTuple):
    """What an entry point takes and gives: name to (dtype, shape)."""

    inputs: dict[str, tuple[str, tuple[int, ...]]]
    outputs: dict[str, tuple[str, tuple[int, ...]]]

    def __str__(self) -> str:
        """For people: `(x float32[1, 4]) -> (y float32[1, 2])`."""
        sides = (", ".join(f"{n} {dtypes.spell(*t)}" for n, t in side.items()) for side in self)
        return "({}) -> ({})".format(*sides)


class Timing(NamedTuple):
    """How long one call of an entry took, by kernel call."""

    label: str
    kernel: str
    seconds: float


def signature_of(entry: Entry) -> Signature:
    """Return what an entry point takes and gives."""

    def side(names: dict[str, int]) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {n: (entry.buffers[i].dtype, entry.buffers[i].shape) for n, i in names.items()}

    return Signature(side(entry.inputs), side(entry.outputs))


def accept(value: Any, buffer: Buffer, what: str) -> Array:
    """Take what a caller passed as an array of the shape and dtype of a buffer, without copying.

    Args:
        value: A numpy array, a tensor that speaks DLPack on the CPU (torch, jax, ...), or nested
            lists of numbers.
        buffer: Shape and dtype that it must have.
        what: How to call it in messages.

    Raises:
        UsageError: It is something else; the message has both types.
    """
    wanted = dtypes.spell(buffer.dtype, buffer.shape)
    if not isinstance(value, np.ndarray):
        value = _from_foreign(value, buffer, what, wanted)
    if value.shape != buffer.shape or value.dtype.name != buffer.dtype:
        raise UsageError(
            f"{what} must be {wanted}, this is {dtypes.spell(value.dtype.name, value.shape)}"
        )
    array: Array = value
    return array


def _from_foreign(value: Any, buffer: Buffer, what: str, wanted: str) -> Array:
    dtype = dtypes.numpy_dtype(buffer.dtype)
    try:
        if not hasattr(value, "__dlpack__"):
            return np.asarray(value, dtype)
        if dtype.isbuiltin == 1:
            return np.from_dlpack(value)
    except (BufferError, RuntimeError, TypeError, ValueError, OverflowError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UsageError(
            f"{what} cannot be taken as {wanted}: {reason}",
            remedy="Pass a numpy array or a detached tensor in the CPU's memory.",
        ) from error
    return _through_bits(value, dtype, what, wanted)


def _through_bits(value: Any, dtype: np.dtype[Any], what: str, wanted: str) -> Array:
    """View a tensor of an element type that numpy's own DLPack reader does not know."""
    bits = np.dtype(f"u{dtype.itemsize}")
    try:
        import tvm_ffi

        tensor = tvm_ffi.from_dlpack(value)
        view = tvm_ffi.get_global_func("runtime.TVMTensorCreateView")
        if str(tensor.dtype) != dtype.name:
            raise TypeError(f"it is {tensor.dtype}")
        plain = view(tensor, tvm_ffi.Shape(tensor.shape), tvm_ffi.dtype(bits.name), 0)
        return np.from_dlpack(plain).view(dtype)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UsageError(
            f"{what} cannot be taken as {wanted}: {reason}",
            remedy="Pass a numpy array or a detached, contiguous tensor in the CPU's memory.",
        ) from error


def state_spans(
    states: dict[str, State], sequences: int = 1, boundary: int = 4096, shared: Collection[str] = ()
) -> tuple[dict[str, slice], int]:
    """Return where the states of so many sequences lie in one block of memory, and the block's size.

    Those that are ``shared`` are there once.
    """
    spans, at = {}, 0
    for name, state in states.items():
        count = 1 if name in shared else sequences
        size = count * dtypes.size(state.dtype, state.shape)
        spans[name] = slice(at, at + size)
        at += -(-size // boundary) * boundary
    return spans, at
