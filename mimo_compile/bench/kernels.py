"""Our own contestants: a candidate lowered, compiled, checked against the op's reference, ready to call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mimo_compile import _tvm
from mimo_compile.bench.contest import Contestant
from mimo_compile.errors import VerificationError
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.base import Array
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules import get_schedule, schedules_for
from mimo_compile.schedules.base import Kernel, Schedule
from mimo_compile.schedules.compile import compile_kernel
from mimo_compile.search.database import Database
from mimo_compile.search.lookup import best_record
from mimo_compile.search.measure.buffers import as_tensor
from mimo_compile.search.measure.verify import judge


@dataclass(frozen=True, slots=True)
class Pick:
    """A candidate to compare with: which, and why."""

    schedule: str
    config: dict[str, Any]
    source: str
    """``measured`` (best record), ``default`` (no record) or ``given``."""


def picks(
    workload: Workload, hardware: Hardware, db: Database | None, *, every_schedule: bool = False
) -> list[Pick]:
    """Return the best known candidate (else the preferred default), optionally each schedule's default."""
    found: list[Pick] = []
    best = best_record(workload, hardware, db, near=True)
    if best is not None:
        found.append(Pick(best.record.schedule, dict(best.record.config), "measured"))
    for schedule in schedules_for(workload, hardware):
        if found and not every_schedule:
            break
        config = schedule.config_to_json(schedule.space(workload, hardware).default)
        pick = Pick(schedule.name, config, "default")
        if all((p.schedule, p.config) != (pick.schedule, pick.config) for p in found):
            found.append(pick)
    return found


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
                out[arg.name] = _tvm.empty_aligned(arg.shape, kind)
                out[arg.name].view(np.uint8).reshape(-1)[...] = 0xFF
                continue
            source = packed[arg.name] if arg.role != "input" else self.inputs[arg.name]
            if source.shape != arg.shape:
                raise VerificationError(
                    f"{arg.name} is packed as {list(source.shape)}, the kernel takes {list(arg.shape)}",
                    where=f"{self.schedule.name} {self.workload}",
                )
            out[arg.name] = _copy(source)
        return out

    def _tensors(self, arrays: Mapping[str, Array]) -> tuple[Any, ...]:
        return tuple(as_tensor(arrays[a.name], a.dtype) for a in self.kernel.args)

    def __call__(self, tensors: tuple[Any, ...]) -> None:
        """Run the kernel on a set of arguments."""
        self.function(*tensors)

    def check(self) -> float:
        """Run once and return the worst error as a multiple of its bound.

        Raises:
            VerificationError: a result is outside its bound; the message names the element.
        """
        op = get_op(self.workload.op)
        expected = op.reference(self.workload, self.inputs)
        bound = op.bound(self.workload, self.inputs, expected)
        self.function(*self.tensors)
        states = {a.name: self.arrays[a.name] for a in self.kernel.args if a.role == "state"}
        got = self.schedule.unpack_state(self.workload, self.config, states)
        got |= {a.name: self.arrays[a.name] for a in self.kernel.args if a.role == "output"}
        worst, message = judge(op.args(self.workload), got, expected, bound, self.inputs)
        if message:
            raise VerificationError(message, where=f"{self.schedule.name} {self.workload}")
        return worst

    def sets(self, wanted_bytes: int, memory_bytes: int) -> list[tuple[Any, ...]]:
        """Return argument sets whose weights and states together hold ``wanted_bytes`` (0: one set)."""
        cold = [a.name for a in self.kernel.args if a.role in ("weight", "state")]
        each = sum(self.arrays[n].nbytes for n in cold)
        count = copies(each, wanted_bytes, memory_bytes)
        made = [self.tensors]
        for _ in range(count - 1):
            made.append(self._tensors({**self.arrays, **{n: _copy(self.arrays[n]) for n in cold}}))
        return made


def copies(each: int, wanted_bytes: int, memory_bytes: int) -> int:
    """Return how many argument sets of ``each`` bytes exceed the caches, within a limit of memory."""
    if not each or not wanted_bytes:
        return 1
    return max(1, min(-(-wanted_bytes // each) + 1, 512, memory_bytes // each))


def contestants(
    workload: Workload,
    hardware: Hardware,
    chosen: Sequence[Pick],
    inputs: Mapping[str, Array],
    caches: Sequence[str],
    cold_bytes: int,
    memory_bytes: int,
) -> list[Contestant]:
    """Build and check candidates and return one contestant for each cache state.

    Raises:
        VerificationError: a candidate is wrong: it may not compete.
    """
    counts = get_op(workload.op).counts(workload)

    def use_threads() -> None:
        _tvm.set_threads(hardware.threads)

    out = []
    for pick in chosen:
        runnable = Runnable(workload, get_schedule(pick.schedule), pick.config, hardware, inputs)
        use_threads()
        runnable.check()
        for cache in caches:
            contestant = Contestant(
                op=str(workload),
                impl="mimo",
                threads=hardware.threads,
                cache=cache,
                call=runnable,
                sets=runnable.sets(cold_bytes if cache == "cold" else 0, memory_bytes),
                bytes=counts.bytes.get("dram", 0.0),
                operations=counts.flops,
                schedule=pick.schedule,
                config=pick.config,
                prepare=use_threads,
            )
            out.append(contestant)
    return out


def _copy(source: Array) -> Array:
    copy = _tvm.empty_aligned(source.shape, source.dtype)
    copy[...] = source
    return copy
