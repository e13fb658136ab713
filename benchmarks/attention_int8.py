"""Errors of attention in INT8 arithmetic beside float16 and emulated float8, on normal and uniform inputs.

One head of width 64; every query sees every key (no mask), as in the published comparison of
INT-FlashAttention. Errors are L1 of the difference over L1 of the float64 result, medians over seeds. `int8`
and `int8half` are `ir.ops.int8_attention`; `published` is INT-FlashAttention as its authors describe it (one
scale for all values, weights relative to the running maximum, 127 levels, sums of integer weights); `fp16`
rounds inputs, logits and weights to float16; `e5m2` and `e4m3` round inputs (and weights) to 8-bit floats,
one scale a tensor.

    python benchmarks/attention_int8.py                    # 256 queries, 1024 and 4096 keys
    python benchmarks/attention_int8.py --keys 16384 --seeds 1 --json
"""

from __future__ import annotations

import argparse
import json

import torch

from mimo_compile.ir.ops.int8_attention import attend_int8
from mimo_compile.ir.ops.numerics import quantize_rows

WIDTH = 64
MOST = {torch.float8_e5m2: 57344.0, torch.float8_e4m3fn: 448.0}
KINDS = ("fp16", "int8half", "int8", "published", "e4m3", "e5m2")


def drawn(kind, queries, keys, seed):
    draw = torch.Generator().manual_seed(seed)
    make = torch.randn if kind == "normal" else torch.rand
    q, k, v = (make((n, WIDTH), generator=draw) for n in (queries, keys, keys))
    return (q, k, v) if kind == "normal" else (q - 0.5, k - 0.5, v - 0.5)


def exact(q, k, v):
    logits = q.double() @ k.double().T / WIDTH**0.5
    return torch.softmax(logits, -1) @ v.double()


def fp16(q, k, v):
    q, k, v = (x.half().float() for x in (q, k, v))
    logits = (q @ k.T / WIDTH**0.5).half().float()
    weights = torch.exp(logits - logits.amax(-1, keepdim=True)).half().float()
    return (weights @ v / weights.sum(-1, keepdim=True)).half()


def float8(q, k, v, dtype):
    def rounded(x):
        scale = x.abs().max() / MOST[dtype]
        return (x / scale).to(dtype).float() * scale

    q, k, v = (rounded(x) for x in (q, k, v))
    logits = q @ k.T / WIDTH**0.5
    weights = torch.exp(logits - logits.amax(-1, keepdim=True))
    return weights.to(dtype).float() @ v / weights.sum(-1, keepdim=True)


def integers(q, k, v, half):
    # the last query sees all keys; one call for each query would see the same
    last = torch.tensor([k.shape[0] - 1, 1])
    q, k, v = q[:, None], k[:, None], v[:, None]
    rows = [attend_int8(row[None], k, v, last, None, WIDTH**-0.5, 0, half=half).out for row in q]
    return torch.cat(rows)[:, 0]


def published(q, k, v, tile=64):
    (qc, qs), (kc, ks) = quantize_rows(q), quantize_rows(k)
    step = v.abs().max().double() / 127
    codes = torch.round(v.double() / step)
    logits = (qc.double() @ kc.double().T) * qs * ks.T / WIDTH**0.5
    top = torch.full((len(q), 1), -torch.inf, dtype=torch.float64)
    total, out = torch.zeros_like(top), torch.zeros(len(q), WIDTH, dtype=torch.float64)
    for at in range(0, len(k), tile):
        part = logits[:, at : at + tile]
        high = torch.maximum(top, part.amax(-1, keepdim=True))
        weights, shrink = torch.floor(127 * torch.exp(part - high) + 0.5), torch.exp(top - high)
        total = total * shrink + weights.sum(-1, keepdim=True)
        out, top = out * shrink + weights @ codes[at : at + tile], high
    return out * step / total


FORMS = {
    "fp16": fp16,
    "int8half": lambda q, k, v: integers(q, k, v, True),
    "int8": lambda q, k, v: integers(q, k, v, False),
    "published": published,
    "e4m3": lambda q, k, v: float8(q, k, v, torch.float8_e4m3fn),
    "e5m2": lambda q, k, v: float8(q, k, v, torch.float8_e5m2),
}


def errors(inputs, queries, keys, seeds):
    found = {kind: [] for kind in KINDS}
    for seed in range(seeds):
        q, k, v = drawn(inputs, queries, keys, seed)
        want = exact(q, k, v)
        for kind in KINDS:
            got = FORMS[kind](q, k, v).double()
            found[kind].append(float((got - want).abs().sum() / want.abs().sum()))
    return {kind: sorted(each)[len(each) // 2] for kind, each in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", type=int, nargs="*", default=[1024, 4096])
    parser.add_argument("--queries", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        {"inputs": inputs, "keys": keys, **errors(inputs, args.queries, keys, args.seeds)}
        for inputs in ("normal", "uniform")
        for keys in args.keys
    ]
    if args.json:
        print(json.dumps({"rows": rows}))
        return
    print("| inputs | keys | " + " | ".join(KINDS) + " |")
    print("|---|---|" + "---|" * len(KINDS))
    for row in rows:
        cells = " | ".join(f"{row[kind]:.5f}" for kind in KINDS)
        print(f"| {row['inputs']} | {row['keys']} | {cells} |")


if __name__ == "__main__":
    main()
