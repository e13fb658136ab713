import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.errors import MimoError, UsageError
from mimo_compile.ir.formats import QuantTensor, parse_scheme, parse_weight_format
from mimo_compile.ir.ops.numerics import real_matrix
from mimo_compile.quantize import check_scheme, head_format, quantize

FORMATS = ("w2g32", "w2g64", "w3g64", "w4g64", "w4g128", "w8", "w8g64", "w4gtensor", "w5grow")
ZERO_FORMATS = ("w1zg32", "w2zg64", "w4zg64", "w4zg128", "w8z", "w8zgtensor")


def draw_matrix(data, magnitudes=(-2.0, 2.0)):
    """Draw a matrix of normal rows with outliers, zero groups and, at times, a constant sign."""
    n, k = data.draw(st.integers(1, 5)), data.draw(st.sampled_from([1, 31, 64, 65, 96, 200]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    w = rng.standard_normal((n, k)) * 10 ** rng.uniform(*magnitudes, (n, 1))
    if data.draw(st.booleans()):
        w[rng.integers(n), rng.integers(k)] *= 50
    if data.draw(st.booleans()):
        w[:, : min(k, 64)] = 0
    if data.draw(st.booleans()):
        w = np.abs(w)
    return w.astype(np.float32)


def columns(values, fmt, k):
    return np.repeat(values, fmt.group_size(k), axis=1)[:, :k]


@settings(max_examples=40)
@given(st.data(), st.sampled_from(FORMATS))
def test_symmetric_error_is_at_most_half_a_step(data, name):
    fmt = parse_weight_format(name)
    w = draw_matrix(data)
    q = quantize(w, fmt, search=False)
    step = columns(q.scale, fmt, w.shape[1])
    assert np.all(np.abs(q.dequantize() - w) <= step / 2 * (1 + 2**-9))
    assert q.codes.max() <= fmt.max_code and q.zero is None
    assert np.all(q.scale == q.scale.astype(np.float16))


@settings(max_examples=40)
@given(st.data(), st.sampled_from(ZERO_FORMATS))
def test_asymmetric_error_is_at_most_one_step(data, name):
    fmt = parse_weight_format(name)
    w = draw_matrix(data)
    q = quantize(w, fmt, search=False)
    assert q.zero is not None
    step = columns(q.scale, fmt, w.shape[1])
    error = np.abs(q.dequantize() - w)
    assert np.all(error <= step * (1 + 2.0 ** (fmt.bits - 10)))
    # only values at an end of the range may be off by more than half a step
    inner = (q.codes > 0) & (q.codes < fmt.max_code)
    assert np.all(error[inner] <= step[inner] / 2 * (1 + 2**-9))
    assert np.all(q.zero == np.round(q.zero)) and q.zero.min() >= 0 and q.zero.max() <= fmt.max_code
    assert np.all(q.dequantize()[w == 0] == 0)


@settings(max_examples=40)
@given(st.data(), st.sampled_from(FORMATS))
def test_quantising_again_changes_nothing(data, name):
    fmt = parse_weight_format(name)
    once = quantize(draw_matrix(data), fmt, search=False)
    twice = quantize(once.dequantize(), fmt, search=False)
    np.testing.assert_array_equal(once.dequantize(), twice.dequantize())


@settings(max_examples=30)
@given(st.data(), st.sampled_from(("w2g64", "w3g64", "w4g64", "w2zg64", "w4zg64")))
def test_search_never_makes_the_error_larger(data, name):
    fmt = parse_weight_format(name)
    w = draw_matrix(data)

    def error(q):
        return ((q.dequantize().astype(np.float64) - w) ** 2).sum()

    found, plain = (error(quantize(w, fmt, search=s)) for s in (True, False))
    noise = 1e-6 * (w.astype(np.float64) ** 2).sum()  # gains are compared in float32
    assert found <= 1.0001 * plain + noise


@pytest.mark.parametrize(("name", "most"), [("w4g64", 0.0095), ("w3g64", 0.037), ("w2g64", 0.14)])
def test_search_reaches_the_known_error_of_normal_weights(name, most):
    w = np.random.default_rng(0).standard_normal((64, 1024)).astype(np.float32)
    q = quantize(w, parse_weight_format(name))
    assert ((q.dequantize() - w) ** 2).mean() < most
    assert q.scale.min() < 0 or name == "w4g64", "both signs of the scale are candidates"


@settings(max_examples=30)
@given(st.data(), st.sampled_from(("w1.58", "w1.58g64", "w1.58grow", "w1.58d")))
def test_ternary_is_absmean(data, name):
    fmt = parse_weight_format(name)
    w = draw_matrix(data)
    q = quantize(w, fmt)
    n, k = w.shape
    if fmt.group == -1:
        gamma = np.full((n, 1), np.abs(w.astype(np.float64)).mean())
    else:
        size = fmt.group_size(k)
        parts = [np.abs(w[:, i : i + size].astype(np.float64)).mean(1) for i in range(0, k, size)]
        gamma = np.stack(parts, 1)
    np.testing.assert_allclose(q.scale, gamma, rtol=2**-10, atol=2.0**-24)
    ratio = w / np.maximum(columns(gamma, fmt, k), 1e-30)
    clear = np.abs(np.abs(ratio) - 0.5) > 1e-5  # away from ties, where float32 may differ
    expected = np.clip(np.round(ratio), -1, 1) + 1
    np.testing.assert_array_equal(q.codes[clear], expected[clear])
    again = quantize(q.dequantize(), fmt)
    assert np.all(
        (again.codes == q.codes) | (q.scale[:, :1] == 0) | (columns(q.scale, fmt, k) == 0)
    )


def test_ties_of_ternary_go_to_zero():
    q = quantize(
        np.array([[1.0, -1.0, 2.0, -4.0, 4.0, 0.0]], np.float32), parse_weight_format("w1.58")
    )
    assert q.scale[0, 0] == 2.0
    assert q.codes.tolist() == [[1, 1, 2, 0, 2, 1]]


@pytest.mark.parametrize("name", [*FORMATS, *ZERO_FORMATS, "w1.58", "w1.58g64"])
def test_zeros_get_scale_zero_and_the_zero_point(name):
    fmt = parse_weight_format(name)
    w = np.zeros((3, 96), np.float32)
    q = quantize(w, fmt)
    assert not q.scale.any() and not q.dequantize().any()
    zero = fmt.fixed_zero if q.zero is None else q.zero[0, 0]
    assert np.all(q.codes == zero)


def test_known_codes():
    # multiples of 1/16 with step 1/8: every second value is a tie and goes to the even code
    w = np.array([[0.875, -0.875, 0.4375, -0.0625, 0.0625, 0.0, 0.1875, 0.3125]], np.float32)
    q = quantize(w, parse_weight_format("w4grow"), search=False)
    assert q.scale[0, 0] == 0.125
    assert q.codes.tolist() == [[15, 1, 12, 8, 8, 8, 10, 10]]
    q = quantize(
        np.array([[-1.0, 0.5, 2.0, 0.0]], np.float32), parse_weight_format("w2zgrow"), search=False
    )
    assert q.zero is not None
    assert (q.scale[0, 0], q.zero[0, 0], q.codes.tolist()) == (1.0, 1.0, [[0, 1, 3, 1]])


def test_an_outlier_costs_only_its_group():
    w = np.random.default_rng(1).standard_normal((1, 256)).astype(np.float32)
    plain = quantize(w, parse_weight_format("w8g64")).dequantize()
    w[0, 5] = 1000
    spoiled = quantize(w, parse_weight_format("w8g64")).dequantize()
    np.testing.assert_array_equal(plain[0, 64:], spoiled[0, 64:])
    assert abs(spoiled[0, 5] - 1000) < 4


def test_a_short_last_group_has_its_own_scale_and_the_op_agrees():
    w = np.random.default_rng(2).standard_normal((4, 96)).astype(np.float32)
    w[:, 64:] *= 100
    q = quantize(w, parse_weight_format("w8g64"))
    assert q.scale.shape == (4, 2) and np.all(q.scale[:, 1] > 10 * q.scale[:, 0])
    parts = torch.from_numpy(q.codes), torch.from_numpy(q.scale), None
    back = real_matrix(q.fmt, *parts, torch.float64)
    np.testing.assert_array_equal(back.to(torch.float32).numpy(), q.dequantize())


def test_tiny_weights_survive_coarse_subnormal_scales():
    w = np.array([[3e-7, -1e-7, 5e-8, 0]], np.float32)
    q = quantize(w, parse_weight_format("w4grow"), search=False)
    assert np.all(np.abs(q.dequantize() - w) <= q.scale / 2)


def test_input_types_and_blocks_agree():
    w = torch.randn(300, 2048, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    fmt = parse_weight_format("w4g64")
    whole, part = quantize(w, fmt), quantize(w[130:140].float().numpy(), fmt)
    np.testing.assert_array_equal(whole.codes[130:140], part.codes)
    np.testing.assert_array_equal(whole.scale[130:140], part.scale)
    threads = torch.get_num_threads()
    assert isinstance(whole, QuantTensor) and threads == torch.get_num_threads()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["w4g64", "w4zg64", "w1.58", "w8gtensor"])
def test_nan_and_infinity_are_refused(bad, name):
    w = np.ones((4, 64), np.float32)
    w[2, 3] = bad
    with pytest.raises(MimoError, match=r"q_proj.*NaN or infinity"):
        quantize(w, parse_weight_format(name), what="layers.0.q_proj")


def test_unsupported_input_is_refused():
    with pytest.raises(MimoError, match="too large"):
        quantize(np.full((1, 64), 1e30, np.float32), parse_weight_format("w4g64"))
    with pytest.raises(UsageError, match="matrix"):
        quantize(np.ones(4, np.float32), parse_weight_format("w4g64"))
    with pytest.raises(UsageError, match="no quantised format"):
        quantize(np.ones((1, 4), np.float32), parse_weight_format("bf16"))
    for scheme in ("none", "kv16", "w4g64a8kv16", "w4g64a8kvfp8"):
        check_scheme(parse_scheme(scheme))


@pytest.mark.parametrize(
    ("scheme", "head"),
    [("w4g64a8", "w4g64"), ("w2g64a8", "w8"), ("w1.58a8", "w8"), ("w8a8", "w8"), ("none", None)],
)
def test_the_output_projection_keeps_four_bits(scheme, head):
    fmt = head_format(parse_scheme(scheme))
    assert (fmt.name if fmt else None) == head
