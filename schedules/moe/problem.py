"""One expert layer and how a kernel runs it: extents, config, packed arguments, declared work."""

from __future__ import annotations

from dataclasses import dataclass

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.formats import WeightFormat, parse_weight_format
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.base import Arg
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.emit.dot import DOTS, exact, float_work
from mimo_compile.schedules.emit.layout import ROWS, CodeLayout
from mimo_compile.schedules.emit.quantize import workspace_bytes
from mimo_compile.schedules.mpgemm.problem import arg_bytes


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """Knobs of the expert kernel."""

    rows13: int = 2
    """Blocks of 16 rows of gate, and as many of up, in a register tile."""
    rows2: int = 4
    """Blocks of 16 rows in a register tile of the down projection."""
    tokens: int = 1
    """Slots in a register tile (a power of two; what is left takes smaller ones)."""
    prefetch: int = 0
    """Distance of prefetches in cache lines, 0 for none."""
    unroll: int = 1
    """Steps along K in the inner loop's body."""
    parallel: bool = False
    """Spread the rows of the weights over threads."""
    dot: str = ""
    """Name of the way to multiply (`emit.dot.DOTS`); empty for float32 FMA."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One expert layer, its parameters resolved."""

    t: int
    e: int
    k: int
    d: int
    f: int
    fmt: WeightFormat
    act: str
    scale_dtype: str

    @classmethod
    def of(cls, workload: Workload) -> Problem:
        """Read a workload of the op ``moe``."""
        p = get_op("moe").full(workload)
        fmt = parse_weight_format(p["w"])
        return cls(p["t"], p["e"], p["k"], p["d"], p["f"], fmt, p["a"], p["s"])

    @property
    def slots(self) -> int:
        """Pairs of token and choice."""
        return self.t * self.k

    @property
    def layout13(self) -> CodeLayout:
        """Layout of the gate, and of the up matrix, of one expert."""
        return CodeLayout(self.fmt, self.f, self.d)

    @property
    def layout2(self) -> CodeLayout:
        """Layout of the down matrix of one expert."""
        return CodeLayout(self.fmt, self.d, self.f)

    @property
    def exact(self) -> bool:
        """True for integer codes whose sums fit 32 bits in both matmuls."""
        return exact(self.layout13) and exact(self.layout2)

    def args(self) -> tuple[Arg, ...]:
        """Return the kernel's parameters: x, ids, weights, packed w13 and w2, y."""
        out = [
            Arg("x", "input", (self.t, self.d), "float32"),
            Arg("ids", "input", (self.t, self.k), "int32"),
            Arg("weights", "input", (self.t, self.k), "float32"),
        ]
        for prefix, lead, layout in (
            ("w13_", (self.e, 2), self.layout13),
            ("w2_", (self.e,), self.layout2),
        ):
            if self.fmt.is_float:
                dtype = "uint16" if self.fmt.bits == 16 else "float32"
                shape = (*lead, layout.row_blocks, layout.k, ROWS)
                out.append(Arg(f"{prefix}w", "weight", shape, dtype))
            else:
                out += layout.args(prefix, lead, self.scale_dtype)
        return (*out, Arg("y", "output", (self.t, self.d), "float32"))


def scratch_bytes(problem: Problem, config: MoeConfig) -> int:
    """Bytes of workspace: lists, hidden rows, quantised rows, one task's parts for each thread."""
    p = problem
    size = 4 * (2 * p.slots + 3 * p.e + 2)
    size += 4 * p.slots * ROWS * (p.layout13.row_blocks + config.rows2)
    if config.dot in DOTS:
        dtype = DOTS[config.dot](p.layout13).activation
        size += workspace_bytes(p.layout13, p.t, dtype) + workspace_bytes(p.layout2, p.slots, dtype)
    return size


def counts(problem: Problem, config: MoeConfig) -> Counts:
    """Work under uniform routing (expected number of hit experts), over padded extents."""
    p = problem
    per_expert = sum(arg_bytes(a) for a in p.args() if a.role == "weight") / p.e
    hit = p.e * (1 - (1 - p.k / p.e) ** p.t)
    tiles = max(hit, p.slots / config.tokens)
    ops: dict[str, float] = {"exp_f32": float(p.slots * p.layout13.row_blocks * ROWS)}

    def add(kind: str, amount: float) -> None:
        ops[kind] = ops.get(kind, 0.0) + amount

    for layout, halves in ((p.layout13, 2), (p.layout2, 1)):
        weights = float(halves * layout.row_blocks * ROWS)
        if config.dot in DOTS:
            dot = DOTS[config.dot](layout)
            steps = weights / dot.lanes * layout.blocks
            for kind, amount in dot.work.items():
                add(kind, amount * steps * p.slots)
            for kind, amount in dot.unpack_work.items():
                add(kind, amount * steps * tiles)
            add("fma_f32", weights * layout.groups * p.slots * (2 if p.fmt.has_zero else 1))
        else:
            add("fma_f32", weights * layout.k * p.slots)
            if not p.fmt.is_float:
                for kind, amount in float_work(layout, config.dot).items():
                    add(kind, amount * weights * layout.k * tiles)
    add("fma_f32", float(p.slots * p.d))
    dram = hit * per_expert + 8.0 * p.t * p.d + 8.0 * p.slots
    near = max(dram, per_expert * tiles + 8.0 * p.slots * (p.d + 2 * p.f))
    return Counts(ops, {"dram": dram, "l2": near, "l1": near})
