"""Models of machines on paper: published figures, limits in closed form, monotony."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.cost_models.simulated import device_model, estimate, roma
from mimo_compile.cost_models.simulated import lut_tensor_core as lut_model
from mimo_compile.cost_models.simulated.lut_area import LookupArray, relative_density, shapes
from mimo_compile.cost_models.simulated.published import (
    BITNET_3B,
    DECODE,
    Figure,
    densest_shape,
    figures,
    model_ms,
)
from mimo_compile.ir.formats import parse_weight_format
from mimo_compile.ir.hardware import SIMULATED
from mimo_compile.ir.simulated import LmmaConfig, Matmul, MmaConfig, RomaConfig

ROOT = Path(__file__).resolve().parents[2]
FIGURES = figures()


def matmul(m: int, n: int, k: int, w: str = "w2grow") -> Matmul:
    return Matmul(m, n, k, parse_weight_format(w), "a8")


# -- published figures -------------------------------------------------------------------------


@pytest.mark.parametrize("figure", FIGURES, ids=lambda f: f"{f.machine}: {f.what}")
def test_published_figures_are_reproduced(figure: Figure) -> None:
    assert abs(figure.error) <= figure.tolerance


def test_tolerances_are_15_percent_but_for_three_that_the_page_explains() -> None:
    wider = {f.what: f.tolerance for f in FIGURES if f.tolerance != 0.15}
    assert len(wider) == 3 and max(wider.values()) <= 0.25
    fused = [f for f in FIGURES if f.what.startswith("tables fused")]
    assert all(abs(f.modelled - f.published) < 0.5 for f in fused)  # percentage points
    fitted = [f for f in FIGURES if f.how == "fitted"]
    assert len(fitted) == 3 and all(abs(f.error) < 0.01 for f in fitted)


def test_more_array_helps_and_registers_let_it() -> None:
    times = [model_ms(BITNET_3B, u, *DECODE) for u in ("fp16", "int8", "lut-4x", "lut-8x")]
    assert times == sorted(times, reverse=True)
    one = lut_model.lut(LmmaConfig(table="f16", scale=8, registers=1), 2)
    two = lut_model.lut(LmmaConfig(table="f16", scale=8, registers=2), 2)
    gpu, shape = lut_model.A100, (8192, 27648, 12288)
    assert lut_model.best_gemm_us(gpu, two, shape) < lut_model.best_gemm_us(gpu, one, shape)
    assert set(lut_model.tiles_of(gpu, one)) < set(lut_model.tiles_of(gpu, two))


def test_elongated_shape_is_the_densest() -> None:
    assert densest_shape() == (2, 64, 4)
    square = LookupArray(16, 8, 4)
    assert square.area > 1.05 * LookupArray(2, 64, 4).area
    assert all(m * n * k == 512 for m, n, k in shapes())
    assert relative_density(2, 64, 4, 16) == 1
    assert max(relative_density(*s, 16) for s in shapes()) == 1
    assert sum(square.gates().values()) == square.area


def test_rom_and_sram_capacity() -> None:
    assert roma.most_tokens(roma.LLAMA3_8B) == 3968
    assert roma.most_tokens(roma.LLAMA32_3B) > 4096
    assert roma.most_tokens(replace(roma.LLAMA3_8B, bits=4)) == 0
    assert roma.LLAMA32_3B.base_bytes / 2**30 == pytest.approx(1.50, abs=0.005)


def test_the_page_has_the_table_that_the_script_makes() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "simulated_targets.py")],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    page = (ROOT / "docs" / "simulated-targets.md").read_text()
    shown = re.search(r"<!-- figures: begin -->\n(.*?)<!-- figures: end -->", page, re.S)
    assert shown and shown[1].splitlines() == rows
    assert f"| {lut_model.A100.issue} |" in page and f"{roma.ROMA.rom_bytes:.0f} (" in page


# -- limits and monotony -----------------------------------------------------------------------


def test_gpu_in_the_limits() -> None:
    """Whatever is made infinitely fast, the rest remains in closed form."""
    shape, tile = (1024, 4096, 4096), (64, 128)
    fast = replace(
        lut_model.A100, l2_bytes_per_cycle=1e18, port_bytes_per_cycle=1e18, dram_bytes_per_s=1e30,
        smem_bytes_per_cycle=1e18, fill_cycles=0.0,
    )  # fmt: skip
    unit = lut_model.lut(LmmaConfig(table="i8", scale=4), 2)
    tiles = 16 * 32
    cycles = -(-tiles // fast.sms) * 4096 * 64 * 128 / (unit.macs * 4 * fast.issue)
    us, _ = lut_model.gemm_us(fast, unit, shape, tile)
    assert us == pytest.approx(cycles / fast.hz * 1e6, rel=1e-9)
    slow = replace(lut_model.A100, dram_bytes_per_s=1e6)
    moved = 1024 * 4096 * 2 + 4096 * 4096 / 4 + 1024 * 4096 * 4
    assert lut_model.gemm_us(slow, unit, shape, tile)[0] == pytest.approx(moved, rel=1e-9)


def test_lookups_are_bit_serial() -> None:
    four = lut_model.lut(LmmaConfig(scale=4), 4)
    assert lut_model.lut(LmmaConfig(scale=4), 1).macs == 4 * four.macs
    assert lut_model.lut(LmmaConfig(scale=1), 2).macs == lut_model.FP16.macs
    other = lut_model.lut(LmmaConfig(shape="16x8x4"), 2)
    assert other.macs < lut_model.FP16.macs  # as much area, less dense


_gpu = {
    "hz": 1.41e9, "dram_bytes_per_s": 1.555e12, "l2_bytes_per_cycle": 5120.0,
    "smem_bytes_per_cycle": 128.0, "issue": 0.573, "alu_lanes": 64.0,
}  # fmt: skip


@settings(max_examples=40)
@given(
    st.sampled_from(sorted(_gpu)), st.floats(1.05, 4.0), st.integers(1, 600), st.integers(64, 4000),
    st.sampled_from(["w1grow", "w2g64", "w4grow"]), st.sampled_from(["fused", "split"]),
    st.sampled_from(["f16", "i8"]),
)  # fmt: skip
def test_gpu_is_monotone(
    name: str, factor: float, m: int, n: int, w: str, precompute: str, table: str
) -> None:
    config = LmmaConfig(precompute=precompute, table=table, scale=4)
    problem = matmul(m, n, 2048, w)
    before, _ = lut_model.kernel(problem, config)
    faster = replace(lut_model.A100, **{name: _gpu[name] * factor})
    assert lut_model.kernel(problem, config, faster)[0] <= before * (1 + 1e-12)
    assert lut_model.kernel(matmul(m, n, 4096, w), config)[0] > before


def test_roma_in_the_limits() -> None:
    model = replace(roma.LLAMA3_8B, rank=0)
    free = replace(roma.ROMA, rom_bytes=1e30, sram_bytes=1e30, h_macs=1e30, fill_cycles=0.0)
    weights = model.layers * model.layer_weights + model.vocabulary * model.hidden
    assert roma.pass_cycles(model, 1, 0, free) == pytest.approx(weights / 256 / free.l_macs)
    bound = replace(free, rom_bytes=1.0, l_macs=1e30)
    assert roma.pass_cycles(model, 1, 0, bound) == pytest.approx(weights / 4 / 256)
    idle = replace(free, l_macs=1e30, fill_cycles=33.0)
    assert roma.pass_cycles(model, 1, 0, idle) == pytest.approx(33 * (5 * 32 + 1))


@settings(max_examples=40)
@given(
    st.sampled_from(["hz", "rom_bytes", "l_macs", "sram_bytes", "h_macs"]), st.floats(1.05, 4.0),
    st.integers(1, 64), st.integers(64, 8000), st.sampled_from([1, 2, 3]),
    st.sampled_from(["rows", "grid"]),
)  # fmt: skip
def test_roma_is_monotone(
    name: str, factor: float, m: int, n: int, fusion: int, mapping: str
) -> None:
    config = RomaConfig(fusion=fusion, mapping=mapping)
    problem = replace(matmul(m, n, 4096), rank=16, adapters=3, parts=(n,))
    faster = replace(roma.ROMA, **{name: getattr(roma.ROMA, name) * factor})
    assert roma.kernel(problem, config, faster)[0] <= roma.kernel(problem, config)[0] * (1 + 1e-12)
    model = roma.LLAMA3_8B
    assert roma.pass_cycles(model, m, n, faster) / faster.hz <= (
        roma.pass_cycles(model, m, n) / roma.ROMA.hz * (1 + 1e-12)
    )


def test_adapters_hide_beside_the_base_or_do_not() -> None:
    alone = matmul(1, 4096, 4096)
    with_adapter = replace(alone, rank=16, parts=(4096,))
    times = {f: estimate(with_adapter, RomaConfig(f)).latency_us for f in (1, 2, 3)}
    base = estimate(alone, RomaConfig()).latency_us
    assert {estimate(alone, RomaConfig(f)).latency_us for f in (1, 2, 3)} == {base}
    assert base < times[3] < times[1] < times[2]  # each unit making all of t costs most
    assert times[3] < 1.10 * base
    padded = estimate(with_adapter, RomaConfig(3, r_tile=32)).latency_us
    assert padded >= times[3]
    stacked = replace(with_adapter, parts=(2048, 2048))  # two adapters' ranks above each other
    assert estimate(stacked, RomaConfig(3)).latency_us > times[3]


def test_lookups_against_unpacking_by_bits_and_array() -> None:
    """At four bits a 4x array does as many multiply-adds as int8 units, at one bit four times as many."""
    tiles = list(itertools.product((16, 32, 128), (128, 256, 512), (64, 256)))

    def best(w: str, scale: int) -> float:
        problem = matmul(1024, 4096, 4096, w)
        lut = [
            LmmaConfig(table="i8", scale=scale, registers=2, tile_m=a, tile_n=b, tile_k=c)
            for a, b, c in tiles
        ]
        configs = lut if scale else [MmaConfig(*t) for t in tiles]
        return min(estimate(problem, c).latency_us for c in configs if c.fits(4))

    assert best("w4grow", 1) > 2 * best("w4grow", 0)
    assert best("w4grow", 4) == pytest.approx(best("w4grow", 0), rel=0.15)
    assert best("w1grow", 4) < best("w1grow", 0) / 2


def test_a_device_model_for_each_target() -> None:
    for hardware in SIMULATED.values():
        device = device_model(hardware)
        assert device.bandwidth("dram", hardware.threads) > 1e12
        assert not device.measured
    with pytest.raises(TypeError, match="no program"):
        estimate(matmul(1, 64, 64), "config")
