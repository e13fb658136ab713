"""A decoder in miniature: two layers of routers; its hidden state is the weights of the chosen experts."""

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import runtime_samples as plain

from mimo_compile import _tvm
from mimo_compile.artifact import Artifact
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.workload import Workload
from mimo_compile.runtime.program import Buffer, Call, Choice, Decoder, Entry, Layer, Programs
from mimo_compile.schedules import get_schedule

EXPERTS, CHOSEN, LAYERS, BATCH, CONTEXT = 8, 2, ("layers.1", "layers.2"), 2, 32
STEPS = (1, 4)
ROWS = (*STEPS, BATCH)
WIDTH = EXPERTS * len(LAYERS)
RULE = "e=8,k=2,scoring=sigmoid,factor=2.5"


@cache
def routers():
    """Kernel of each number of rows, and its workload."""
    hardware, schedule = local_cpu(), get_schedule("route.x86")
    out = {}
    for n in ROWS:
        workload = Workload.parse(f"route:t={n},{RULE}")
        out[n] = (
            workload,
            schedule.lower(workload, schedule.space(workload, hardware).default, hardware),
        )
    return out


def _gates(n):
    """Logits of both layers: the two halves of a token's row of the table."""
    from tvm.script import tirx as T

    @T.prim_func(s_tir=True)
    def gates(ids: T.handle, table: T.handle, first: T.handle, second: T.handle):
        I = T.match_buffer(ids, (n,), "int32")  # noqa: E741
        E = T.match_buffer(table, (plain.VOCAB, WIDTH), "float32")
        A = T.match_buffer(first, (n, EXPERTS), "float32")
        B = T.match_buffer(second, (n, EXPERTS), "float32")
        for t, e in T.grid(n, EXPERTS):
            A[t, e] = E[I[t], e]
            B[t, e] = E[I[t], EXPERTS + e]

    return gates


def _mix(n):
    """Write the weight of each chosen expert to the expert's place of the hidden state."""
    from tvm.script import tirx as T

    @T.prim_func(s_tir=True)
    def mix(i0: T.handle, w0: T.handle, i1: T.handle, w1: T.handle, hidden: T.handle):
        I0 = T.match_buffer(i0, (n, CHOSEN), "int32")
        W0 = T.match_buffer(w0, (n, CHOSEN), "float32")
        I1 = T.match_buffer(i1, (n, CHOSEN), "int32")
        W1 = T.match_buffer(w1, (n, CHOSEN), "float32")
        H = T.match_buffer(hidden, (n, WIDTH), "float32")
        for t, d in T.grid(n, WIDTH):
            H[t, d] = T.float32(0)
        for t, j in T.grid(n, CHOSEN):
            H[t, I0[t, j]] = W0[t, j]
            H[t, EXPERTS + I1[t, j]] = W1[t, j]

    return mix


@cache
def code() -> bytes:
    """Object code of all kernels."""
    tvm = _tvm.compiler()
    functions = {f"gates{n}": _gates(n) for n in ROWS} | {f"mix{n}": _mix(n) for n in ROWS}
    functions |= {kernel.name: kernel.func for _, kernel in routers().values()}
    functions |= {f"head{n}": plain._head(n) for n in (1, 4)}
    module = tvm.IRModule({k: f.with_attr("global_symbol", k) for k, f in functions.items()})
    target = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v3"})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "code.o"
        tvm.compile(module, target=target).mod.write_to_file(str(path))
        return path.read_bytes()


def entry(n: int, places: tuple[int, ...]) -> Entry:
    """One step of n tokens; ``places`` is the shape of ``pos``."""
    shapes = [
        ((n,), "int32"), (places, "int32"), ((n, EXPERTS), "float32"), ((n, EXPERTS), "float32"),
        ((n, CHOSEN), "int32"), ((n, CHOSEN), "float32"), ((n, CHOSEN), "int32"),
        ((n, CHOSEN), "float32"), ((n, WIDTH), "float32"),
    ]  # fmt: skip
    buffers = [
        Buffer("arena", shape, dtype, 512 * i) for i, (shape, dtype) in enumerate(shapes)
    ] + [Buffer("weight", (plain.VOCAB, WIDTH), "float32", 0, "table")]
    router = routers()[n][1].name
    calls = (
        Call(f"gates{n}", (0, 9, 2, 3), "embed"),
        Call(router, (2, 4, 5), "layers.1.feed"),
        Call(router, (3, 6, 7), "layers.2.feed"),
        Call(f"mix{n}", (4, 5, 6, 7, 8), "final"),
    )
    return Entry(512 * len(shapes), tuple(buffers), calls, {"ids": 0, "pos": 1}, {"hidden": 8})


def table() -> np.ndarray:
    """Router logits ``[VOCAB, WIDTH]`` of each token, without near ties."""
    rng = np.random.default_rng(3)
    rows = [rng.permutation(EXPERTS) for _ in range(plain.VOCAB * len(LAYERS))]
    return (np.reshape(rows, (plain.VOCAB, WIDTH)) / 2 - 2).astype(np.float32)


def routed() -> Artifact:
    """The decoder; it decodes up to two sequences together."""
    entries = {f"step_{n}": entry(n, (2,)) for n in STEPS}
    entries[f"batch_{BATCH}"] = entry(BATCH, (BATCH, 2))
    entries |= {
        name: made
        for name, made in plain.decoder().programs.entries.items()
        if name.startswith("head_")
    }
    facts = Decoder(
        STEPS, (1, 4), WIDTH, plain.VOCAB, CONTEXT, eos=(plain.EOS,), batch=BATCH,
        layers=tuple(Layer(name, slots=CONTEXT) for name in LAYERS),
    )  # fmt: skip
    manifest = plain.manifest("routed", entries, {}, facts)
    plan = tuple(
        Choice(str(workload), "route.x86", {}, kernel.name, "default")
        for workload, kernel in routers().values()
    )
    from msgspec.structs import replace

    return Artifact(
        replace(manifest, plan=plan), Programs(entries), code(),
        {"table": table(), "head": plain.embeddings()[1]}, tokenizer=plain.tokenizer_json(),
    )  # fmt: skip


def chosen(tokens) -> np.ndarray:
    """Experts ``[N, L, k]`` that the model chooses for tokens, best first."""
    logits = table()[np.asarray(tokens)].reshape(-1, len(LAYERS), EXPERTS)
    return np.argsort(-logits, -1, kind="stable")[..., :CHOSEN]
