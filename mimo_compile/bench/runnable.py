"""Kernels made ready to be called: of a schedule's config, or those that an artifact holds."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mimo_compile import _tvm
from mimo_compile.bench.draws import Draws, copies
from mimo_compile.bench.oracle import Oracle
from mimo_compile.errors import UsageError, VerificationError
from mimo_compile.ir.hardware import Hardware, built_for
from mimo_compile.ir.ops import OPS, get_op
from mimo_compile.ir.ops.base import Array
from mimo_compile.ir.workload import Workload
from mimo_compile.runtime.container import Parts
from mimo_compile.runtime.memory import Bytes, Zeroed
from mimo_compile.runtime.program import Choice, Manifest
from mimo_compile.schedules import get_schedule
from mimo_compile.schedules.base import Kernel, Schedule
from mimo_compile.schedules.compile import compile_kernel
from mimo_compile.search.measure.buffers import as_tensor

_GUARD = 64


class Runnable:
    """One compiled candidate with its arguments in memory that kernels can use."""

    def __init__(
        self,
        workload: Workload,
        schedule: Schedule,
        config: Mapping[str, Any],
        hardware: Hardware,
        inputs: Mapping[str, Array],
        code: Any = None,
        symbol: str = "",
    ) -> None:
        """Lower, compile and load a candidate, or take its ``symbol`` from loaded ``code``.

        Raises:
            VerificationError: packing gave something else than the kernel's arguments.
        """
        self.workload, self.schedule, self.inputs = workload, schedule, inputs
        self.config = schedule.config_from_json(config)
        self.kernel: Kernel = schedule.lower(workload, self.config, hardware)
        self._roles = {a.name: a for a in get_op(workload.op).args(workload)}
        if code is None:
            code, symbol = _tvm.load_object(compile_kernel(self.kernel, hardware)), self.kernel.name
        self._code = code
        self.function = code[symbol]
        self._guards: dict[str, Array] = {}
        self.arrays = self._lay_out()
        self.tensors = self._tensors(self.arrays)

    def _lay_out(self) -> dict[str, Array]:
        constant = {
            n: a for n, a in self.inputs.items() if self._roles[n].role in ("weight", "state")
        }
        packed = self.schedule.pack(self.workload, self.config, constant)
        out: dict[str, Array] = {}
        for arg in self.kernel.args:
            if arg.role == "output":
                kind = np.dtype("uint16" if arg.dtype == "bfloat16" else arg.dtype)
                nan = np.full(math.prod(arg.shape) * kind.itemsize, 0xFF, np.uint8)
                out[arg.name] = self._guarded(arg.name, nan.view(kind).reshape(arg.shape))
                continue
            source = packed[arg.name] if arg.role != "input" else self.inputs[arg.name]
            if source.shape != arg.shape:
                raise VerificationError(
                    f"{arg.name} is packed as {list(source.shape)}, the kernel takes {list(arg.shape)}",
                    where=f"{self.schedule.name} {self.workload}",
                )
            out[arg.name] = self._guarded(arg.name, source)
        return out

    def _guarded(self, name: str, source: Array) -> Array:
        """Copy an array into aligned memory that ends with bytes which no kernel may touch."""
        memory = self._memory(name, source.nbytes + _GUARD)
        self._guards[name] = memory[source.nbytes :]
        self._guards[name][...] = 0xA5
        copy: Array = memory[: source.nbytes].view(source.dtype).reshape(source.shape)
        copy[...] = source
        return copy

    def _memory(self, name: str, size: int) -> Bytes:
        """Return memory for an argument: pages of states are those of a loaded artifact's, never huge ones.

        numpy asks for huge pages where an array is long, and random blocks are read faster from them.
        """
        if self._roles[name].role == "state":
            return Zeroed(size).bytes
        return _tvm.empty_aligned(size, "uint8")

    def _copy(self, name: str) -> Array:
        source = self.arrays[name]
        copy: Array = self._memory(name, source.nbytes).view(source.dtype).reshape(source.shape)
        copy[...] = source
        return copy

    def _tensors(self, arrays: Mapping[str, Array]) -> tuple[Any, ...]:
        return tuple(as_tensor(arrays[a.name], a.dtype) for a in self.kernel.args)

    def __call__(self, tensors: tuple[Any, ...]) -> None:
        """Run the kernel on a set of arguments."""
        self.function(*tensors)

    def check(self, oracle: Oracle | None = None) -> float:
        """Run once and return the worst error as a multiple of its bound.

        Args:
            oracle: What must come out for these inputs; computed here where None.

        Raises:
            VerificationError: a result is outside its bound (the message names the element), or memory
                that is not the kernel's to write was changed.
        """
        oracle = oracle or Oracle(self.workload, self.inputs, self.schedule.exact(self.config))
        kept = [a.name for a in self.kernel.args if a.role != "output" and not a.mutated]
        before = {name: _digest(self.arrays[name]) for name in kept}
        self.function(*self.tensors)
        where = f"{self.schedule.name} {self.workload}"
        for name, guard in self._guards.items():
            if (guard != 0xA5).any():
                raise VerificationError(f"it wrote behind the end of {name}", where=where)
        for name in kept:
            if _digest(self.arrays[name]) != before[name]:
                raise VerificationError(f"it changed its input {name}", where=where)
        states = {a.name: self.arrays[a.name] for a in self.kernel.args if a.mutated}
        got = self.schedule.unpack_state(self.workload, self.config, states) if states else {}
        got |= {a.name: self.arrays[a.name] for a in self.kernel.args if a.role == "output"}
        worst, message = oracle.judge(got)
        if message:
            raise VerificationError(message, where=where)
        return worst

    def sets(
        self, wanted_bytes: int, memory_bytes: int, draws: Draws | None = None
    ) -> list[tuple[Any, ...]]:
        """Return argument sets that together read ``wanted_bytes`` of weights and states (0: one set).

        Args:
            wanted_bytes: What they read.
            memory_bytes: Limit of the copies.
            draws: Inputs that sets take in turn; None: all have the same.
        """
        cold = [a.name for a in self.kernel.args if a.role in ("weight", "state")]
        draws = draws or Draws()
        each = draws.share * sum(self.arrays[n].nbytes for n in cold)
        made: list[tuple[Any, ...]] = []
        held: dict[str, Array] = {}
        last = 0
        for number in range(copies(int(each), wanted_bytes, memory_bytes)):
            copy, inputs = draws.place(number)
            if copy > last:
                held, last = {n: self._copy(n) for n in cold}, copy
            made.append(self._tensors({**self.arrays, **held, **inputs}))
        return made


def _digest(array: Array) -> bytes:
    """Return what tells whether an array was changed; a copy of long caches would fill the memory."""
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return hashlib.blake2b(flat.data).digest()


def hardware_of(manifest: Manifest) -> Hardware:
    """Return the hardware description that an artifact's kernels were generated for."""
    target = manifest.target
    return built_for(target.name, target.kind, frozenset(target.features), target.threads)


def kernel_of(choice: Choice, manifest: Manifest) -> Kernel | None:
    """Generate the kernel of a choice again (None: generic, or this version has no such schedule)."""
    workload = Workload.parse(choice.workload)
    try:
        schedule = get_schedule(choice.schedule)
    except UsageError:
        return None
    if workload.op not in OPS:
        return None
    return schedule.lower(workload, schedule.config_from_json(choice.config), hardware_of(manifest))


def written_arguments(parts: Parts) -> dict[str, set[int]]:
    """Return, for each kernel of an artifact, the positions of the arguments that it writes.

    Generic kernels have their outputs behind their inputs; how many is not recorded, so one is assumed.
    """
    counts = {c.kernel: len(c.args) for e in parts.programs.entries.values() for c in e.calls}
    out: dict[str, set[int]] = {}
    for choice in parts.manifest.plan:
        kernel = kernel_of(choice, parts.manifest)
        if kernel is None:
            out[choice.kernel] = {counts.get(choice.kernel, 1) - 1}
        else:
            out[choice.kernel] = {
                i for i, a in enumerate(kernel.args) if a.role == "output" or a.mutated
            }
    return out
