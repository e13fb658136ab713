"""Lists of the best blocks on GPUs: one block of threads for each list, with its scores in shared memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.block_lists import blocks_of
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention.cuda_layout import float32
from mimo_compile.schedules.base import Kernel, Schedule, Space, kernel_name
from mimo_compile.schedules.cuda.code import DeviceCode, Launch
from mimo_compile.schedules.cuda.limits import fits
from mimo_compile.schedules.cuda.template import rendered

BITS = 32
"""Passes over the scores that find a level."""


@dataclass(frozen=True, slots=True)
class ListConfig:
    """Knobs."""

    threads: int = 256
    """That share a list."""


class CudaSelect(Schedule):
    """The level of the last block that is wanted, bit by bit; then prefix sums."""

    name = "select_blocks.cuda"
    op = "select_blocks"
    config = ListConfig

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Rules ``topk`` and ``threshold``, each head alone, as far as shared memory holds scores."""
        if workload.op != self.op or hardware.kind != "cuda":
            return False
        p = get_op(self.op).full(workload)
        plain = p["rule"] != "mass" and p["merge"] == "none" and float32(p["share"]) == p["share"]
        shared = _shared_bytes(workload, ListConfig(32))
        return plain and fits(hardware, threads=32, shared_bytes=shared)

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Threads of a list."""
        blocks = blocks_of(
            get_op(self.op).full(workload)["cap"], get_op(self.op).full(workload)["block"]
        )
        threads = 32
        while threads < 1024 and threads * 8 < blocks:
            threads *= 2

        def legal(config: ListConfig) -> bool:
            shared = _shared_bytes(workload, config)
            return fits(hardware, threads=config.threads, shared_bytes=shared, registers=48)

        while not legal(ListConfig(threads)):
            threads //= 2
        return Space(
            ListConfig, {"threads": (32, 64, 128, 256, 512, 1024)}, ListConfig(threads), legal
        )

    def order(self, workload: Workload, config: ListConfig, hardware: Hardware) -> str | None:
        """Nothing is added up but counts."""
        return "exact"

    def lower(self, workload: Workload, config: ListConfig, hardware: Hardware) -> Kernel:
        """Generate the kernel of one config."""
        op = get_op(self.op)
        p, args = op.full(workload), op.args(workload)
        lists = {a.name: a.shape for a in args}["idx"]
        rows = blocks_of(p["t"], p["rows"])
        constants = {
            "R": rows, "HS": p["hs"], "BLOCKS": blocks_of(p["cap"], p["block"]), "BLOCK": p["block"],
            "ROWS": p["rows"], "K": p["k"], "SHARE": float32(p["share"]), "FIRST": p["first"],
            "LAST": p["last"], "KMAX": lists[-1], "POSITIVE": bool(p["positive"]),
            "THRESHOLD": p["rule"] == "threshold", "THREADS": config.threads,
        }  # fmt: skip
        launch = Launch(
            "select_blocks", (p["b"] * rows * p["hs"], 1, 1), config.threads,
            tuple(a.name for a in args), _shared_bytes(workload, config),
        )  # fmt: skip
        return Kernel(
            kernel_name(self, workload, config, hardware), None, args,
            self.work(workload, config, hardware), features=frozenset({"cuda"}),
            device=DeviceCode(
                rendered(Path(__file__).with_suffix(".cu"), constants), (launch,), expected=("SHFL",)
            ),
        )  # fmt: skip

    def work(self, workload: Workload, config: ListConfig, hardware: Hardware) -> Counts:
        """Scores once from memory, and compared once for each bit of a level; a threshold may have two."""
        op = get_op(self.op)
        p, need = op.full(workload), op.counts(workload)
        levels = 2 if p["rule"] == "threshold" and p["k"] else 1
        return Counts({"int_op": need.ops["int_op"] * (levels * (BITS + 1) + 2)}, need.bytes)


def _shared_bytes(workload: Workload, config: ListConfig) -> int:
    p = get_op(workload.op).full(workload)
    return int(4 * (blocks_of(p["cap"], p["block"]) + config.threads))
