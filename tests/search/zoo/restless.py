"""An attention kernel that takes each sequence of a batch for one that has a token."""

from __future__ import annotations

from typing import Any
from unittest import mock

from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention import x86_flash
from mimo_compile.schedules.base import Kernel
from mimo_compile.schedules.emit.build import T


class Everyone:
    """Starts of sequences, as they are, and one token for each."""

    def __init__(self, pos: Any) -> None:
        self.pos = pos

    def __getitem__(self, index: tuple[Any, int]) -> Any:
        return T.int32(1) if index[1] == 1 else self.pos[index]


class Restless(x86_flash.X86Flash):
    name = "cached_attention.restless"

    def lower(self, workload: Workload, config: Any, hardware: Hardware) -> Kernel:
        emit = x86_flash.emit

        def emitting(*given: Any, **named: Any) -> None:
            sizes, splits, parallel, scale, q, pos, *more = given
            emit(sizes, splits, parallel, scale, q, Everyone(pos), *more, **named)

        with mock.patch.object(x86_flash, "emit", emitting):
            return super().lower(workload, config, hardware)
