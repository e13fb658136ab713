"""What KV caches of fewer bits cost in quality: error of attention to normal keys, perplexity on code.

Attention of one token to 1,024 normal keys and values of 128 channels: how far the numbers that a cache holds
move it (L2, relative), and how far kernels do beside that which take integers for queries and weights. The
last line is one bit by the smallest and the largest number, as KIVI and TailorKV define it, not by the mean.

Perplexity: the model runs eagerly in float32, but for its caches. What a position attends to are the float32
rows of its own group and the codes of all before, as compiled kernels read them. All formats see the same
texts, held-out modules of the standard library.

    python benchmarks/kv_quality.py                                        # the built-in model
    python benchmarks/kv_quality.py --folder models/tiny-4k --length 4096 --texts 2
    python benchmarks/kv_quality.py --texts 0                              # attention alone
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from mimo_compile.frontend.huggingface import load_checkpoint, resolve_source
from mimo_compile.ir import kv_groups, kv_rounding
from mimo_compile.ir.formats import parse_scheme
from mimo_compile.ir.kv_groups import GROUPED, STATES
from mimo_compile.ir.ops import load_all
from mimo_compile.ir.policies import parse_policy
from mimo_compile.runtime.scores import log_softmax_at
from mimo_compile.tiny import corpus

KEYS, WIDTH = 1024, 128


def distance(x, reference):
    """Return the L2 norm of a difference, relative."""
    return float((x.double() - reference).norm() / reference.norm())


def between_extremes(x, axis):
    """Return what one bit by the smallest and the largest number of each 64 keeps."""
    parts = x.unflatten(axis, (-1, 64))
    axis = axis % x.dim() + 1
    scale, zero = (
        a.unsqueeze(axis) for a in kv_groups.parameters(parts.amin(axis), parts.amax(axis), 1)
    )
    codes = kv_groups.nearest(parts, scale, zero, 1)
    return (codes * scale.float() + zero.float()).reshape(x.shape)


def errors(draws):
    """Print how far formats and integers move attention to normal keys, means of some draws."""
    exact, scale = torch.ops.mimo.cached_attention, WIDTH**-0.5
    pos = torch.tensor([KEYS - 1, 1], dtype=torch.int32)
    found = {name: [] for name in (*GROUPED, "i1 by extremes")}
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        q, k, v = (
            torch.from_numpy(rng.standard_normal((n, 1, WIDTH), np.float32))
            for n in (1, KEYS, KEYS)
        )
        want = exact(q.double(), k.double(), v.double(), pos, None, scale, 0)
        for name, fmt in GROUPED.items():
            held = kv_groups.encoded(k.numpy(), v.numpy(), KEYS - 1, KEYS, 64, fmt)
            states = {n: torch.from_numpy(a) for n, a in held.items()}
            arrays = (states[n] for n in STATES)
            codes = torch.ops.mimo.grouped_attention(q.double(), *arrays, pos, None, scale, name)
            given = {"q": q, "pos": pos, **states}
            integers = kv_rounding.attend_rounded(given, scale, fmt, None)
            found[name].append((distance(codes, want), distance(integers, codes)))
        kept = between_extremes(k, 0).double(), between_extremes(v, -1).double()
        codes = exact(q.double(), *kept, pos, None, scale, 0)
        found["i1 by extremes"].append((distance(codes, want), math.nan))
    for name, each in found.items():
        codes, integers = np.mean(each, 0)
        more = "" if math.isnan(integers) else f", by integers by {integers:.2g}"
        print(f"{name}: attention is off by {codes:.2g}{more}", flush=True)


def perplexities(args):
    """Print the perplexity of a model with each format."""
    tokenizer = Tokenizer.from_file(str(args.folder / "tokenizer.json"))
    ids = corpus.encode(tokenizer, corpus.collect().held_out).astype(np.int32)
    texts = np.split(ids[: args.texts * args.length], args.texts)
    first = None
    for name in args.formats:
        model = load_checkpoint(
            args.folder, parse_scheme(name), args.length, attention=parse_policy(args.attention)
        ).decoder
        seen = []
        for text in texts:
            model.reset()
            logits = model.prefill([int(i) for i in text])[1].numpy()
            seen.append(log_softmax_at(logits[:-1], text[1:]))
        loss = -float(np.mean(np.concatenate(seen), dtype=np.float64))
        first = loss if first is None else first
        print(
            f"{name}: perplexity {math.exp(loss):.3f}, {math.expm1(loss - first):+.2%}", flush=True
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=resolve_source("tiny"))
    parser.add_argument("--length", type=int, default=512, help="tokens of a text")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--attention", default="model")
    parser.add_argument(
        "--formats", nargs="*", default=["none", "kv16", "kvfp8", "kv8", "kv4", "kv2", "kv1"]
    )
    args = parser.parse_args()
    load_all()
    if args.draws:
        errors(args.draws)
    if args.texts:
        perplexities(args)


if __name__ == "__main__":
    main()
