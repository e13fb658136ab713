"""Attention of many tokens over a bfloat16 KV cache on Hopper GPUs: ``wgmma`` on tiles that TMA brings.

Blocks with one group of warps that only asks for tiles of keys and values, and one to three that multiply.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.pages import paged
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention import cuda_layout as layout
from mimo_compile.schedules.attention.cuda_flash import CudaFlash
from mimo_compile.schedules.attention.cuda_work import HEIGHT, spans, steps_of, tiles_of
from mimo_compile.schedules.base import Space
from mimo_compile.schedules.cuda.code import Launch, TensorMap
from mimo_compile.schedules.cuda.limits import fits
from mimo_compile.schedules.mpgemm.cuda_wgmma import NEEDS, REGISTERS, ROWS

PANEL = 64
"""Numbers of a row that lie together in shared memory: 128 bytes, one row of the swizzle."""
_WIDEST = 256
"""Columns of values: those of one product."""
_SPARE = 40
"""Registers of a consumer for all that is neither sum, logit nor weight."""


@dataclass(frozen=True, slots=True)
class FlashConfig:
    """Knobs of `CudaFlashWgmma`."""

    keys: int = 128
    """Of a tile."""
    consumers: int = 2
    """Groups of four warps, each with 64 rows of a block."""
    stages: int = 2
    """Tiles of keys, and as many of values, in shared memory or on their way."""
    overlap: bool = True
    """Weights of a tile are made while the one before is multiplied with its values."""

    @property
    def height(self) -> int:
        """Rows of a block."""
        return ROWS * self.consumers

    @property
    def threads(self) -> int:
        """Of a block: the producer's group and the consumers."""
        return 128 * (self.consumers + 1)


def panels(width: int) -> int:
    """Return how many panels a row of so many numbers takes."""
    return -(-width // PANEL)


class CudaFlashWgmma(CudaFlash):
    """Blocks of 64 rows for each consumer; any window and sink, caches of slots, not of pages."""

    name = "cached_attention.cuda_wgmma"
    op = "cached_attention"
    version: ClassVar[int] = 2
    config: ClassVar[type] = FlashConfig
    needs: ClassVar[frozenset[str]] = layout.NEEDS | NEEDS
    expected: ClassVar[tuple[str, ...]] = ("HGMMA", "UTMALDG", "USETMAXREG")

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Workloads of the op with bfloat16 caches and float arithmetic on Hopper, but for pages."""
        if workload.op != self.op or hardware.missing(NEEDS):
            return False
        return not paged(get_op(self.op).full(workload)) and super().supports(workload, hardware)

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Keys and number of stages, groups that multiply, and whether these overlap products and weights."""
        p = get_op(self.op).full(workload)
        knobs = {
            "keys": (32, 64, 96, 128), "consumers": (1, 2, 3), "stages": (2, 3, 4),
            "overlap": (False, True),
        }  # fmt: skip
        tries = _defaults(p, hardware)
        default = next((c for c in tries if self.legal(p, c, hardware)), FlashConfig(32, 1))
        return Space(FlashConfig, knobs, default, lambda c: self.legal(p, c, hardware))

    def legal(self, p: Mapping[str, Any], config: FlashConfig, hardware: Hardware) -> bool:
        """Say whether a config can be launched, and needs no registers that a consumer's thread lacks."""
        return (
            layout.whole(p["dv"]) <= _WIDEST
            and self.registers(p, config, config.keys) <= REGISTERS[config.consumers][1]
            and (config.consumers == 1 or config.height < 2 * p["t"] * (p["h"] // p["kv"]))
            and fits(
                hardware, threads=config.threads, shared_bytes=self.shared_bytes(p, config)
            )
        )  # fmt: skip

    def registers(self, p: Mapping[str, Any], config: FlashConfig, own: int) -> int:
        """Return about how many registers a consumer's thread needs: sums, logits, weights under way."""
        weights = own // 4 if config.overlap else 0
        return PANEL * panels(layout.whole(p["dv"])) // 2 + own // 2 + weights + _SPARE

    def shared_bytes(self, p: Mapping[str, Any], config: FlashConfig) -> int:
        """Return the shared memory of a block: queries, keys, values, two barriers for each stage."""
        keys, values = panels(layout.whole(p["d"])), panels(layout.whole(p["dv"]))
        rows = config.height * keys + config.stages * config.keys * (keys + values)
        return 2 * PANEL * rows + 32 * config.stages

    def template(self) -> Path:
        """Return the file of the text."""
        return Path(__file__).with_suffix(".cu")

    def constants(self, workload: Workload) -> dict[str, int | float | bool]:
        """Return what the text is told of a workload."""
        found = super().constants(workload) | {"B": get_op(self.op).full(workload)["b"]}
        return {n: x for n, x in found.items() if n not in ("PAGE", "TABLE")}

    def knobs_of(self, config: FlashConfig) -> dict[str, int | float | bool]:
        """Return what the text is told of a config: its registers, too."""
        producer, consumer = REGISTERS[config.consumers]
        more = {"PRODUCER_REGISTERS": producer, "CONSUMER_REGISTERS": consumer}
        return super().knobs_of(config) | more

    def launches(self, workload: Workload, config: FlashConfig) -> tuple[Launch, ...]:
        """Return the one launch."""
        p = get_op(self.op).full(workload)
        shapes = layout.cache_shapes(p)
        maps = (
            TensorMap(n, "bfloat16", heads * slots, wide, config.keys, PANEL)
            for n, (heads, slots, wide) in shapes.items()
        )
        tiles = tiles_of(p["t"], p["h"] // p["kv"], config.height)
        given = ("q", "pos", "sink" if p["sink"] else "q", *maps, "out")
        grid = (p["kv"] * p["b"] * tiles, 1, 1)
        return (
            Launch("attend", grid, config.threads, given, self.shared_bytes(p, config)),
        )  # fmt: skip

    def work(self, workload: Workload, config: FlashConfig, hardware: Hardware) -> Counts:
        """Return the kernel's work at the op's nominal KV lengths: whole tiles, values in whole panels."""
        op: Any = get_op(self.op)
        p = op.full(workload)
        copied = scored = held = 0.0
        for length in op.lengths(p):
            begin, end = spans(p, length, config.height)
            copied += float((-(-(end - begin) // config.keys) * config.keys).sum())
            held += float(end.max() - begin.min()) * p["kv"]
            steps = steps_of(p, length, begin, (config.consumers, ROWS), config.keys)
            scored += float(steps.sum()) * config.keys * (ROWS // HEIGHT)
        deep, wide = PANEL * panels(layout.whole(p["d"])), layout.whole(p["dv"])
        empty = HEIGHT * scored * p["kv"] * (PANEL * panels(wide) - wide)
        found = self.counted(p, copied, held, scored, config.keys)
        # products read keys and values once for 64 rows, and queries once for a tile of keys
        row = 2.0 * (deep + PANEL * panels(wide)) + 2.0 * ROWS * deep / config.keys
        read = p["kv"] * scored / (ROWS // HEIGHT) * row
        moved = {**found.bytes, "l1": read + found.bytes["l2"]}
        return Counts({**found.ops, "tile_bf16": found.ops["tile_bf16"] + empty}, moved)


def _defaults(p: Mapping[str, Any], hardware: Hardware) -> Iterator[FlashConfig]:
    """Return configs, the preferred first: two groups where SMs still have a block each. Not measured."""
    tiles = p["b"] * p["kv"] * tiles_of(p["t"], p["h"] // p["kv"], 2 * ROWS)
    for keys in (128, 96, 64, 32):
        for consumers in (2, 1) if 2 * tiles > hardware.cores else (1,):
            yield FlashConfig(keys, consumers)
            yield FlashConfig(keys, consumers, overlap=False)
