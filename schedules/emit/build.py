"""Write PrimFuncs as plain Python: statements in order, Python loops for what is unrolled.

A thin layer over TVM's IR builder. Registers are stack buffers of one vector each: they stay below
TVM's limit for the stack and in the scope ``global`` (other scopes become calls of the workspace
allocator), and LLVM promotes them to machine registers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mimo_compile._tvm import compiler
from mimo_compile.errors import UsageError
from mimo_compile.ir.ops.base import Arg

compiler()
from tvm.script.ir_builder import IRBuilder, tirx

T: Any = tirx
"""TVM's vocabulary of statements and expressions."""
MOST = 2**31
"""Elements of a state: kernels index caches by 32 bits, and those of a greater one would wrap around."""


def function(name: str, args: Sequence[Arg], body: Callable[..., None]) -> Any:
    """Build the PrimFunc ``name`` whose parameters are ``args`` and whose statements ``body`` emits.

    Args:
        name: Its global symbol.
        args: Names, shapes and dtypes of the parameters, none of which overlap in memory.
        body: Called with one buffer for each parameter.

    Raises:
        UsageError: A state has more than `MOST` elements.
    """
    check_states(name, args)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"tirx.noalias": True, "global_symbol": name})
        # an empty tensor is none that a kernel can check: it is passed and not looked at
        kinds = [T.buffer(a.shape, a.dtype) if all(a.shape) else T.handle() for a in args]
        body(*(T.arg(a.name, kind) for a, kind in zip(args, kinds, strict=True)))
    return builder.get()


def check_states(name: str, args: Sequence[Arg]) -> None:
    """Refuse states that a kernel, here ``name``, could not index.

    Raises:
        UsageError: A state has more than `MOST` elements.
    """
    for arg in args:
        if arg.role == "state" and math.prod(arg.shape) > MOST:
            raise UsageError(
                f"{name}: {arg.name} {list(arg.shape)} has more than 2^31 elements",
                remedy="give it a smaller capacity",
            )


@contextmanager
def loop(extent: Any, *, parallel: bool = False) -> Iterator[Any]:
    """Loop over ``0 .. extent-1``; a loop of one turn leaves no trace. Yields the index."""
    if isinstance(extent, int) and extent == 1:
        yield 0
        return
    with (T.parallel if parallel else T.serial)(0, extent) as index:
        yield index


@contextmanager
def when(condition: Any) -> Iterator[None]:
    """Run the statements only if the condition holds."""
    with T.If(condition), T.Then():
        yield


def choose(condition: Any, then: Callable[[], None], other: Callable[[], None]) -> None:
    """Emit a two-way branch."""
    with T.If(condition):
        with T.Then():
            then()
        with T.Else():
            other()


def bind(value: Any) -> Any:
    """Compute a value once, here."""
    return T.bind(value)


def vector_type(dtype: str, lanes: int) -> str:
    """Return TVM's name of a vector type."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def load(buffer: Any, *index: Any, lanes: int = 1, stride: int = 1) -> Any:
    """Return ``lanes`` neighbours of a buffer from ``index`` on."""
    *outer, last = index
    return buffer[(*outer, last if lanes == 1 else T.ramp(last, stride, lanes))]


def store(buffer: Any, value: Any, *index: Any, lanes: int = 1) -> None:
    """Store a vector at ``index`` and behind."""
    *outer, last = index
    where = [*outer, last if lanes == 1 else T.ramp(last, 1, lanes)]
    if isinstance(buffer, Part):
        buffer, where = buffer.buffer, [*buffer.index(where)]
    T.buffer_store(buffer, value, where)


def splat(value: Any, lanes: int) -> Any:
    """Return a scalar in all lanes."""
    return value if lanes == 1 else T.broadcast(value, lanes)


def prefetch(buffer: Any, *index: Any, near: bool = True) -> None:
    """Ask for a cache line; the address may lie behind the end of the buffer.

    Args:
        buffer: Where it is.
        index: An element of it.
        near: Into the first-level cache, not the second.
    """
    if math.prod(int(n) for n in buffer.shape) >= MOST:  # TVM has 32 bits for their number
        index = tuple(T.cast(i, "int64") if not isinstance(i, int) else T.int64(i) for i in index)
    place = T.address_of(buffer[tuple(index)])
    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", place, 0, 3 if near else 2, 1))


def workspace(shape: Sequence[int], dtype: str) -> Any:
    """Allocate scratch memory that lives until the function returns (or the enclosing scope ends)."""
    return T.alloc_buffer(tuple(shape), dtype)


class Part:
    """A buffer of which the first index counts from a row on: what belongs to one of several."""

    def __init__(self, buffer: Any, first: Any) -> None:
        self.buffer, self.first = buffer, first
        self.shape = buffer.shape
        """Of the whole buffer."""

    def index(self, index: Sequence[Any]) -> tuple[Any, ...]:
        """Return the index in the whole buffer."""
        return (self.first + index[0], *index[1:])

    def __getitem__(self, index: Any) -> Any:
        """Return an element, or a vector of them."""
        return self.buffer[self.index(index if isinstance(index, tuple) else (index,))]


class Register:
    """A mutable vector (or scalar) that lives in machine registers."""

    def __init__(self, dtype: str, lanes: int, start: Any | None = None) -> None:
        self.lanes = lanes
        self.buffer = T.alloc_buffer((lanes,), dtype)
        if start is not None:
            self.set(start)

    def get(self) -> Any:
        """Return the current value."""
        return load(self.buffer, 0, lanes=self.lanes)

    def set(self, value: Any) -> None:
        """Replace the value."""
        store(self.buffer, value, 0, lanes=self.lanes)

    def lane(self, index: Any) -> Any:
        """Return one lane (index may be a loop variable)."""
        return self.buffer[index]
