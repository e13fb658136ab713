"""Scores against plain loops, and what each system's paper promises of its own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.errors import UsageError
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.ir.ops.block_lists import outside_tie_band, to_mask
from mimo_compile.ir.ops.score_blocks import score_blocks
from mimo_compile.ir.ops.score_keys import score_keys
from mimo_compile.ir.ops.score_lowbit import estimates, score_lowbit, to_codes

SEEDS = st.integers(0, 2**31)


def made(text, seed=0, **arrays):
    """Return op, parameters, inputs and reference of a workload."""
    workload = parse_workload(text)
    op = get_op(workload.op)
    inputs = op.make_inputs(workload, np.random.default_rng(seed)) | arrays
    return op, op.full(workload), inputs, op.reference(workload, inputs)


def probabilities(q, k, position, scale):
    """Return softmax over the keys up to a position."""
    logits = scale * (k[: position + 1] @ q)
    e = np.exp(logits - logits.max())
    return e / e.sum()


# -- from keys ---------------------------------------------------------------------------------


@settings(max_examples=15)
@given(
    SEEDS, st.integers(3, 30), st.sampled_from([1, 3, 4]), st.sampled_from(["max", "none", "sum"])
)
def test_oracle_is_the_block_maximum_of_softmax(seed, length, block, agg) -> None:
    text = f"score_keys:t=3,h=4,kv=2,d=5,cap=32,kind=oracle,agg={agg},block={block},len={length}"
    _, _, i, want = made(text, seed)
    q, k = i["q"].astype(np.float64), i["k_cache"].astype(np.float64)
    for t in range(3):
        end = length - 3 + t
        heads = []
        for h in range(4):
            prob = probabilities(q[t, h], k[:, h // 2], end, 5**-0.5)
            heads.append([prob[b : b + block].max() for b in range(0, end + 1, block)])
        score = np.array(heads)
        if agg != "none":
            score = score.reshape(2, 2, -1)
            score = score.max(1) if agg == "max" else score.sum(1)
        np.testing.assert_allclose(want["score"][t, :, : score.shape[1]], score, atol=1e-14)
        assert np.isneginf(want["score"][t, :, score.shape[1] :]).all()


def test_normalising_comes_before_the_maximum_over_heads() -> None:
    """Ranked by raw maxima a group chooses other blocks, nearly always."""
    differ = 0
    for seed in range(40):
        text = "t=1,h=8,kv=1,d=16,cap=256,block=8"
        _, _, i, oracle = made(f"score_keys:{text},kind=oracle,agg=max", seed)
        raw = get_op("score_keys").reference(
            parse_workload(f"score_keys:{text},kind=logits,agg=max"), i
        )
        choice = parse_workload("select_blocks:t=1,hs=1,cap=256,block=8,k=8")
        sets = []
        for scored in (oracle, raw):
            given_ = {"score": scored["score"].astype(np.float32), "pos": i["pos"]}
            sets.append(get_op("select_blocks").reference(choice, given_)["idx"])
        differ += int((sets[0] != sets[1]).any())
    assert differ > 30


def test_a_call_in_chunks_scores_as_one() -> None:
    _, _, i, whole = made(
        "score_keys:t=6,h=4,kv=2,d=8,cap=30,kind=oracle,agg=max,block=4,len=25", 1
    )
    op = get_op("score_keys")
    for a in range(0, 6, 2):
        part = {**i, "q": i["q"][a : a + 2], "pos": np.array([19 + a, 2], np.int32)}
        text = f"score_keys:t=2,h=4,kv=2,d=8,cap=30,kind=oracle,agg=max,block=4,len={21 + a}"
        got = op.reference(parse_workload(text), part)["score"]
        np.testing.assert_allclose(got, whole["score"][a : a + 2], atol=1e-15)


@settings(max_examples=15)
@given(SEEDS, st.integers(1, 6), st.booleans())
def test_channels_are_the_most_important_ones(seed, count, guess) -> None:
    text = f"score_keys:t=2,h=6,kv=2,d=6,cap=20,kind=channels,agg=mean,channels={count}"
    _, _, i, want = made(text + ",guess=1" * guess, seed)
    q, k = i["q"].astype(np.float64), i["k_cache"].astype(np.float64)
    chooser = i["guess"].astype(np.float64) if guess else q
    for t in range(2):
        for u in range(2):
            mean = q[t, 3 * u : 3 * u + 3].mean(0)
            size = np.abs(chooser[t, 3 * u : 3 * u + 3].mean(0)) * i["peak"][u]
            best = sorted(range(6), key=lambda c: (-size[c], c))[:count]
            score = k[:, u][:, best] @ mean[best]
            end = 18 + t
            np.testing.assert_allclose(want["score"][t, u, : end + 1], score[: end + 1], atol=1e-13)


def test_all_channels_give_the_exact_scores_and_a_planted_needle_is_found() -> None:
    text = "score_keys:t=1,h=4,kv=1,d=8,cap=64,kind=channels,agg=mean,channels="
    _, _, i, exact = made(text + "8", 2)
    mean = i["q"][0].astype(np.float64).mean(0)
    np.testing.assert_allclose(
        exact["score"][0, 0], i["k_cache"][:, 0].astype(float) @ mean, atol=1e-13
    )
    for place in (5, 31, 60):
        keys = 0.1 * i["k_cache"]
        keys[place, 0, :2] = 20 * np.sign(mean[:2])  # outliers in two channels
        peak = np.abs(keys).max(0)
        _, _, _, got = made(text + "2", 2, k_cache=keys, peak=peak)
        assert got["score"][0, 0].argmax() == place


def test_equal_channels_go_to_the_lower_one() -> None:
    ones = {"q": np.ones((1, 2, 4), "f4"), "peak": np.ones((1, 4), "f4")}
    keys = np.arange(8 * 4, dtype=np.float32).reshape(8, 1, 4)
    text = "score_keys:t=1,h=2,kv=1,d=4,cap=8,kind=channels,agg=mean,channels=1"
    _, _, _, got = made(text, 0, k_cache=keys, **ones)
    np.testing.assert_array_equal(got["score"][0, 0], keys[:, 0, 0])


@pytest.mark.parametrize("kind", ["oracle,agg=max", "logits", "channels,agg=mean,channels=3"])
def test_choice_by_float32_scores_lies_in_the_tie_band(kind) -> None:
    """Scores of a float32 implementation choose the float64 set, but for what their bound leaves open."""
    text = f"score_keys:t=2,h=4,kv=2,d=16,cap=200,kind={kind},block=4"
    for seed in range(5):
        op, p, i, want = made(text, seed)
        bound = op.bound(parse_workload(text), i, want)["score"]
        t = {n: torch.from_numpy(a) for n, a in i.items()}
        got = score_keys(
            t["q"], t["k_cache"], t["pos"], t.get("peak"), None, p["kind"], p["agg"], 4,
            p["channels"], 0.25,
        )  # fmt: skip
        hs = got.shape[1]
        chooser = parse_workload(f"select_blocks:t=2,hs={hs},cap=200,block=4,k=9")
        lists = get_op("select_blocks").reference(chooser, {"score": got.numpy(), "pos": i["pos"]})
        mask = to_mask(torch.from_numpy(lists["idx"]), torch.from_numpy(lists["cnt"]), 50)
        exact = torch.from_numpy(want["score"])
        free = torch.isfinite(exact)
        assert not outside_tie_band(mask, free, exact, torch.from_numpy(bound)).any()
        worst = exact.masked_fill(~free, math.inf).argmin(-1, keepdim=True)
        mask = mask.scatter(-1, exact.argmax(-1, keepdim=True), False).scatter(-1, worst, True)
        assert outside_tie_band(mask, free, exact, torch.from_numpy(bound)).all()


# -- from descriptors --------------------------------------------------------------------------


def described(keys, length, kind, size, stride=0):
    """Describe the first positions of a cache ``[cap, KV, D]`` by the op."""
    cap, kv, d = keys.shape
    text = (
        f"describe_blocks:t={length},kv={kv},d={d},cap={cap},kind={kind},size={size},len={length}"
    )
    workload = parse_workload(text + (f",stride={stride}" if stride else ""))
    op = get_op("describe_blocks")
    inputs = op.make_inputs(workload, np.random.default_rng(0))
    desc = op.reference(workload, inputs | {"k_cache": keys})["desc"].astype(np.float32)
    if length % size:  # what is not complete may not be looked at
        desc[(length - size) // (stride or size) + 1 :] = np.nan
    return desc


@settings(max_examples=20)
@given(SEEDS, st.integers(1, 30), st.sampled_from([1, 3, 4]))
def test_quest_is_never_below_a_logit(seed, length, block) -> None:
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((32, 2, 6), dtype=np.float32)
    q = rng.standard_normal((1, 4, 6), dtype=np.float32)
    pos = np.array([length - 1, 1], np.int32)
    text = f"score_blocks:t=1,h=4,kv=2,d=6,cap=32,kind=quest,block={block},len={length}"
    desc = described(keys, length, "bounds", block)
    _, _, _, got = made(text, 0, q=q, desc=desc, pos=pos)
    logits = np.einsum("hd,shd->hs", q[0].astype(float), np.repeat(keys, 2, 1)) * 6**-0.5
    for b in range(length // block):
        own = logits[:, b * block : (b + 1) * block]
        assert (got["score"][0, :, b] >= own.max(1) - 1e-12).all()
        lo, hi = (np.repeat(desc[b, :, n].astype(float), 2, 0) for n in (0, 1))
        naive = np.maximum(q[0] * lo, q[0] * hi).sum(1) * 6**-0.5
        np.testing.assert_allclose(got["score"][0, :, b], naive, atol=1e-13)
    assert np.isneginf(got["score"][0, :, length // block :]).all()


def test_the_mean_query_bounds_the_mean_head_only() -> None:
    """ReSA's published score is below some head's logit often; the maximum over heads never is."""
    below = {"query": 0, "max": 0}
    for seed in range(40):
        rng = np.random.default_rng(seed)
        keys = rng.standard_normal((64, 1, 16), dtype=np.float32)
        q = rng.standard_normal((1, 4, 16), dtype=np.float32)
        logits = (q[0].astype(float) @ keys[:, 0].T.astype(float) / 4).reshape(4, 4, 16)
        for agg in below:
            text = f"score_blocks:t=1,h=4,kv=1,d=16,cap=64,kind=quest,agg={agg},block=16"
            _, _, _, got = made(text, 0, q=q, desc=described(keys, 64, "bounds", 16))
            below[agg] += int((got["score"][0, 0] < logits.max((0, 2)) - 1e-12).any())
            mean = logits.mean(0).max(-1)
            assert (got["score"][0, 0] >= mean - 1e-12).all()
    assert below["max"] == 0 < below["query"]


@settings(max_examples=15)
@given(SEEDS, st.integers(4, 30))
def test_mean_gate_and_indexer_by_loops(seed, length) -> None:
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((32, 2, 6), dtype=np.float32)
    desc = described(keys, length, "mean", 4)
    q = rng.standard_normal((2, 4, 6), dtype=np.float32)
    ends = (length - 2, length - 1)
    _, _, _, got = made(
        f"score_blocks:t=2,h=4,kv=2,d=6,cap=32,kind=mean,block=4,len={length}", 0, q=q, desc=desc
    )
    for t, h, b in np.ndindex(2, 4, 8):
        if (b + 1) * 4 - 1 <= ends[t]:
            want = q[t, h].astype(float) @ keys[4 * b : 4 * b + 4, h // 2].astype(float).mean(0)
            assert got["score"][t, h, b] == pytest.approx(want * 6**-0.5, abs=1e-6)
        else:
            assert got["score"][t, h, b] == -math.inf
    text = f"score_blocks:t=2,h=4,kv=2,d=6,cap=32,kind=gate,soft=1,block=4,len={length}"
    _, _, _, soft = made(text, 0, q=q[:, :2], desc=desc)
    for t in range(2):
        seen = ends[t] // 4 + 1
        full = (ends[t] + 1) // 4
        logits = np.zeros((2, seen))
        logits[:, :full] = np.einsum("ud,bud->ub", q[t, :2], desc[:full, :, 0]) * 6**-0.5
        want = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        np.testing.assert_allclose(soft["score"][t, :, :seen], want, atol=1e-6)
    _, _, i, index = made(
        f"score_blocks:t=2,h=3,kv=1,d=6,cap=32,kind=indexer,agg=sum,block=1,len={length}", seed
    )
    dots = np.einsum("thd,sd->ths", i["q"].astype(float), i["desc"][:length, 0, 0].astype(float))
    want = (np.maximum(dots, 0) * i["weight"][..., None]).sum(1)
    for t in range(2):
        end = ends[t] + 1
        np.testing.assert_allclose(index["score"][t, 0, :end], want[t, :end], atol=1e-12)
        assert np.isneginf(index["score"][t, 0, end:]).all()


@settings(max_examples=15)
@given(SEEDS, st.integers(1, 40))
def test_compressed_probabilities_fall_onto_the_blocks_they_overlap(seed, length) -> None:
    """Their sum over blocks is that over heads, once a compressed key is complete; before, all is 0."""
    sizes = f"agg=sum,block=16,size=8,stride=4,len={length}"
    text = f"score_blocks:t=1,h=4,kv=2,d=6,cap=48,kind=compressed,{sizes}"
    _, _, i, got = made(text, seed)
    seen = (length - 1) // 16 + 1
    score = got["score"][0]
    assert np.isneginf(score[:, seen:]).all()
    count = max(0, (length - 8) // 4 + 1)
    want = np.zeros((2, 3))
    for h in range(4):
        if not count:
            break
        logits = i["desc"][:count, h // 2, 0].astype(float) @ i["q"][0, h].astype(float) * 6**-0.5
        prob = np.exp(logits) / np.exp(logits).sum()
        for c in range(count):
            for position in range(4 * c, 4 * c + 8):
                want[h // 2, position // 16] += prob[c] / 8
    np.testing.assert_allclose(score[:, :seen], want[:, :seen], atol=1e-12)
    assert score[:, :seen].sum() == pytest.approx(4.0 if count else 0.0)


# -- low-bit estimates ---------------------------------------------------------------------------

LOWBIT = "score_lowbit:t=10,h=4,kv=2,d=8,cap=48,block=4,rows=4,first=1,last=2,bits={},len={}"


@settings(max_examples=12)
@given(SEEDS, st.integers(10, 45), st.sampled_from([4, 8]))
def test_survivors_follow_the_rule_of_the_same_codes(seed, length, bits) -> None:
    """Exponential and logarithmic form of the threshold agree, block by block and element by element."""
    _, _, i, got = made(LOWBIT.format(bits, length), seed)
    q, k = i["q"].astype(np.float64), i["k_cache"][:length].astype(np.float64)
    kq = (i["k_cache"][:length] - i["k_mean"]).astype(np.float64)
    qs = (i["q"] - i["q_mean"]).astype(np.float64)
    top, scale, start = 2 ** (bits - 1) - 1, 8**-0.5, length - 10

    def code(x):
        s = max(np.abs(x).max() / top, 1e-30)
        return np.rint(x / s) * s

    for r, h, tau in np.ndindex(3, 4, 3):
        level = (0.0, 0.05, 0.6)[tau]
        tokens = range(4 * r, min(4 * r + 4, 10))
        own = (start + 4 * r) // 4
        kept = got["score"][r, h] >= level
        for b in range(12):
            last = (start + tokens[-1]) // 4
            if b > last:
                assert not kept[b]
            elif b < 1 or b >= own - 1:
                assert kept[b] and np.isinf(got["score"][r, h, b])
            elif level:
                passes, margin = False, math.inf
                for t in tokens:
                    p = start + t
                    region = [j for j in range(p + 1) if j < 4 or j // 4 >= own - 1]
                    exact = scale * (kq[region, h // 2] @ q[t, h])
                    m = exact.max()
                    lse = m + math.log(np.exp(exact - m).sum())
                    for j in range(4 * b, 4 * b + 4):
                        s = code(qs[t, h]) @ code(kq[j, h // 2])
                        s = scale * (s + i["q_mean"][h].astype(float) @ kq[j, h // 2])
                        passes |= s >= lse + math.log(level)
                        margin = min(margin, abs(s - lse - math.log(level)))
                if margin > 1e-4:
                    assert kept[b] == passes
            else:
                assert kept[b]  # a threshold of 0 is dense
    assert k.shape[0] == length


def test_a_huge_threshold_leaves_sink_and_local_blocks() -> None:
    _, _, i, got = made(LOWBIT.format(4, 45), 0)
    workload = parse_workload(
        "select_blocks:t=10,hs=4,cap=48,block=4,rule=threshold,rows=4,first=1,last=2,len=45"
    )
    given_ = {"score": got["score"].astype(np.float32), "pos": i["pos"]}
    given_["value"] = np.full(4, 1e37, np.float32)
    lists = get_op("select_blocks").reference(workload, given_)
    assert lists["idx"][0, 0, :5].tolist() == [0, 7, 8, 9, -1]  # queries 35 ... 38
    assert lists["idx"][2, 0, :5].tolist() == [0, 9, 10, 11, -1]  # queries 43, 44


@settings(max_examples=20)
@given(SEEDS, st.sampled_from([4, 8]))
def test_estimates_are_as_near_as_their_codes(seed, bits) -> None:
    _, _, i, _ = made(LOWBIT.format(bits, 40), seed)
    t = {n: torch.from_numpy(a) for n, a in i.items()}
    estimate, exact, _ = estimates(
        t["q"], t["k_cache"], t["pos"], t["q_mean"], t["k_mean"], bits, 1.0
    )
    q, k = t["q"] - t["q_mean"], t["k_cache"][:40] - t["k_mean"]
    sq, sk = to_codes(q, bits)[1].double(), to_codes(k, bits)[1].double()
    for h in range(4):
        a, b = q[:, h].double(), k[:, h // 2].double()
        x, y = sq[:, h], sk[:, h // 2].T
        most = (x * b.abs().sum(-1)[None] + y * a.abs().sum(-1)[:, None]) / 2 + 8 * x * y / 4
        assert ((estimate - exact)[h].abs() <= most + 1e-4).all()


def test_a_shift_of_all_keys_changes_no_weight() -> None:
    """Smoothing: the mean of the keys moves every logit of a row alike."""
    _, _, i, _ = made(LOWBIT.format(4, 40), 3)
    grid = {n: np.round(i[n] * 64) / 64 for n in ("k_cache", "k_mean")}  # sums on it are exact
    shift = np.random.default_rng(0).integers(-2, 3, i["k_mean"].shape).astype(np.float32)
    both = {n: a + shift for n, a in grid.items()}
    one, two = (made(LOWBIT.format(4, 40), 3, **x)[3]["score"] for x in (grid, both))
    np.testing.assert_allclose(two, one, rtol=1e-12)
    text = "score_keys:t=10,h=4,kv=2,d=8,cap=48,kind=oracle,block=4,len=40"
    whole = [made(text, 1, q=i["q"], k_cache=x["k_cache"])[3]["score"] for x in (grid, both)]
    np.testing.assert_allclose(*whole, rtol=1e-12)


# -- forms ---------------------------------------------------------------------------------------


def test_fake_rules() -> None:
    tests = ("test_schema", "test_faketensor")
    pos = torch.tensor([14, 2], dtype=torch.int32)
    q, k = torch.randn(2, 4, 8), torch.randn(18, 2, 8)
    for kind, agg in (("oracle", "max"), ("logits", "none"), ("channels", "mean")):
        args = (q, k, pos, torch.rand(2, 8), None, kind, agg, 4, 3, 0.5)
        torch.library.opcheck(score_keys, args, test_utils=tests)
    desc, w = torch.randn(5, 2, 2, 8), torch.randn(2, 4)
    for kind, agg, d in (
        ("quest", "query", desc), ("quest", "none", desc), ("mean", "max", desc[:, :, :1]),
        ("compressed", "sum", desc[:, :, :1]), ("indexer", "sum", desc[:, :1, :1]),
    ):  # fmt: skip
        args = (q, d, w, pos, kind, agg, False, 4, 1, 5, 4, 4, 0.5)
        torch.library.opcheck(score_blocks, args, test_utils=tests)
    args = (q, k, pos, q.mean(0), k.mean(0), 4, 4, 2, 1, 2, 0.5)
    torch.library.opcheck(score_lowbit, args, test_utils=tests)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("score_keys:t=1,h=4,kv=2,d=8,cap=8,kind=best", "no kind=best"),
        ("score_keys:t=1,h=4,kv=2,d=8,cap=8,kind=channels,channels=9", "outside of 1"),
        ("score_keys:t=1,h=4,kv=2,d=8,cap=8,kind=oracle,channels=2", "go with kind=channels"),
        ("score_keys:t=1,h=3,kv=2,d=8,cap=8,kind=oracle", "not a multiple"),
        ("score_blocks:t=1,h=4,kv=2,d=8,cap=8,kind=gate,agg=max,block=4", "no kind=gate, agg=max"),
        ("score_blocks:t=1,h=4,kv=2,d=8,cap=8,kind=compressed,block=4", "size and stride"),
        ("score_blocks:t=1,h=4,kv=2,d=8,cap=8,kind=quest,soft=1,block=4", "soft goes with"),
        ("score_blocks:t=1,h=4,kv=2,d=8,cap=8,kind=indexer,agg=sum,block=4", "kv=1 and block=1"),
        ("score_lowbit:t=1,h=4,kv=2,d=8,cap=8,block=4,rows=4,first=1,last=1,bits=9", "above 8"),
        (
            "score_lowbit:t=1,h=4,kv=2,d=8,cap=8,block=4,rows=4,first=1,last=1,len=9",
            "between t and",
        ),
        ("describe_blocks:t=1,kv=2,d=8,cap=8,kind=sum,size=4", "no kind=sum"),
    ],
)
def test_bad_workloads(text, message) -> None:
    with pytest.raises(UsageError, match=message):
        parse_workload(text)


SCORED = [
    "score_keys:t=3,h=4,kv=2,d=16,cap=70,kind=oracle,agg=max,block=8,len=45",
    "score_keys:t=2,h=6,kv=2,d=16,cap=40,kind=logits,agg=mean,block=4",
    "score_keys:t=2,h=6,kv=2,d=16,cap=40,kind=channels,agg=mean,channels=5,len=33",
    "score_blocks:t=3,h=4,kv=2,d=16,cap=70,kind=quest,agg=max,block=8,len=49",
    "score_blocks:t=3,h=6,kv=2,d=16,cap=70,kind=quest,agg=query,block=8,len=49",
    "score_blocks:t=3,h=6,kv=2,d=16,cap=40,kind=gate,block=4,soft=1,len=37",
    "score_blocks:t=3,h=6,kv=2,d=16,cap=90,kind=compressed,agg=sum,block=16,size=8,stride=4,len=77",
    "score_blocks:t=3,h=4,kv=1,d=16,cap=40,kind=indexer,agg=sum,block=1,len=37",
    "score_lowbit:t=21,h=4,kv=2,d=16,cap=70,block=4,rows=8,first=1,last=2,len=61",
]


@pytest.mark.parametrize("text", SCORED)
def test_bounds_refuse_scores_of_other_queries_and_positions(text) -> None:
    """A query that is off by a thousandth, or a causal limit that is off by one, shows."""
    op, _, i, want = made(text, 4)
    bound = op.bound(parse_workload(text), i, want)["score"]
    finite = np.isfinite(want["score"])
    tilt = np.random.default_rng(0).choice([0.999, 1.001], i["q"].shape).astype(np.float32)
    near = op.reference(parse_workload(text), i | {"q": i["q"] * tilt})["score"]
    assert (np.abs(near[finite] - want["score"][finite]) > bound[finite]).mean() > 0.2
    early = op.reference(parse_workload(text), i | {"pos": i["pos"] - np.array([1, 0], np.int32)})
    lost = np.isfinite(early["score"]) != finite
    off = np.abs(early["score"][finite & ~lost] - want["score"][finite & ~lost])
    assert lost.any() or (off > bound[finite & ~lost]).any()
