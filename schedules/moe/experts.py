"""Expert schedules on x86: their configs, and kernels that read the layouts of plain matmuls."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops.base import Array
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Kernel, KnobValue, Schedule, Space, kernel_name
from mimo_compile.schedules.emit.build import function
from mimo_compile.schedules.emit.layout import ROWS
from mimo_compile.schedules.emit.matrix import PARALLEL_BYTES
from mimo_compile.schedules.moe.kernel import ExpertKernel
from mimo_compile.schedules.moe.multiply import Multiply
from mimo_compile.schedules.moe.problem import MoeConfig, Problem, Split
from mimo_compile.schedules.moe.work import expert_work

_FEW = 8
"""Slots of an expert up to which reading weights takes longer than multiplying with them."""
_ROOM = 4
"""Slots in a tile from which on there is something between powers of two."""
_PARTS_BYTES = 64 << 20
"""Most workspace that goes into results of slots before tokens add them up."""


class Experts(Schedule):
    """Base of the expert schedules."""

    op = "moe"
    version: ClassVar[int] = 4
    config = MoeConfig
    packing: ClassVar[str] = ""
    """Layout of integer codes (`emit.dense.PACKINGS`)."""

    def problem(self, workload: Workload) -> Problem:
        """Return the workload as this schedule runs it."""
        return Problem.of(workload, self.packing)

    @abstractmethod
    def multiply(self, problem: Problem, config: MoeConfig) -> Multiply:
        """Return how both matmuls multiply."""

    def kernel(self, problem: Problem, config: MoeConfig) -> ExpertKernel:
        """Return the emitter of the kernel."""
        return ExpertKernel(self.multiply(problem, config))

    def dots(self, problem: Problem, hardware: Hardware) -> tuple[str, ...]:
        """Return the ways to multiply that may be chosen from."""
        return ("",)

    def unrolls(self, problem: Problem) -> tuple[int, ...]:
        """Return the steps along K that an inner loop may hold."""
        return (1, 2, 4)

    def streams(self, problem: Problem) -> bool:
        """Say whether one row block at a time, from memory, is best where experts have few slots."""
        return problem.act == "a8" and problem.exact

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Tiles of both matmuls, prefetch and threads."""
        problem = self.problem(workload)
        blocks13, blocks2 = problem.layout13.row_blocks, problem.layout2.row_blocks
        knobs: dict[str, tuple[KnobValue, ...]] = {
            "rows13": tuple(r for r in (1, 2, 3, 4) if blocks13 % r == 0),
            "rows2": tuple(r for r in (1, 2, 3, 4, 6, 8) if blocks2 % r == 0),
            "tokens": tuple(t for t in (1, 2, 4, 6, 8) if t <= problem.t),
            "prefetch": (0, 8, 16, 32, 128),
            "unroll": self.unrolls(problem),
            "parallel": (False, True) if hardware.threads > 1 else (False,),
            "tasks": tuple(sorted({0, hardware.threads, 4 * hardware.threads})),
            "apart": (False, True)[: problem.halves],
            "dot": self.dots(problem, hardware),
            "share": (False, True) if problem.t > 1 else (False,),
            "once": (False, True) if problem.t >= _ROOM else (False,),
        }

        def legal(config: MoeConfig) -> bool:
            most = max(config.rows13 * (1 if config.apart else problem.halves), config.rows2)
            multiply = self.multiply(problem, config)
            if config.unroll > 1 and not multiply.unrolls:
                return False
            if config.share and config.prefetch:
                return False
            if config.once and config.tokens < _ROOM:
                return False
            if not config.once and config.tokens & (config.tokens - 1):
                return False
            size = most * config.tokens * multiply.cost * config.unroll
            return most * config.tokens <= 28 and (size <= 256 or most * config.tokens <= 2)

        work = (
            problem.expert_bytes
            * min(problem.slots, problem.e)
            * max(1.0, problem.slots / problem.e / 4)
        )
        parallel = hardware.threads > 1 and work >= PARALLEL_BYTES
        space = Space(MoeConfig, knobs, None, legal)
        return replace(space, default=self.default(space, problem, hardware, parallel))

    def default(
        self, space: Space, problem: Problem, hardware: Hardware, parallel: bool
    ) -> MoeConfig:
        """Return a good config without a measurement: about as many slots as an expert gets."""
        if (stream := self.stream(space, problem, hardware, parallel)) is not None:
            return stream
        if (many := self.many(space, problem, hardware, parallel)) is not None:
            return many
        per_expert = 2 * problem.slots / problem.e
        sizes = [t for t in (4, 2, 1) if t in space.knobs["tokens"] and t <= max(1, per_expert)]
        dot = self.dots(problem, hardware)[0]
        far = self.far(problem, hardware)
        ahead = 16 if far and problem.t == 1 else 0
        share = far and problem.t > 1
        options = (
            MoeConfig(rows13, rows2, tokens, ahead, unroll, parallel, dot=dot, share=share)
            for tokens in sizes
            for rows13 in ((4, 2, 1) if tokens == 1 else (2, 1))
            for rows2 in (4, 3, 2, 1)
            for unroll in ((2, 1) if tokens == 1 else (1,))
            if unroll in space.knobs["unroll"]
            if rows13 in space.knobs["rows13"] and rows2 in space.knobs["rows2"]
        )
        return next(c for c in options if space.legal(c))

    @staticmethod
    def far(problem: Problem, hardware: Hardware) -> bool:
        """Say whether weights come from memory."""
        return problem.expert_bytes * problem.hit > hardware.l2_bytes

    def stream(
        self, space: Space, problem: Problem, hardware: Hardware, parallel: bool
    ) -> MoeConfig | None:
        """Return the config that reads weights in one stream, asked for 8 KiB ahead; None: not worth it."""
        few = problem.slots <= _FEW * problem.hit
        if not (few and self.far(problem, hardware) and self.streams(problem)):
            return None
        unroll = 1
        if problem.t == 1:
            layouts = () if problem.fmt.is_float else (problem.layout13, problem.layout2)
            steps = sorted(self.unrolls(problem), reverse=True)
            unroll = next(u for u in steps if not any(x.group_blocks % u for x in layouts))
        one = MoeConfig(
            1, 1, 1, 128, unroll, parallel, tasks=hardware.threads, apart=True,
            dot=self.dots(problem, hardware)[0],
        )  # fmt: skip
        sizes = sorted(space.knobs["tokens"], reverse=True)
        # most experts have fewer slots; whoever has more reads the rows again from the cache
        tiles = (replace(one, tokens=int(t), once=int(t) >= _ROOM) for t in sizes)
        return next(c for c in tiles if space.legal(c))

    def many(
        self, space: Space, problem: Problem, hardware: Hardware, parallel: bool
    ) -> MoeConfig | None:
        """Return the config that keeps an expert's slots in cache for all of its rows; None: not measured.

        That is for weights from memory which multiply as they lie there, in sums of whole rows.
        """
        bytes_ = problem.act == "a8" and problem.fmt.bits == 8 and problem.layout13.groups == 1
        ready = problem.fmt.is_float or bytes_
        if not (ready and self.far(problem, hardware) and self.streams(problem)):
            return None
        size = 4 * problem.slots * problem.d  # of what slots add to tokens, in one task a thread
        threads = hardware.threads
        tasks = next((n * threads for n in (1, 4) if size <= n * _PARTS_BYTES), 0)
        config = MoeConfig(
            1, 2, 8, 0, 1, parallel, tasks=tasks, dot=self.dots(problem, hardware)[0],
            share=True, once=True,
        )  # fmt: skip
        known = all(getattr(config, name) in values for name, values in space.knobs.items())
        wide = self.multiply(problem, config).lanes == ROWS
        return config if known and wide and space.legal(config) else None

    def order(self, workload: Workload, config: MoeConfig, hardware: Hardware) -> str | None:
        """A token adds up its experts in the order of its choices, whoever else has the same ones."""
        return f"{self.name} dot={config.dot} unroll={config.unroll}"

    def lower(self, workload: Workload, config: MoeConfig, hardware: Hardware) -> Kernel:
        """Generate the kernel of one config."""
        problem = self.problem(workload)
        name = kernel_name(self, workload, config, hardware)
        args = problem.args()
        return Kernel(
            name,
            function(name, args, self.kernel(problem, config).body),
            args,
            self.work(workload, config, hardware),
            self.scratch_bytes(problem, config, hardware),
            hardware.features,  # LLVM may have used any of them
        )

    def work(self, workload: Workload, config: MoeConfig, hardware: Hardware) -> Counts:
        """Return the kernel's work without generating it."""
        return expert_work(self.multiply(self.problem(workload), config), hardware)

    def scratch_bytes(self, p: Problem, config: MoeConfig, hardware: Hardware) -> int:
        """Bytes of workspace: lists, hidden rows, what rows become, a task's parts for each thread."""
        multiply = self.multiply(p, config)
        size = 4 * (2 * p.slots + 3 * p.e + 2)
        split = Split.of(p.w2, config.rows2, config.tasks)
        running = min(hardware.threads, split.tasks) if config.parallel else 1
        rows = config.rows2 * split.chunk * running
        size += 4 * p.slots * (p.hidden_width + p.parts * ROWS * rows)
        size += multiply.scratch_bytes(p.w13, p.parts * p.t)
        return size + multiply.scratch_bytes(p.w2, p.parts * p.slots)

    def layouts(self, workload: Workload, config: MoeConfig) -> dict[str, str]:
        """The layouts of plain matmuls, gate and up padded each by itself."""
        return {"weight": self.problem(workload).w13.layout}

    def pack(
        self, workload: Workload, config: MoeConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Pack the experts' matrices that are given."""
        problem = self.problem(workload)
        given = dict(arrays)
        if problem.halves == 2:
            for name in (n for n in given if n.startswith("w13_")):
                given[name] = given[name].reshape(problem.e, 2, problem.f, -1)
        return problem.w13.pack(given) | problem.w2.pack(given)

    def unpack_weights(
        self, workload: Workload, config: MoeConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Undo `pack`."""
        problem = self.problem(workload)
        w13 = problem.w13.unpack(arrays)
        w13 = {n: a.reshape(problem.e, -1, a.shape[-1]) for n, a in w13.items()}
        return w13 | problem.w2.unpack(arrays)
