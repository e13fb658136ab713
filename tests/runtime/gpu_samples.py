"""Artifacts for a GPU made by hand: the samples of `runtime_samples` with CUDA kernels.

Their texts are real; `fake_driver.c` has functions of the same names that compute the same.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
from runtime_samples import (
    BATCH,
    CONTEXT,
    EOS,
    STEPS,
    VOCAB,
    WIDTH,
    N,
    embeddings,
    manifest,
    plain,
    tokenizer_json,
)

from mimo_compile._cuda import Launch
from mimo_compile.artifact import Artifact
from mimo_compile.runtime.device_code import Argument, DeviceKernel, Made, Scratch, Usage, encode
from mimo_compile.runtime.program import (
    Buffer,
    Call,
    Choice,
    Decoder,
    Entry,
    Layer,
    Pool,
    Programs,
    State,
    Target,
)

CUBIN = b"\x7fELF\0\1 no machine code"
PAGE, PAGES, COLUMNS = 16, 5, 16
TEXT = """
extern "C" __global__ void twice(const float* a, float* b, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) b[i] = 2.0f * a[i];
}
extern "C" __global__ void plus(const float* a, const float* b, float* c, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) c[i] = a[i] + b[i];
}
extern "C" __global__ void step(const int* ids, const int* pos, const float* embed, const int* table,
    float* cache, float* hidden, int tokens, int width, int context, int apart, int page, int columns) {
  const int d = threadIdx.x;
  for (int t = 0; t < tokens && d < width; t++) {
    const int* mine = pos + 2 * t * apart;
    const int at = mine[0] + (apart ? 0 : t);
    const bool counts = apart ? mine[1] > 0 : t < mine[1];
    const int* row = table + t * apart * columns;
    float* own = cache + (page ? 0 : t * apart * context * width);
    float sum = 0.0f;
    for (int j = 0; j <= at && counts; j++) {
      float* place = own + (page ? row[j / page] * page + j % page : j) * width + d;
      if (j == at) *place = embed[ids[t] * width + d];
      sum += *place;
    }
    hidden[t * width + d] = sum;
  }
}
extern "C" __global__ void head(const float* hidden, const float* weight, float* logits, int tokens,
    int width, int vocab) {
  for (int i = threadIdx.x; i < tokens * vocab; i += blockDim.x) {
    float sum = 0.0f;
    for (int d = 0; d < width; d++) sum += hidden[i / vocab * width + d] * weight[i % vocab * width + d];
    logits[i] = sum;
  }
}
"""


def made(symbol: str, args: list[Argument], operands: tuple[Any, ...], **more: Any) -> Made:
    """A kernel of one launch, of one block."""
    launch = Launch(symbol, (1, 1, 1), 32, operands)
    kernel = DeviceKernel(
        tuple(args), (launch,), usage={symbol: Usage(8)}, predicted_us=2.5, **more
    )
    return Made(kernel, CUBIN, TEXT)


def _vector(name: str, role: Any, mutated: bool = False) -> Argument:
    return Argument(name, role, (N,), "float32", mutated)


def kernels() -> dict[str, Made]:
    """Those of `plain`: `add` goes through an array that is zero before each call."""
    double = made("twice", [_vector("a", "input"), _vector("b", "output")], ("a", "b", N))
    three = [_vector("a", "input"), _vector("b", "input"), _vector("c", "output")]
    none = Scratch("none", (N,), "float32", 256, zeroed=True)
    add = made("plus", three, (), scratch=(none,))
    both = Scratch("both", (N,), "float32", 0)
    launches = tuple(
        Launch("plus", (1, 1, 1), 32, operands, shared_bytes=shared)
        for operands, shared in (
            (("a", "b", "both", N), 0),
            (("both", "none", "c", N), 1024),
        )
    )
    kernel = msgspec.structs.replace(add.kernel, launches=launches, scratch=(both, none))
    return {"double": double, "add": replace(add, kernel=kernel)}


def target(artifact_manifest: Any, **facts: Any) -> Any:
    """The manifest of an artifact for an H200."""
    features = ("cp_async", "cuda", "fp8", "mma", "sm_80", "sm_90a", "tma", "wgmma")
    gpu = Target("cuda", "cuda:sm_90a", features, 132)
    versions = {**artifact_manifest.versions, "cuda": "13.0"}
    return msgspec.structs.replace(artifact_manifest, target=gpu, versions=versions, **facts)


def plain_gpu(**code: Made) -> Artifact:
    """`runtime_samples.plain` for a GPU."""
    cpu = plain(b"its code is of no use here")
    blob = encode("sm_90a", {**kernels(), **code})
    plan = tuple(Choice(f"{name}:n={N}", "of.a_test", {}, name, "default") for name in kernels())
    return Artifact(target(cpu.manifest, plan=plan), cpu.programs, blob, cpu.weights)


def _step_args(n: int, apart: int, paged: bool) -> tuple[list[Argument], tuple[Any, ...]]:
    rows = BATCH if apart else 1
    shape = (1, PAGES * PAGE, WIDTH) if paged else (rows * CONTEXT, WIDTH)
    args = [
        Argument("ids", "input", (n,), "int32"),
        Argument("pos", "input", (n, 2) if apart else (2,), "int32"),
        Argument("embed", "weight", (VOCAB, WIDTH), "float32"),
        *([Argument("table", "state", (rows, COLUMNS), "int32")] if paged else []),
        Argument("cache", "state", shape, "float32", True),
        Argument("hidden", "output", (n, WIDTH), "float32"),
    ]
    table = "table" if paged else "pos"
    page = (PAGE, COLUMNS) if paged else (0, 0)
    names = ("ids", "pos", "embed", table, "cache", "hidden")
    return args, (*names, n, WIDTH, CONTEXT, apart, *page)


def decoder_gpu(batch: int = 1, pages: bool = False) -> Artifact:
    """`runtime_samples.decoder` for a GPU; with `BATCH` sequences also over pages."""
    code, entries = {}, {}
    for name, n in [(f"step_{n}", n) for n in STEPS] + ([(f"batch_{batch}", batch)] * (batch > 1)):
        apart = int(name.startswith("batch"))
        args, operands = _step_args(n, apart, pages)
        code[name] = made("step", args, operands)
        offsets = {"ids": 0, "pos": 64, "hidden": 128}
        buffers = tuple(
            Buffer("arena", a.shape, a.dtype, offsets[a.name])
            if a.name in offsets
            else Buffer("state" if a.role == "state" else "weight", a.shape, a.dtype, 0, a.name)
            for a in args
        )
        places = {a.name: i for i, a in enumerate(args)}
        calls = (Call(name, tuple(range(len(args))), "layers.0"),)
        entries[name] = Entry(
            128 + 64 * n, buffers, calls, {k: places[k] for k in ("ids", "pos")},
            {"hidden": places["hidden"]},
        )  # fmt: skip
    for n in (1, 4):
        args = [
            Argument("hidden", "input", (n, WIDTH), "float32"),
            Argument("weight", "weight", (VOCAB, WIDTH), "float32"),
            Argument("logits", "output", (n, VOCAB), "float32"),
        ]
        buffers = (
            Buffer("arena", (n, WIDTH), "float32", 0),
            Buffer("weight", (VOCAB, WIDTH), "float32", 0, "head"),
            Buffer("arena", (n, VOCAB), "float32", 64 * n),
        )
        entries[f"head_{n}"] = Entry(
            64 * n + 4 * n * VOCAB, buffers, (Call(f"head{n}", (0, 1, 2), "head"),), {"hidden": 0},
            {"logits": 2},
        )  # fmt: skip
        code[f"head{n}"] = made("head", args, ("hidden", "weight", "logits", n, WIDTH, VOCAB))
    states = {"cache": State((1, PAGES * PAGE, WIDTH) if pages else (CONTEXT, WIDTH), "float32")}
    pool = None
    if pages:
        states["table"] = State((1, COLUMNS), "int32")
        pool = Pool(PAGE, PAGES, ("cache",), "table")
    layers = (Layer("layers.0", slots=CONTEXT, states=("cache",)),)
    facts = Decoder(
        STEPS, (1, 4), WIDTH, VOCAB, CONTEXT, eos=(EOS,), layers=layers, batch=batch, pool=pool
    )
    embed, head = embeddings()
    return Artifact(
        target(manifest("decoder", entries, states, facts)), Programs(entries), encode("sm_90a", code),
        {"embed": embed, "head": head}, tokenizer=tokenizer_json(),
    )  # fmt: skip


def inputs() -> np.ndarray:
    """What entries of `plain_gpu` take."""
    return np.arange(N, dtype=np.float32)
