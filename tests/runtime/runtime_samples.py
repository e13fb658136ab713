"""Small artifacts made by hand: one with two plain entries, one that is a decoder in miniature."""

import json
import tempfile
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np

from mimo_compile import _tvm
from mimo_compile.artifact import Artifact
from mimo_compile.runtime.program import (
    SCHEMA,
    Buffer,
    Call,
    Decoder,
    Entry,
    Manifest,
    Programs,
    State,
    Target,
)

N = 64
VOCAB, WIDTH, CONTEXT, EOS = 257, 16, 48, 256
STEPS = (1, 4, 16)
BATCH = 3


@cache
def code() -> bytes:
    """Object code of all kernels that the samples use."""
    tvm = _tvm.compiler()
    from tvm.script import tirx as T

    @T.prim_func(s_tir=True)
    def double(a: T.handle, b: T.handle):
        A = T.match_buffer(a, (N,), "float32")
        B = T.match_buffer(b, (N,), "float32")
        for i in T.serial(N):
            B[i] = A[i] * T.float32(2)

    @T.prim_func(s_tir=True)
    def add(a: T.handle, b: T.handle, c: T.handle):
        A = T.match_buffer(a, (N,), "float32")
        B = T.match_buffer(b, (N,), "float32")
        C = T.match_buffer(c, (N,), "float32")
        for i in T.parallel(N):
            C[i] = A[i] + B[i]

    functions = {"double": double, "add": add}
    functions |= {f"step{n}": _step(n) for n in STEPS}
    functions |= {f"head{n}": _head(n) for n in (1, 4)}
    functions["batch"] = _batch(BATCH)
    module = tvm.IRModule({k: f.with_attr("global_symbol", k) for k, f in functions.items()})
    target = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v2"})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "code.o"
        tvm.compile(module, target=target).mod.write_to_file(str(path))
        return path.read_bytes()


def _step(n: int):
    """Append n embeddings to the cache; the hidden state is the sum of all so far."""
    from tvm.script import tirx as T

    @T.prim_func(s_tir=True)
    def step(ids: T.handle, pos: T.handle, embed: T.handle, cache: T.handle, hidden: T.handle):
        I = T.match_buffer(ids, (n,), "int32")  # noqa: E741
        P = T.match_buffer(pos, (2,), "int32")
        E = T.match_buffer(embed, (VOCAB, WIDTH), "float32")
        K = T.match_buffer(cache, (CONTEXT, WIDTH), "float32")
        H = T.match_buffer(hidden, (n, WIDTH), "float32")
        for t in T.serial(n):
            if t < P[1]:
                for d in T.serial(WIDTH):
                    K[P[0] + t, d] = E[I[t], d]
        for t, d in T.grid(n, WIDTH):
            H[t, d] = T.float32(0)
            for j in T.serial(CONTEXT):
                if j <= P[0] + t:
                    H[t, d] = H[t, d] + K[j, d]

    return step


def _batch(n: int):
    """Append an embedding to the cache of each of n sequences, where its `pos` says so."""
    from tvm.script import tirx as T

    @T.prim_func(s_tir=True)
    def batch(ids: T.handle, pos: T.handle, embed: T.handle, cache: T.handle, hidden: T.handle):
        I = T.match_buffer(ids, (n,), "int32")  # noqa: E741
        P = T.match_buffer(pos, (n, 2), "int32")
        E = T.match_buffer(embed, (VOCAB, WIDTH), "float32")
        K = T.match_buffer(cache, (n, CONTEXT, WIDTH), "float32")
        H = T.match_buffer(hidden, (n, WIDTH), "float32")
        for t in T.serial(n):
            if P[t, 1] > 0:
                for d in T.serial(WIDTH):
                    K[t, P[t, 0], d] = E[I[t], d]
        for t, d in T.grid(n, WIDTH):
            H[t, d] = T.float32(0)
            for j in T.serial(CONTEXT):
                if P[t, 1] > 0 and j <= P[t, 0]:
                    H[t, d] = H[t, d] + K[t, j, d]

    return batch


def _head(n: int):
    from tvm.script import tirx as T

    @T.prim_func(s_tir=True)
    def head(hidden: T.handle, weight: T.handle, logits: T.handle):
        H = T.match_buffer(hidden, (n, WIDTH), "float32")
        W = T.match_buffer(weight, (VOCAB, WIDTH), "float32")
        L = T.match_buffer(logits, (n, VOCAB), "float32")
        for t, v in T.grid(n, VOCAB):
            L[t, v] = T.float32(0)
            for d in T.serial(WIDTH):
                L[t, v] = L[t, v] + H[t, d] * W[v, d]

    return head


def manifest(name: str, entries, states, decoder=None) -> Manifest:
    """A manifest for this machine."""
    return Manifest(
        schema=SCHEMA,
        name=name,
        target=Target("cpu", "x86-64-v2", (), 2),
        versions={
            "mimo_compile": "0.1.0",
            "apache-tvm": version("apache-tvm"),
            "apache-tvm-ffi": version("apache-tvm-ffi"),
        },
        quant="none",
        objective="latency",
        entries=tuple(entries),
        members={},
        states=states,
        plan=(),
        decoder=decoder,
    )


def plain(object_code: bytes | None = None) -> Artifact:
    """`main(x) -> 2 (2 x + bias)` on a reused arena; `accumulate(x)` adds x to a state."""
    f32 = "float32"
    main = Entry(
        arena_bytes=512,
        buffers=(
            Buffer("arena", (N,), f32, 0),  # x, then 2 x + bias
            Buffer("arena", (N,), f32, 256),  # 2 x, then the result
            Buffer("weight", (N,), f32, 0, "bias"),
            Buffer("arena", (8, 8), f32, 256),
        ),
        calls=(
            Call("double", (0, 1), "first"),
            Call("add", (1, 2, 0), "bias"),
            Call("double", (0, 1), "second"),
        ),
        inputs={"x": 0},
        outputs={"y": 3},
    )
    accumulate = Entry(
        arena_bytes=256,
        buffers=(Buffer("arena", (N,), f32, 0), Buffer("state", (N,), f32, 0, "sum")),
        calls=(Call("add", (0, 1, 1), "sum"),),
        inputs={"x": 0},
        outputs={"sum": 1, "x": 0},
    )
    entries = {"main": main, "accumulate": accumulate}
    states = {"other": State((3,), "int8"), "sum": State((N,), f32)}
    weights = {
        "odd": np.arange(5, dtype=np.int8),
        "bias": np.arange(N, dtype=np.float32),
        "tail": np.ones((3, 0, 2), np.float16),
    }
    return Artifact(
        manifest("plain", entries, states), Programs(entries), object_code or code(), weights
    )


def embeddings() -> tuple[np.ndarray, np.ndarray]:
    """Embedding `[VOCAB, WIDTH]` and head `[VOCAB, WIDTH]`, small whole numbers: sums are exact."""
    rng = np.random.default_rng(5)
    return tuple(rng.integers(-3, 4, (VOCAB, WIDTH)).astype(np.float32) for _ in range(2))


def reference_logits(ids) -> np.ndarray:
    """Logits `[n, VOCAB]` in float64 of every prefix of the ids."""
    embed, head = (a.astype(np.float64) for a in embeddings())
    return np.cumsum(embed[np.asarray(ids)], axis=0) @ head.T


def tokenizer_json() -> bytes:
    """A tokenizer whose tokens are single bytes, and an end-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    assert tokenizer.get_vocab_size() == VOCAB
    return tokenizer.to_str().encode()


def decoder(batch: int = 1) -> Artifact:
    """A decoder: hidden state = sum of the embeddings so far; logits = head of it.

    ``batch``: sequences at a time, 1 or `BATCH`.
    """
    entries = {}
    for n in STEPS:
        entries[f"step_{n}"] = Entry(
            arena_bytes=128 + 64 * n,
            buffers=(
                Buffer("arena", (n,), "int32", 0),
                Buffer("arena", (2,), "int32", 64),
                Buffer("weight", (VOCAB, WIDTH), "float32", 0, "embed"),
                Buffer("state", (CONTEXT, WIDTH), "float32", 0, "cache"),
                Buffer("arena", (n, WIDTH), "float32", 128),
            ),
            calls=(Call(f"step{n}", (0, 1, 2, 3, 4), "layers.0"),),
            inputs={"ids": 0, "pos": 1},
            outputs={"hidden": 4},
        )
    if batch > 1:
        entries[f"batch_{batch}"] = Entry(
            arena_bytes=128 + 64 * batch,
            buffers=(
                Buffer("arena", (batch,), "int32", 0),
                Buffer("arena", (batch, 2), "int32", 64),
                Buffer("weight", (VOCAB, WIDTH), "float32", 0, "embed"),
                Buffer("state", (batch, CONTEXT, WIDTH), "float32", 0, "cache"),
                Buffer("arena", (batch, WIDTH), "float32", 128),
            ),
            calls=(Call("batch", (0, 1, 2, 3, 4), "layers.0"),),
            inputs={"ids": 0, "pos": 1},
            outputs={"hidden": 4},
        )
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
    facts = Decoder(STEPS, (1, 4), WIDTH, VOCAB, CONTEXT, eos=(EOS,), batch=batch)
    states = {"cache": State((CONTEXT, WIDTH), "float32")}
    return Artifact(
        manifest("decoder", entries, states, facts),
        Programs(entries),
        code(),
        {"embed": embed, "head": head},
        config=json.dumps({"model_type": "sum"}).encode(),
        tokenizer=tokenizer_json(),
        records=b"{}\n",
    )
