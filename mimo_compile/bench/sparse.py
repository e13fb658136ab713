"""Sparse attention beside our own dense attention: what a policy's kernels take, part by part and in a row.

A cell is a policy at the end of a context: one decoded token, or the last chunk of a prompt. Its parts are
the kernels that a choosing layer runs: `describe` (descriptors or an index kept up to date, means of keys),
`queries` (those of gates), `score`, `select` and `attend`; `all` runs them one after the other, `dense` is
`cached_attention` over the same caches. All take turns in one run. Lists are random blocks, several draws in
turn, so that the calls together read more than caches hold; each kernel was checked against its op's
reference before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mimo_compile import _tvm
from mimo_compile.bench.contest import Contestant, Row, compete, ratio_of
from mimo_compile.bench.kernels import picks
from mimo_compile.bench.memory import SPARE_BYTES
from mimo_compile.bench.oracle import Oracle
from mimo_compile.bench.runnable import Runnable
from mimo_compile.errors import UsageError
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.base import Array
from mimo_compile.ir.ops.block_lists import to_lists
from mimo_compile.ir.policies import Geometry, parse_policy
from mimo_compile.ir.policies.dsa import Dsa
from mimo_compile.ir.policies.seer import Seer
from mimo_compile.ir.policies.tailorkv import TailorKV
from mimo_compile.ir.workload import Value, Workload
from mimo_compile.schedules import get_schedule
from mimo_compile.search.database import Database

NAME = "sparse"
"""Of the suite."""
DRAWS = 8
"""Lists that calls take in turn."""
SHARE = 10
"""One key in so many is listed."""
_DESCRIPTORS = {"quest": "bounds", "mean": "mean"}
"""Source of scores -> descriptors that each token brings up to date."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One policy at one place."""

    policy: str
    """Text of ``--attention``."""
    t: int
    cap: int
    heads: tuple[tuple[str, int], ...] = (("h", 32), ("kv", 8), ("d", 128), ("dv", 128))
    c: str = "bf16"

    @property
    def geometry(self) -> Geometry:
        """Extents of the call."""
        return Geometry(t=self.t, cap=self.cap, c=self.c, **dict(self.heads))

    @property
    def params(self) -> dict[str, str]:
        """What conditions of a suite look at."""
        policy = parse_policy(self.policy)
        found: dict[str, Value] = {
            "policy": policy.name, "block": policy.block, "t": self.t, "cap": self.cap, "c": self.c,
        }  # fmt: skip
        return {k: str(v) for k, v in (found | dict(self.heads)).items()}

    def __str__(self) -> str:
        """Return the policy and the extents."""
        heads = ",".join(f"{k}={v}" for k, v in self.heads)
        return f"{self.policy} t={self.t},{heads},cap={self.cap},c={self.c}"


def _decode(cap: int) -> list[str]:
    keys = cap // SHARE
    return [
        *(f"quest:budget={keys},page={n},dense=0" for n in (16, 64)),
        *(f"resa:p={1 / SHARE},block={n}" for n in (16, 64)),
        *(f"seer:budget={keys},block={n}" for n in (16, 64)),
        f"moba:block=512,k={keys // 512}", f"hysparse:budget={keys}", f"lessismore:budget={keys}",
        f"tailorkv:budget={keys},quantised=0", f"dsa:k={keys}",
    ]  # fmt: skip


def all_cells() -> list[Cell]:
    """Return every cell: one token at 64k and 128k keys, chunks of prompts that end at 16k, 32k and 64k."""
    found = [Cell(policy, 1, cap) for cap in (65536, 131072) for policy in _decode(cap)]
    for cap in (16384, 32768, 65536):
        for policy in ("sale", "sale:every=4", f"moba:block=512,k={cap // SHARE // 512}"):
            found.append(Cell(policy, 256, cap))
    return found


def cells(text: str) -> list[Cell]:
    """Return the cells of ``sparse`` or, with conditions, some of them: ``sparse:policy=quest,cap=65536``.

    Raises:
        UsageError: no cell is kept; the remedy lists what there is.
    """
    kept = all_cells()
    for condition in filter(None, text.partition(":")[2].split(",")):
        key, _, values = condition.partition("=")
        there = list(dict.fromkeys(c.params[key] for c in kept if key in c.params))
        kept = [c for c in kept if c.params.get(key) in values.split("+")]
        if not kept:
            raise UsageError(
                f"suite {NAME} has no cell with {condition} (--suite)",
                remedy=f"use {key}={'+'.join(there)}" if there else
                f"conditions are on {', '.join(all_cells()[0].params)}",
            )  # fmt: skip
    return kept


def parts(cell: Cell) -> dict[str, Workload]:
    """Return the kernels of a choosing layer by name, and ``dense``."""
    g, policy = cell.geometry, parse_policy(cell.policy)
    steps, source = policy.workloads(g), policy.score
    assert steps.score is not None and steps.select is not None and source is not None
    score, attend = steps.score, steps.attend
    shape: dict[str, Value] = {"t": g.t, "kv": g.kv, "d": g.d, "cap": g.cap, "c": g.c}
    out: dict[str, Workload] = {}
    if score.op == "score_lowbit":
        out["describe"] = get_op("key_mean").workload(**shape)
    elif source.source in _DESCRIPTORS:
        kind = _DESCRIPTORS[source.source]
        entries = g.c if kind == "bounds" else "f32"
        out["describe"] = get_op("describe_blocks").workload(
            **shape, kind=kind, size=policy.block, whole=1, e=entries
        )
        if kind == "bounds":
            score = score.replace(e=entries)
    elif isinstance(policy, Seer):
        out |= _gates(policy, g)
    elif isinstance(policy, TailorKV):
        out["describe"] = get_op("index_keys").workload(**shape, span=policy.span)
    elif isinstance(policy, Dsa):
        out["describe"] = get_op("append_entries").workload(
            t=g.t, kv=1, d=policy.width, cap=g.cap, e=g.c
        )
        score = score.replace(e=g.c)
    # nothing scores these keys
    apart = score.op == "score_blocks" or not policy.alone or isinstance(policy, TailorKV)
    if policy.block < 16 and apart:
        attend = attend.replace(lay="rows")
    dense = get_op("cached_attention").workload(**shape, h=g.h, dv=g.dv)
    return out | {"score": score, "select": steps.select, "attend": attend, "dense": dense}


def _gates(policy: Seer, g: Geometry) -> dict[str, Workload]:
    """Return what makes compressed keys and queries of gates with norms, where all channels are rotated."""
    width = policy.gate
    shape = {"t": g.t, "kv": g.kv, "d": g.d, "g": width, "norm": 1, "rot": g.d, "grot": width}
    keys = get_op("gate_keys").workload(**shape, cap=g.cap, size=policy.block, c=g.c)
    return {"describe": keys, "queries": get_op("gate_queries").workload(**shape, h=g.h)}


def kept_blocks(attend: Workload) -> int:
    """Return how many blocks a list has here: all that fit, or `SHARE` where thresholds decide."""
    p = get_op(attend.op).full(attend)
    blocks = -(-p["cap"] // p["block"])
    return int(p["kmax"] if p["kmax"] < blocks else blocks // SHARE)


def necessary(workload: Workload, draws: Sequence[Mapping[str, Array]] = ()) -> tuple[float, float]:
    """Return the bytes and operations of a part; ``draws``: what its lists are, where it follows any."""
    op = get_op(workload.op)
    if not draws:
        counts = op.counts(workload)
        return counts.bytes.get("dram", 0.0), counts.flops
    kept = op.counts(workload.replace(kmax=kept_blocks(workload)))
    read = op.counts(workload.replace(kmax=named_blocks(workload, draws)))
    return read.bytes.get("dram", 0.0), kept.flops


def named_blocks(workload: Workload, draws: Sequence[Mapping[str, Array]]) -> int:
    """Return how many blocks all lists over a KV head name together, on average."""
    p = get_op(workload.op).full(workload)
    found = []
    for draw in draws:
        for kv in range(p["kv"]):
            first, end = kv * p["hs"] // p["kv"], (kv + 1) * p["hs"] // p["kv"]
            own = slice(first, max(end, first + 1))
            there = np.arange(draw["idx"].shape[2]) < draw["cnt"][:, own, None]
            found.append(np.unique(draw["idx"][:, own][there]).size)
    return round(float(np.mean(found)))


@dataclass(frozen=True, slots=True)
class Measured:
    """One part of a cell beside dense attention."""

    cell: Cell
    part: str
    row: Row
    time: tuple[float, float, float]
    """Its time over that of dense attention: median, p10 and p90 over rounds."""
    bytes: float
    """Necessary bytes over those of dense attention."""
    work: float
    """Necessary operations over those of dense attention."""

    def json(self) -> dict[str, Any]:
        """Return the row with the comparison; ``share``: the speed-up over the ratio of bytes."""
        speed = 1 / self.time[0]
        return {
            **self.row.json(), "policy": self.cell.policy, "part": self.part,
            "time_ratio": self.time[0], "time_ratio_p10": self.time[1], "time_ratio_p90": self.time[2],
            "byte_ratio": self.bytes, "work_ratio": self.work, "speed_up": speed,
            "share": speed * self.bytes if self.part == "all" else None,
        }  # fmt: skip


def needed_bytes(cell: Cell) -> float:
    """Return about how many bytes a cell holds at its peak: keys and values drawn, packed and copied."""
    g = cell.geometry
    caches = float(g.cap * g.kv * (g.d + g.dv))
    reference = 24.0 * g.cap * (g.d + g.dv + min(g.t, 64)) * (g.h // g.kv)
    return 4 * caches * 4 + 3 * 2 * caches + reference


def bench_cell(
    cell: Cell, hardware: Hardware, db: Database | None, rounds: int, seed: int = 0,
    available_bytes: float | None = None,
) -> list[Measured]:  # fmt: skip
    """Measure all parts of a cell, in turns.

    Raises:
        UsageError: it needs more memory than is free.
        VerificationError: a kernel is wrong.
    """
    if available_bytes is None:
        import psutil

        available_bytes = float(psutil.virtual_memory().available)
    need = needed_bytes(cell) + SPARE_BYTES
    if need > available_bytes:
        raise UsageError(
            f"{cell} would need about {need / 1e9:.1f} GB of memory, {available_bytes / 1e9:.1f} GB are free",
            remedy="take fewer keys (--suite sparse:cap=16384)",
        )
    _tvm.set_threads(hardware.threads)
    entrants: dict[str, Contestant] = {}
    shared: dict[tuple[str, tuple[int, ...]], Array] = {}
    workloads = parts(cell)
    for name in sorted(workloads, key=lambda n: n != "dense"):  # its caches are everybody's
        entrants[name] = _contestant(cell, name, workloads[name], hardware, db, shared, seed)
    order = [n for n in ("describe", "queries", "score", "select", "attend") if n in entrants]
    chain = _chain(cell, [entrants[n] for n in order])
    field = [chain, *(entrants[n] for n in order), entrants["dense"]]
    rows = compete(field, rounds=rounds)
    each = {n: (entrants[n].bytes, entrants[n].operations) for n in (*order, "dense")}
    whole = tuple(sum(each[n][i] for n in order) for i in range(2))
    out = []
    for name, found in zip(["all", *order, "dense"], rows, strict=True):
        moved, work = whole if name == "all" else each[name]
        runner = replace(found.contestant, sets=(), bytes=moved, operations=work)
        row = replace(found, contestant=runner)
        time = ratio_of(row, rows[-1])
        out.append(
            Measured(cell, name, row, time, moved / each["dense"][0], work / each["dense"][1])
        )
    return out


def _contestant(
    cell: Cell, name: str, workload: Workload, hardware: Hardware, db: Database | None,
    shared: dict[tuple[str, tuple[int, ...]], Array], seed: int,
) -> Contestant:  # fmt: skip
    """Build and check the best known kernel of a part; caches of one layout are the same for all parts."""
    chosen = picks(workload, hardware, db)
    if not chosen:
        raise UsageError(f"no schedule computes {workload} here")
    inputs = get_op(workload.op).make_inputs(workload, np.random.default_rng(seed))
    config = chosen[0].config
    runnable = Runnable(workload, get_schedule(chosen[0].schedule), config, hardware, inputs)
    runnable.check(Oracle(workload, inputs))
    for cache in ("k_cache", "v_cache"):
        if cache in runnable.arrays:
            held = runnable.arrays[cache]
            if (cache, held.shape) not in shared:
                _fill(held, np.random.default_rng(seed))
                shared[cache, held.shape] = held
            runnable.arrays[cache] = shared[cache, held.shape]
    draws: list[Mapping[str, Array]] = [{}]
    if name == "attend":
        draws = list(_draws(workload, np.random.default_rng(seed)))
    sets = [runnable._tensors({**runnable.arrays, **draw}) for draw in draws]
    moved, work = necessary(workload, draws if name == "attend" else ())
    return Contestant(
        f"{cell} {name}: {workload}", "mimo", hardware.threads, "cold", runnable, sets, moved, work,
        chosen[0].schedule, config,
    )  # fmt: skip


def _chain(cell: Cell, entrants: Sequence[Contestant]) -> Contestant:
    """Return what runs all parts of a layer, one after the other."""
    most = max(len(c.sets) for c in entrants)
    sets = [[c.sets[i % len(c.sets)] for c in entrants] for i in range(most)]

    def call(given: Sequence[Any]) -> None:
        for entrant, arguments in zip(entrants, given, strict=True):
            entrant.call(arguments)

    moved, work = (sum(getattr(c, n) for c in entrants) for n in ("bytes", "operations"))
    return Contestant(f"{cell} all", "mimo", entrants[0].threads, "cold", call, sets, moved, work)


def _fill(held: Array, rng: np.random.Generator) -> None:
    """Put normal numbers in a packed cache: its kernel was checked with NaN where no list led."""
    flat = held.reshape(-1)
    source = rng.standard_normal(min(flat.size, 1 << 20), dtype=np.float32)
    some = source if held.dtype == np.float32 else (source.view(np.uint32) >> 16).astype(np.uint16)
    for at in range(0, flat.size, some.size):
        flat[at : at + some.size] = some[: flat.size - at]


def _draws(workload: Workload, rng: np.random.Generator) -> Iterator[dict[str, Array]]:
    """Yield lists of random blocks up to each row's own, aligned as kernels want them."""
    import torch

    p = get_op(workload.op).full(workload)
    rows, blocks, kept = -(-p["t"] // p["rows"]), -(-p["cap"] // p["block"]), kept_blocks(workload)
    start = int(p["len"] or p["cap"]) - p["t"]
    for _ in range(DRAWS):
        chosen = np.zeros((rows, p["hs"], blocks), bool)
        for row in range(rows):
            seen = (start + row * p["rows"]) // p["block"] + 1
            for head in range(p["hs"]):
                chosen[row, head, rng.permutation(seen)[:kept]] = True
        idx, cnt = to_lists(torch.from_numpy(chosen), p["kmax"])
        yield {"idx": _tvm.as_aligned(idx.numpy()), "cnt": _tvm.as_aligned(cnt.numpy())}
