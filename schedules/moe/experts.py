"""Routed experts in one kernel: quantise, sort slots by expert, gate and up, silu, down, weighted sum.

A slot is one (token, choice) pair. Slots are sorted by expert, stably, so that each weight is read
once for all tokens of its expert; both matmuls use the tiles and packed layouts of plain matmuls with
the expert as leading index. Ids outside ``[0, E)`` add nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.formats import WeightFormat, parse_weight_format
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.base import Arg, Array
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Kernel, KnobValue, Schedule, Space
from mimo_compile.schedules.emit.build import (
    Register,
    T,
    bind,
    function,
    load,
    loop,
    splat,
    store,
    when,
    workspace,
)
from mimo_compile.schedules.emit.dot import DOTS, Dot, exact
from mimo_compile.schedules.emit.layout import ROWS, CodeLayout, pack_quantised, pack_rows
from mimo_compile.schedules.emit.quantize import (
    Activations,
    alloc_activations,
    quantize_row,
    workspace_bytes,
)
from mimo_compile.schedules.emit.tile import (
    Out,
    TileKnobs,
    Weights,
    float_tile,
    int_tile,
    store_rows,
)
from mimo_compile.schedules.emit.vector import sigmoid
from mimo_compile.schedules.mpgemm.gemm import PARALLEL_BYTES, arg_bytes, kernel_name


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


class Experts(Schedule):
    """Base of the expert schedules."""

    op = "moe"
    config = MoeConfig

    def dots(self, problem: Problem, hardware: Hardware) -> tuple[str, ...]:
        """Return the ways to multiply that may be chosen from."""
        return ("",)

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Tiles of both matmuls, prefetch and threads."""
        problem = Problem.of(workload)
        blocks13, blocks2 = problem.layout13.row_blocks, problem.layout2.row_blocks
        knobs: dict[str, tuple[KnobValue, ...]] = {
            "rows13": tuple(r for r in (1, 2, 3, 4) if blocks13 % r == 0),
            "rows2": tuple(r for r in (1, 2, 3, 4, 6, 8) if blocks2 % r == 0),
            "tokens": tuple(t for t in (1, 2, 4, 8) if t <= problem.t),
            "prefetch": (0, 8, 16, 32),
            "unroll": (1, 2),
            "parallel": (False, True) if hardware.threads > 1 else (False,),
            "dot": self.dots(problem, hardware),
        }

        def legal(config: MoeConfig) -> bool:
            most = max(2 * config.rows13, config.rows2)
            steps = 1
            if not problem.fmt.is_float:
                layout = problem.layout13
                is_int = config.dot not in ("", "float")
                steps = layout.per_byte if is_int else layout.block
                steps *= ROWS // DOTS[config.dot].lanes if config.dot else 1
            size = most * config.tokens * steps * config.unroll
            return most * config.tokens <= 28 and (size <= 256 or most * config.tokens == 2)

        per_expert = sum(arg_bytes(a) for a in problem.args() if a.role == "weight") / problem.e
        work = per_expert * min(problem.slots, problem.e) * max(1.0, problem.slots / problem.e / 4)
        parallel = hardware.threads > 1 and work >= PARALLEL_BYTES
        wanted = max(
            int(t) for t in knobs["tokens"] if t == 1 or t <= 2 * problem.slots / problem.e
        )
        options = [
            MoeConfig(int(r13), int(r2), tokens, 0, unroll, parallel, self.dots(problem, hardware)[0])
            for tokens in (min(4, wanted), min(2, wanted), 1)
            for r13 in sorted(knobs["rows13"], reverse=True) if int(r13) <= 2
            for r2 in sorted(knobs["rows2"], reverse=True) if int(r2) <= 4
            for unroll in (2, 1)
        ]  # fmt: skip
        return Space(MoeConfig, knobs, next(c for c in options if legal(c)), legal)

    def lower(self, workload: Workload, config: MoeConfig, hardware: Hardware) -> Kernel:
        """Generate the kernel of one config."""
        problem = Problem.of(workload)
        name = kernel_name(self, workload, config, hardware)
        args = problem.args()
        return Kernel(
            name,
            function(name, args, _Emitter(problem, config).body),
            args,
            counts(problem, config),
            scratch_bytes(problem, config),
            hardware.features,  # LLVM may have used any of them
        )

    def layouts(self, workload: Workload, config: MoeConfig) -> dict[str, str]:
        """The layouts of plain matmuls, gate and up padded each by itself."""
        return {"weight": "rows16.k1" if Problem.of(workload).fmt.is_float else "rows16.k4"}

    def pack(
        self, workload: Workload, config: MoeConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Pack the experts' matrices that are given."""
        problem = Problem.of(workload)
        halves = {
            name: a.reshape(problem.e, 2, problem.f, a.shape[-1]) if name.startswith("w13_") else a
            for name, a in arrays.items()
        }
        if problem.fmt.is_float:
            return {name: pack_rows(a) for name, a in halves.items()}
        out: dict[str, Array] = {}
        for prefix, layout in (("w13_", problem.layout13), ("w2_", problem.layout2)):
            out |= pack_quantised(layout, prefix, halves, problem.scale_dtype)
        return out


@dataclass(frozen=True, slots=True)
class _Slots:
    """Slots sorted by expert, in the kernel's workspace."""

    hits: Any
    """``[1]``: number of experts that have slots."""
    expert: Any
    """``[E]``: the hit experts, ascending."""
    start: Any
    """``[E + 1]``: first sorted position of each hit expert, then the end."""
    token: Any
    """``[T * k]``: token of each sorted position."""
    place: Any
    """``[T * k]``: sorted position of each slot, -1 for an id that is no expert."""


class _Emitter:
    """Emits the phases of one kernel."""

    def __init__(self, problem: Problem, config: MoeConfig) -> None:
        self.problem, self.config = problem, config
        self.knobs = TileKnobs(config.prefetch, config.unroll)
        self.wide = any(math.prod(a.shape) >= 2**31 for a in problem.args())

    def body(self, x: Any, ids: Any, weights: Any, *rest: Any) -> None:
        """Emit everything, given the buffers of the parameters."""
        p, config = self.problem, self.config
        *packed, y = rest
        half = len(packed) // 2
        w13, w2 = Weights(*packed[:half]), Weights(*packed[half:])
        slots = self.sort(ids)
        width = p.layout13.row_blocks * ROWS
        hidden = workspace((p.slots, width), "float32")
        rows = self.quantised(p.layout13, x, p.t, p.t * p.d)
        with loop(p.layout13.row_blocks // config.rows13, parallel=config.parallel) as task:
            self.gate_up(w13, rows, slots, hidden, task)
        inner = self.quantised(p.layout2, hidden, slots.start[slots.hits[0]], p.slots * p.f)
        with loop(p.layout2.row_blocks // config.rows2, parallel=config.parallel) as task:
            self.down(w2, inner, slots, weights, y, task)

    def sort(self, ids: Any) -> _Slots:
        """Count, then place slots: stable, serial, tiny."""
        p = self.problem
        slots = _Slots(*(workspace((n,), "int32") for n in (1, p.e, p.e + 1, p.slots, p.slots)))
        count = workspace((p.e,), "int32")
        with loop(p.e) as e:
            store(count, T.int32(0), e)

        def each(action: Callable[[Any, Any], None]) -> None:
            with loop(p.t) as t, loop(p.k) as j:
                e = bind(ids[t, j])
                with when(T.And(e >= 0, e < p.e)):
                    action(t * p.k + j, e)

        with loop(p.slots) as s:
            store(slots.place, T.int32(-1), s)
        each(lambda s, e: store(count, count[e] + 1, e))
        total, hits = Register("int32", 1, T.int32(0)), Register("int32", 1, T.int32(0))
        with loop(p.e) as e, when(count[e] > 0):
            number = bind(count[e])
            store(
                slots.expert,
                T.cast(e, "int32") if not isinstance(e, int) else T.int32(e),
                hits.get(),
            )
            store(slots.start, total.get(), hits.get())
            store(count, total.get(), e)  # from here on: where its next slot goes
            total.set(total.get() + number)
            hits.set(hits.get() + 1)
        store(slots.start, total.get(), hits.get())
        store(slots.hits, hits.get(), 0)

        def place(s: Any, e: Any) -> None:
            at = bind(count[e])
            store(slots.token, T.cast(T.floordiv(s, p.k), "int32"), at)
            store(slots.place, at, s)
            store(count, at + 1, e)

        each(place)
        return slots

    def quantised(self, layout: CodeLayout, x: Any, rows: Any, size: int) -> Any:
        """Quantise rows of ``x`` for integer dots; float kernels read them as they are."""
        if not self.config.dot:
            return x
        out = alloc_activations(layout, x.shape[0], self.dot(layout).activation)
        with loop(rows, parallel=self.config.parallel and size > 64 << 10) as row:
            quantize_row(layout, x, (row,), out, row)
        return out

    def dot(self, layout: CodeLayout) -> Dot:
        """Return the chosen way to multiply."""
        return DOTS[self.config.dot](layout)

    def lanes(self) -> int:
        """Rows in a vector."""
        return DOTS[self.config.dot].lanes if self.config.dot else ROWS

    def tile(
        self, layout: CodeLayout, weights: Weights, x: Any,
        blocks: list[tuple[Any, ...]], tokens: list[Any], out: Out,
    ) -> None:  # fmt: skip
        """Emit one register tile."""
        if isinstance(x, Activations):
            int_tile(self.dot(layout), weights, x, blocks, tokens, out, self.knobs)
        else:
            codes = None if self.problem.fmt.is_float else layout
            float_tile(codes, layout.k, weights, x, blocks, tokens, out, self.knobs)

    def over_experts(self, slots: _Slots, emit: Callable[[Any, Any, int], None]) -> None:
        """Visit the hit experts and their slots in tiles: ``emit(expert, position, count)``."""
        with T.serial(0, slots.hits[0]) as h:
            expert = slots.expert[h]
            expert = bind(T.cast(expert, "int64") if self.wide else expert)
            first, count = bind(slots.start[h]), bind(slots.start[h + 1] - slots.start[h])
            size = self.config.tokens
            with T.serial(0, T.floordiv(count, size)) as i:
                emit(expert, bind(first + i * size), size)
            while (size := size // 2) >= 1:
                with when(T.bitwise_and(count, size) != 0):
                    # what the larger tiles have done: the higher bits of the count
                    done = T.bitwise_and(count, T.int32(-2 * size))
                    emit(expert, bind(first + done), size)

    def gate_up(self, w13: Weights, x: Any, slots: _Slots, hidden: Any, task: Any) -> None:
        """Compute ``silu(gate) * up`` of some rows for all slots."""
        rows, lanes = self.config.rows13, self.lanes()

        def emit(expert: Any, first: Any, count: int) -> None:
            blocks: list[tuple[Any, ...]] = [
                (expert, half, task * rows + r) for half in (0, 1) for r in range(rows)
            ]
            gates: dict[tuple[int, int, int], Register] = {}

            def out(r: int, m: int, lane: int, value: Any) -> None:
                if r < rows:
                    gates[r, m, lane] = Register("float32", lanes, value)
                    return
                gate = bind(gates[r - rows, m, lane].get())
                result = gate * sigmoid(gate, lanes) * value
                store(
                    hidden, result, first + m, (task * rows + r - rows) * ROWS + lane, lanes=lanes
                )

            tokens = [bind(slots.token[first + m]) for m in range(count)]
            self.tile(self.problem.layout13, w13, x, blocks, tokens, out)

        self.over_experts(slots, emit)

    def down(self, w2: Weights, x: Any, slots: _Slots, weights: Any, y: Any, task: Any) -> None:
        """Project some rows of all slots down and add each token's up in the order of its choices."""
        p, rows, lanes = self.problem, self.config.rows2, self.lanes()
        parts = workspace((p.slots, rows * ROWS), "float32")

        def emit(expert: Any, first: Any, count: int) -> None:
            blocks: list[tuple[Any, ...]] = [(expert, task * rows + r) for r in range(rows)]

            def out(r: int, m: int, lane: int, value: Any) -> None:
                store(parts, value, first + m, r * ROWS + lane, lanes=lanes)

            tokens = [first + m for m in range(count)]
            self.tile(p.layout2, w2, x, blocks, tokens, out)

        self.over_experts(slots, emit)
        with loop(p.t) as t:
            sums = [Register("float32", ROWS, splat(T.float32(0), ROWS)) for _ in range(rows)]
            with loop(p.k) as j:
                at = bind(slots.place[t * p.k + j])
                with when(at >= 0):
                    weight = splat(bind(weights[t, j]), ROWS)
                    for r, total in enumerate(sums):
                        total.set(total.get() + weight * load(parts, at, r * ROWS, lanes=ROWS))
            for r, total in enumerate(sums):
                store_rows(y, t, task * rows + r, 0, ROWS, total.get(), p.d, last=r + 1 == rows)


def scratch_bytes(problem: Problem, config: MoeConfig) -> int:
    """Bytes of workspace: lists, hidden rows, quantised rows, one task's parts for each thread."""
    p = problem
    size = 4 * (2 * p.slots + 3 * p.e + 2)
    size += 4 * p.slots * ROWS * (p.layout13.row_blocks + config.rows2)
    if config.dot:
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
        if config.dot:
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
                add("int_op", 3 * weights * layout.k * tiles)
                add("add_f32", weights * layout.k * tiles)
    add("fma_f32", float(p.slots * p.d))
    dram = hit * per_expert + 8.0 * p.t * p.d + 8.0 * p.slots
    near = max(dram, per_expert * tiles + 8.0 * p.slots * (p.d + 2 * p.f))
    return Counts(ops, {"dram": dram, "l2": near, "l1": near})
