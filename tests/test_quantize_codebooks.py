"""Codebook (AFPQ), fp8, 1-bit and complex quantisers."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mimo_compile.errors import UsageError
from mimo_compile.ir.formats import E4M3_NAN, parse_scheme, parse_weight_format
from mimo_compile.quantize import check_scheme, quantize
from mimo_compile.quantize.complex import quantize_phase

BOOKS = ["nf3", "nf4", "fp3", "fp4", "anf3", "anf4", "afp3", "afp4"]


def spread(scale: np.ndarray, size: int, k: int) -> np.ndarray:
    return np.repeat(scale, size, axis=1)[:, :k]


@pytest.mark.parametrize("name", BOOKS)
@given(st.integers(0, 10_000), st.integers(1, 80), st.sampled_from(["normal", "skew", "one side"]))
@settings(max_examples=12)
@example(117, 1, "normal")  # a scale below float16's normal numbers
def test_each_weight_gets_the_nearest_value(name: str, seed: int, k: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((3, k)).astype(np.float32)
    if kind == "skew":
        w[w < 0] /= 4
    if kind == "one side":
        w = np.abs(w)
    fmt = parse_weight_format(name + "g32")
    q = quantize(w, fmt, search=False)
    values = np.array(fmt.values)
    if fmt.two_sided:
        above, below = (spread(q.scale[:, i::2], 32, k) for i in (0, 1))
    else:
        above = below = spread(q.scale, 32, k)
    scale = np.where(w >= 0, above, below).astype(np.float64)
    choices = values * scale[..., None]
    allowed = np.where(w[..., None] >= 0, values >= 0, values <= 0)
    best = np.where(allowed, np.abs(choices - w[..., None]), np.inf).min(-1)
    error = np.abs(q.dequantize().astype(np.float64) - w)
    np.testing.assert_allclose(error, best, atol=1e-6 * np.abs(w).max())
    # half the widest gap, and the extremes but for the scale's rounding to float16
    gap = np.diff(np.unique(values)).max() / 2
    tiny = 2**-25 * np.abs(values).max()  # half a step of the smallest scales
    assert np.all(error <= gap * scale + np.abs(w) * 2**-10 + tiny)
    if fmt.two_sided:
        group = slice(0, min(32, k))
        for row in range(3):
            at = np.abs(w[row, group]).argmax()
            assert error[row, group][at] <= 2**-10 * np.abs(w[row, group][at]) + tiny


@pytest.mark.parametrize(
    ("name", "mse"),
    [("nf4", 0.00914), ("anf4", 0.00847), ("nf3", 0.0440), ("anf3", 0.0390),
     ("fp4", 0.01184), ("afp4", 0.01116), ("fp3", 0.0570), ("afp3", 0.0514)],
)  # fmt: skip
def test_error_on_normal_weights(name: str, mse: float) -> None:
    """Relative squared error of half a million normal weights in groups of 128."""
    w = np.random.default_rng(0).standard_normal((1000, 512)).astype(np.float32)
    fmt = parse_weight_format(name + "g128")
    plain = quantize(w, fmt, search=False).dequantize()
    assert ((plain - w) ** 2).mean() / (w**2).mean() == pytest.approx(mse, rel=0.03)
    searched = quantize(w, fmt).dequantize()
    assert ((searched - w) ** 2).mean() < ((plain - w) ** 2).mean()


@pytest.mark.parametrize("name", BOOKS)
def test_negation_idempotence_and_zeros(name: str) -> None:
    fmt = parse_weight_format(name + "g32")
    w = np.random.default_rng(1).standard_normal((4, 96)).astype(np.float32)
    w[0, :32] = 0
    q = quantize(w, fmt, search=False)
    assert not q.dequantize()[0, :32].any()
    again = quantize(q.dequantize(), fmt, search=False)
    np.testing.assert_allclose(again.dequantize(), q.dequantize(), rtol=2**-9)
    if "fp" in name:
        np.testing.assert_array_equal(quantize(-w, fmt, search=False).dequantize(), -q.dequantize())


def test_equal_extremes_make_two_scales_equal() -> None:
    w = np.random.default_rng(2).standard_normal((2, 64)).astype(np.float32)
    w[:, 0], w[:, 32], w[:, 1], w[:, 33] = 5, 5, -5, -5
    for name in ("nf4", "fp4"):
        plain = quantize(w, parse_weight_format(name + "g32"), search=False)
        two = quantize(w, parse_weight_format("a" + name + "g32"), search=False)
        np.testing.assert_array_equal(plain.dequantize(), two.dequantize())


@given(st.integers(0, 1000), st.integers(1, 300), st.integers(1, 300))
@settings(max_examples=10)
def test_fp8_blocks(seed: int, n: int, k: int) -> None:
    w = np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)
    w[: n // 2] *= 50
    q = quantize(w, parse_weight_format("fp8b128"))
    assert not np.isin(q.codes, E4M3_NAN).any()
    for r in range(0, n, 128):
        for c in range(0, k, 128):
            block = w[r : r + 128, c : c + 128]
            scale = np.float32(np.abs(block).max()) / np.float32(448)
            np.testing.assert_array_equal(q.scale[r : r + 128, c // 128], scale)
            want = torch.from_numpy(block / scale).to(torch.float8_e4m3fn).to(torch.float32).numpy()
            got = q.dequantize()[r : r + 128, c : c + 128] / scale
            # float32 rounds both quotients, of values up to 448
            error, least = (np.abs(v - block / scale) for v in (got, want))
            assert np.all(error <= least + 1e-4)


def test_one_bit_is_the_sign_times_the_mean() -> None:
    w = np.array([[1, -3, 2, -2, 0, 0, 0, 0]], np.float32)
    q = quantize(w, parse_weight_format("w1grow"))
    np.testing.assert_array_equal(q.dequantize(), [[1, -1, 1, -1, 1, 1, 1, 1]])


def test_phase_borders() -> None:
    re = torch.tensor([[1.0, 1.0, -1.0, -1.0, 0.0, -2.0, 0.0, 0.0, 1.0]])
    im = torch.tensor([[1.0, -1.0, 1.0, -1.0, 0.0, 0.0, 3.0, -3.0, 0.5]])
    codes, scale = quantize_phase(re, im)
    assert codes.tolist() == [[1, 0, 2, 3, 0, 2, 1, 3, 0]]
    assert scale.tolist() == [[1.0, 2.0]]  # 1, 1, 0, 2, 1 kept on the real axis; 1, 1, 3, 3


def test_an_axis_without_weights_has_scale_zero() -> None:
    codes, scale = quantize_phase(torch.ones(2, 2), torch.zeros(2, 2), per_row=True)
    assert not codes.any() and scale.tolist() == [[1, 0], [1, 0]]


def test_widely_linear_error_of_gaussian_weights() -> None:
    """``1 - 2/pi`` after one stage, 0.1305 after two (Fairy2i)."""
    w = np.random.default_rng(3).standard_normal((512, 1024)).astype(np.float32)
    for name, want in (("complex2wl", 1 - 2 / np.pi), ("complex2wl2", 0.1305)):
        fmt = parse_weight_format(name)
        error = ((quantize(w, fmt).dequantize() - w) ** 2).mean()
        assert error == pytest.approx(want, rel=0.01)


def test_complex_refusals() -> None:
    with pytest.raises(UsageError, match="even extents"):
        quantize(np.ones((3, 4), np.float32), parse_weight_format("complex2wl"))
    with pytest.raises(UsageError, match="trained with complex"):
        check_scheme(parse_scheme("complex2a8"))
    with pytest.raises(UsageError, match="no groups of activations"):
        check_scheme(parse_scheme("complex2wl2a8g64"))
