"""The decoder in miniature over pages: it sums what lies in a pool, and in a cache of each sequence."""

import tempfile
from functools import cache
from pathlib import Path

from runtime_samples import (
    BATCH,
    CONTEXT,
    EOS,
    STEPS,
    VOCAB,
    WIDTH,
    _head,
    embeddings,
    manifest,
    tokenizer_json,
)

from mimo_compile import _tvm
from mimo_compile.artifact import Artifact
from mimo_compile.runtime.program import Buffer, Call, Decoder, Entry, Layer, Pool, Programs, State

PAGE, PAGES, TABLE = 4, 16, 16
"""Positions in a page; pages, which are two less than the sequences' contexts together; width of a table."""


def _step(n: int, t: int):
    """Append t embeddings of n sequences to the pool and to their own caches; hidden: mean of both sums."""
    from tvm.script import tirx as T

    @T.prim_func(s_tir=True)
    def step(
        ids: T.handle, pos: T.handle, embed: T.handle, pool: T.handle, own: T.handle, pages: T.handle,
        hidden: T.handle,
    ):  # fmt: skip
        I = T.match_buffer(ids, (n * t,), "int32")  # noqa: E741
        P = T.match_buffer(pos, (n, 2), "int32")
        E = T.match_buffer(embed, (VOCAB, WIDTH), "float32")
        K = T.match_buffer(pool, (1, PAGES * PAGE, WIDTH), "float32")
        O = T.match_buffer(own, (n, CONTEXT, WIDTH), "float32")  # noqa: E741
        B = T.match_buffer(pages, (n, TABLE), "int32")
        H = T.match_buffer(hidden, (n * t, WIDTH), "float32")
        for s, i in T.grid(n, t):
            if i < P[s, 1]:
                for d in T.serial(WIDTH):
                    at: T.let = P[s, 0] + i
                    K[0, B[s, at // PAGE] * PAGE + at % PAGE, d] = E[I[s * t + i], d]
                    O[s, at, d] = E[I[s * t + i], d]
        for s, i, d in T.grid(n, t, WIDTH):
            H[s * t + i, d] = T.float32(0)
            for j in T.serial(CONTEXT):
                if i < P[s, 1] and j <= P[s, 0] + i:
                    H[s * t + i, d] = H[s * t + i, d] + T.float32(0.5) * (
                        K[0, B[s, j // PAGE] * PAGE + j % PAGE, d] + O[s, j, d]
                    )

    return step


@cache
def code() -> bytes:
    """Object code of the kernels."""
    tvm = _tvm.compiler()
    functions = {f"step{t}": _step(1, t) for t in STEPS}
    functions |= {"batch": _step(BATCH, 1), "head1": _head(1), "head4": _head(4)}
    module = tvm.IRModule({k: f.with_attr("global_symbol", k) for k, f in functions.items()})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "code.o"
        target = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v2"})
        tvm.compile(module, target=target).mod.write_to_file(str(path))
        return path.read_bytes()


def _entry(n: int, t: int) -> Entry:
    rows = n * t
    return Entry(
        arena_bytes=128 + 64 * rows,
        buffers=(
            Buffer("arena", (rows,), "int32", 0),
            Buffer("arena", (n, 2) if n > 1 else (2,), "int32", 64),
            Buffer("arena", (n, 2), "int32", 64),
            Buffer("weight", (VOCAB, WIDTH), "float32", 0, "embed"),
            Buffer("state", (1, PAGES * PAGE, WIDTH), "float32", 0, "pool"),
            Buffer("state", (n, CONTEXT, WIDTH), "float32", 0, "own"),
            Buffer("state", (n, TABLE), "int32", 0, "pages"),
            Buffer("arena", (rows, WIDTH), "float32", 128),
        ),
        calls=(Call("batch" if n > 1 else f"step{t}", (0, 2, 3, 4, 5, 6, 7), "layers.0"),),
        inputs={"ids": 0, "pos": 1},
        outputs={"hidden": 7},
    )


def decoder() -> Artifact:
    """The artifact; its results are those of `runtime_samples.decoder`."""
    entries = {f"step_{t}": _entry(1, t) for t in STEPS} | {f"batch_{BATCH}": _entry(BATCH, 1)}
    for n in (1, 4):
        entries[f"head_{n}"] = Entry(
            arena_bytes=64 * n + 4 * n * VOCAB,
            buffers=(
                Buffer("arena", (n, WIDTH), "float32", 0),
                Buffer("weight", (VOCAB, WIDTH), "float32", 0, "head"),
                Buffer("arena", (n, VOCAB), "float32", 64 * n),
            ),
            calls=(Call(f"head{n}", (0, 1, 2), "head"),),
            inputs={"hidden": 0},
            outputs={"logits": 2},
        )
    embed, head = embeddings()
    pool = Pool(PAGE, PAGES, ("pool",), "pages")
    layers = (Layer("layers.0", slots=CONTEXT, states=("pool", "own")),)
    facts = Decoder(
        STEPS, (1, 4), WIDTH, VOCAB, CONTEXT, eos=(EOS,), batch=BATCH, pool=pool, layers=layers
    )
    states = {
        "pool": State((1, PAGES * PAGE, WIDTH), "float32"),
        "own": State((1, CONTEXT, WIDTH), "float32"),
        "pages": State((1, TABLE), "int32"),
    }
    return Artifact(
        manifest("paged", entries, states, facts),
        Programs(entries),
        code(),
        {"embed": embed, "head": head},
        tokenizer=tokenizer_json(),
    )
