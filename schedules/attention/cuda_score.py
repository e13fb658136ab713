"""Scores of blocks on GPUs from their bounds, means or compressed keys, whose softmax nobody asks for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.block_lists import blocks_of
from mimo_compile.ir.ops.pages import TABLE, paged, width_of
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention.cuda_layout import float32
from mimo_compile.schedules.base import Kernel, Schedule, Space, kernel_name
from mimo_compile.schedules.cuda.code import DeviceCode, Launch
from mimo_compile.schedules.cuda.limits import fits
from mimo_compile.schedules.cuda.template import rendered

_AGGS = ("none", "max", "mean", "sum", "query")
_FULL = 32
"""Warps of an SM that default configs ask for."""


@dataclass(frozen=True, slots=True)
class EntriesConfig:
    """Knobs of a kernel whose warps have entries one after the other."""

    warps: int = 4
    """Of a block."""
    each: int = 4
    """Entries of a warp, for which its block's queries are in shared memory."""


class CudaScore(Schedule):
    """A warp for an entry and a head of keys; the head's queries take turns."""

    name = "score_blocks.cuda"
    op = "score_blocks"
    config = EntriesConfig

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Kinds ``quest``, ``mean`` and ``gate`` without softmax."""
        if workload.op != self.op or hardware.kind != "cuda":
            return False
        p = get_op(self.op).full(workload)
        alone = p["kind"] in ("quest", "mean") or (p["kind"] == "gate" and not p["soft"])
        shared = self._shared_bytes(workload)
        return bool(alone and p["d"] <= 1024 and fits(hardware, threads=32, shared_bytes=shared))

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Warps of a block and entries of a warp."""
        p, shared = get_op(self.op).full(workload), self._shared_bytes(workload)
        entries = blocks_of(p["cap"], p["block"])
        tasks = p["b"] * blocks_of(p["t"], p["rows"]) * p["kv"] * entries
        each = 1
        while each < 16 and tasks // (2 * each) >= hardware.cores * _FULL:
            each *= 2
        return Space(
            EntriesConfig,
            {"warps": (1, 2, 4, 8), "each": (1, 2, 4, 8, 16)},
            EntriesConfig(4, each),
            lambda c: fits(hardware, threads=32 * c.warps, shared_bytes=shared, registers=128),
        )

    def order(self, workload: Workload, config: EntriesConfig, hardware: Hardware) -> str | None:
        """Lanes have every 32nd column, and are added up by halves."""
        return "lanes"

    def lower(self, workload: Workload, config: EntriesConfig, hardware: Hardware) -> Kernel:
        """Generate the kernel of one config."""
        op = get_op(self.op)
        p, rows = op.full(workload), blocks_of(op.full(workload)["t"], op.full(workload)["rows"])
        blocks, gate = blocks_of(p["cap"], p["block"]), p["kind"] == "gate"
        table = width_of(p["cap"], p["page"]) if paged(p) else 0
        constants: dict[str, int | float | bool | str] = {
            "R": rows, "KV": p["kv"], "GROUP": 1 if gate else p["h"] // p["kv"],
            "D": p["d"], "BLOCKS": blocks, "BLOCK": p["block"], "ROWS": p["rows"],
            "BOUNDS": p["kind"] == "quest", "AGG": _AGGS.index(p["agg"]),
            "SCALE": float32(p["scale"] or p["d"] ** -0.5), "EACH": config.each, "WARPS": config.warps,
            "PAGE": p["page"], "TABLE": table, "ENTRY": "unsigned short" if p["e"] == "bf16" else "float",
        }  # fmt: skip
        tiles = -(-blocks // (config.warps * config.each))
        args = op.args(workload)
        launch = Launch(
            "score_blocks", (p["b"] * rows * p["kv"] * tiles, 1, 1), 32 * config.warps,
            ("q", "pos", TABLE if paged(p) else "pos", "desc", "score"), self._shared_bytes(workload),
        )  # fmt: skip
        return Kernel(
            kernel_name(self, workload, config, hardware), None, args,
            self.work(workload, config, hardware), features=frozenset({"cuda"}),
            device=DeviceCode(
                rendered(Path(__file__).with_suffix(".cu"), constants), (launch,), expected=("SHFL", "FFMA")
            ),
        )  # fmt: skip

    def work(self, workload: Workload, config: EntriesConfig, hardware: Hardware) -> Counts:
        """What the op cannot avoid; queries are read again by each block."""
        p, need = get_op(self.op).full(workload), get_op(self.op).counts(workload)
        tiles = -(-blocks_of(p["cap"], p["block"]) // (config.warps * config.each))
        rows = float(p["b"] * blocks_of(p["t"], p["rows"]))
        queries = 4.0 * rows * p["h"] * p["d"] * (tiles - 1)
        entries = (
            (rows - p["b"]) / rows * need.bytes["dram"]
        )  # each row reads them, the first from memory
        return Counts(
            need.ops, {"dram": need.bytes["dram"], "l2": need.bytes["dram"] + queries + entries}
        )

    def _shared_bytes(self, workload: Workload) -> int:
        p = get_op(self.op).full(workload)
        alone = p["kind"] == "gate" or p["agg"] == "query"
        return int(4 * p["d"] * (1 if alone else p["h"] // p["kv"]))
