"""Changes of groups and formats that may not change a weight; experts in formats of their own."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from mimo_compile.errors import InputError
from mimo_compile.frontend.huggingface import load_checkpoint
from mimo_compile.frontend.weights.canonical import (
    affine,
    column_order,
    common_format,
    flatten,
    grouped_format,
    regroup,
    widen,
)
from mimo_compile.frontend.weights.checkpoint import read_json
from mimo_compile.frontend.weights.plain import Safetensors
from mimo_compile.ir.formats import QuantTensor, parse_scheme, parse_weight_format

pytestmark = pytest.mark.compile
NAMES = [
    "w2g16", "w3g32", "w4", "w4zg32", "w4zgrow", "w5g128", "w6g16", "w8", "w8zg256", "w1.58",
    "w1.58g256", "w4gtensor", "w1z",
]  # fmt: skip


def draw(rng, name, n, k):
    fmt = parse_weight_format(name)
    codes = rng.integers(0, fmt.max_code + 1, (n, k)).astype(np.uint8)
    shape = fmt.scale_shape(n, k)
    zero = rng.integers(0, 2**fmt.bits, shape).astype(np.float32) if fmt.has_zero else None
    return QuantTensor(fmt, codes, rng.standard_normal(shape).astype(np.float32), zero)


@given(
    names=st.lists(st.sampled_from(NAMES), min_size=2, max_size=3),
    k=st.sampled_from([32, 96, 256, 300, 512]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_a_common_format_holds_all_exactly(names, k, seed):
    rng = np.random.default_rng(seed)
    parts = [draw(rng, name, 3, k) for name in names]
    fmt = common_format([p.fmt for p in parts], k)
    assert fmt is not None and fmt.bits == max(p.fmt.bits for p in parts)
    for part in parts:
        wide = widen(part, fmt)
        assert wide.fmt == fmt and wide.scale.shape == fmt.scale_shape(3, k)
        assert int(wide.codes.max()) <= fmt.max_code
        assert np.array_equal(wide.dequantize(), part.dequantize())


@given(
    names=st.lists(st.sampled_from(NAMES), min_size=2, max_size=2),
    widths=st.lists(st.sampled_from([32, 64, 96, 256, 300, 512]), min_size=2, max_size=2),
    seed=st.integers(0, 99),
)
@settings(max_examples=25)
def test_a_common_format_of_matrices_of_different_widths(names, widths, seed):
    rng = np.random.default_rng(seed)
    parts = [draw(rng, name, 3, k) for name, k in zip(names, widths, strict=True)]
    fmt = common_format([p.fmt for p in parts], max(widths))
    assert fmt is not None
    for part, k in zip(parts, widths, strict=True):
        wide = widen(part, fmt)
        assert wide.scale.shape == fmt.scale_shape(3, k)
        assert np.array_equal(wide.dequantize(), part.dequantize())


def test_a_format_with_fewer_scales_is_refused():
    x = draw(np.random.default_rng(0), "w4g32", 3, 96)
    with pytest.raises(ValueError, match=r"w4grow has no room for the scales \[3, 3\] of w4g32"):
        widen(x, parse_weight_format("w4grow"))


def test_codebooks_have_no_common_format():
    for a, b in (("nf4", "w4"), ("fp8b128", "nf4"), ("w1", "w4"), ("complex2", "w2")):
        assert common_format([parse_weight_format(a), parse_weight_format(b)], 64) is None
    nf4 = parse_weight_format("nf4")
    assert common_format([nf4, nf4], 64) == nf4


@given(group=st.sampled_from([16, 32, 48, 64, 96, 128, 256, 384, 512, 1000]), k=st.integers(1, 600))
@settings(max_examples=60)
def test_groups_are_spread(group, k):
    values = np.arange(-(-k // group), dtype=np.float32)[None]
    fmt = grouped_format(4, False, group, k)
    if fmt is None:
        assert group % 16 and group < k
        return
    spread = np.repeat(regroup(values, group, fmt, k), fmt.group_size(k), axis=1)[:, :k]
    assert spread.tolist() == [[c // group for c in range(k)]]


@given(scale=st.floats(-8, 8, width=16), offset=st.floats(-8, 8, width=16), code=st.integers(0, 15))
@settings(max_examples=200)
def test_offsets_move_weights_by_half_a_unit_at_most(scale, offset, code):
    scales, offsets = (np.array([[v]], np.float32) for v in (scale, offset))
    codes = flatten(np.array([[code]], np.uint8), scales, 1)
    s, z = affine(scales, offsets)
    exact = Fraction(scale) * code + Fraction(offset)
    got = Fraction(float(s[0, 0])) * (int(codes[0, 0]) - Fraction(float(z[0, 0])))
    assert abs(got - exact) <= abs(Fraction(offset)) / 2**24


def test_order_of_columns():
    assert column_order(np.array([0, 0, 1, 1, 2]), 2) == (None, True)
    order, regular = column_order(np.array([1, 0, 2, 0, 1]), 2)
    assert order.tolist() == [1, 3, 0, 4, 2] and regular
    assert not column_order(np.array([1, 0, 1, 1, 1]), 2)[1]
    x = draw(np.random.default_rng(0), "w4g16", 3, 32)
    perm = np.random.default_rng(1).permutation(32).astype(np.int32)
    moved = QuantTensor(x.fmt, x.codes, x.scale, None, perm).dequantize()
    assert np.array_equal(moved[:, perm], x.dequantize())


@pytest.mark.parametrize("case", ["mixed", "mixed experts", "float down", "perm"])
def test_experts(saved, monkeypatch, case, tools):
    """Experts in two integer formats share one that holds both; floats among codes are refused."""
    folder = saved("mimo_v2_flash")[1]
    tensors, rng = load_file(folder / "model.safetensors"), np.random.default_rng(1)
    shapes = {n: t.shape for n, t in tensors.items() if "mlp.experts." in n}
    assert len(shapes) > 8
    made = {}
    for name, (n, k) in shapes.items():
        if case == "float down" and "down" in name:
            continue
        other = ("down" in name and case == "mixed") or (".3." in name and case == "mixed experts")
        fmt = "w5zg16" if other else "w4g32"
        x = draw(rng, fmt, n, k)
        perm = rng.permutation(k).astype(np.int32) if case == "perm" else None
        made[name] = QuantTensor(x.fmt, x.codes, x.scale / 20, x.zero, perm)

    class Mixed(Safetensors):
        def __init__(self, source, config):
            super().__init__(source, config)
            for name, x in made.items():
                self.entries[name] = replace(self.entries[name], dtype=x.fmt.name, fmt=x.fmt)

        def read(self, name):
            return made[name] if name in made else super().read(name)

    module = "mimo_compile.frontend.huggingface.open_checkpoint"
    monkeypatch.setattr(module, lambda source: Mixed(source, read_json(source / "config.json")))
    if case == "float down":
        with pytest.raises(InputError, match=r"experts.*stored as float.*as w4g32.*one format"):
            load_checkpoint(folder, parse_scheme("none"))
        return
    decoder = load_checkpoint(folder, parse_scheme("none")).decoder
    experts = decoder.stage("layers.1").module.feed.experts
    assert experts.w == ("f32" if case == "perm" else "w5zg16")
    logits = decoder.prefill(tools.prompt(9))[1]
    real = {n: torch.from_numpy(x.dequantize()) for n, x in made.items()}
    made.clear()
    monkeypatch.setattr(Mixed, "read", lambda self, n: real.get(n, Safetensors.read(self, n)))
    expected = load_checkpoint(folder, parse_scheme("none")).decoder.prefill(tools.prompt(9))[1]
    assert float((logits - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
