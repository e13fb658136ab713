"""Weight formats, the `--quant` grammar and workload texts."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mimo_compile.errors import UsageError
from mimo_compile.ir.formats import (
    ACT_NAMES,
    QuantTensor,
    parse_act_format,
    parse_scheme,
    parse_weight_format,
)
from mimo_compile.ir.workload import BUCKETS, Workload, bucket_of

GRAMMAR = {
    "w4g64a8": ("int", 4, 64, False, "8", ""),
    "w4zg128a16kv4": ("int", 4, 128, True, "16", "4"),
    "w8a8": ("int", 8, 0, False, "8", ""),
    "w1.58a8": ("ternary", 2, -1, False, "8", ""),
    "w1.58dgrow": ("ternary", 2, 0, False, "16", ""),
    "afp4g64": ("codebook", 4, 64, False, "16", ""),
    "fp8b128kvfp8": ("fp8", 8, 128, False, "16", "fp8"),
    "complex2": ("complex", 2, -1, False, "16", ""),
    "complex2wl2growa8": ("complex", 2, 0, False, "8", ""),
    "fp3g32": ("codebook", 3, 32, False, "16", ""),
    "anf4g128a8": ("codebook", 4, 128, False, "8", ""),
    "w3gtensor": ("int", 3, -1, False, "16", ""),
    "w4g64abf16": ("int", 4, 64, False, "bf16", ""),
    "w4g64a8g32kv8": ("int", 4, 64, False, "8g32", "8"),
    "nf4af16kv4": ("codebook", 4, 64, False, "f16", "4"),
    "bf16abf16": ("float", 16, 0, False, "bf16", ""),
    "w4g64a8kv16": ("int", 4, 64, False, "8", "16"),
    "bf16kv16": ("float", 16, 0, False, "16", "16"),
}


@pytest.mark.parametrize("text", GRAMMAR)
def test_scheme_grammar(text: str) -> None:
    scheme = parse_scheme(text)
    fmt = scheme.weight
    assert fmt is not None
    got = (fmt.family, fmt.bits, fmt.group, fmt.has_zero, scheme.act, scheme.kv)
    assert got == GRAMMAR[text]
    assert parse_scheme(str(scheme)) == scheme


@pytest.mark.parametrize(
    "text",
    [
        "",
        "w9",
        "w4g63",
        "w4a7",
        "q4",
        "w4 a8",
        "none8",
        "w4kv3",
        "nonekv16",
        "kv",
        "kv16a8",
        "w4kv32",
        "w1.5",
        "w4a8g48",
        "w4abf",
        "a16",
        "f32a8",
    ],
)
def test_bad_scheme_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(UsageError, match="--quant") as error:
        parse_scheme(text)
    assert repr(text) in str(error.value)


def test_activation_formats() -> None:
    for name in ACT_NAMES:
        act = parse_act_format(name)
        assert str(act) == name and act.is_int8 == name.startswith("a8")
        if name != "a16":
            assert parse_scheme(name).act == name[1:] and str(parse_scheme(name)) == name
    for name, parts in {
        "kv16": ("16", "16"),
        "a8kv16": ("8", "16"),
        "abf16kvfp8": ("bf16", "fp8"),
    }.items():
        scheme = parse_scheme(name)
        assert scheme.weight is None and (scheme.act, scheme.kv) == parts and str(scheme) == name
    assert parse_act_format("a8g64").group == 64 and parse_act_format("a8").groups(100) == 1
    assert parse_act_format("a8g64").groups(65) == 2
    with pytest.raises(UsageError, match="a8g48"):
        parse_act_format("a8g48")


@given(st.text(max_size=12))
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        scheme = parse_scheme(text)
    except UsageError:
        return
    assert parse_scheme(str(scheme)) == scheme


@given(st.sampled_from(["w2g32", "w4g64", "w4zg32", "w8", "w1.58"]), st.integers(1, 100))
def test_dequantize_is_scale_times_code_minus_zero(name: str, k: int) -> None:
    fmt = parse_weight_format(name)
    rng = np.random.default_rng(k)
    codes = rng.integers(0, fmt.max_code + 1, (3, k), dtype=np.uint8)
    scale = rng.random((3, fmt.groups(k)), dtype=np.float32)
    zero = rng.integers(0, 4, scale.shape).astype(np.float32) if fmt.has_zero else None
    got = QuantTensor(fmt, codes, scale, zero).dequantize()
    for n in range(3):
        for j in range(k):
            g = j // fmt.group_size(k)
            z = fmt.fixed_zero if zero is None else zero[n, g]
            assert got[n, j] == np.float32(scale[n, g] * (np.float32(codes[n, j]) - np.float32(z)))


def test_codebooks_hold_the_published_values() -> None:
    assert parse_weight_format("fp4").values[1:8] == (0.5, 1, 1.5, 2, 3, 4, 6)
    assert parse_weight_format("afp3").values == (0, 1, 2, 4, 0, -1, -2, -4)
    for name, zero in (("nf4", 7), ("nf3", 3)):
        values = parse_weight_format(name).values
        assert values[0] == -1 and values[-1] == 1 and values[zero] == 0
        assert sorted(values) == list(values) and len(values) == 2 ** int(name[-1])


def test_e4m3_is_torchs() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(torch.float8_e4m3fn).to(torch.float64).numpy()
    np.testing.assert_array_equal(parse_weight_format("fp8b128").values, values)


def test_two_sided_scales() -> None:
    fmt = parse_weight_format("afp4g32")
    codes = np.array([[0, 7, 15, 9]], np.uint8)
    got = QuantTensor(fmt, codes, np.array([[0.5, 2.0]], np.float32)).dequantize()
    assert got.tolist() == [[0, 3, -12, -1]]


@pytest.mark.parametrize("name", ["complex2", "complex2wl", "complex2wl2"])
def test_complex_matrices_act_as_complex_numbers(name: str) -> None:
    """``complex2`` on the conjugate; the others on x and on its conjugate, in turns."""
    rng = np.random.default_rng(4)
    fmt = parse_weight_format(name)
    n, k = 6, 10
    codes = rng.integers(0, 4, fmt.code_shape(n, k), dtype=np.uint8)
    scale = rng.random(fmt.scale_shape(n, k), dtype=np.float32)
    roots = np.array([1, 1j, -1, -1j])[codes]
    w = roots.real * scale[:, :1] + 1j * roots.imag * scale[:, 1:]
    x = rng.standard_normal(k // 2) + 1j * rng.standard_normal(k // 2)
    terms = w.reshape(fmt.terms, n // 2, k // 2)
    if fmt.terms == 1:
        want = terms[0] @ x.conj()
    else:
        want = sum(m @ (x.conj() if i % 2 else x) for i, m in enumerate(terms))
    real = QuantTensor(fmt, codes, scale).dequantize().astype(np.float64)
    got = real @ np.concatenate([x.real, x.imag])
    np.testing.assert_allclose(got[: n // 2] + 1j * got[n // 2 :], want, rtol=1e-5, atol=1e-5)


def test_complex_codes_have_no_groups_of_columns() -> None:
    with pytest.raises(UsageError, match="grow or gtensor"):
        parse_weight_format("complex2g64")


def test_workload_text_round_trips() -> None:
    text = "mpgemm:m=1,n=4096,k=4096,w=w2g64,a=a8"
    workload = Workload.parse(text)
    assert str(workload) == text
    assert workload.integer("n") == 4096
    assert str(workload.replace(m=4)) == text.replace("m=1", "m=4")


@pytest.mark.parametrize(
    "text", ["", "mpgemm:m", "mpgemm:m=1,m=2", "Mp:m=1", "mpgemm:m=a b", ":m=1"]
)
def test_malformed_workload_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="malformed"):
        Workload.parse(text)


def test_buckets_cover_every_count() -> None:
    for tokens in range(1, 300):
        bucket = bucket_of(tokens)
        assert bucket in BUCKETS
        assert tokens <= bucket or bucket == BUCKETS[-1]
