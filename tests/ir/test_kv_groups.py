"""KV caches in groups of few bits: errors of codes, what is quantised when, what a query sees, bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.errors import UsageError
from mimo_compile.ir import kv_groups
from mimo_compile.ir.caches import scheme_cache_format, window_cache_format
from mimo_compile.ir.kv_groups import GROUPED, STATES
from mimo_compile.ir.ops import get_op, load_all, parse_workload

load_all()
FMTS = st.sampled_from(sorted(GROUPED))
OPS = torch.ops.mimo


def empty(fmt, cap=256, tail=192, kv=2, d=3, dv=70):
    shapes = kv_groups.state_shapes(fmt, cap, tail, kv, d, dv)
    return {n: torch.zeros(shape, dtype=getattr(torch, t)) for n, (shape, t) in shapes.items()}


def rows(rng, n, kv=2, d=3, dv=70, kind="normal"):
    k, v = (torch.from_numpy(rng.standard_normal((n, kv, w), np.float32)) for w in (d, dv))
    if kind == "constant":
        k[:], v[:] = 0.7, -3.3
    elif kind == "large":
        k[..., 0] *= 50.0
        v *= 1e4
    elif kind == "tiny":
        k *= 1e-7
        v *= 1e-9
    return k, v


KINDS = st.sampled_from(["normal", "constant", "large", "tiny"])


@settings(max_examples=25)
@given(name=FMTS, n=st.integers(1, 256), seed=st.integers(0, 99), kind=KINDS, data=st.data())
def test_caches_do_not_depend_on_how_many_tokens_a_call_appends(name, n, seed, kind, data):
    fmt = GROUPED[name]
    k, v = rows(np.random.default_rng(seed), n, kind=kind)
    whole, parts = empty(fmt, tail=256), empty(fmt, tail=256)
    kv_groups.append_rows(whole, k, v, 0, fmt)
    at = 0
    while at < n:
        step = data.draw(st.sampled_from([1, 1, 7, 63, 64, 65, 129]))
        kv_groups.append_rows(parts, k[at : at + step], v[at : at + step], at, fmt)
        at += step
    for array in STATES:
        assert torch.equal(whole[array], parts[array])


@settings(max_examples=25)
@given(name=st.sampled_from(["i8", "i4", "i2"]), seed=st.integers(0, 99), kind=KINDS)
def test_error_of_a_code_is_half_a_step(name, seed, kind):
    fmt = GROUPED[name]
    k, v = rows(np.random.default_rng(seed), 128, kind=kind)
    codes, params = kv_groups.quantise_keys(k, fmt)
    real = kv_groups.real_keys(codes, params, torch.float64)
    scale, zero = (p.repeat_interleave(64, 0) for p in params.double().unbind(-1))
    least = (
        2.0**-23
    )  # half the distance of subnormal float16 numbers; a smaller range is a constant
    assert (codes <= fmt.levels).all()
    assert (
        (real - k).abs() <= scale / 2 * (1 + 2**-10) + zero.abs() * 2**-11 + fmt.levels * least
    ).all()
    codes, params = kv_groups.quantise_values(v, fmt)
    real = kv_groups.real_values(codes, params, fmt, torch.float64)
    wide = params.double().repeat_interleave(fmt.columns, -2)[..., : v.shape[-1], :]
    scale, zero = wide.unbind(-1)
    assert (
        (real - v).abs() <= scale / 2 * (1 + 2**-10) + zero.abs() * 2**-11 + fmt.levels * least
    ).all()


@settings(max_examples=25)
@given(seed=st.integers(0, 99), kind=KINDS, alpha=st.integers(-4, 4))
def test_one_bit_is_the_mean_and_the_best_step_to_both_sides(seed, kind, alpha):
    fmt = GROUPED["i1"]
    k, v = rows(np.random.default_rng(seed), 64, kind=kind)
    codes, params = kv_groups.quantise_keys(k, fmt)
    real, x = kv_groups.real_keys(codes, params, torch.float64), k.double()
    mean = x.mean(0)
    away = (x - mean).abs().mean(0)
    # both numbers are rounded to float16, and so is their difference
    off = 2.0**-10 * (mean.abs() + away) + 2.0**-23
    for sign in (-1, 1):
        levels = torch.where(codes == (sign + 1) // 2, real, torch.nan)
        assert ((levels - (mean + sign * away)).abs() <= off).logical_or(levels.isnan()).all()
    side = (x > mean) == codes.bool()
    assert side.logical_or((x - mean).abs() <= off).logical_or(params[0, ..., 0] == 0).all()

    def error(step):
        return (mean + torch.where(x > mean, 1, -1) * step - x).square().mean(0)

    for factor in (0.8, 0.97, 1.03, 1.2):
        assert (error(factor * away) >= error(away)).all()
    least, most = x.aminmax(dim=0)
    ends = torch.minimum((x - least).abs(), (x - most).abs()).square().mean(0)
    assert ((real - x).square().mean(0) <= ends + 4 * off * (away + off)).all()
    if kind == "normal":  # nothing of it is near the least float16
        other = kv_groups.quantise_keys(k * 2.0**alpha, fmt)
        assert torch.equal(other[0], codes) and torch.equal(other[1], params * 2.0**alpha)
    of_values = kv_groups.quantise_values(v, fmt)[1][..., 0, :].double()
    mean = v[..., :64].double().clamp(-65504, 65504).mean(-1)
    away = (v[..., :64].double().clamp(-65504, 65504) - mean[..., None]).abs().mean(-1)
    off = 2.0**-10 * (mean.abs() + away) + 2.0**-23
    assert ((of_values.sum(-1) - (mean + away)).abs() <= off).all()


def test_what_one_bit_saturates_at_is_no_number_that_is_lost():
    fmt, x = GROUPED["i1"], torch.full((64, 1, 1), 1e38)
    codes, params = kv_groups.quantise_keys(x, fmt)
    assert params[0, 0, 0].tolist() == [0.0, 65504.0] and not codes.any()


@pytest.mark.parametrize("name", ["i2", "i1"])
def test_a_constant_group_is_its_zero_point(name):
    fmt = GROUPED[name]
    codes, params = kv_groups.quantise_keys(torch.full((64, 1, 1), -0.625), fmt)
    assert not codes.any() and params[0, 0, 0, 0] == 0
    assert kv_groups.real_keys(codes, params, torch.float32).unique() == torch.tensor(-0.625)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", GROUPED)
def test_what_is_no_number_stays_to_be_seen_and_leaves_other_channels_and_tokens_alone(name, bad):
    fmt, rng = GROUPED[name], np.random.default_rng(0)
    k, v = rows(rng, 64)
    k[5, 1, 2], v[7, 0, 65] = bad, bad
    codes, params = kv_groups.quantise_keys(k, fmt)
    lost = kv_groups.real_keys(codes, params, torch.float64).isnan()
    assert lost[:, 1, 2].all() and lost.sum() == 64 and not codes[:, 1, 2].any()
    codes, params = kv_groups.quantise_values(v, fmt)
    lost = kv_groups.real_values(codes, params, fmt, torch.float64).isnan()
    assert lost[7, 0, 64:].all() and lost.sum() == 6 and not codes[7, 0, 64:].any()


@pytest.mark.parametrize("name", GROUPED)
def test_an_outlier_channel_leaves_the_keys_of_others_alone_and_an_outlier_token_the_values(name):
    fmt = GROUPED[name]
    k = torch.from_numpy(np.random.default_rng(0).standard_normal((64, 1, 16), np.float32))

    def error(x):
        codes, params = kv_groups.quantise_keys(x, fmt)
        return (kv_groups.real_keys(codes, params, torch.float32) - x)[..., 1:].abs()

    loud = k.clone()
    loud[..., 0] *= 50
    assert torch.equal(error(loud), error(k))
    token = (loud.amax(-1, True) - loud.amin(-1, True)) / fmt.levels  # one scale for a token's key
    alike = (((loud / token).round() * token) - loud)[..., 1:].abs()
    assert alike.mean() > {"i1": 1.3, "i2": 2}.get(name, 5) * error(loud).mean()
    v = k.transpose(0, 2).contiguous()[:, :, :16].repeat(1, 1, 4)
    codes, params = kv_groups.quantise_values(v, fmt)
    other = v.clone()
    other[0] *= 50
    codes2, params2 = kv_groups.quantise_values(other, fmt)
    assert torch.equal(codes[1:], codes2[1:]) and torch.equal(params[1:], params2[1:])


@pytest.mark.parametrize(
    ("name", "least"), [("i8", 3e-5), ("i4", 0.0080), ("i2", 0.202), ("i1", 0.358)]
)
def test_relative_error_of_normal_numbers(name, least):
    x = torch.from_numpy(np.random.default_rng(1).standard_normal((64, 500, 64), np.float32))
    codes, params = kv_groups.quantise_values(x, GROUPED[name])
    off = kv_groups.real_values(codes, params, GROUPED[name], torch.float32) - x
    assert float(off.square().mean() / x.square().mean()) == pytest.approx(least, rel=0.1)


@settings(max_examples=5)
@given(name=FMTS, n=st.integers(1, 200), seed=st.integers(0, 99), data=st.data())
def test_what_a_query_sees_does_not_depend_on_the_call(name, n, seed, data):
    fmt, rng = GROUPED[name], np.random.default_rng(seed)
    k, v = rows(rng, n)
    q = torch.from_numpy(rng.standard_normal((n, 4, 3), np.float32)).double()

    def attended(steps):
        states, out, at = empty(fmt, tail=256), [], 0
        for step in steps:
            end = min(n, at + step)
            if end == at:
                break
            kv_groups.append_rows(states, k[at:end], v[at:end], at, fmt)
            pos = torch.tensor([at, end - at], dtype=torch.int32)
            given_ = [states[name] for name in STATES]
            out.append(OPS.grouped_attention(q[at:end], *given_, pos, None, 0.5, fmt.name))
            at = end
        return torch.cat(out)

    steps = [*data.draw(st.lists(st.integers(1, 130), min_size=1, max_size=9)), 200]
    assert torch.allclose(attended([n]), attended(steps), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", GROUPED)
def test_error_of_attention_is_what_steps_of_codes_explain(name):
    fmt, rng, scale = GROUPED[name], np.random.default_rng(3), 3**-0.5
    k, v = rows(rng, 200)
    q = torch.from_numpy(rng.standard_normal((1, 4, 3), np.float32)).double()
    states = empty(fmt)
    kv_groups.append_rows(states, k, v, 0, fmt)
    pos = torch.tensor([199, 1], dtype=torch.int32)
    got = OPS.grouped_attention(q, *(states[n] for n in STATES), pos, None, scale, fmt.name)
    want = OPS.cached_attention(q, k.double(), v.double(), pos, None, scale, 0)
    step = states["k_scale"][:3].double()[..., 0].amax(0).repeat_interleave(2, 0)
    value = states["v_scale"][..., 0].max().double()
    if name == "i1":  # numbers lie beyond both, too
        off = [
            (real - exact[:192]).abs().amax(0)
            for real, exact in (
                (kv_groups.real_keys(states["k_cache"][:192], states["k_scale"][:3], q.dtype), k),
                (
                    kv_groups.real_values(
                        states["v_cache"][:192], states["v_scale"][:192], fmt, q.dtype
                    ),
                    v,
                ),
            )
        ]
        step, value = 2 * off[0].repeat_interleave(2, 0), 2 * off[1].max()
    eps = scale * (q[0].abs() * step * 0.51).sum(-1)[None, :, None]
    spread = (torch.exp(2 * eps) - 1) * v.abs().max()
    assert ((got - want).abs() <= spread + value * 0.51).all()
    assert (got - want).abs().max() > 0


@pytest.mark.parametrize("c", ["i4", "i1"])
def test_rows_within_the_error_are_allowed_and_others_are_not(c):
    w = parse_workload(f"kv_append:t=70,h=2,kv=2,d=16,dv=24,cap=192,c={c}")
    op = get_op("kv_append")
    given_ = op.make_inputs(w, np.random.default_rng(0)) | {"pos": np.array([60, 70], np.int32)}
    want = op.reference(w, given_)
    bound = op.bound(w, given_, want)
    assert bound["k_cache"][:64].max() <= 1 and bound["k_cache"][128:].max() == 0
    assert (bound["k_cache"] > 0).mean() < 0.01  # only codes next to a tie
    assert (bound["k_scale"] > 0).mean() < 0.1
    near = {**given_, "qkv": given_["qkv"] * np.float32(1 + 2e-7)}
    other = op.reference(w, near)
    for name in STATES:
        error = np.abs(other[name].astype(np.float64) - want[name])
        assert (error <= bound[name]).all(), name
    far = op.reference(w, {**given_, "qkv": given_["qkv"] * np.float32(1.01)})
    assert (np.abs(far["k_scale"].astype(float) - want["k_scale"]) > bound["k_scale"]).any()


def test_refusals_name_what_is_wrong():
    base = "cached_attention:t=1,h=2,kv=1,d=8,dv=8"
    for text, message in (
        (f"{base},cap=128,window=64,c=i4", "window.*c=bf16"),
        (f"{base},cap=100,c=i4", "multiples of 64"),
        (f"{base},cap=128,tail=70,c=i8", "multiples of 64"),
        ("cached_attention:t=65,h=2,kv=1,d=8,dv=8,cap=256,tail=64,c=i8", "too short.*tail=128"),
        (f"{base},cap=128,tail=64", "only caches in groups"),
        (
            "sparse_attention:t=1,h=2,kv=1,d=8,dv=8,cap=64,block=16,kmax=2,hs=1,c=i4",
            "unknown format",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            parse_workload(text)


def test_formats_of_schemes_and_rings():
    for kv, name in (("8", "i8"), ("4", "i4"), ("2", "i2"), ("1", "i1")):
        fmt = scheme_cache_format(kv)
        assert fmt.name == name and window_cache_format(fmt).name == "bf16"
    assert window_cache_format(scheme_cache_format("")).name == "f32"


def test_bytes_are_those_of_codes_and_of_scales():
    text = "cached_attention:t=1,h=32,kv=8,d=128,dv=128,cap=262144,c={}"
    op = get_op("cached_attention")
    bytes_ = {
        c: op.counts(parse_workload(text.format(c))).bytes["dram"] for c in ("bf16", *GROUPED)
    }
    for name, fmt in GROUPED.items():  # 32 bits for each 64 codes
        assert bytes_["bf16"] / bytes_[name] == pytest.approx(16 / (fmt.bits + 0.5), rel=0.02)
