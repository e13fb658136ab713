"""An attention kernel that is right but for what it reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mimo_compile.ir.ops.base import Array
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention.x86_flash_pairs import X86FlashPairs

KEYS = 16


class Neighbours(X86FlashPairs):
    """Takes for the values of some keys amid the cache those of the next ones."""

    name = "cached_attention.neighbours"

    def pack(
        self, workload: Workload, config: Any, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Lay out a cache in which the values are moved."""
        values = arrays["v_cache"].copy()
        middle = len(values) // 2
        values[middle : middle + KEYS] = values[middle + KEYS : middle + 2 * KEYS]
        return super().pack(workload, config, {**arrays, "v_cache": values})
