"""Attention in int8 arithmetic over bfloat16 KV caches on GPUs: codes of what is seen, then warps with rows.

A launch of its own makes the codes of keys, and of values unless they are weighed as they are stored, once
for all queries; integers are exact (`ir.ops.int8_attention`). Of `arith=int8` no knob changes a bit of a
result: a stage is a tile of weights, and rows pass over tiles in the order of slots. Made for prompts; of one
token making codes is most of the work.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from mimo_compile.ir.counts import Counts, in_turn
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.base import Arg
from mimo_compile.ir.ops.int8_attention import TILE
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention import cuda_layout as layout
from mimo_compile.schedules.attention.cuda_flash import StagesConfig
from mimo_compile.schedules.attention.cuda_group_layout import deep
from mimo_compile.schedules.attention.cuda_prefill import CudaPrefill
from mimo_compile.schedules.attention.cuda_work import HEIGHT, spans, tiles_of
from mimo_compile.schedules.base import Space
from mimo_compile.schedules.cuda.code import Launch
from mimo_compile.schedules.cuda.limits import fits

_CODERS = 256
"""Threads of a block that makes codes."""
_SPARE = 116
"""Registers beside a tile's logits and the sums: what lets values be 144 wide, where ptxas takes 242 to
255 of 255 without a spill, and no wider. Of narrow values it takes others, which decides nothing."""
_MOST_DEEP = 256
"""Channels of a key: of more, sums of products are no longer the last bits of a float."""


class CudaInt8(CudaPrefill):
    """``arith=int8``: weights and values are bytes, too."""

    name = "cached_attention.cuda_int8"
    version: ClassVar[int] = 2
    arith: ClassVar[str] = "int8"
    half: ClassVar[bool] = False
    expected: ClassVar[tuple[str, ...]] = ("IMMA", "LDSM", "LDGSTS")
    steps: ClassVar[tuple[int, ...]] = (TILE,)
    """Keys of a stage, the default first."""

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Workloads with bfloat16 caches in this arithmetic, of heads that registers hold."""
        if workload.op != self.op or not layout.takes(workload, hardware, self.arith):
            return False
        space = self.space(workload, hardware)
        return space.legal(space.default)

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Keys and number of stages, warps."""
        p = get_op(self.op).full(workload)
        knobs = {"keys": tuple(sorted(self.steps)), "stages": (2, 3), "warps": (1, 2, 4, 8)}
        tries = (
            StagesConfig(keys, 2, warps)
            for keys in self.steps
            for warps in (self.warps_of(p, hardware), 1)
        )
        default = next(
            (c for c in tries if self.legal(p, c, hardware)), StagesConfig(self.steps[-1], 2, 1)
        )
        return Space(StagesConfig, knobs, default, lambda c: self.legal(p, c, hardware))

    def legal(self, p: Mapping[str, Any], config: StagesConfig, hardware: Hardware) -> bool:
        """Say whether a config can be launched."""
        coding = fits(hardware, threads=_CODERS, shared_bytes=self._coding_bytes(p))
        return (
            coding and deep(p["d"]) <= _MOST_DEEP and super().can(p, config, config.keys, hardware)
        )

    def shared_bytes(self, p: Mapping[str, Any], config: Any) -> int:
        """Return the shared memory of a block: codes, scales and values of all stages, codes of queries."""
        sums = layout.whole(p["dv"])
        own = 2 * sums + 16 + 4 if self.half else sums + 12
        queries = config.warps * HEIGHT * deep(p["d"])
        return int(config.stages * config.keys * (deep(p["d"]) + own) + queries)

    def registers(self, p: Mapping[str, Any], config: Any, own: int) -> int:
        """Return about how many registers a thread needs: sums, logits of a tile, and what ptxas adds."""
        if self.half:
            return super().registers(p, config, own)
        return int(layout.whole(p["dv"]) // 2 + TILE // 2 + _SPARE)

    def constants(self, workload: Workload) -> dict[str, int | float | bool]:
        """Return what the text is told of a workload."""
        p = get_op(self.op).full(workload)
        own = {"DEEP": deep(p["d"]), "CODERS": _CODERS, "HALF": self.half}
        return super().constants(workload) | own

    def template(self) -> Path:
        """Return the file of the text."""
        return Path(__file__).with_name("cuda_int8.cu")

    def launches(self, workload: Workload, config: Any) -> tuple[Launch, ...]:
        """Return the launch that makes codes, and the one that attends."""
        p = get_op(self.op).full(workload)
        coded = p["b"] * p["kv"] * -(-p["cap"] // TILE)
        # of what is not there some array is given, not looked at
        codes, scales = ("k_codes", "k_scale") if self.half else ("v_codes", "v_scale")
        first = Launch(
            "make_codes", (coded, 1 if self.half else 2, 1), _CODERS,
            ("pos", "k_cache", "v_cache", "k_codes", "k_scale", codes, scales), self._coding_bytes(p),
        )  # fmt: skip
        sink, values = "sink" if p["sink"] else "q", "v_cache" if self.half else "v_codes"
        tiles = tiles_of(p["t"], p["h"] // p["kv"], HEIGHT * config.warps)
        second = Launch(
            "attend", (p["kv"] * p["b"] * tiles, 1, 1), 32 * config.warps,
            ("q", "pos", sink, "k_codes", "k_scale", values, scales, "out"), self.shared_bytes(p, config),
        )  # fmt: skip
        return first, second

    def scratch(self, workload: Workload, config: Any) -> dict[str, Arg]:
        """Return codes and scales, by tiles of slots; of values the logarithms and inverses of theirs."""
        p = get_op(self.op).full(workload)
        tiles = (p["b"] * p["kv"], -(-p["cap"] // TILE))
        shapes = {"k_codes": (deep(p["d"]), TILE), "k_scale": (TILE,)}
        if not self.half:
            shapes |= {"v_codes": (TILE, layout.whole(p["dv"])), "v_scale": (2, TILE)}
        kinds = {n: "uint8" if n.endswith("codes") else "float32" for n in shapes}
        return {n: Arg(n, "output", (*tiles, *shape), kinds[n]) for n, shape in shapes.items()}

    def work(self, workload: Workload, config: Any, hardware: Hardware) -> Counts:
        """Return the kernel's work at the op's nominal KV lengths."""
        op: Any = get_op(self.op)
        p = op.full(workload)
        coded = copied = scored = held = 0.0
        for length in op.lengths(p):
            begin, end = spans(p, length, HEIGHT)
            held += float(end.max() - begin.min())
            coded += TILE * float((end.max() - 1) // TILE - begin.min() // TILE + 1)
            scored += float(_slots(begin, end, config.keys).sum())
            copied += float(_slots(*spans(p, length, HEIGHT * config.warps), config.keys).sum())
        return in_turn(
            self._coding(p, held, coded), self._attending(p, config, held, copied, scored)
        )

    def _coding(self, p: Mapping[str, Any], held: float, coded: float) -> Counts:
        """Return the counts of making codes: largest magnitude, product, integer, four in a word."""
        kv, sums = float(p["kv"]), 0 if self.half else layout.whole(p["dv"])
        numbers = kv * coded * (layout.whole(p["d"]) + sums)
        read = 2.0 * kv * held * (layout.whole(p["d"]) + sums)
        made = kv * coded * (deep(p["d"]) + 4 + (sums + 8 if sums else 0))
        ops = {"add_f32": 3.0 * numbers, "fma_f32": numbers, "int_op": 1.75 * numbers}
        moved = {"dram": read, "l2": read + made, "l1": read + 2.0 * made}
        return Counts(ops, moved, name="make_codes")

    def _attending(
        self, p: Mapping[str, Any], config: Any, held: float, copied: float, scored: float
    ) -> Counts:
        """Return the counts of passing over codes: copied by blocks, and read by warps with 16 rows each."""
        kv, sums, channels = float(p["kv"]), layout.whole(p["dv"]), deep(p["d"])
        cells, given = HEIGHT * scored * kv, 4.0 * p["b"] * p["t"] * p["h"] * (p["d"] + p["dv"])
        rescaled = cells / config.keys * sums
        if self.half:
            row, stored = channels + 4.0 + 2.0 * sums, 2.0 * kv * held * sums
            ops = {
                "tile_i8": cells * channels, "tile_bf16": cells * sums, "exp_f32": cells,
                # an integer less its zero; greatest, difference, sum
                "add_f32": 4.0 * cells, "fma_f32": 2.0 * cells + rescaled, "int_op": 0.5 * cells,
            }  # fmt: skip
        else:
            row, stored = channels + sums + 12.0, 0.0
            ops = {
                "tile_i8": cells * (channels + sums), "exp_f32": cells,
                # an integer less its zero; twice the logarithm of a scale, two greatest, difference
                "add_f32": 6.0 * cells + rescaled,
                # two scales, a level, a sum; sums of a tile
                "fma_f32": 4.0 * cells + 2.0 * rescaled, "int_op": 0.75 * cells,
            }  # fmt: skip
        moved = {"dram": stored + given, "l2": kv * copied * row + given}
        # each warp reads what the block copied, and in each step the codes of its queries
        own = row + HEIGHT * channels / config.keys
        moved["l1"] = kv * scored * own + moved["l2"]
        return Counts(ops, moved, name="attend")

    def _coding_bytes(self, p: Mapping[str, Any]) -> int:
        """Return the shared memory of a block that makes codes: a tile's, 16 bytes behind each row."""
        widest = deep(p["d"]) if self.half else max(deep(p["d"]), layout.whole(p["dv"]))
        return int(TILE * (widest + 16))


class CudaInt8Half(CudaInt8):
    """``arith=int8half``: values are weighed as they are stored, by weights of bfloat16."""

    name = "cached_attention.cuda_int8half"
    arith: ClassVar[str] = "int8half"
    half: ClassVar[bool] = True
    expected: ClassVar[tuple[str, ...]] = ("IMMA", "HMMA", "LDSM", "LDGSTS")
    steps: ClassVar[tuple[int, ...]] = (64, 32, 16)


def _slots(begin: Any, end: Any, keys: int) -> Any:
    """Return how many slots are in the steps that hold positions ``begin`` ... ``end - 1`` of each tile."""
    return ((end - 1) // keys - begin // keys + 1) * keys
