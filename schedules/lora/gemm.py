"""QLoRA matmuls: any tiled schedule of `mpgemm`, with the adapters' products fused into its kernel.

Where ``t = A x`` is computed is a knob, ``fusion``:

* ``first``: before the tiles, once for each token; B t is added to a tile's sums in registers.
* ``shared``: the threads that are woken for the tiles compute rows of A first, and wait for each other.
* ``tile``: by each task of tiles for itself, so that none waits for another.
* ``after``: before the tiles too, but B t is added in a second pass over y, for tiles without a seam.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.base import Arg, Array
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Kernel, KnobValue, Schedule, Space, kernel_name
from mimo_compile.schedules.emit.build import T, choose, function, loop, workspace
from mimo_compile.schedules.emit.matrix import arg_bytes
from mimo_compile.schedules.lora.adapter import AdapterCode
from mimo_compile.schedules.lora.packing import Adapters
from mimo_compile.schedules.mpgemm.gemm import X86Gemm
from mimo_compile.schedules.mpgemm.problem import GemmConfig, Problem

FUSIONS = ("shared", "first", "tile", "after")
TILE_TOKENS = 4
"""With more tokens, code that adds an adapter to each of a tile's sums outgrows the tile's own."""
_SHARED = 1 << 20
"""Multiply-adds of A x that one thread does before others would have woken up."""


@dataclass(frozen=True, slots=True)
class LoraConfig(GemmConfig):
    """Knobs of a tiled matmul, and where A x is computed."""

    fusion: str = "first"


@dataclass(frozen=True, slots=True)
class Fused(Problem):
    """A matmul whose tiles add adapters to their sums."""

    code: AdapterCode
    fusion: str

    @contextmanager
    def launch(self, tasks: int) -> Iterator[None]:
        """Let the threads that come for the tiles compute t first, and wait for each other."""
        if self.fusion != "shared":
            yield
        elif tasks == 1:  # no one comes
            self.code.project_all(parallel=False)
            yield
        else:
            with T.attr(T.int32(0), "pragma_parallel_launch_point", 1):
                self.code.project_shared()
                yield

    def start_task(self) -> None:
        """Compute t here if no one did before."""
        if self.fusion == "tile":
            self.code.t = workspace((self.m, self.code.adapters.total), "float32")
            self.code.project_all(parallel=False)

    def finish(self, value: Any, token: Any, block: Any, lane: int, lanes: int) -> Any:
        """Add the token's adapter."""
        return self.code.added(value, token, block, lane, lanes)


class LoraGemm(Schedule):
    """Base: a schedule of the plain matmul gives the tiles."""

    op = "lora_mpgemm"
    config: ClassVar[type] = LoraConfig
    base: ClassVar[type[X86Gemm]]
    seam: ClassVar[bool] = True
    """True if the tiles pass their sums through `Problem.finish`."""

    def plain(self, workload: Workload) -> Workload:
        """Return the workload without adapters."""
        p = get_op("lora_mpgemm").full(workload)
        known = {param.name for param in get_op("mpgemm").params}
        return get_op("mpgemm").workload(**{k: v for k, v in p.items() if k in known})

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """What the tiles support, with adapters that 32-bit indices reach."""
        small = all(arg_bytes(a) < 2**31 for a in Adapters.of(workload).args())
        return small and self.base().supports(self.plain(workload), hardware)

    def fusions(self, workload: Workload) -> tuple[str, ...]:
        """Return the ways that there are."""
        tokens = Adapters.of(workload).m
        if not self.seam or tokens > TILE_TOKENS:
            return ("after",)
        return FUSIONS if tokens == 1 else ("after", "shared", "first", "tile")

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """The tiles' knobs, and ``fusion``."""
        inner = self.base().space(self.plain(workload), hardware)
        ways = self.fusions(workload)
        knobs: dict[str, tuple[KnobValue, ...]] = {**inner.knobs, "fusion": ways}
        alone = ways[0] == "shared" and not inner.default.parallel
        default = self.config(**asdict(inner.default), fusion=ways[int(alone)])

        def legal(config: Any) -> bool:
            lonely = config.fusion == "shared" and not config.parallel
            # what each task computes for its own tiles is not there where their pieces are added
            late = config.fusion == "tile" and config.split > 1
            return config.fusion in ways and not (lonely or late) and inner.legal(config)

        return Space(self.config, knobs, default, legal)

    def args(self, workload: Workload) -> tuple[Arg, ...]:
        """Return x, adapter, the matrix, lora_a, lora_b, gain, y."""
        x, *inner, y = self.base().problem(self.plain(workload)).args()
        ids = Arg("adapter", "input", (x.shape[0],), "int32")
        return (x, ids, *inner, *Adapters.of(workload).args(), y)

    def lower(self, workload: Workload, config: Any, hardware: Hardware) -> Kernel:
        """Generate the kernel of one config."""
        adapters, base = Adapters.of(workload), self.base()
        problem = base.problem(self.plain(workload))
        name = kernel_name(self, workload, config, hardware)
        args = self.args(workload)
        scratch = base.workspace_bytes(problem, config) + 4 * adapters.m * adapters.total
        return Kernel(
            name,
            function(name, args, self.body(problem, adapters, config, hardware)),
            args,
            self.work(workload, config, hardware),
            scratch,
            hardware.features,
        )

    def body(
        self, problem: Problem, adapters: Adapters, config: Any, hardware: Hardware
    ) -> Callable[..., None]:
        """Return the emitter."""

        def emit(x: Any, ids: Any, *rest: Any) -> None:
            *inner, a, b, gain, y = rest
            code = AdapterCode(adapters, x, ids, a, b, gain, ahead=config.rows)
            if config.fusion != "tile":
                code.t = workspace((adapters.m, adapters.total), "float32")
            tiles = problem
            if config.fusion != "after":
                tiles = Fused(
                    problem.m, problem.weight, problem.act, problem.bias, code, config.fusion
                )
            if config.fusion in ("first", "after"):
                wide = adapters.m * adapters.k * adapters.total > _SHARED
                code.project_all(parallel=config.parallel and wide)
            self.base().emitter(tiles, config, hardware)(x, *inner, y)
            if config.fusion == "after":
                self._second_pass(code, y, parallel=config.parallel)

        return emit

    @staticmethod
    def _second_pass(code: AdapterCode, y: Any, *, parallel: bool) -> None:
        final = code.adapters.row_blocks - 1

        def block_of(block: Any, *, last: bool) -> None:
            with loop(code.adapters.m) as token:
                code.add_rows(y, block, token, last=last)

        with loop(final + 1, parallel=parallel) as block:
            if code.adapters.n % 16 == 0:
                block_of(block, last=False)
            elif isinstance(block, int):
                block_of(block, last=True)
            else:
                choose(
                    block < final,
                    lambda: block_of(block, last=False),
                    lambda: block_of(block, last=True),
                )

    def work(self, workload: Workload, config: Any, hardware: Hardware) -> Counts:
        """Return the tiles' work and that of the adapters, one for each token."""
        adapters = Adapters.of(workload)
        plain = self.base().work(self.plain(workload), config, hardware)
        a, b, _ = (arg_bytes(arg) / adapters.count for arg in adapters.args())
        m, again = adapters.m, 1.0
        if config.fusion == "tile":
            again = plain.traits["tasks"]
        rows = float(adapters.row_blocks * 16 * adapters.columns)
        ops = {"fma_f32": m * (again * adapters.total * adapters.k + rows)}
        near, far = m * (again * a + b), min(m, adapters.count) * (a + b)
        if config.fusion == "after":
            near += 8.0 * m * adapters.n
        added = Counts(ops, {"l1": near, "l2": near, "l3": far, "dram": far})
        total = plain + added
        return Counts(total.ops, total.bytes, plain.traits)

    def layouts(self, workload: Workload, config: Any) -> dict[str, str]:
        """Name the matrix's layout; that of adapters is always the same."""
        return self.base().layouts(self.plain(workload), config)

    def pack(
        self, workload: Workload, config: Any, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Pack the matrix, bias, and the adapters (those given)."""
        out = self.base().pack(self.plain(workload), config, arrays)
        return out | Adapters.of(workload).pack(arrays)

    def unpack_weights(
        self, workload: Workload, config: Any, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Undo `pack`."""
        out = self.base().unpack_weights(self.plain(workload), config, arrays)
        return out | Adapters.of(workload).unpack(arrays)
