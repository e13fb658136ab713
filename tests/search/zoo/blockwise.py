"""An attention kernel that takes the last block of 16 positions for full."""

from __future__ import annotations

from typing import Any
from unittest import mock

from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention.reach import Reach, fixed
from mimo_compile.schedules.attention.x86_flash import X86Flash
from mimo_compile.schedules.base import Kernel
from mimo_compile.schedules.emit.build import T, bind
from mimo_compile.schedules.emit.vector import LANES


def _seen(reach: Reach, step: Any, u: Any) -> Any:
    return fixed(
        T.if_then_else(step * reach.sizes.blocks + u < reach.total, T.int32(1), T.int32(0))
    )


def _clean(reach: Reach, step: Any) -> Any:
    return (step + 1) * reach.sizes.blocks <= reach.total


def _positions(reach: Reach, step: Any, u: Any) -> Any:
    return bind(T.broadcast(_seen(reach, step, u) - 1, LANES))


def _live(reach: Reach, step: Any, u: Any) -> Any:
    return fixed(_seen(reach, step, u) * LANES)


class Blockwise(X86Flash):
    name = "cached_attention.blockwise"

    def lower(self, workload: Workload, config: Any, hardware: Hardware) -> Kernel:
        with mock.patch.multiple(Reach, clean=_clean, positions=_positions, live=_live):
            return super().lower(workload, config, hardware)
