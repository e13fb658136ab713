"""RMS normalisation on GPUs, with the residual addition fused in when there is one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Space
from mimo_compile.schedules.cuda.limits import MOST_THREADS, WARP, fits
from mimo_compile.schedules.elementwise.cuda_rows import THREADS, WIDTH, CudaRows

HELD = 64
"""Most numbers of a row that a thread keeps in registers, of blocks of up to half of the most threads."""
HELD_BY_MOST = 16
"""In larger blocks, whose threads have 64 registers."""
_BUSY = 1024
"""Threads that keep an SM's port to L2 busy, about: rows are for so many threads of each."""


@dataclass(frozen=True, slots=True)
class TeamConfig:
    """Knobs of a kernel whose threads share rows."""

    threads: int = 256
    """Of a block; it has ``threads / team`` rows."""
    team: int = 256
    """Threads that share a row, of one warp or more."""
    width: int = WIDTH
    """Neighbouring numbers of a thread: its loads and stores have 16 bytes at most."""


class CudaRmsNorm(CudaRows):
    """A row is in the registers of a team of threads while its squares are added up."""

    name = "rms_norm.cuda"
    op = "rms_norm"
    config = TeamConfig
    symbol = "rms_norm"
    expected = ("LDG.E.128", "STG.E.128", "SHFL")

    def rows(self, p: dict[str, Any]) -> tuple[int, int]:
        """Tokens, columns."""
        return p["t"], p["d"]

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Threads of a block and of a row, and how wide they read."""
        p = get_op(self.op).full(workload)
        widths = tuple(w for w in self.widths if p["d"] % w == 0)
        width = max(w for w in widths if w <= WIDTH)
        # rows are shared by more threads the fewer there are, down to one piece for each thread
        team = WARP
        while team < MOST_THREADS and team * width < p["d"] and (
            p["t"] * team < hardware.cores * _BUSY or -(-p["d"] // team) > HELD
        ):  # fmt: skip
            team *= 2
        default = TeamConfig(max(team, 128), team, width)
        return Space(
            TeamConfig,
            {"threads": (*THREADS, MOST_THREADS), "team": (32, 64, 128, 256, 512, 1024), "width": widths},
            default,
            lambda c: _legal(c, p["d"], hardware),
        )  # fmt: skip

    def order(self, workload: Workload, config: TeamConfig, hardware: Hardware) -> str | None:
        """Who adds up which squares follows from the team and the width."""
        return f"team={config.team},width={config.width}"

    def constants(self, p: dict[str, Any]) -> dict[str, int | float | bool | str]:
        """Extents, and whether there is a residual."""
        return {
            "ROWS": p["t"],
            "D": p["d"],
            "EPS": float(np.float32(p["eps"])),
            "RESIDUAL": bool(p["residual"]),
        }

    def knobs(self, p: dict[str, Any], config: TeamConfig) -> dict[str, int | float | bool | str]:
        """Who has what."""
        return {"TEAM": config.team, "WIDTH": config.width, "HOLD": bool(_held(p["d"], config))}

    def blocks(self, p: dict[str, Any], config: TeamConfig) -> int:
        """One for some rows."""
        return int(-(-p["t"] // (config.threads // config.team)))

    def shared_bytes(self, config: TeamConfig) -> int:
        """A partial sum for each warp."""
        return 4 * (config.threads // WARP) if config.team > WARP else 0

    def work(self, workload: Workload, config: TeamConfig, hardware: Hardware) -> Counts:
        """Rows once from memory, those that are not held a second time from L2; weights for each row."""
        need, p = get_op(self.op).counts(workload), get_op(self.op).full(workload)
        rows, far = 4.0 * p["t"] * p["d"], need.bytes["dram"] + 4.0 * p["d"]
        again = 0.0 if _held(p["d"], config) else rows
        return Counts(need.ops, {"dram": far, "l2": need.bytes["dram"] + rows + again})


def _each(columns: int, config: TeamConfig) -> int:
    """Return the numbers of a row that a thread has at most."""
    return -(-columns // (config.team * config.width)) * config.width


def _held(columns: int, config: TeamConfig) -> int:
    """Return the numbers of a row that a thread keeps in registers; 0: it reads them again."""
    each = _each(columns, config)
    return each if each <= (HELD if config.threads < MOST_THREADS else HELD_BY_MOST) else 0


def _legal(config: TeamConfig, columns: int, hardware: Hardware) -> bool:
    """Teams are of one block, and have all a piece; only the largest do not keep their rows.

    Roundings are then far within the op's bound, ``(8 + 2 sqrt(d)) u``: 64 squares of a thread, 5 sums of a
    warp and 32 of warps, of which the root takes half, and four more, are 56 u; rows of less than 600 numbers
    have fewer terms.
    """
    held = _held(columns, config)
    some = config.team == WARP or config.team * config.width < 2 * columns
    return (
        config.threads % config.team == 0
        and (held > 0 or config.team == MOST_THREADS)
        and some
        and fits(hardware, threads=config.threads, registers=32 + held)
    )
