"""What systems keep between steps: descriptors, compressed keys, and caches that are made exact again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.ir.ops.describe_blocks import PARTS, describe_blocks, entries_of
from mimo_compile.ir.ops.kv_append import rotate
from mimo_compile.ir.ops.seer_gates import gate_keys, gate_queries
from mimo_compile.ir.policies import parse_policy

SEEDS = st.integers(0, 2**31)


def naive(keys, length, kind, size, stride):
    """Describe each entry that holds a position, one by one."""
    out = []
    for at in range(0, length, stride):
        own = keys[at : min(at + size, length)].double()
        low, high, mean = own.amin(0), own.amax(0), own.mean(0)
        parts = {
            "bounds": [low, high], "mean": [mean], "peak": [own.abs().amax(0)],
            "pool3": [high, low, mean],
        }  # fmt: skip
        out.append(torch.stack(parts[kind], 1))
    return torch.stack(out)


@settings(max_examples=40)
@given(SEEDS, st.sampled_from(list(PARTS)), st.sampled_from([1, 4, 6]), st.booleans())
def test_descriptors_step_by_step_equal_those_of_the_whole(seed, kind, size, halves) -> None:
    """However tokens come in, the entries are those of a prompt of the same length."""
    rng = np.random.default_rng(seed)
    stride = size // 2 if halves and size > 1 else size
    keys = torch.from_numpy(rng.standard_normal((32, 2, 3)))
    desc = torch.full((entries_of(32, size, stride), 2, PARTS[kind], 3), torch.nan).double()
    at = 0
    while at < 27:
        n = int(rng.integers(1, 9))
        n = min(n, 27 - at)
        seen = keys.clone()
        seen[at + n :] = torch.nan
        describe_blocks(seen, torch.tensor([at, n], dtype=torch.int32), desc, kind, size, stride)
        at += n
    want = naive(keys, 27, kind, size, stride)
    filled = min(len(want), len(desc))
    torch.testing.assert_close(desc[:filled], want[:filled], rtol=0, atol=1e-14)
    assert desc[filled:].isnan().all()


@pytest.mark.parametrize("kind", ["bounds", "pool3", "peak"])
def test_overwriting_by_smaller_keys_leaves_nothing_stale(kind) -> None:
    """Merging would: a minimum cannot be taken back. Entries that were not touched keep their values."""
    keys = 10 * torch.randn(24, 1, 5).double()
    desc = torch.zeros(6, 1, PARTS[kind], 5).double()
    describe_blocks(keys, torch.tensor([0, 24], dtype=torch.int32), desc, kind, 4, 4)
    before = desc.clone()
    keys[9:] /= 100
    describe_blocks(keys, torch.tensor([9, 15], dtype=torch.int32), desc, kind, 4, 4)
    torch.testing.assert_close(desc[2:], naive(keys, 24, kind, 4, 4)[2:])
    merged = torch.maximum(before, naive(keys, 24, kind, 4, 4))
    assert not torch.equal(merged[2:], desc[2:])
    assert torch.equal(desc[:2], before[:2])
    # rolled back to 15 tokens, the last block holds three
    describe_blocks(keys, torch.tensor([14, 1], dtype=torch.int32), desc, kind, 4, 4)
    torch.testing.assert_close(desc[3], naive(keys, 15, kind, 4, 4)[3])


def test_nothing_written_changes_nothing() -> None:
    desc = torch.full((4, 1, 2, 3), 7.0)
    keys = torch.full((16, 1, 3), torch.nan)
    describe_blocks(keys, torch.tensor([8, 0], dtype=torch.int32), desc, "bounds", 4, 4)
    assert (desc == 7).all()
    args = (keys, torch.tensor([8, 2], dtype=torch.int32), desc, "bounds", 4, 4)
    torch.library.opcheck(describe_blocks, args, test_utils=("test_schema", "test_faketensor"))


# -- SeerAttention-R -----------------------------------------------------------------------------


def angles(positions, half=2):
    angle = torch.as_tensor(positions).double()[:, None] * 0.3 ** torch.arange(half)
    return torch.stack([angle.cos(), angle.sin()], 1)


def test_gate_queries_sum_over_the_heads_of_a_group() -> None:
    q, w, norm = (
        torch.randn(3, 6, 4).double(),
        torch.randn(2, 12, 8).double(),
        torch.rand(8).double(),
    )
    got = gate_queries(q, w, norm, angles([5, 6, 7]))
    for t, u in np.ndindex(3, 2):
        x = sum(q[t, 3 * u + g] @ w[u, 4 * g : 4 * g + 4] for g in range(3))
        x = x / (x.square().mean() + 1e-6).sqrt() * norm
        x = rotate(x[None, None], angles([5 + t]))[0, 0]
        torch.testing.assert_close(got[t, u], x)


@settings(max_examples=15)
@given(SEEDS, st.integers(1, 30))
def test_compressed_keys_of_decoding_are_those_of_a_prompt(seed, length) -> None:
    torch.manual_seed(seed)
    keys, w = torch.randn(32, 2, 4).double(), torch.randn(2, 12, 8).double()
    whole, steps = (torch.zeros(8, 2, 3, 4).double() for _ in range(2))
    describe_blocks(keys, torch.tensor([0, length], dtype=torch.int32), whole, "pool3", 4, 4)
    for at in range(length):
        describe_blocks(keys, torch.tensor([at, 1], dtype=torch.int32), steps, "pool3", 4, 4)
    first = angles(torch.arange(8) * 4)
    complete = length // 4
    one, two = (gate_keys(x, w, None, first)[:complete] for x in (whole, steps))
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    if complete:
        shifted = gate_keys(whole, w, None, angles(torch.arange(8) * 4 + 3))[:complete]
        assert not torch.allclose(one, shifted)  # block_pos=last is another function


# -- ReSA ----------------------------------------------------------------------------------------


class Net:
    """A random decoder of two layers in float64, that attends densely or to blocks by Quest's bound."""

    def __init__(self, seed: int, policy) -> None:
        gen = torch.Generator().manual_seed(seed)
        draw = lambda *s: torch.randn(*s, generator=gen).double() / s[-1] ** 0.5  # noqa: E731
        self.policy, self.cap, self.layers = policy, 48, 2
        self.embed = draw(20, 8) * 3
        self.w = [{n: draw(8, 8) for n in "qkvo"} for _ in range(self.layers)]
        self.k = torch.full((2, self.cap, 1, 8), torch.nan).double()
        self.v = self.k.clone()
        blocks = entries_of(self.cap, policy.block, policy.block)
        self.desc = torch.zeros(2, blocks, 1, 2, 8).double()

    def step(self, ids: list[int], start: int, *, sparse: bool) -> int:
        """Run tokens, write their keys and values, return the likeliest next token."""
        from mimo_compile.ir.ops.block_lists import to_lists
        from mimo_compile.ir.ops.score_blocks import block_scores
        from mimo_compile.ir.ops.select_blocks import choose
        from mimo_compile.ir.ops.sparse_attention import attend_lists

        x, n, b = self.embed[ids], len(ids), self.policy.block
        pos = torch.tensor([start, n], dtype=torch.int32)
        blocks = self.desc.shape[1]
        for i, w in enumerate(self.w):
            q, k, v = ((x @ w[m]) for m in "qkv")
            q = q.reshape(n, 2, 4).repeat(1, 1, 2)
            self.k[i, start : start + n, 0], self.v[i, start : start + n, 0] = k, v
            describe_blocks(self.k[i], pos, self.desc[i], "bounds", b, b)
            if sparse:
                s = self.policy.select
                score = block_scores(
                    q, self.desc[i], None, pos, "quest", "query", False, b, 1, blocks, b, b, 0.4
                )
                chosen = choose(
                    score, pos, None, "topk", s.k, s.share, b, 1, s.first, s.last, "none", blocks
                )
            else:
                chosen = torch.ones(n, 1, blocks, dtype=torch.bool)
            idx, cnt = to_lists(chosen, blocks)
            out, _ = attend_lists(q, self.k[i], self.v[i], pos, idx, cnt, None, b, 1, 0.4, 0)
            x = x + torch.tanh(out.mean(1) @ w["o"])
        return int((x[-1] @ self.embed.T).argmax())


@pytest.mark.parametrize("text", ["f=1", "f=4", "f=7"])
def test_after_rectification_the_cache_is_that_of_dense_prefill(text) -> None:
    policy = parse_policy(f"resa:p=0.1,block=4,least=1,{text}")
    net, ids, prompt = Net(3, policy), [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], 11
    net.step(ids, 0, sparse=False)
    token, differed = 7, 0.0
    for n in range(1, 2 * policy.f + 3):
        ids.append(token)
        token = net.step(ids[-1:], len(ids) - 1, sparse=True)
        oracle = Net(3, policy)
        oracle.step(ids, 0, sparse=False)
        length = len(ids)
        differed = max(differed, float((net.k - oracle.k)[:, :length].abs().max()))
        if again := policy.rectified(n, prompt):
            net.step(ids[slice(*again)], again[0], sparse=False)
            torch.testing.assert_close(net.k[:, :length], oracle.k[:, :length], rtol=0, atol=1e-12)
            torch.testing.assert_close(net.v[:, :length], oracle.v[:, :length], rtol=0, atol=1e-12)
            filled = -(-length // 4)
            torch.testing.assert_close(
                net.desc[:, :filled], oracle.desc[:, :filled], rtol=0, atol=1e-12
            )
    assert differed > 1e-3  # sparse steps do leave approximate keys behind
