"""GPTQ and the scales of AWQ on single matrices: bounds, brute force, a plain reference, bad inputs."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.errors import MimoError, UsageError
from mimo_compile.ir.formats import parse_weight_format
from mimo_compile.quantize import quantize
from mimo_compile.quantize.awq import Part, candidates, search_scales
from mimo_compile.quantize.calibration import parse_calibration
from mimo_compile.quantize.gptq import _Parts, _run, gptq
from mimo_compile.quantize.moments import Moments, inverse_factor, squared_error

FORMATS = (
    "w1", "w2g64", "w3g32", "w4g128", "w8", "w2zg64", "w4zg64", "w3grow", "w4gtensor", "w2g256",
    "w1.58", "w1.58g64", "w1.58grow", "nf3", "nf4g32", "fp3", "fp4", "anf3", "anf4g32", "afp3",
    "afp4grow", "fp8b128",
)  # fmt: skip


def draw(seed, n, k, tokens):
    """Return weights and inputs whose channels depend on each other and differ in size."""
    rng = torch.Generator().manual_seed(seed)
    w = torch.randn((n, k), generator=rng) * 0.05
    mix = torch.randn((k, max(1, k // 3)), generator=rng)
    x = torch.randn((tokens, mix.shape[1]), generator=rng) @ mix.mT
    x += 0.3 * torch.randn((tokens, k), generator=rng)
    return w, x * torch.rand(k, generator=rng).mul(3).exp()


def moments_of(x):
    moments = Moments(x.shape[1])
    for part in x.split(7):
        moments.add(part)
    return moments


def error(q, w, moments):
    return float(squared_error(torch.from_numpy(q.dequantize()) - w, moments.hessian).sum())


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(FORMATS), st.integers(0, 2**32), st.integers(1, 9),
    st.sampled_from([1, 31, 64, 130, 200]), st.sampled_from([1, 20, 300]),
)  # fmt: skip
def test_error_on_the_text_is_never_above_that_of_rounding(name, seed, n, k, tokens):
    fmt = parse_weight_format(name)
    w, x = draw(seed, n, k, tokens)
    moments = moments_of(x)
    q, gain = gptq(w, moments, fmt)
    plain = quantize(w, fmt)
    assert error(q, w, moments) <= error(plain, w, moments) * (1 + 1e-3) + 1e-9
    assert gain.calibrated <= gain.rtn
    assert q.codes.shape == plain.codes.shape and q.scale.shape == plain.scale.shape
    assert q.codes.max() <= plain.fmt.max_code and np.isfinite(q.scale).all() and q.perm is None
    if fmt.family != "fp8":
        np.testing.assert_array_equal(q.scale, q.scale.astype(np.float16))
    if fmt.group == -1:
        assert np.unique(q.scale).size == 1
    if not fmt.is_integer:
        assert (q.scale >= 0).all()


@pytest.mark.parametrize("name", ["w4g64", "w3g64", "w2g64", "w1.58", "nf3", "anf3", "afp3"])
def test_dependent_inputs_gain_much(name):
    w, x = draw(3, 48, 192, 600)
    _, gain = gptq(w, moments_of(x), parse_weight_format(name))
    assert gain.calibrated < 0.7 * gain.rtn


@pytest.mark.parametrize(
    "name", ["w2grow", "w3grow", "w4zgrow", "w1.58grow", "nf3grow", "afp3grow"]
)
def test_codes_are_those_of_the_definition(name):
    """Column by column: the weights left take their least-squares values, the next one is rounded."""
    fmt, k = parse_weight_format(name), 17
    w, x = draw(5, 4, k, 80)
    moments = moments_of(x)
    hessian = moments.hessian.to(torch.float64)
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(k)
    start = _Parts.of(quantize(w, fmt))
    found = _run(w, start, moments.factor("w"), "w")
    for n in range(len(w)):
        one = _Parts.of(quantize(w[n : n + 1], fmt))
        target = w[n].to(torch.float64)
        left = target.clone()
        for j in range(k):
            value = left[j].to(torch.float32)
            every = torch.arange(fmt.max_code + 1 if fmt.is_integer else 1 << fmt.bits)
            grid = torch.stack([_value(one, int(c)) for c in every])
            code = int((grid - value).abs().argmin())
            got = int(found.codes[n, j])
            assert abs(grid[got] - value) <= abs(grid[code] - value) * (1 + 1e-3) + 1e-6, (n, j)
            left[j] = grid[got].to(torch.float64)
            rest, fixed = slice(j + 1, k), slice(0, j + 1)
            if j + 1 < k:
                off = left[fixed] - target[fixed]
                moved = torch.linalg.solve(hessian[rest, rest], hessian[rest, fixed] @ off)
                left[rest] = target[rest] - moved


def _value(parts, code):
    codes = torch.full((1, 1), code, dtype=torch.uint8)
    return _Parts(parts.fmt, codes, parts.scale, parts.zero).real()[0, 0]


def test_between_rounding_and_the_best_of_all_codes():
    fmt = parse_weight_format("w2grow")
    gap = []
    for seed in range(6):
        w, x = draw(seed, 1, 6, 40)
        moments = moments_of(x)
        start = _Parts.of(quantize(w, fmt))
        combinations = torch.tensor(list(itertools.product(range(4), repeat=6)), dtype=torch.uint8)
        every = _Parts(fmt, combinations, start.scale.expand(len(combinations), 1), None)
        best = float(squared_error(every.real() - w, moments.hessian).min())
        run = _run(w, start, moments.factor("w"), "w")
        ours = float(squared_error(run.real() - w, moments.hessian))
        rtn = float(squared_error(start.real() - w, moments.hessian))
        assert best <= ours * (1 + 1e-4)
        gap.append((ours / best, rtn / best))
    ours, rtn = np.exp(np.log(np.array(gap)).mean(0))
    assert ours < rtn


def test_independent_inputs_are_plain_rounding():
    w, _ = draw(1, 5, 64, 1)
    moments = Moments(64)
    moments.add(torch.eye(64))
    fmt = parse_weight_format("w3grow")
    plain = quantize(w, fmt)
    run = _run(w, _Parts.of(plain), moments.factor("w"), "w")
    np.testing.assert_array_equal(run.codes.numpy(), plain.codes)


def test_no_inputs_at_all_are_plain_rounding():
    w, _ = draw(1, 5, 64, 1)
    q, gain = gptq(w, Moments(64), parse_weight_format("w4g32"))
    np.testing.assert_array_equal(q.codes, quantize(w, q.fmt).codes)
    assert gain.rtn == gain.calibrated == 0


@pytest.mark.parametrize("tokens", [1, 5, 400])
def test_factor_inverts_the_damped_moments(tokens):
    _, x = draw(2, 1, 40, tokens)
    hessian = moments_of(x).hessian
    upper = inverse_factor(hessian).to(torch.float64)
    assert bool((upper.tril(-1) == 0).all())
    damped = hessian.to(torch.float64)
    damped = damped + 0.01 * damped.diagonal().mean() * torch.eye(40)
    product = upper.mT @ upper @ damped
    assert torch.allclose(product, torch.eye(40, dtype=torch.float64), atol=1e-3)


def test_moments_of_pieces_are_those_of_the_whole():
    _, x = draw(4, 1, 20, 90)
    both, other = moments_of(x[:50]), moments_of(x[50:])
    both.join(other)
    assert both.count == 90
    torch.testing.assert_close(both.hessian, (x.mT @ x) / 90, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both.magnitude, x.abs().mean(0))


def test_bad_inputs_are_refused():
    w, x = draw(1, 4, 32, 50)
    bad = moments_of(x)
    bad.add(torch.full((1, 32), float("nan")))
    with pytest.raises(MimoError, match=r"layer: its inputs .* NaN.*--calibrate rtn"):
        gptq(w, bad, parse_weight_format("w4g32"), "layer")
    with pytest.raises(MimoError, match="NaN or infinity"):
        gptq(w * float("inf"), moments_of(x), parse_weight_format("w4g32"))
    with pytest.raises(UsageError, match="complex2wl"):
        gptq(w, moments_of(x), parse_weight_format("complex2wl"))
    with pytest.raises(MimoError, match="not positive definite"):
        inverse_factor(torch.tensor([[1.0, 9.0], [9.0, 1.0]]))


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(["w2g32", "w4g64", "w1.58", "anf3"]), st.integers(0, 2**32))
def test_scales_never_make_the_error_larger(name, seed):
    fmt = parse_weight_format(name)
    w, x = draw(seed, 6, 64, 50)
    moments = moments_of(x)
    scale, gain = search_scales(lambda: [Part(w, moments, "w")], moments.magnitude, fmt)
    scaled = torch.from_numpy(quantize(w * scale, fmt).dequantize()) / scale
    after = float(squared_error(scaled - w, moments.hessian).sum())
    assert after <= error(quantize(w, fmt), w, moments) * (1 + 1e-3)
    assert gain.calibrated == pytest.approx(after, rel=1e-3) and bool((scale > 0).all())


def test_scales_find_outlier_channels():
    w, x = draw(8, 32, 128, 300)
    x = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    x[:, 5] *= 60
    moments = moments_of(x)
    scale, gain = search_scales(
        lambda: [Part(w, moments, "w")], moments.magnitude, parse_weight_format("w3g64")
    )
    assert int(scale.argmax()) == 5 and gain.calibrated < 0.5 * gain.rtn


def test_candidates_begin_with_none_and_are_bounded():
    every = candidates(torch.tensor([0.0, 1.0, 1e9]), torch.tensor([1.0, 0.0, 1.0]))
    assert bool((every[0] == 1).all()) and len(every) > 10
    for scale in every:
        assert bool(torch.isfinite(scale).all()) and bool((scale > 0).all())


@pytest.mark.parametrize("text", ["", "GPTQ", "gptq:", "obq", "rtn:book.txt", ":x"])
def test_wrong_methods_are_refused(text):
    with pytest.raises(UsageError, match="--calibrate"):
        parse_calibration(text)


def test_methods_and_files_are_parsed():
    assert parse_calibration("rtn").method == "rtn"
    found = parse_calibration("awq:a:b.txt", seed=7)
    assert (found.method, str(found.text), found.seed) == ("awq", "a:b.txt", 7)
