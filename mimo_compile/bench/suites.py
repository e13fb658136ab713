"""Named lists of workloads to compare on; every entry is a valid ``--op`` text."""

from __future__ import annotations

from collections.abc import Iterable

from mimo_compile.errors import UsageError
from mimo_compile.ir.ops import get_op, parse_workload

KINDS: dict[str, str] = {
    "mpgemm": "mpgemm",
    "attention": "cached_attention",
    "moe": "moe",
}
"""Kind of `bench` -> op."""

_SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (3200, 8640), (8640, 3200))
_HEADS = (
    "h=32,kv=8,d=128,dv=128",
    "h=32,kv=8,d=64,dv=64",
    "h=32,kv=8,d=192,dv=128",
    "h=32,kv=1,d=128,dv=128",
)
"""Groups of four heads, wide and narrow; values narrower than keys; one KV head for all."""
_KEYS = (4096, 16384, 32768, 65536, 131072)
_BATCH, _BATCH_KEYS = 4, (4096, 32768)
"""Sequences of a batch, and keys of each."""
_PAGE = 64
"""Positions in a page."""
_PROMPTS = (1024, 2048, 4096, 8192)
_CHUNKS = (256, 512)
_WINDOW = 128


def _mpgemm(m: int, formats: tuple[str, ...], shapes: tuple[tuple[int, int], ...]) -> list[str]:
    return [f"mpgemm:m={m},n={n},k={k},{f}" for f in formats for n, k in shapes]


def _attention(forms: Iterable[str]) -> list[str]:
    """Return the workloads of every form at every geometry of heads, in both formats of caches."""
    return [
        f"cached_attention:{form.format(heads)}{stored}"
        for form in forms
        for heads in _HEADS
        for stored in ("", ",c=bf16")
    ]


def _ring(tokens: int) -> int:
    """Return the slots of a ring that a call of so many tokens needs."""
    return _WINDOW if tokens == 1 else _WINDOW + tokens


_ALL = ("w=f32", "w=bf16", "w=w8,a=a8", "w=w4g64,a=a8", "w=w2g64,a=a8", "w=w1.58,a=a8")
_LLM = (
    "w=w8,a=a8",
    "w=w4g64,a=a8",
    "w=w2g64,a=a8",
    "w=w1.58,a=a8",
    "w=w1.58d,a=a8",
    "w=w1g64,a=a8",
)
_ACTIVATIONS = (
    "w=bf16",
    "w=bf16,a=abf16",
    "w=w4g64",
    "w=w4g64,a=abf16",
    "w=w4g64,a=a8",
    "w=w4g64,a=a8g64",
)
_EXPERTS = ("e=64,k=8,d=2048,f=768", "e=256,k=8,d=1024,f=512")
LAYERS = [
    f"moe:t={t},{experts},w={w}"
    for experts in _EXPERTS
    for w in ("bf16,a=abf16", "w8,a=a8", "w4g64,a=a8")
    for t in (1, 16, 128, 512)
]
"""Layers of experts: one token, few and many of each expert."""
_SUITES: dict[str, dict[str, list[str]]] = {
    "mpgemm": {
        "quick": _mpgemm(1, ("w=w8,a=a8", "w=w4g64,a=a8", "w=w2g64,a=a8"), _SHAPES[:1]),
        "gemv": _mpgemm(1, _ALL, _SHAPES[:1]),
        "shapes": _mpgemm(1, ("w=w4g64,a=a8",), _SHAPES),
        "llm": [
            s
            for shape in _SHAPES  # one shape at a time: peers quantise its weights once
            for m in (1, 4, 16, 128, 512)
            for s in _mpgemm(m, _LLM, (shape,))
        ],
        "activations": [s for m in (1, 4, 16, 128) for s in _mpgemm(m, _ACTIVATIONS, _SHAPES[:1])],
        "gemm": [s for m in (16, 256) for s in _mpgemm(m, ("w=w4g64,a=a8", "w=f32"), _SHAPES[:1])],
    },
    "attention": {
        "quick": [f"cached_attention:t=1,{_HEADS[0]},cap=4096"],
        "decode": [
            *_attention(f"t=1,{{}},cap={n}" for n in _KEYS),
            # as many sequences, all of one length, as peers take them
            *_attention(f"t=1,{{}},cap={n},b={_BATCH},even=1" for n in _BATCH_KEYS),
        ],
        # sequences over caches of their own, and over pages of a pool that holds as much
        "pages": [
            f"cached_attention:t=1,{_HEADS[0]},cap={n},b={_BATCH},even=1{stored}{paged}"
            for n in _BATCH_KEYS
            for stored in ("", ",c=bf16")
            for paged in ("", f",page={_PAGE},pool={_BATCH * n // _PAGE}")
        ],
        "prefill": _attention(
            [f"t={n},{{}},cap={n}" for n in _PROMPTS] + [f"t={t},{{}},cap=4096" for t in _CHUNKS]
        ),
        # the same prompts over the same caches, in each arithmetic
        "int8": [
            f"cached_attention:t={n},{heads},cap={n},c=bf16{arith}"
            for n in _PROMPTS[1::2]
            for heads in _HEADS
            for arith in ("", ",arith=int8half", ",arith=int8")
        ],
        # a ring that holds the window of each token of the call; most of a context went by
        "window": [
            *_attention(
                f"t={t},{{}},cap={_ring(t)},window={_WINDOW},len={max(t, 4096)}"
                for t in (1, *_CHUNKS, *_PROMPTS)
            ),
            f"cached_attention:t=1,{_HEADS[0]},cap=128,window=128,sink=1,len=4096",
        ],
    },
    "moe": {
        "quick": ["moe:t=1,e=32,k=4,d=1024,f=512,w=w4g64,a=a8"],
        "decode": [
            f"moe:t=1,e=64,k=8,d=2048,f=768,w={w}" for w in ("w4g64,a=a8", "w8,a=a8", "bf16")
        ],
        "prefill": [f"moe:t={t},e=32,k=4,d=1024,f=512,w=w4g64,a=a8" for t in (16, 256)],
        "layers": LAYERS,
    },
}


_OTHERS = {"attention": ("sparse",), "moe": ("skew",)}
"""Suites of runs of their own: see `bench.sparse` and `bench.skew`."""


def suite(kind: str, text: str) -> list[str]:
    """Return the workloads of a named suite, or some of them.

    Args:
        kind: One of `KINDS`.
        text: ``NAME``, or ``NAME:KEY=VALUE[+VALUE...][,KEY=...]``, which keeps the workloads whose
            parameters have one of the values: ``llm:m=1+16,w=w4g64``.

    Raises:
        UsageError: there is no such suite or parameter, or no workload is kept; the remedy lists what
            there is.
    """
    name, _, filters = text.partition(":")
    found = _SUITES[kind].get(name)
    if found is None:
        raise UsageError(
            f"there is no suite {name!r} of {kind} (--suite)",
            remedy=f"use one of {', '.join((*_SUITES[kind], *_OTHERS.get(kind, ())))}",
        )
    return chosen(name, found, filters)


def chosen(name: str, entries: Iterable[str], filters: str) -> list[str]:
    """Return the entries of suite ``name`` that conditions keep: ``KEY=VALUE[+VALUE...][,KEY=...]``.

    Raises:
        UsageError: none is kept.
    """
    kept = list(entries)
    for condition in filter(None, filters.split(",")):
        key, _, values = condition.partition("=")
        have = {entry: _parameter(entry, key) for entry in kept}
        kept = [entry for entry in kept if have[entry] in values.split("+")]
        if not kept:
            there = list(dict.fromkeys(v for v in have.values() if v is not None))
            raise UsageError(
                f"suite {name} has no workload with {condition} (--suite)",
                remedy=f"use {key}={'+'.join(there)}" if there else "use a parameter of the op",
            )
    return kept


def _parameter(entry: str, key: str) -> str | None:
    workload = parse_workload(entry)
    value = get_op(workload.op).full(workload).get(key)
    return None if value is None else str(value)


def suite_names(kind: str) -> list[str]:
    """Return the names of a kind's suites."""
    return list(_SUITES[kind])
