"""SeerAttention-R's gates on x86: queries of a group to one, keys of a block to one.

A task is a KV head with a token, or with a block that the call completed. Its queries (or pools) go to
scratch memory, from where each number meets vectors of its row of the projection. Sequences of a batch
complete blocks one after the other.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mimo_compile.ir.caches import parse_cache_format
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.base import Arg, Array
from mimo_compile.ir.ops.describe_blocks import entries_of
from mimo_compile.ir.ops.pages import paged
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention import descriptors, layout, sequences
from mimo_compile.schedules.attention.gate_emit import Pools, finish, project, turned_queries
from mimo_compile.schedules.attention.pages import Table
from mimo_compile.schedules.attention.reach import fixed
from mimo_compile.schedules.attention.score_common import over
from mimo_compile.schedules.base import Kernel, Schedule, Space
from mimo_compile.schedules.elementwise.rows import PARALLEL_BYTES
from mimo_compile.schedules.emit.build import T, bind, function, load, loop, store, when, workspace
from mimo_compile.schedules.emit.vector import LANES, symbol
from mimo_compile.schedules.work import Stream, Tile, busiest, work

ENTRIES = parse_cache_format("f32")
"""Format of compressed keys."""


@dataclass(frozen=True, slots=True)
class GateConfig:
    """Knobs."""

    wide: int = 8
    """Vectors of outputs that share a number."""
    chains: int = 1
    """Sums of each output that are in flight."""
    parallel: bool = False
    """Spread the tasks over threads."""


class _Gates(Schedule):
    """Tasks of a KV head each."""

    config = GateConfig

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Every workload of the op, on any x86-64."""
        return workload.op == self.op and hardware.kind == "cpu"

    @abstractmethod
    def tasks(self, p: Mapping[str, Any]) -> int:
        """Return how many tasks a sequence has at most."""

    @abstractmethod
    def columns(self, p: Mapping[str, Any]) -> int:
        """Return the numbers that each output is made of."""

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Register tile, sums in flight, threads."""
        p = get_op(self.op).full(workload)
        vectors = max(1, p["g"] // LANES)
        most = 24 if hardware.has_avx512 else 12
        wide = tuple(n for n in (1, 2, 4, 8) if n < 2 * vectors)
        may = p["b"] * self.tasks(p) > 1 and hardware.threads > 1
        heavy = get_op(self.op).counts(workload).bytes["dram"] >= PARALLEL_BYTES
        side = max(n for n in wide if hardware.has_avx512 or n <= 4)
        # a sum waits some cycles for the one before: eight of them hide that
        chains = next(n for n in (1, 2, 4) if n * side >= min(8, most) or n == 4)
        return Space(
            GateConfig,
            {"wide": wide, "chains": (1, 2, 4), "parallel": (False, True) if may else (False,)},
            GateConfig(side, chains, may and heavy),
            lambda c: c.wide * c.chains <= most,
        )

    def work(self, workload: Workload, config: GateConfig, hardware: Hardware) -> Counts:
        """Return what the op cannot avoid, and angles for each KV head anew."""
        op = get_op(self.op)
        p, need = op.full(workload), op.counts(workload)
        ops = {**need.ops, "exp_f32": need.ops["exp_f32"] * p["kv"]}
        tasks = p["b"] * self.tasks(p)
        threads = hardware.threads if config.parallel else 1
        row = p["g"] * (4.0 if p["w"] == "f32" else 2.0)
        again = tasks // p["kv"]  # tokens or blocks, each of which reads the projection
        return work(
            ops, [Stream(need.bytes["dram"], ((again, need.bytes["dram"]),))], hardware,
            tasks=tasks if threads > 1 else 1, share=busiest(tasks, threads),
            useful=min(1.0, p["g"] / (-(-p["g"] // LANES) * LANES)),
            tile=Tile(config.wide, 1, row * self.columns(p), sums=config.chains),
        )  # fmt: skip


class X86GateQueries(_Gates):
    """One task for each token and KV head."""

    name = "gate_queries.x86"
    op = "gate_queries"

    def tasks(self, p: Mapping[str, Any]) -> int:
        """Tokens times KV heads."""
        return int(p["t"] * p["kv"])

    def columns(self, p: Mapping[str, Any]) -> int:
        """The queries of a group."""
        return int(p["h"] // p["kv"] * p["d"])

    def lower(self, workload: Workload, config: GateConfig, hardware: Hardware) -> Kernel:
        """Generate the kernel of one config."""
        op = get_op(self.op)
        p, args = op.full(workload), op.args(workload)
        name = symbol(self.op, self.name, self.version, workload, config, hardware.has_avx512)
        columns = self.columns(p)

        def body(q: Any, pos: Any, inv_freq: Any, gate_freq: Any, weight: Any, *rest: Any) -> None:
            norm, out = rest[0] if p["norm"] else None, rest[-1]
            b, tasks = p["b"], self.tasks(p)
            with sequences.turns(b, tasks, parallel=config.parallel) as (sequence, task):
                token, head = bind(task // p["kv"]), bind(task % p["kv"])
                x, y = workspace((columns,), "float32"), workspace((p["g"],), "float32")
                start = sequences.place_of(pos, sequence)[0]
                position = bind(T.cast(start + token, "float32"))
                mine, own = (sequences.part_of(buffer, sequence, b) for buffer in (q, out))
                turned_queries(p, mine, token, head, inv_freq, x, position)
                project(p, columns, x, weight, head, y, config.wide, config.chains)
                finish(p, y, norm, position, gate_freq)

                def copy(at: Any, lanes: int) -> None:
                    store(own, load(y, at, lanes=lanes), token, head, at, lanes=lanes)

                over(p["g"], copy)

        return Kernel(name, function(name, args, body), args, self.work(workload, config, hardware))


class X86GateKeys(_Gates):
    """One task for each KV head and block that is complete now."""

    name = "gate_keys.x86"
    op = "gate_keys"

    def tasks(self, p: Mapping[str, Any]) -> int:
        """KV heads times the blocks that so many tokens may complete."""
        entries = entries_of(p["cap"], p["size"], p["size"])
        return int(p["kv"] * min(entries, -(-p["t"] // p["size"])))

    def columns(self, p: Mapping[str, Any]) -> int:
        """Three pools of a key."""
        return int(3 * p["d"])

    def lower(self, workload: Workload, config: GateConfig, hardware: Hardware) -> Kernel:
        """Generate the kernel of one config."""
        op = get_op(self.op)
        p = op.full(workload)
        name = symbol(self.op, self.name, self.version, workload, config, hardware.has_avx512)
        keys, shapes = parse_cache_format(p["c"]), self._shapes(workload)
        stored = {"k_cache": keys.stored, "desc": "float32"}
        args = tuple(
            Arg(a.name, a.role, shapes[a.name], stored[a.name], a.mutated)
            if a.name in shapes
            else a
            for a in op.args(workload)
        )
        most, size = self.tasks(p) // p["kv"], p["size"]
        entries = entries_of(p["cap"], size, size)

        def body(pos: Any, inv_freq: Any, gate_freq: Any, weight: Any, *rest: Any) -> None:
            norm = rest[0] if p["norm"] else None
            with sequences.turns(p["b"], 1) as (sequence, _):
                where = sequences.place_of(pos, sequence)
                table = Table(rest[-3], sequence, p["page"]) if paged(p) else None
                k, desc = rest[-2:]
                if table is None:
                    k, desc = (sequences.part_of(held, sequence, p["b"]) for held in (k, desc))
                start = fixed(where[0])
                first = fixed(start // size)
                stop = fixed(T.min((start + where[1]) // size, T.int32(entries)))
                # most steps of decoding complete no block: then no thread is woken either
                with when(first < stop), loop(self.tasks(p), parallel=config.parallel) as task:
                    head, entry = bind(task // most), fixed(first + task % most)
                    with when(entry < stop):
                        x = Pools(p, keys.bits, k, inv_freq, head, entry, table).emit()
                        y = workspace((p["g"],), "float32")
                        project(p, 3 * p["d"], x, weight, head, y, config.wide, config.chains)
                        position = entry * size + (size - 1 if p["last"] else 0)
                        finish(p, y, norm, bind(T.cast(position, "float32")), gate_freq)
                        vector, lane = entry // LANES, entry % LANES
                        if table is not None:
                            vector, lane = table.row(entry, size)
                        with loop(p["g"]) as at:
                            store(desc, y[at], head, vector, 0, at, lane)

        return Kernel(name, function(name, args, body), args, self.work(workload, config, hardware))

    def _shapes(self, workload: Workload) -> dict[str, tuple[int, ...]]:
        """Return the extents of the cache and the compressed keys as they lie."""
        p = get_op(self.op).full(workload)
        rows, heads, lanes = (
            _rows(p),
            p["kv"] * (1 if paged(p) else p["b"]),
            descriptors.lanes_of(p),
        )
        return {
            "k_cache": layout.cache_shapes(p)["k_cache"],
            "desc": descriptors.shape(rows, heads, 1, p["g"], ENTRIES, lanes),
        }

    def layouts(self, workload: Workload, config: GateConfig) -> dict[str, str]:
        """Return the names of the layouts of the cache and of the compressed keys."""
        lanes = descriptors.lanes_of(get_op(workload.op).full(workload))
        return {
            "k_cache": layout.layouts(workload)["k_cache"],
            "desc": descriptors.layout_name(ENTRIES, lanes),
        }

    def pack(
        self, workload: Workload, config: GateConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Lay out the cache and the compressed keys."""
        return sequences.pack_each(workload, arrays, self._pack)

    @staticmethod
    def _pack(workload: Workload, arrays: Mapping[str, Array]) -> dict[str, Array]:
        out = layout.pack_caches(workload, arrays)
        lanes = descriptors.lanes_of(get_op(workload.op).full(workload))
        if "desc" in out:
            out["desc"] = descriptors.laid_out(out["desc"], ENTRIES, lanes)
        return out

    def unpack_state(
        self, workload: Workload, config: GateConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Return the canonical cache and compressed keys."""
        return sequences.unpack_each(workload, arrays, self._unpack)

    @staticmethod
    def _unpack(workload: Workload, arrays: Mapping[str, Array]) -> dict[str, Array]:
        p = get_op(workload.op).full(workload)
        out = dict(layout.unpack_caches(workload, arrays))
        if "desc" in out:
            lanes = descriptors.lanes_of(p)
            out["desc"] = descriptors.canonical(out["desc"], _rows(p), p["g"], ENTRIES, lanes)
        return out


def _rows(p: Mapping[str, Any]) -> int:
    """Return the compressed keys of a sequence, or of a pool."""
    if paged(p):
        return int(p["pool"]) * descriptors.lanes_of(p)
    return entries_of(p["cap"], p["size"], p["size"])
