"""The mean key of each KV head on GPUs: threads add up every so manyth key, and sums are added in pairs.

Blocks take turns at the keys, so that all of a GPU reads them, and a second launch adds up what blocks found.
The order of all additions is fixed. A number goes through no more roundings than the op's bound counts: those
of a thread, of ``log2 parts`` steps, and of one split less than have keys; adding zero rounds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimo_compile.ir.counts import Counts, in_turn
from mimo_compile.ir.hardware import Hardware, gpu_of
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.base import Arg, Array
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention import cuda_layout as layout
from mimo_compile.schedules.base import Kernel, Schedule, Space, kernel_name
from mimo_compile.schedules.cuda.code import DeviceCode, Launch
from mimo_compile.schedules.cuda.limits import array_bytes
from mimo_compile.schedules.cuda.template import rendered

_PAIRS = 8
"""Threads that share a key's 16 columns: 32 bytes, which memory moves at a time."""
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
_LEAST = 8
"""Keys of a thread, all on their way at a time, below which keys are not split further."""
_MERGERS = 128
"""Threads of a block that adds up splits."""


@dataclass(frozen=True, slots=True)
class PartsOfKeysConfig:
    """Knobs."""

    parts: int = 64
    """Of the keys that blocks take at a time: sums of a block's threads."""
    splits: int = 1
    """Blocks that take turns at the keys."""


class CudaKeyMean(Schedule):
    """A block for 16 columns of a KV head, and a share of its keys."""

    name = "key_mean.cuda"
    version = 2
    op = "key_mean"
    config = PartsOfKeysConfig

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Every workload of the op over bfloat16 keys."""
        return workload.op == self.op and layout.takes(workload, hardware)

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Parts of the keys: at least the op's; by default as many blocks as the GPU holds at a time."""
        p, parts = get_op(self.op).full(workload), PartsOfKeysConfig().parts
        held = hardware.cores * (gpu_of(hardware).threads_per_sm // (_PAIRS * parts))
        room = min(held // _slices(p), int(p["len"] or p["cap"]) // (parts * _LEAST))
        splits = max(n for n in _SPLITS if n <= max(1, room))
        knobs = {"parts": (16, 32, 64), "splits": _SPLITS}
        return Space(PartsOfKeysConfig, knobs, PartsOfKeysConfig(parts, splits))

    def lower(self, workload: Workload, config: PartsOfKeysConfig, hardware: Hardware) -> Kernel:
        """Generate the kernel of one config."""
        p = get_op(self.op).full(workload)
        constants = {
            "D": p["d"], "DK": layout.whole(p["d"]), "KV": p["kv"], "CAP": p["cap"], "PARTS": config.parts,
            "SPLITS": config.splits, "MERGE_THREADS": _MERGERS,
        }  # fmt: skip
        threads, split = _PAIRS * config.parts, config.splits > 1
        # without splits some array is given, not looked at
        first = Launch(
            "key_mean", (_slices(p), config.splits, 1), threads,
            ("pos", "k_cache", "sums" if split else "mean", "mean"), 8 * threads,
        )  # fmt: skip
        merged = Launch(
            "merge", (-(-p["kv"] * p["d"] // _MERGERS), 1, 1), _MERGERS, ("pos", "sums", "mean")
        )
        shape = (config.splits, p["kv"] * layout.whole(p["d"]))
        scratch = {"sums": Arg("sums", "output", shape, "float32")} if split else {}
        text = rendered(Path(__file__).with_suffix(".cu"), constants)
        launches = (first, merged) if split else (first,)
        return Kernel(
            kernel_name(self, workload, config, hardware), None, layout.kernel_args(workload),
            self.work(workload, config, hardware), sum(array_bytes(a) for a in scratch.values()),
            layout.NEEDS, device=DeviceCode(text, launches, scratch, expected=("FADD",)),
        )  # fmt: skip

    def work(self, workload: Workload, config: PartsOfKeysConfig, hardware: Hardware) -> Counts:
        """Return what the op cannot avoid, of rows in whole sixteens, and sums of splits."""
        p, need = get_op(self.op).full(workload), get_op(self.op).counts(workload)
        more = layout.whole(p["d"]) / p["d"]
        ops, moved = {n: more * x for n, x in need.ops.items()}, more * need.bytes["dram"]
        if config.splits == 1:
            return Counts(ops, {"dram": moved, "l2": moved})
        result = 4.0 * p["kv"] * p["d"]
        made, read = more * config.splits * result, config.splits * result
        keys = {"dram": moved - result, "l2": moved - result + made}
        added = {"add_f32": read / 4, "fma_f32": result / 4}
        merged = Counts(added, {"dram": result, "l2": result + read}, name="merge")
        return in_turn(Counts(ops, keys, name="key_mean"), merged)

    def layouts(self, workload: Workload, config: PartsOfKeysConfig) -> dict[str, str]:
        """Return the name of the layout of the keys."""
        return {"k_cache": layout.layouts(workload)["k_cache"]}

    def pack(
        self, workload: Workload, config: PartsOfKeysConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Lay out the keys."""
        return layout.pack(workload, arrays)

    def unpack_state(
        self, workload: Workload, config: PartsOfKeysConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Return canonical keys."""
        return layout.unpack(workload, arrays)


def _slices(p: Mapping[str, Any]) -> int:
    """Return the slices of 16 columns of all KV heads."""
    return int(p["kv"] * layout.whole(p["d"]) // (2 * _PAIRS))
