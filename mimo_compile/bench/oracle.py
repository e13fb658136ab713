"""What a workload's result must be, computed once for all who compete.

Attention over long contexts is judged in parts: a few heads of one KV head at a time, of prompts the tokens
at some places, the sequences of a batch one by one. These do not depend on each other, so a part is a
workload of its own; float64 scores of all of a prompt of 8192 tokens would take 17 GB. Of attention of
prompts to lists, and of their low-bit scores, the first and the last KV head stand for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mimo_compile.ir.ops import batches, get_op, pages
from mimo_compile.ir.ops.base import Arg, Array
from mimo_compile.ir.ops.cached_attention import CachedAttention
from mimo_compile.ir.workload import Workload
from mimo_compile.search.measure.verify import judge

WHOLE_BYTES = 256 << 20
"""Attention whose float64 keys, values and scores take more is judged in parts."""
PART_HEADS = 4
PART_TOKENS = 16
PLACES = 4
"""Spots of a prompt at which `PART_TOKENS` tokens are compared: its begin, its end and others between."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some heads and tokens of a workload, with what their result must be."""

    workload: Workload
    inputs: Mapping[str, Array]
    """What states are compared with; nothing where it is not all."""
    expected: Mapping[str, Array]
    bound: Mapping[str, Array]
    index: tuple[slice, ...]
    """Where it stands in the outputs; empty: it is all of them."""

    def of(self, got: Mapping[str, Array]) -> dict[str, Array]:
        """Return the part of results."""
        return {n: a[self.index] if self.index else a for n, a in got.items()}


class Oracle:
    """The float64 result of a workload for one set of inputs, and the error that is allowed."""

    def __init__(
        self, workload: Workload, inputs: Mapping[str, Array], exact: bool = False
    ) -> None:
        """Allow what the op's `bound` does, or with ``exact`` its `exact_bound`."""
        self.workload, self.inputs, self._exact = workload, inputs, exact

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The parts that are compared, computed on first use."""
        return tuple(
            _solve(workload, inputs, index, self._exact)
            for workload, inputs, index in _split(self.workload, self.inputs)
        )

    def judge(self, got: Mapping[str, Array]) -> tuple[float, str]:
        """Return the worst error as a multiple of its bound, and what is wrong ("" when nothing is).

        What is outside the parts must be finite at least.
        """
        worst = 0.0
        for part in self.parts:
            args = get_op(part.workload.op).args(part.workload)
            ratio, message = judge(args, part.of(got), part.expected, part.bound, part.inputs)
            worst = max(worst, ratio)
            if message:
                where = ", ".join(f"{s.start}..{s.stop - 1}" for s in part.index)
                return worst, message + (f" (within tokens and heads {where})" if where else "")
            if part.index and "out" in got and not np.isfinite(got["out"]).all():
                return np.inf, "out has values that are not finite"
        return worst, ""

    @cached_property
    def in_floats(self) -> Oracle:
        """The same with float activations: what those compute that do not quantise or round theirs."""
        op = get_op(self.workload.op)
        p = op.full(self.workload)
        if p.get("a", "a16") == "a16":
            return self
        return Oracle(op.workload(**{**p, "a": "a16"}), self.inputs)

    def distance(self, out: Array) -> float:
        """Return the relative error (root mean square) of the op's output, of the worst part."""
        worst, name = 0.0, output_of(self.workload).name
        for part in self.parts:
            expected = np.asarray(part.expected[name], np.float64)
            off = np.linalg.norm(part.of({name: out})[name].astype(np.float64) - expected)
            worst = max(worst, float(off) / max(float(np.linalg.norm(expected)), 1e-300))
        return worst


def output_of(workload: Workload) -> Arg:
    """Return the first output of a workload's op."""
    return next(a for a in get_op(workload.op).args(workload) if a.role == "output")


def _solve(
    workload: Workload, inputs: Mapping[str, Array], index: tuple[slice, ...], exact: bool
) -> Part:
    op = get_op(workload.op)
    expected = op.reference(workload, inputs)
    bound = (op.exact_bound if exact else op.bound)(workload, inputs, expected)
    # the copies of a part's keys and values are not needed to judge it
    return Part(workload, {} if index else inputs, expected, bound, index)


def _split(
    workload: Workload, inputs: Mapping[str, Array]
) -> Iterator[tuple[Workload, Mapping[str, Array], tuple[slice, ...]]]:
    p = get_op(workload.op).full(workload)
    if workload.op in _SOME and p["t"] * p["h"] * p["cap"] * 8 > WHOLE_BYTES and p["t"] > 1:
        for head in sorted({0, p["kv"] - 1}):
            yield from _SOME[workload.op](workload, p, inputs, head)
        return
    if workload.op != "cached_attention" or float64_bytes(p) <= WHOLE_BYTES:
        yield workload, inputs, ()
        return
    if p["b"] > 1 or pages.paged(p):
        each = batches.split(get_op(workload.op), workload, inputs)
        for i, given in enumerate(each):
            for one, of_one, index in _split(batches.alone(workload), given):
                rows, rest = index[0] if index else slice(0, p["t"]), index[1:]
                start = i * p["t"]
                yield one, of_one, (slice(start + rows.start, start + rows.stop), *rest)
        return
    group = p["h"] // p["kv"]
    for tokens in _places(p["t"], p["h"] * p["cap"]):
        for first in range(0, p["h"], group):
            for at in range(first, first + group, PART_HEADS):
                heads = slice(at, min(at + PART_HEADS, first + group))
                yield _part(workload, p, inputs, tokens, heads, first // group)


def _part(
    workload: Workload,
    p: Mapping[str, int],
    inputs: Mapping[str, Array],
    tokens: slice,
    heads: slice,
    kv: int,
) -> tuple[Workload, Mapping[str, Array], tuple[slice, ...]]:
    count = tokens.stop - tokens.start
    start = int(inputs["pos"][0]) + tokens.start
    own = dict(workload.params) | {"t": count, "h": heads.stop - heads.start, "kv": 1}
    states = [a.name for a in get_op(workload.op).args(workload) if a.role == "state"]
    caches = {n: inputs[n][:, kv : kv + 1].copy() for n in states}
    given = {
        **inputs,
        "q": inputs["q"][tokens, heads].copy(),
        "pos": np.array([start, count], np.int32),
        **caches,
    }
    if "sink" in inputs:
        given["sink"] = inputs["sink"][heads].copy()
    return Workload.make(workload.op, own), given, (tokens, heads)


Split = Iterator[tuple[Workload, Mapping[str, Array], tuple[slice, ...]]]


def _one_head(
    workload: Workload, inputs: Mapping[str, Array], heads: slice, kv: int, tokens: slice
) -> dict[str, Array]:
    """Return what one KV head and its query heads read, for some tokens."""
    args = get_op(workload.op).args(workload)
    first = int(inputs["pos"][0]) + tokens.start
    given = dict(inputs) | {n: inputs[n][heads].copy() for n in ("sink", "q_mean") if n in inputs}
    given |= {n: inputs[n][kv : kv + 1].copy() for n in ("k_mean",) if n in inputs}
    given |= {a.name: inputs[a.name][:, kv : kv + 1].copy() for a in args if a.role == "state"}
    given["q"] = inputs["q"][tokens, heads].copy()
    given["pos"] = np.array([first, tokens.stop - tokens.start], np.int32)
    return given


def _lists_of_one(
    workload: Workload, p: Mapping[str, int], inputs: Mapping[str, Array], kv: int
) -> Split:
    """Yield attention of one KV head to the first, a middle and the last list: of each, both ends."""
    group, lists, last = p["h"] // p["kv"], p["hs"], -(-p["t"] // p["rows"]) - 1
    heads = slice(kv * group, (kv + 1) * group)
    own = heads if lists == p["h"] else slice(kv, kv + 1) if lists == p["kv"] else slice(0, 1)
    for row, begin in _ends({0, last // 2, last}, p["rows"], p["t"]):
        tokens = slice(begin, min(begin + PART_TOKENS, (row + 1) * p["rows"], p["t"]))
        given = _one_head(workload, inputs, heads, kv, tokens)
        given |= {n: inputs[n][row : row + 1, own].copy() for n in ("idx", "cnt")}
        count = tokens.stop - tokens.start
        small = {"t": count, "rows": count, "h": group, "kv": 1, "hs": own.stop - own.start}
        yield Workload.make(workload.op, dict(workload.params) | small), given, (tokens, heads)


def _ends(lists: set[int], rows: int, tokens: int) -> list[tuple[int, int]]:
    """Return lists with the tokens where parts begin: their first, and `PART_TOKENS` before their end."""
    found = []
    for row in sorted(lists):
        begin, end = row * rows, min((row + 1) * rows, tokens)
        found += [(row, at) for at in sorted({begin, max(begin, end - PART_TOKENS)})]
    return found


def _scores_of_one(
    workload: Workload, p: Mapping[str, int], inputs: Mapping[str, Array], kv: int
) -> Split:
    """Yield low-bit scores of the query heads of one KV head."""
    group = p["h"] // p["kv"]
    heads = slice(kv * group, (kv + 1) * group)
    given = _one_head(workload, inputs, heads, kv, slice(0, p["t"]))
    own = dict(workload.params) | {"h": group, "kv": 1}
    every = slice(0, -(-p["t"] // p["rows"]))
    yield Workload.make(workload.op, own), given, (every, heads)


_SOME: dict[str, Callable[..., Split]] = {
    "sparse_attention": _lists_of_one,
    "score_lowbit": _scores_of_one,
}
"""Ops of prompts of which the first and the last KV head are judged, where float64 scores of all take more
than `WHOLE_BYTES`."""


def visible_keys(p: Mapping[str, int]) -> int:
    """Return how many keys the tokens of a call see together, given all parameters of `cached_attention`."""
    length = CachedAttention().kv_length(p)
    return min(length, p["window"] + p["t"] - 1) if p["window"] else length


def float64_bytes(p: Mapping[str, int]) -> float:
    """Return the bytes of keys and values of each query head and of scores, as the reference holds them.

    Those of one sequence: of a batch one after the other is computed.
    """
    return 8.0 * p["h"] * p["cap"] * (p["d"] + p["dv"] + p["t"])


def _places(tokens: int, keys: int) -> list[slice]:
    """Return runs of tokens to compare: all of few, else some at places spread over the prompt."""
    if tokens <= PLACES * PART_TOKENS:
        return [slice(0, tokens)]
    rng = np.random.default_rng(tokens + keys)
    last = tokens - PART_TOKENS
    between = rng.choice(np.arange(PART_TOKENS, last), PLACES - 2, replace=False)
    starts = [0, *sorted(int(b) for b in between), last]
    return [slice(s, s + PART_TOKENS) for s in starts]
