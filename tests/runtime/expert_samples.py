"""A decoder in miniature whose three layers are experts: real routers and expert kernels, plain glue."""

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import runtime_samples as plain
from msgspec.structs import replace

from mimo_compile import _tvm
from mimo_compile.artifact import Artifact
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.workload import Workload
from mimo_compile.runtime.program import Buffer, Call, Choice, Decoder, Entry, Layer, Programs
from mimo_compile.schedules import get_schedule

EXPERTS, CHOSEN, CONTEXT = 6, 2, 64
LAYERS = ("layers.1", "layers.2", "layers.3")
STEPS = (1, 16)
BATCH = 3
ROWS = (*STEPS, BATCH)
"""Of entry points."""
WIDTH = plain.WIDTH
KINDS = {
    "float": ("moe.x86_float", "w=f32,a=a16"),
    "pairs": ("moe.x86_bf16", "w=bf16,a=abf16"),
    "int8": ("moe.x86_vnni", "w=w8,a=a8"),
}


def workload(n: int, kind: str, inner: int = 16) -> Workload:
    """The experts of one layer for n tokens."""
    rest = KINDS[kind][1]
    return Workload.parse(f"moe:t={n},e={EXPERTS},k={CHOSEN},d={WIDTH},f={inner},{rest}")


@cache
def kernels(kind: str):
    """Router and expert kernel of each number of rows, and their workloads."""
    hardware, out = local_cpu(), {}
    for n in ROWS:
        for name, work in (
            ("route.x86", Workload.parse(f"route:t={n},e={EXPERTS},k={CHOSEN},scoring=sigmoid")),
            (KINDS[kind][0], workload(n, kind)),
        ):
            schedule = get_schedule(name)
            config = schedule.space(work, hardware).default
            out[n, name] = work, schedule.lower(work, config, hardware)
    return out


def _glue(n: int):
    """Embedding, router matmul, and the addition to the residual stream."""
    from tvm.script import tirx as T

    @T.prim_func(s_tir=True)
    def embed(ids: T.handle, table: T.handle, rows: T.handle):
        I = T.match_buffer(ids, (n,), "int32")  # noqa: E741
        E = T.match_buffer(table, (plain.VOCAB, WIDTH), "float32")
        X = T.match_buffer(rows, (n, WIDTH), "float32")
        for t, d in T.grid(n, WIDTH):
            X[t, d] = E[I[t], d]

    @T.prim_func(s_tir=True)
    def gate(rows: T.handle, weight: T.handle, logits: T.handle):
        X = T.match_buffer(rows, (n, WIDTH), "float32")
        W = T.match_buffer(weight, (EXPERTS, WIDTH), "float32")
        L = T.match_buffer(logits, (n, EXPERTS), "float32")
        for t, e in T.grid(n, EXPERTS):
            L[t, e] = T.float32(0)
            for d in T.serial(WIDTH):
                L[t, e] = L[t, e] + X[t, d] * W[e, d]

    @T.prim_func(s_tir=True)
    def add(a: T.handle, b: T.handle, c: T.handle):
        A = T.match_buffer(a, (n, WIDTH), "float32")
        B = T.match_buffer(b, (n, WIDTH), "float32")
        C = T.match_buffer(c, (n, WIDTH), "float32")
        for t, d in T.grid(n, WIDTH):
            C[t, d] = A[t, d] + B[t, d]

    return {f"embed{n}": embed, f"gate{n}": gate, f"add{n}": add}


@cache
def code(kind: str) -> bytes:
    """Object code of all kernels."""
    tvm = _tvm.compiler()
    functions = {name: made for n in ROWS for name, made in _glue(n).items()}
    functions |= {kernel.name: kernel.func for _, kernel in kernels(kind).values()}
    functions |= {f"head{n}": plain._head(n) for n in (1, 4)}
    module = tvm.IRModule({k: f.with_attr("global_symbol", k) for k, f in functions.items()})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "code.o"
        target = tvm.target.Target(local_cpu().tvm_target())
        tvm.compile(module, target=target).mod.write_to_file(str(path))
        return path.read_bytes()


def entry(n: int, kind: str, packed: dict[str, np.ndarray]) -> Entry:
    """One step of n tokens; `BATCH` of them are of as many sequences."""
    buffers: list[Buffer] = []
    calls: list[Call] = []

    def new(shape, dtype="float32", source=""):
        kind = "weight" if source else "arena"
        buffers.append(Buffer(kind, shape, dtype, 0 if source else 1024 * len(buffers), source))
        return len(buffers) - 1

    ids, pos = new((n,), "int32"), new((n, 2) if n == BATCH else (2,), "int32")
    table = new((plain.VOCAB, WIDTH), source="table")
    x = new((n, WIDTH))
    calls.append(Call(f"embed{n}", (ids, table, x), "embed"))
    router, expert = (kernels(kind)[n, name][1].name for name in ("route.x86", KINDS[kind][0]))
    for layer in LAYERS:
        gate = new((EXPERTS, WIDTH), source=f"{layer}.gate")
        logits = new((n, EXPERTS))
        chosen, weights, y, total = (
            new((n, CHOSEN), "int32"), new((n, CHOSEN)), new((n, WIDTH)), new((n, WIDTH)),
        )  # fmt: skip
        arrays = [
            new(a.shape, a.dtype.name, name)
            for name, a in packed.items()
            if name.startswith(f"{layer}.experts")
        ]
        calls += [
            Call(f"gate{n}", (x, gate, logits), f"{layer}.router"),
            Call(router, (logits, chosen, weights), f"{layer}.feed"),
            Call(expert, (x, chosen, weights, *arrays, y), f"{layer}.experts"),
            Call(f"add{n}", (x, y, total), f"{layer}.add"),
        ]
        x = total
    size = 1024 * len(buffers)
    return Entry(size, tuple(buffers), tuple(calls), {"ids": ids, "pos": pos}, {"hidden": x})


def weights(kind: str, inner: int = 16) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Packed experts of all layers, and the other weights."""
    schedule, work = get_schedule(KINDS[kind][0]), workload(1, kind, inner)
    config = schedule.space(work, local_cpu()).default
    rng = np.random.default_rng(7)
    packed, others = {}, {}
    for layer in LAYERS:
        drawn = get_op("moe").make_inputs(work, rng)
        given = {name: a for name, a in drawn.items() if name.startswith(("w13_", "w2_"))}
        made = schedule.pack(work, config, given)
        order = [a.name for a in schedule.problem(work).args() if a.role == "weight"]
        packed |= {f"{layer}.experts.{name}": made[name] for name in order}
        others[f"{layer}.gate"] = rng.standard_normal((EXPERTS, WIDTH)).astype(np.float32)
    others["table"] = rng.standard_normal((plain.VOCAB, WIDTH)).astype(np.float32)
    others["head"] = plain.embeddings()[1]
    return packed, others


def experts(kind: str = "float", inner: int = 16) -> Artifact:
    """The decoder. With another ``inner`` width of its experts it can be opened, and not run."""
    packed, others = weights(kind, inner)
    entries = {f"step_{n}": entry(n, kind, packed) for n in STEPS}
    entries[f"batch_{BATCH}"] = entry(BATCH, kind, packed)
    entries |= {
        name: made
        for name, made in plain.decoder().programs.entries.items()
        if name.startswith("head_")
    }
    facts = Decoder(
        STEPS, (1, 4), WIDTH, plain.VOCAB, CONTEXT, eos=(plain.EOS,), batch=BATCH,
        layers=tuple(Layer(name, slots=CONTEXT) for name in LAYERS),
    )  # fmt: skip
    plan = tuple(
        Choice(str(work), name, {}, kernel.name, "default")
        for (_, name), (work, kernel) in kernels(kind).items()
    )
    manifest = replace(plain.manifest("experts", entries, {}, facts), plan=plan)
    return Artifact(
        manifest, Programs(entries), code(kind), {**packed, **others},
        tokenizer=plain.tokenizer_json(),
    )  # fmt: skip
