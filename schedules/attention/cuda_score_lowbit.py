"""Scores of blocks for prefill by products of codes on GPUs (SALE): bytes on matrix tiles, up to 8 bits.

Keys are coded once; a block then is a head with a tile of queries, whose codes meet those of every key
between its sinks and its near keys. Only the greatest estimate of each block of keys is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimo_compile.ir.counts import Counts, in_turn
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.base import Arg, Array
from mimo_compile.ir.ops.block_lists import blocks_of
from mimo_compile.ir.ops.int8_attention import TILE
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention import cuda_layout as layout
from mimo_compile.schedules.attention.cuda_flash import LOG2_E
from mimo_compile.schedules.attention.cuda_group_layout import deep
from mimo_compile.schedules.attention.cuda_work import HEIGHT
from mimo_compile.schedules.base import Kernel, Schedule, Space, kernel_name
from mimo_compile.schedules.cuda.code import DeviceCode, Launch
from mimo_compile.schedules.cuda.limits import array_bytes, fits
from mimo_compile.schedules.cuda.template import rendered

_CODERS = 256
"""Threads of a block that makes codes."""
_MOST_WARPS = 8
_MOST_DEEP = 256
"""Channels of a key: of more, sums of products are no longer the last bits of a float."""
_REGISTERS = 184
"""Registers of a thread, about."""


@dataclass(frozen=True, slots=True)
class LowbitStagesConfig:
    """Knobs."""

    stages: int = 2
    """Tiles of codes, of which all but one are on their way while one is worked on."""


class CudaScoreLowbit(Schedule):
    """``mma.sync`` of bytes for estimates, of bfloat16 in three terms for the exact region."""

    name = "score_lowbit.cuda"
    version = 2
    op = "score_lowbit"
    config = LowbitStagesConfig

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Blocks of 8, 16, 32, 64 and 128 keys, up to 128 estimated queries of a tile, bfloat16 keys."""
        if workload.op != self.op or not layout.takes(workload, hardware):
            return False
        p = get_op(self.op).full(workload)
        blocks = p["block"] % 8 == 0 and TILE % p["block"] == 0
        narrow = deep(p["d"]) <= _MOST_DEEP and _warps(p) <= _MOST_WARPS
        return blocks and narrow and self._legal(p, LowbitStagesConfig(2), hardware)

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Number of stages."""
        p = get_op(self.op).full(workload)
        return Space(
            LowbitStagesConfig, {"stages": (2, 3, 4)}, LowbitStagesConfig(2),
            lambda c: self._legal(p, c, hardware),
        )  # fmt: skip

    def lower(self, workload: Workload, config: LowbitStagesConfig, hardware: Hardware) -> Kernel:
        """Generate the kernel of one config."""
        op: Any = get_op(self.op)
        p = op.full(workload)
        names = {
            "BLOCK": "block",
            "LIST": "rows",
            "EVERY": "every",
            "FIRST": "first",
            "LAST": "last",
        }
        constants: dict[str, int | float | bool] = {
            n.upper(): p[n] for n in ("t", "h", "kv", "d", "cap")
        }
        constants |= {name: p[n] for name, n in names.items()} | {
            "DK": layout.whole(p["d"]), "DEEP": deep(p["d"]), "LEAST": p["least"],
            "SCALE": layout.float32(op.softmax_scale(p) * LOG2_E), "TOP": float(2 ** (p["bits"] - 1) - 1),
            "CODERS": _CODERS, "WARPS": _warps(p), "STAGES": config.stages,
        }  # fmt: skip
        coded = -(-p["cap"] // TILE)
        shapes = {
            "codes": ((p["kv"], coded, TILE, deep(p["d"])), "uint8"),
            "scales": ((p["kv"], coded, TILE), "float32"),
            "shifts": ((p["h"], coded, TILE), "float32"),
        }
        scratch = {n: Arg(n, "output", shape, kind) for n, (shape, kind) in shapes.items()}
        first = Launch(
            "make_codes", (p["kv"] * coded, 1, 1), _CODERS,
            ("pos", "q_mean", "k_mean", "k_cache", *shapes), TILE * (deep(p["d"]) + 16),
        )  # fmt: skip
        second = Launch(
            "estimate", (p["h"] * blocks_of(p["t"], p["rows"]), 1, 1), 32 * _warps(p),
            ("q", "pos", "q_mean", "k_mean", "k_cache", *shapes, "score"), _shared_bytes(p, config),
        )  # fmt: skip
        text = rendered(Path(__file__).with_suffix(".cu"), constants)
        code = DeviceCode(
            text, (first, second), scratch, expected=("IMMA", "HMMA", "LDSM", "LDGSTS")
        )
        return Kernel(
            kernel_name(self, workload, config, hardware), None, layout.kernel_args(workload),
            self.work(workload, config, hardware), sum(array_bytes(a) for a in scratch.values()),
            layout.NEEDS, device=code,
        )  # fmt: skip

    def work(self, workload: Workload, config: LowbitStagesConfig, hardware: Hardware) -> Counts:
        """Return the kernel's work at the nominal length: every key between sinks and near keys of a tile."""
        p, need = get_op(self.op).full(workload), get_op(self.op).counts(workload)
        length, tiles, channels = (
            int(p["len"] or p["cap"]),
            blocks_of(p["t"], p["rows"]),
            deep(p["d"]),
        )
        rows, wide = float(HEIGHT * _warps(p)), layout.whole(p["d"])
        scored = exact = 0.0
        for tile in range(tiles if length > p["least"] else 0):
            own = (length - p["t"] + tile * p["rows"]) // p["block"] - p["last"]
            if own >= p["first"]:
                low = p["first"] * p["block"] // TILE
                scored += TILE * (((own + 1) * p["block"] - 1) // TILE + 1 - low)
                seen = length - p["t"] + min((tile + 1) * p["rows"], p["t"])
                exact += -(-(seen - (own + 1 - p["first"]) * p["block"]) // HEIGHT) * HEIGHT
        keys, heads = float(p["kv"] * length), float(p["h"])
        cells, near = rows * scored * heads, rows * exact * heads
        read = 2.0 * keys * wide
        codes = keys * (channels + 4) + 4.0 * heads * length
        numbers, shifted = keys * wide, heads * length * wide
        first = Counts(
            {"add_f32": 4.0 * numbers, "fma_f32": numbers + shifted, "int_op": 1.75 * numbers},
            {"dram": read, "l2": read + codes}, name="make_codes",
        )  # fmt: skip
        rest = need.bytes["dram"] - 2.0 * keys * p["d"]
        split = 4.0 * near / HEIGHT * wide  # of keys, in three numbers each, by each warp
        second = Counts(
            {
                "tile_i8": max(cells * channels, need.ops["dot_i8"]),
                "tile_bf16": 6.0 * near * wide, "exp_f32": near,
                # an integer less its zero, a shift, a denominator, the greatest
                "add_f32": 4.0 * cells + 3.0 * near + split, "fma_f32": 2.0 * cells,
                "int_op": 0.75 * split,
            },
            {"dram": rest, "l2": rest + heads * (scored * (channels + 8) + exact * 2.0 * wide)},
            name="estimate",
        )  # fmt: skip
        return in_turn(first, second)

    def layouts(self, workload: Workload, config: LowbitStagesConfig) -> dict[str, str]:
        """Return the name of the layout of the keys."""
        return {"k_cache": layout.layouts(workload)["k_cache"]}

    def pack(
        self, workload: Workload, config: LowbitStagesConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Lay out the keys."""
        return layout.pack(workload, arrays)

    def unpack_state(
        self, workload: Workload, config: LowbitStagesConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Return canonical keys."""
        return layout.unpack(workload, arrays)

    def _legal(self, p: Mapping[str, Any], config: LowbitStagesConfig, hardware: Hardware) -> bool:
        own, coding = _shared_bytes(p, config), TILE * (deep(p["d"]) + 16)
        threads = 32 * _warps(p)
        return fits(hardware, threads=_CODERS, shared_bytes=coding) and fits(
            hardware, threads=threads, shared_bytes=own, registers=_REGISTERS
        )


def _warps(p: Mapping[str, Any]) -> int:
    """Return the warps of a block: each has 16 of a tile's queries that are estimated."""
    return int(-(-blocks_of(min(p["rows"], p["t"]), p["every"]) // HEIGHT))


def _shared_bytes(p: Mapping[str, Any], config: LowbitStagesConfig) -> int:
    """Return the shared memory of a block: codes and scales of all stages, queries as codes and in terms."""
    queries = HEIGHT * deep(p["d"]) + 3 * 32 * layout.whole(p["d"]) + 4 * TILE // p["block"]
    return int(config.stages * TILE * (deep(p["d"]) + 8) + _warps(p) * queries)
