"""Programs of simulated machines, bit by bit: lookup tables, stored signs, bit planes, ROM and adapters."""

from __future__ import annotations

import hashlib
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.errors import UsageError
from mimo_compile.ir.hardware import PRESETS, SIMULATED, local_cpu, resolve_target
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.ir.simulated import LmmaConfig, RomaConfig
from mimo_compile.schedules import get_schedule, schedules_for
from mimo_compile.schedules.simulated import lmma, roma_units
from mimo_compile.schedules.simulated.base import quantize_rows

pytestmark = pytest.mark.compile

KS = [(k, sign) for k in (2, 4, 8) for sign in (0, k - 1)]
LUT, MMA, ROMA = "mpgemm.sim_lut_tensor_core", "mpgemm.sim_tensor_core", "mpgemm.sim_roma"


def case(text: str, seed: int = 0):
    """Return a workload with inputs, reference and bound."""
    workload = parse_workload(text)
    op = get_op("mpgemm")
    inputs = op.make_inputs(workload, np.random.default_rng(seed))
    expected = op.reference(workload, inputs)
    return workload, inputs, expected["y"], op.bound(workload, inputs, expected)["y"]


# -- LMMA --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "sign"), KS)
def test_half_of_the_table_gives_every_entry(k: int, sign: int) -> None:
    a = np.random.default_rng(k).integers(-127, 128, (3, 4 * k))
    whole, half = lmma.full_tables(a, k), lmma.half_tables(a, k, sign)
    assert half.shape[-1] == whole.shape[-1] // 2 == 1 << (k - 1)
    assert np.array_equal(whole, -whole[..., ::-1])  # odd: the complement's entry is the negative
    assert np.array_equal(lmma.grown_tables(a, k, sign), half)
    index = np.arange(1 << k)
    stored = lmma.encode(index, k, sign)
    address, negate = stored & ((1 << (k - 1)) - 1), stored >> (k - 1)
    found = np.where(negate == 1, -half[..., address], half[..., address])
    assert np.array_equal(found, whole)


@pytest.mark.parametrize(("k", "sign"), KS)
def test_stored_negation_comes_back(k: int, sign: int) -> None:
    index = np.arange(1 << k, dtype=np.uint8)
    stored = lmma.encode(index, k, sign)
    assert sorted(stored) == list(index)  # nothing is lost
    assert np.array_equal(lmma.decode(stored, k, sign), index)
    complement = lmma.encode(~index & ((1 << k) - 1), k, sign)
    assert np.array_equal(complement, stored ^ (1 << (k - 1)))  # only the sign differs


@settings(max_examples=60)
@given(
    st.integers(1, 4), st.integers(0, 40), st.fractions(min_value=0, max_value=4),
    st.integers(-20, 20).map(lambda z: Fraction(z, 2)),
)  # fmt: skip
def test_reinterpretation_is_exact(bits: int, q: int, s: Fraction, z: Fraction) -> None:
    q %= 1 << bits
    odd, zero = lmma.reinterpret(np.array([[q]]), np.float32(z), bits)
    assert odd[0, 0] % 2 == 1 and abs(odd[0, 0]) < 1 << bits
    assert 2 * s * (q - z) == s * (int(odd[0, 0]) - Fraction(float(zero)))


@settings(max_examples=40)
@given(
    st.integers(1, 4), st.sampled_from(KS), st.integers(1, 5), st.integers(1, 9), st.integers(1, 6),
    st.sampled_from([np.int16, np.float16]), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_bit_serial_is_the_integer_dot_product(bits, ks, m, n, groups, kind, seed) -> None:
    (k, sign), rng = ks, np.random.default_rng(seed)
    a = rng.integers(-127, 128, (m, groups * k))
    codes = rng.integers(0, 1 << bits, (n, groups * k)).astype(np.uint8)
    tables = lmma.half_tables(a, k, sign).astype(kind)
    stored = lmma.encode(lmma.index_planes(codes, bits, k), k, sign)
    acc = np.zeros((m, n), np.int32 if kind == np.int16 else np.float32)
    lmma.lmma(tables, stored, acc, k)
    odd, _ = lmma.reinterpret(codes, np.float32(0), bits)
    assert np.array_equal(acc.astype(np.int64), a @ odd.T)


@settings(max_examples=60)
@given(
    st.sampled_from(KS), st.integers(1, 40), st.integers(1, 8), st.integers(0, 2**32 - 1),
    st.sampled_from([0, 1, 127]),
)  # fmt: skip
def test_int8_tables_never_hold_minus_128(ks, groups, per_scale, seed, largest) -> None:
    (k, sign), rng = ks, np.random.default_rng(seed)
    a = rng.integers(-largest, largest + 1, (2, groups * k))
    exact = lmma.half_tables(a, k, sign)
    codes, scale = lmma.quantize_tables(exact, per_scale)
    assert codes.dtype == np.int8 and codes.min() >= -127
    step = np.repeat(scale, per_scale, axis=1)[:, :groups, None].astype(np.float64)
    assert np.all(np.abs(codes * step - exact) <= step / 2 * (1 + 1e-5))
    assert np.all(codes[np.broadcast_to(step == 0, codes.shape)] == 0)


def test_accumulators_have_their_width() -> None:
    tables = np.full((1, 1, 8), 32767, np.int16)
    stored = np.zeros((4, 1, 1), np.uint8)
    acc = np.full((1, 1), lmma.INT32_MAX - 100, np.int32)
    with pytest.raises(OverflowError, match="accumulator"):
        lmma.lmma(tables, stored, acc, 4)
    acc = np.full((1, 1), lmma.FP32_EXACT - 1, np.float32)
    with pytest.raises(OverflowError, match="past 16777216"):
        lmma.lmma(np.ones((1, 1, 8), np.float16), stored, acc, 4)


# -- programs ----------------------------------------------------------------------------------

FORMATS = ("w1", "w2", "w3g32", "w2g16", "w4g128", "w2z", "w4zgrow", "w1.58", "w1.58d", "w4gtensor")


def programs(workload, hardware, count: int, seed: int):
    """Yield the default and random configs, ``count`` in all, of each schedule there is."""
    rng = np.random.default_rng(seed)
    for schedule in schedules_for(workload, hardware):
        space = schedule.space(workload, hardware)
        assert space.legal(space.default)
        found = [space.default]
        while len(found) < count:
            knobs = {k: v[rng.integers(len(v))] for k, v in space.knobs.items()}
            config = space.make(**knobs)
            if space.legal(config):
                found.append(config)
        yield from ((schedule, config) for config in found)


@pytest.mark.parametrize("w", FORMATS)
@pytest.mark.parametrize("target", ["sim:lut-tensor-core", "sim:lut-tensor-core-8x", "sim:roma"])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 70, 128), (5, 130, 300)])
def test_every_program_computes_the_op(w: str, target: str, m: int, n: int, k: int) -> None:
    hardware = resolve_target(target)
    workload, inputs, expected, bound = case(f"mpgemm:m={m},n={n},k={k},w={w},a=a8,bias=1")
    for schedule, config in programs(workload, hardware, 6, seed=m):
        assert schedule.config_from_json(schedule.config_to_json(config)) == config
        got = schedule.simulate(workload, config, inputs)["y"]
        slack = schedule.slack(workload, config, inputs)
        assert bool(slack) == (getattr(config, "table", "") == "i8")
        assert np.all(np.abs(got - expected) <= bound + slack.get("y", 0.0)), config


ADVERSARIAL = {
    "all largest": lambda x, c: (np.full_like(x, 3.0), np.full_like(c, c.max())),
    "all smallest": lambda x, c: (np.full_like(x, -3.0), np.zeros_like(c)),
    "alternating": lambda x, c: (x * np.where(np.arange(x.shape[1]) % 2, -1, 1), c),
    "one outlier": lambda x, c: (np.where(np.arange(x.shape[1]) == 7, 1e4, x), c),
    "a zero row": lambda x, c: (x * (np.arange(len(x))[:, None] > 0), c),
    "a zero group": lambda x, c: (x * (np.arange(x.shape[1]) >= 64), c),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
@pytest.mark.parametrize("target", ["sim:lut-tensor-core-4x", "sim:roma"])
def test_adversarial_inputs(name: str, target: str) -> None:
    hardware, op = resolve_target(target), get_op("mpgemm")
    workload, inputs, _, _ = case("mpgemm:m=3,n=65,k=256,w=w2g64,a=a8")
    x, codes = ADVERSARIAL[name](inputs["x"], inputs["codes"])
    inputs |= {"x": x.astype(np.float32), "codes": codes}
    expected = op.reference(workload, inputs)
    bound = op.bound(workload, inputs, expected)["y"]
    for schedule, config in programs(workload, hardware, 8, seed=1):
        got = schedule.simulate(workload, config, inputs)["y"]
        slack = schedule.slack(workload, config, inputs).get("y", 0.0)
        assert np.all(np.abs(got - expected["y"]) <= bound + slack), config


def test_wide_sums_stay_exact() -> None:
    workload, inputs, expected, bound = case("mpgemm:m=2,n=16,k=14336,w=w4g128,a=a8")
    for target in ("sim:lut-tensor-core", "sim:roma"):
        for schedule, config in programs(workload, SIMULATED[target], 1, seed=0):
            got = schedule.simulate(workload, config, inputs)["y"]
            assert np.all(np.abs(got - expected) <= bound)
    rows = parse_workload("mpgemm:m=2,n=16,k=14336,w=w4grow,a=a8")
    legal = get_schedule(LUT).space(rows, SIMULATED["sim:lut-tensor-core-8x"]).legal
    # 127 * 14336 * 15 does not fit float32's exact integers, int32 it does
    assert not legal(LmmaConfig(scale=8)) and legal(LmmaConfig(scale=8, table="i8"))


def test_where_and_how_tables_are_made_changes_no_bit() -> None:
    workload, inputs, _, _ = case("mpgemm:m=5,n=200,k=256,w=w3,a=a8")
    schedule = get_schedule(LUT)
    base = schedule.simulate(workload, LmmaConfig(), inputs)["y"]
    for config in (
        LmmaConfig(precompute="split"), LmmaConfig(sign="high"), LmmaConfig(tile_m=2, tile_n=64),
        LmmaConfig(shape="8x16x4", tile_k=32), LmmaConfig(shape="2x32x8"), LmmaConfig(scale=8),
    ):  # fmt: skip
        assert np.array_equal(schedule.simulate(workload, config, inputs)["y"], base), config
    fused, split = (LmmaConfig(table="i8", precompute=p) for p in ("fused", "split"))
    got = [schedule.simulate(workload, c, inputs)["y"] for c in (fused, split)]
    assert np.array_equal(*got) and not np.array_equal(got[0], base)


def test_rows_are_quantised_as_the_op_says() -> None:
    import torch

    from mimo_compile.ir.ops import numerics

    x = np.random.default_rng(0).standard_normal((9, 257)).astype(np.float32)
    x[3] = 0
    codes, scale = quantize_rows(x)
    theirs, their_scale = numerics.quantize_rows(torch.from_numpy(x))
    assert np.array_equal(codes, theirs.numpy()) and np.array_equal(scale, their_scale.numpy())


# -- what there is for whom --------------------------------------------------------------------


def test_only_simulated_targets_have_these_schedules() -> None:
    workload = parse_workload("mpgemm:m=1,n=64,k=64,w=w2g64,a=a8")
    for hardware in (local_cpu(), *PRESETS.values()):
        assert not any(".sim_" in s.name for s in schedules_for(workload, hardware))
    for hardware in SIMULATED.values():
        assert [s.name for s in schedules_for(workload, hardware)] in ([LUT, MMA], [ROMA])
        for text in ("w=w8,a=a8", "w=w2g64,a=a16", "w=bf16", "w=nf4,a=a8"):
            other = parse_workload(f"mpgemm:m=1,n=64,k=64,{text}")
            assert not schedules_for(other, hardware), text
        for schedule, config in programs(workload, hardware, 3, seed=0):
            with pytest.raises(UsageError, match="is simulated"):
                schedule.lower(workload, config, hardware)
            work = schedule.work(workload, config, hardware)
            assert work.bytes["dram"] > 0 and sum(work.ops.values()) > 0


def test_a_target_offers_its_own_knobs() -> None:
    workload = parse_workload("mpgemm:m=1,n=64,k=64,w=w2g64,a=a8")
    schedule = get_schedule(LUT)
    free = schedule.space(workload, SIMULATED["sim:lut-tensor-core"]).knobs
    assert (
        free["scale"] == (1, 2, 4, 8) and free["registers"] == (1, 2) and free["table"] == ("f16",)
    )
    fixed = schedule.space(workload, SIMULATED["sim:lut-tensor-core-4x"]).knobs
    assert (
        fixed["scale"] == (4,)
        and fixed["registers"] == (2,)
        and set(fixed["table"]) == {"f16", "i8"}
    )


# -- ROMA --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3, 16, 17])
def test_adapters_against_float64_and_three_fusions(rank: int) -> None:
    rng = np.random.default_rng(rank)
    x = rng.standard_normal((3, 256)).astype(np.float32)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((rank, 256), (300, rank)))
    want = 0.5 * (x.astype(np.float64) @ a.T.astype(np.float64)) @ b.T.astype(np.float64)
    size = 0.5 * (np.abs(x) @ np.abs(a).T) @ np.abs(b).T
    results = [roma_units.low_rank(x, a, b, 0.5, f, r) for f in (1, 2, 3) for r in (4, 16)]
    for got in results:
        assert np.all(np.abs(got - want) <= 1e-6 * size)
        assert np.linalg.norm(got - results[0]) <= 1e-6 * np.linalg.norm(want)


def test_base_weights_cannot_be_written() -> None:
    workload, inputs, _, _ = case("mpgemm:m=2,n=64,k=128,w=w2g64,a=a8")
    before = hashlib.sha256(inputs["codes"].tobytes()).hexdigest()
    first = get_schedule(ROMA).simulate(workload, RomaConfig(), inputs)["y"]
    again = get_schedule(ROMA).simulate(workload, RomaConfig(mapping="grid"), inputs)["y"]
    assert np.array_equal(first, again)  # integers: the order of partial sums does not matter
    assert hashlib.sha256(inputs["codes"].tobytes()).hexdigest() == before


def test_fp8_codes() -> None:
    values = roma_units.fp8_decode(np.arange(256))
    finite = values[np.isfinite(values)]
    assert len(finite) == 254 and finite.max() == 448 and finite.min() == -448
    assert np.array_equal(values[:127], -values[128:255]) and values[1] == 2.0**-9
    steps = np.diff(values[8:127]) / values[8:126]
    assert np.all(steps <= 2.0**-3)  # three bits of mantissa


@pytest.mark.parametrize("mapping", ["rows", "grid"])
def test_units_share_the_base_exactly(mapping: str) -> None:
    rng = np.random.default_rng(1)
    x, codes = rng.integers(-127, 128, (3, 200)), rng.integers(0, 16, (40, 200)).astype(np.uint8)
    sums = roma_units.base_product(x, codes, 64, mapping)
    assert sums.dtype == np.int32 and len(sums) == 4
    for g, got in enumerate(sums):
        part = slice(64 * g, 64 * (g + 1))
        assert np.array_equal(got, x[:, part] @ codes[:, part].astype(np.int64).T)
