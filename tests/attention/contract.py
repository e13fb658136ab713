"""What every implementation of `sparse_attention` must do, whatever selected its lists.

An implementation is a function of a workload and its canonical arrays that returns ``out`` and ``lse``, as
the op's own `reference` does. Each check takes one and a `Case`, and compares within the op's bound with
`dense`, which is written for this purpose: plain numpy in float64 over an expanded mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from mimo_compile.errors import UsageError
from mimo_compile.ir.caches import parse_cache_format
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.pages import row_of, width_of
from mimo_compile.ir.workload import Workload

Array = np.ndarray[Any, Any]
Implementation = Callable[[Workload, Mapping[str, Array]], Mapping[str, Array]]
OP = get_op("sparse_attention")


@dataclass(frozen=True)
class Case:
    """A workload with its arrays."""

    workload: Workload
    inputs: dict[str, Array]

    @property
    def p(self) -> dict[str, Any]:
        return OP.full(self.workload)

    def cache(self, name: str) -> Array:
        """Return the values of a cache, whatever its format."""
        return parse_cache_format(self.p["c"]).decode(self.inputs[name])

    def storing(self, **caches: Array) -> Case:
        """Return a case with other values in its caches."""
        encode = parse_cache_format(self.p["c"]).encode
        return replace(self, inputs=self.inputs | {n: encode(a) for n, a in caches.items()})

    def having(self, **changes: Any) -> Case:
        """Return a case with other arrays (upper-case names) or parameters (lower-case ones)."""
        arrays = {k.lower(): v for k, v in changes.items() if k.isupper()}
        values = {k: v for k, v in changes.items() if not k.isupper()}
        params = {k: v for k, v in self.p.items() if k not in values} | values
        order = [q.name for q in OP.params]
        workload = OP.workload(**{k: params[k] for k in order})
        return replace(self, workload=workload, inputs=self.inputs | arrays)


def lists_of(mask: Array, kmax: int) -> dict[str, Array]:
    """Return the arrays IDX and CNT of a mask ``[R, HS, NB]``."""
    idx = np.full((*mask.shape[:2], kmax), -1, np.int32)
    for at in np.ndindex(mask.shape[:2]):
        ids = np.flatnonzero(mask[at])
        idx[at][: len(ids)] = ids
    return {"IDX": idx, "CNT": mask.sum(-1).astype(np.int32)}


@st.composite
def cases(draw: Any, sink: bool | None = None, c: str = "f32", wide: bool = False) -> Case:
    """Draw small cases: every grouping of heads, partial blocks, padding tokens, short and empty lists.

    ``wide``: of extents that take vectors and several steps.
    """
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    either = lambda small, large: pick(*(large if wide else small))  # noqa: E731
    kv, group = pick(1, 2, 3), pick(1, 2, 3, 5)
    length = draw(st.integers(1, either((40,), (300,))))
    t = draw(st.integers(1, min(either((5,), (1, 20)), length)))
    block = either((1, 2, 3, 4, 16), (16, 32, 64, 1, 8, 24))
    page = either((0, 0, 16), (0, 0, 16, 32))
    unit = either((4,), (32,))
    cap = -(-(length + draw(st.integers(0, 9))) // unit) * unit
    blocks = -(-cap // block)
    p = dict(
        t=t, h=kv * group, kv=kv, d=either((1, 4, 9), (16, 33, 40)), dv=either((1, 3, 8), (16, 24, 48)),
        cap=cap, block=block, hs=pick(1, kv, kv * group), kmax=draw(st.integers(1, blocks + 2)),
        rows=pick(1, 2, t), window=either((0, 0, 1, 3), (0, 0, 1, 17, 40)), len=length,
        sink=int(draw(st.booleans()) if sink is None else sink), c=c, page=page,
        pool=-(-cap // page) + pick(0, 2) if page else 0,
    )  # fmt: skip
    workload = OP.workload(**p)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    inputs = OP.make_inputs(workload, rng)
    inputs["pos"][1] = draw(st.integers(1, t))
    if page:  # a place for each position that the cache may hold
        inputs["pages"] = table_of(p["pool"], cap, page, rng)
    rows = inputs["idx"].shape[0]
    mask = rng.random((rows, p["hs"], blocks)) < rng.random((rows, p["hs"], 1))
    mask &= np.cumsum(mask, -1) <= p["kmax"]
    lists = lists_of(mask, p["kmax"])
    inputs |= {"idx": lists["IDX"], "cnt": lists["CNT"]}
    shapes = {n: inputs[n].shape for n in ("k_cache", "v_cache")}  # poison is a check of its own
    values = {n: rng.standard_normal(shape, dtype=np.float32) for n, shape in shapes.items()}
    return Case(workload, inputs).storing(**values)


def table_of(pool: int, cap: int, page: int, rng: Any) -> Array:
    """Return the block table ``[1, width]`` of a sequence whose pages lie anywhere."""
    table, count = np.zeros((1, width_of(cap, page)), np.int32), -(-cap // page)
    table[0, :count] = rng.permutation(pool)[:count]
    return table


def unpaged(case: Case) -> Case:
    """Return the case over a cache of its own."""
    caches = {n.upper(): case.inputs[n][slots(case)] for n in ("k_cache", "v_cache")}
    own = replace(case, inputs={n: a for n, a in case.inputs.items() if n != "pages"})
    return own.having(page=0, pool=0, **caches)


def visible(case: Case) -> Array:
    """Return the mask ``[T, H, position]`` of what each query head sees."""
    p, inputs = case.p, case.inputs
    start, valid = inputs["pos"].tolist()
    seen = np.zeros((p["t"], p["h"], p["cap"]), bool)
    for i, h in np.ndindex(p["t"], p["h"]):
        if i < valid:
            row = (i // p["rows"], h * p["hs"] // p["h"])
            for b in inputs["idx"][row][: inputs["cnt"][row]]:
                seen[i, h, b * p["block"] : (b + 1) * p["block"]] = True
            seen[i, h, max(0, start + i + 1 - p["window"]) : start + i + 1] |= p["window"] > 0
            seen[i, h, start + i + 1 :] = False
    return seen


def slots(case: Case) -> Array:
    """Return the slot of each position."""
    p, at = case.p, np.arange(case.p["cap"])
    if not p["page"]:
        return at
    return row_of(case.inputs["pages"][0], p["page"], 1, at)


def dense(case: Case, seen: Array | None = None) -> tuple[Array, Array, Array]:
    """Return out, lse and probabilities ``[T, H, position]`` under a mask, in float64."""
    p, inputs = case.p, case.inputs
    seen = visible(case) if seen is None else seen
    group = p["h"] // p["kv"]
    k, v = (
        np.repeat(case.cache(n)[slots(case)].astype(np.float64), group, 1)
        for n in ("k_cache", "v_cache")
    )
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        logits = np.einsum("thd,shd->ths", inputs["q"].astype(np.float64), k) * p["d"] ** -0.5
        logits = np.where(seen, logits, -np.inf)
        z = np.full(p["h"], -np.inf)
        if p["sink"]:
            z = inputs["sink"].astype(np.float64)
        z = np.where(np.arange(p["t"])[:, None] < inputs["pos"][1], z, -np.inf)
        top = np.maximum(logits.max(-1), z)
        top = np.where(np.isfinite(top), top, 0.0)
        e = np.exp(logits - top[..., None])
        total = e.sum(-1) + np.exp(z - top)
        prob = np.where(total[..., None] > 0, e / np.maximum(total[..., None], 1e-300), 0.0)
        lse = np.where(total > 0, np.log(total) + top, -np.inf)
    v = np.where(seen.any((0, 1))[:, None, None], v, 0.0)
    return np.einsum("ths,shd->thd", prob, v), lse, prob


def agree(case: Case, got: Mapping[str, Array], out: Array, lse: Array) -> None:
    """Compare within the op's bound; an infinity must be met exactly."""
    bound = OP.bound(case.workload, case.inputs, OP.reference(case.workload, case.inputs))
    for name, want in (("out", out), ("lse", lse)):
        have = np.asarray(got[name], np.float64)
        with np.errstate(invalid="ignore"):
            right = (np.abs(have - want) <= bound[name] + 1e-14 * (1 + np.abs(want))) | (
                have == want
            )
        assert right.all(), f"{case.workload}: {name} is off by {np.abs(have - want).max():.3g}"


def everything(case: Case) -> Case:
    """Return the case with every block listed."""
    blocks = -(-case.p["cap"] // case.p["block"])
    rows = case.inputs["idx"].shape[0]
    return case.having(kmax=blocks, **lists_of(np.ones((rows, case.p["hs"], blocks), bool), blocks))


# -- the checks --------------------------------------------------------------------------------


def check_full_lists_are_dense(attend: Implementation, case: Case) -> None:
    full = everything(case)
    start, valid = case.inputs["pos"].tolist()
    i, j = np.arange(case.p["t"])[:, None, None], np.arange(case.p["cap"])
    causal = np.broadcast_to((j <= start + i) & (i < valid), visible(case).shape)
    out, lse, _ = dense(full, causal)
    agree(full, attend(full.workload, full.inputs), out, lse)


def check_equals_masked_dense(attend: Implementation, case: Case) -> None:
    agree(case, attend(case.workload, case.inputs), *dense(case)[:2])


def check_drop_identity(attend: Implementation, case: Case) -> None:
    """``o - o' = eps (v_dropped - o')`` where eps is the true mass of what is dropped."""
    full_out, full_lse, prob = dense(everything(case))
    got = attend(case.workload, case.inputs)
    dropped = np.where(visible(case), 0.0, prob)
    eps = dropped.sum(-1)
    v = np.repeat(case.cache("v_cache")[slots(case)], case.p["h"] // case.p["kv"], 1)
    moved = np.einsum("ths,shd->thd", dropped, v.astype(np.float64))
    some = np.isfinite(got["lse"])
    stable = some & (eps < 1 - 1e-6)  # of less, nothing is left to subtract from
    left = np.where(stable, 1 - eps, 1.0)
    predicted = (full_out - moved) / left[..., None]
    for name, want in (("out", predicted), ("lse", full_lse + np.log(left))):
        rest = np.zeros_like(want) if name == "out" else np.full_like(want, -np.inf)
        shape = (*stable.shape, *(1,) * (want.ndim - 2))
        rest = np.where(some.reshape(shape), got[name], rest)
        whole = {"out": got["out"], "lse": got["lse"]}
        wanted = {**whole, name: np.where(stable.reshape(shape), want, rest)}
        agree(case, whole, wanted["out"], wanted["lse"])
    some = stable
    most = 2 * eps[..., None] * np.abs(v).max()
    assert (np.abs(full_out - predicted)[some] <= (most + 1e-12)[some]).all()


def check_invariance(attend: Implementation, case: Case) -> None:
    """Pages in another order, longer lists, finer blocks and lists of one's own change nothing."""
    p, inputs = case.p, case.inputs
    out, lse, _ = dense(case)
    rng = np.random.default_rng(0)
    pool = -(-p["cap"] // 16) + 1
    pages = table_of(pool, p["cap"], 16, rng)
    moved = row_of(pages[0], 16, 1, np.arange(p["cap"]))
    caches = {}
    for name in ("k_cache", "v_cache"):
        caches[name.upper()] = np.zeros((16 * pool, *inputs[name].shape[1:]), inputs[name].dtype)
        caches[name.upper()][moved] = inputs[name][slots(case)]
    idx = inputs["idx"]
    pad = np.full((*idx.shape[:2], 3), -1, np.int32)
    variants = [
        case.having(page=16, pool=pool, PAGES=pages, **caches),
        case.having(kmax=p["kmax"] + 3, IDX=np.concatenate([idx, pad], -1)),
    ]
    if p["block"] % 2 == 0:
        halves = np.stack([2 * idx, 2 * idx + 1], -1).reshape(*idx.shape[:2], -1)
        halves = np.where((halves >= 0) & (halves < -(-p["cap"] * 2 // p["block"])), halves, -1)
        cnt = (halves >= 0).sum(-1).astype(np.int32)
        variants.append(case.having(block=p["block"] // 2, kmax=2 * p["kmax"], IDX=halves, CNT=cnt))
    own = np.arange(p["t"]) // p["rows"]
    variants.append(case.having(rows=1, IDX=idx[own], CNT=inputs["cnt"][own]))
    if p["hs"] != p["h"]:
        heads = np.arange(p["h"]) * p["hs"] // p["h"]
        variants.append(case.having(hs=p["h"], IDX=idx[:, heads], CNT=inputs["cnt"][:, heads]))
    for variant in variants:
        agree(variant, attend(variant.workload, variant.inputs), out, lse)


def check_poison(attend: Implementation, case: Case) -> None:
    """NaN in everything that no head of a KV head sees never reaches the results."""
    p = case.p
    read = visible(case).reshape(p["t"], p["kv"], -1, p["cap"]).any((0, 2)).T
    caches = {}
    for name in ("k_cache", "v_cache"):
        held = case.cache(name)[slots(case)]
        held[~read] = np.nan
        caches[name] = np.full_like(case.cache(name), np.nan)
        caches[name][slots(case)] = held
    bad = case.storing(**caches)
    agree(bad, attend(bad.workload, bad.inputs), *dense(case)[:2])


def check_future_is_unseen(attend: Implementation, case: Case) -> None:
    """Other keys and values behind a token change nothing for it, not even by rounding."""
    start, valid = case.inputs["pos"].tolist()
    half = valid // 2
    caches = {}
    for name in ("k_cache", "v_cache"):
        caches[name] = case.cache(name).copy()
        caches[name][slots(case)[start + half + 1 :]] += 3.0
    later = case.storing(**caches)
    one, two = (attend(c.workload, c.inputs) for c in (case, later))
    for name in ("out", "lse"):
        np.testing.assert_array_equal(one[name][: half + 1], two[name][: half + 1])


def check_sink(attend: Implementation, case: Case) -> None:
    """``o = o_plain sigmoid(lse_plain - z)``, once, however the work was split; no overflow at z = +-60."""
    plain_out, plain_lse, _ = dense(case.having(sink=0))
    for z in (case.inputs["sink"], np.full(case.p["h"], 60.0), np.full(case.p["h"], -60.0)):
        one = case.having(SINK=np.asarray(z, np.float32))
        lse = np.logaddexp(plain_lse, z)
        with np.errstate(over="ignore"):
            share = 1 / (1 + np.exp(z - plain_lse))
        padding = np.arange(case.p["t"]) >= case.inputs["pos"][1]
        lse[padding] = -np.inf
        agree(one, attend(one.workload, one.inputs), plain_out * share[..., None], lse)


def check_empty_lists(attend: Implementation, case: Case) -> None:
    """A row that sees nothing gives 0 and -inf, or the sink's logit."""
    idx, cnt = np.full_like(case.inputs["idx"], -1), np.zeros_like(case.inputs["cnt"])
    none = case.having(window=0, IDX=idx, CNT=cnt)
    got = attend(none.workload, none.inputs)
    assert not np.any(got["out"])
    want = np.full(got["lse"].shape, -np.inf)
    if case.p["sink"]:
        want[: case.inputs["pos"][1]] = case.inputs["sink"]
    np.testing.assert_allclose(got["lse"], want, rtol=1e-6)


def check_bad_lists_are_refused(attend: Implementation, case: Case) -> None:
    """A block listed twice, or a list that breaks its form, is an error and never counts twice."""
    blocks = -(-case.p["cap"] // case.p["block"])
    if blocks < 2:
        return
    for row, count in (([0, 0], 2), ([1, 0], 2), ([0, blocks], 2), ([0, 1], 1), ([0, -1], 3)):
        idx = np.broadcast_to(np.array(row, np.int32), (*case.inputs["cnt"].shape, 2)).copy()
        bad = case.having(kmax=2, IDX=idx, CNT=np.full_like(case.inputs["cnt"], count))
        with pytest.raises(UsageError, match="the list of row 0, list head 0"):
            attend(bad.workload, bad.inputs)


CHECKS = (
    check_full_lists_are_dense, check_equals_masked_dense, check_drop_identity, check_invariance,
    check_poison, check_future_is_unseen, check_empty_lists,
)  # fmt: skip
"""For any case; `check_sink` is for cases with one, `check_bad_lists_are_refused` for what validates."""
