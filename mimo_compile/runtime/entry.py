"""An entry point made ready to run: tensors on the arena, functions, one flat list of calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from mimo_compile.errors import ArtifactError, MimoError, UsageError
from mimo_compile.runtime import dtypes
from mimo_compile.runtime.memory import Bytes, as_array, as_tensor
from mimo_compile.runtime.program import Buffer, Entry, State
from mimo_compile.runtime.weights import WeightSource

Array = npt.NDArray[Any]


class Memory:
    """Where the buffers of all entries of a module lie.

    The entries share one arena, since only one of them runs at a time; what they have in common
    (weights, states) is made into tensors once.
    """

    def __init__(
        self, arena: Bytes, states: dict[str, Bytes], weights: WeightSource, code: Any, where: str
    ) -> None:
        """Put together what exists; `code` is the linked module of kernels."""
        self._arena = arena
        self._states = states
        self._weights = weights
        self._code = code
        self._where = where
        self._functions: dict[str, Callable[..., Any]] = {}
        self._made: dict[Buffer, tuple[Array, Any]] = {}

    def prepare(self, buffers: list[Buffer]) -> None:
        """Check the weights among these buffers against their hashes."""
        names = {buffer.source: None for buffer in buffers if buffer.kind == "weight"}
        self._weights.prepare(names)

    def place(self, buffer: Buffer) -> tuple[Array, Any]:
        """Return a buffer as an array and as a tensor for kernels, both on the same memory."""
        made = self._made.get(buffer)
        if made is None:
            if buffer.kind == "arena":
                data = self._arena
            elif buffer.kind == "state":
                data = self._states[buffer.source]
            else:
                data = self._weights.data(buffer.source)
            array = as_array(data, buffer.dtype, buffer.shape, buffer.offset)
            made = array, as_tensor(array)
            if buffer.kind != "arena":  # those of arenas are seldom shared
                self._made[buffer] = made
        return made

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

    def __init__(self, name: str, program: Entry, memory: Memory, where: str) -> None:
        """Check the entry's weights against their hashes and bind buffers and kernels."""
        self.name = name
        self._where = where
        used = {index for call in program.calls for index in call.args}
        used.update(program.inputs.values(), program.outputs.values())
        memory.prepare([program.buffers[index] for index in sorted(used)])
        placed = {index: memory.place(program.buffers[index]) for index in sorted(used)}
        self.inputs: dict[str, Array] = {n: placed[i][0] for n, i in program.inputs.items()}
        self.outputs: dict[str, Array] = {n: placed[i][0] for n, i in program.outputs.items()}
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
            (memory.function(call.kernel), tuple(placed[index][1] for index in call.args))
            for call in program.calls
        ]
        self.program = program

    def fill(self, arrays: Iterable[Array]) -> None:
        """Copy the inputs, in their order, to where the calls expect them."""
        for place, array in zip(self.inputs.values(), arrays, strict=True):
            place[...] = array

    def run(self) -> None:
        """Call all kernels in their order.

        Raises:
            MimoError: A kernel failed; the message names the call.
        """
        position = -1
        try:
            for position, (function, arguments) in enumerate(self.calls):  # noqa: B007
                function(*arguments)
        except Exception as error:
            raise self._failure(position, error) from error

    def _failure(self, position: int, error: Exception) -> MimoError:
        call = self.program.calls[position]
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        label = f"{call.label}, " if call.label else ""
        return MimoError(
            f"kernel {call.kernel} failed: {reason}",
            where=f"{label}call {position} of entry {self.name} of {self._where}",
        )


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


def state_offsets(states: dict[str, State], boundary: int = 4096) -> tuple[dict[str, int], int]:
    """Return where each state begins in one block of memory, and the size of the block."""
    offsets, at = {}, 0
    for name, state in states.items():
        offsets[name] = at
        at += -(-dtypes.size(state.dtype, state.shape) // boundary) * boundary
    return offsets, at
