"""Matmuls on matrix tiles: proved with tiles made of plain loops, and the instructions by their assembly."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from harness import check, sample_config
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile._tvm import as_aligned, empty_aligned, from_numpy, load_object
from mimo_compile.bench.roof import tile_kernel
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.formats import parse_weight_format
from mimo_compile.ir.hardware import PRESETS, local_cpu
from mimo_compile.ir.ops import parse_workload
from mimo_compile.schedules import get_schedule
from mimo_compile.schedules.base import Kernel
from mimo_compile.schedules.compile import assembly, compile_kernel
from mimo_compile.schedules.emit.amx import AmxTiles
from mimo_compile.schedules.emit.build import Register, T, load, loop, store, workspace
from mimo_compile.schedules.mpgemm.x86_amx import X86Amx
from mimo_compile.schedules.mpgemm.x86_amx_bf16 import X86AmxBf16

SPR = next(h for h in PRESETS.values() if "amx-int8" in h.features)
FORMATS = (
    "w1",
    "w2g64",
    "w4g64",
    "w4g32",
    "w4zg128",
    "w8",
    "w8g64",
    "w1.58",
    "w1.58g64",
    "w2zgrow",
)


class PlainTiles:
    """`Tiles` in memory, as the architecture's manual describes the instructions."""

    def begin(self, shapes):
        self.shapes = list(shapes)
        count = len(self.shapes)
        self.kinds = {
            "int32": workspace((count, 16, 16), "int32"),
            "int8": workspace((count, 16, 64), "int8"),
            "uint8": workspace((count, 16, 64), "uint8"),
            "float32": workspace((count, 16, 16), "float32"),
            "int16": workspace((count, 16, 32), "int16"),
            "uint16": workspace((count, 16, 32), "uint16"),
        }

    def _rows(self, tile, row):
        buffer, _ = row(0)
        rows, width = self.shapes[tile]
        return (
            self.kinds[str(buffer.dtype)],
            rows,
            width // np.dtype(str(buffer.dtype)).itemsize,
        )

    def zero(self, tile):
        with loop(16) as i, loop(16) as j:
            store(self.kinds["int32"], T.int32(0), tile, i, j)

    def load(self, tile, row, stride):
        register, rows, columns = self._rows(tile, row)
        with loop(rows) as i, loop(columns) as j:
            buffer, (*outer, first) = row(i)
            store(register, load(buffer, *outer, first + j), tile, i, j)

    def store(self, tile, row, stride):
        register, rows, columns = self._rows(tile, row)
        with loop(rows) as i, loop(columns) as j:
            buffer, (*outer, first) = row(i)
            store(buffer, load(register, tile, i, j), *outer, first + j)

    def dot(self, sums, a, b, *, signed):
        rows, depth = self.shapes[a]
        assert self.shapes[b] == (depth // 4, 64) and self.shapes[sums] == (rows, 64)
        total = Register("int32", 1)
        with loop(rows) as i, loop(16) as n:
            total.set(load(self.kinds["int32"], sums, i, n))
            with loop(depth // 4) as q, loop(4) as k:
                left = T.cast(load(self.kinds["int8"], a, i, q * 4 + k), "int32")
                weights = self.kinds["int8" if signed else "uint8"]
                right = T.cast(load(weights, b, q, n * 4 + k), "int32")
                total.set(total.get() + left * right)
            store(self.kinds["int32"], total.get(), sums, i, n)

    def zero_f32(self, tile):
        with loop(16) as i, loop(16) as j:
            store(self.kinds["float32"], T.float32(0), tile, i, j)

    def dot_bf16(self, sums, a, b):
        rows, depth = self.shapes[a]
        assert self.shapes[b] == (depth // 4, 64) and self.shapes[sums] == (rows, 64)
        total = Register("float32", 1)

        def number(kind, *at):
            bits = T.bitwise_and(T.cast(load(self.kinds[kind], *at), "int32"), T.int32(0xFFFF))
            return T.reinterpret("float32", T.shift_left(bits, T.int32(16)))

        with loop(rows) as i, loop(16) as n:
            total.set(load(self.kinds["float32"], sums, i, n))
            with loop(depth // 4) as p, loop(2) as k:
                product = number("int16", a, i, 2 * p + k) * number("uint16", b, p, 2 * n + k)
                total.set(total.get() + product)
            store(self.kinds["float32"], total.get(), sums, i, n)

    def end(self):
        pass


class OnPlainTiles(X86Amx):
    """The schedule on tiles that every CPU has."""

    name = "mpgemm.x86_amx_plain"
    tiles_class = PlainTiles

    def supports(self, workload, hardware):
        with_tiles = dataclasses.replace(hardware, features=SPR.features)
        return type(self).__base__.supports(self, workload, with_tiles)

    def lower(self, workload, config, hardware) -> Kernel:
        kernel = type(self).__base__.lower(self, workload, config, hardware)
        return dataclasses.replace(kernel, features=frozenset())


class FloatsOnPlainTiles(X86AmxBf16):
    """bfloat16 on tiles that every CPU has."""

    name = "mpgemm.x86_amx_bf16_plain"
    tiles_class = PlainTiles
    supports = OnPlainTiles.supports
    lower = OnPlainTiles.lower


@settings(max_examples=6)
@given(data=st.data())
def test_bfloat16_of_any_shape_and_config(data):
    m, n, k = (
        data.draw(st.integers(8, 50)),
        data.draw(st.integers(1, 90)),
        data.draw(st.integers(1, 200)),
    )
    bias = data.draw(st.sampled_from(("", ",bias=1")))
    workload = parse_workload(f"mpgemm:m={m},n={n},k={k},w=bf16,a=abf16{bias}")
    seed = data.draw(st.integers(0, 99))
    schedule = FloatsOnPlainTiles()
    check(schedule, workload, sample_config(schedule, workload, local_cpu(), seed), seed)


def test_the_bfloat16_instructions():
    schedule = get_schedule("mpgemm.x86_amx_bf16")
    workload = parse_workload("mpgemm:m=64,n=64,k=512,w=bf16,a=abf16")
    kernel = schedule.lower(workload, schedule.space(workload, SPR).default, SPR)
    text = assembly([kernel], SPR)
    products = len(re.findall(r"\btdpbf16ps\b", text))
    # 2 x 2 tiles for two loads of each side
    assert products and products % 4 == 0 and products == len(re.findall(r"\btileloadd\b", text))
    for instruction in ("ldtilecfg", "tilerelease", "tilezero", "tilestored"):
        assert re.search(rf"\b{instruction}\b", text), instruction
    assert "amx-bf16" in kernel.features
    spr = dataclasses.replace(SPR, features=SPR.features - {"amx-bf16"})
    assert schedule.supports(workload, SPR) and not schedule.supports(workload, spr)


@settings(max_examples=6)
@given(data=st.data())
def test_any_shape_format_and_config(data):
    fmt = data.draw(st.sampled_from(FORMATS))
    m = data.draw(st.integers(8, 40))
    n = data.draw(st.integers(1, 100))
    k = data.draw(st.integers(1, 400))
    group = parse_weight_format(fmt).group
    if group > 0:
        k = max(group, k)
    bias = data.draw(st.sampled_from(("", ",bias=1")))
    workload = parse_workload(f"mpgemm:m={m},n={n},k={k},w={fmt},a=a8{bias}")
    schedule = OnPlainTiles()
    if not schedule.supports(workload, local_cpu()):
        return
    seed = data.draw(st.integers(0, 99))
    config = sample_config(schedule, workload, local_cpu(), seed)
    check(schedule, workload, config, seed)


@pytest.mark.parametrize("kind", ["tile_i8", "tile_bf16"])
def test_the_peak_of_tiles_is_only_products(kind):
    """Benchmarks say what share of it a kernel reaches: its loop must hold nothing else."""
    kernel = Kernel("roof_work", tile_kernel(2, kind, AmxTiles()), (), Counts())
    text = assembly([kernel], SPR)
    product = {"tile_i8": "tdpbssd", "tile_bf16": "tdpbf16ps"}[kind]
    start = text.index(product)
    loop_body = text[start : text.rindex(product)]
    count = len(re.findall(rf"\b{product}\b", text))
    assert count and count % 4 == 0
    assert not re.search(r"tileloadd|tilestored|tilezero|tilecfg", loop_body)
    plain = Kernel("roof_work", tile_kernel(2, kind, PlainTiles(), steps=3), (), Counts())
    run = load_object(compile_kernel(plain, local_cpu()))["roof_work"]
    one = {"tile_i8": (np.int8, np.int8, 1), "tile_bf16": (np.int16, np.uint16, 0x3F80)}[kind]
    left, right = (np.full((2, 2, 16, 64 // np.dtype(t).itemsize), one[2], t) for t in one[:2])
    y = empty_aligned((2, 4, 16, 16), np.int32 if kind == "tile_i8" else np.float32)
    run(*(from_numpy(a) for a in (as_aligned(left), as_aligned(right), y)))
    assert (y == 3 * left.shape[-1]).all()


@pytest.mark.parametrize("fmt", ["w1", "w2g64", "w4g32", "w4zg128", "w8", "w1.58"])
def test_every_format(fmt):
    check(OnPlainTiles(), f"mpgemm:m=36,n=34,k=640,w={fmt},a=a8")


@pytest.mark.parametrize("fmt", ["w8", "w8g64", "w4zg128"])
def test_extremes(fmt):
    workload = parse_workload(f"mpgemm:m=17,n=17,k=640,w={fmt},a=a8")
    low_high = np.array([0, parse_weight_format(fmt).max_code], np.uint8)
    for codes in (np.full((17, 640), low_high[1]), np.resize(low_high, (17, 640))):
        for x in (np.full((17, 640), -3, np.float32), np.eye(17, 640, dtype=np.float32)):
            check(OnPlainTiles(), workload, inputs={"x": x, "codes": codes})


def test_what_it_does_not_take():
    def takes(text):
        return X86Amx().supports(parse_workload(text), SPR)

    assert takes("mpgemm:m=64,n=64,k=256,w=w4g64,a=a8")
    assert not takes("mpgemm:m=64,n=64,k=256,w=w4g64")
    assert not takes("mpgemm:m=4,n=64,k=256,w=w4g64,a=a8")
    assert not takes("mpgemm:m=64,n=64,k=100,w=w4gtensor")
    spr = dataclasses.replace(SPR, features=SPR.features - {"amx-int8"})
    assert not X86Amx().supports(parse_workload("mpgemm:m=64,n=64,k=256,w=w4g64,a=a8"), spr)


@pytest.mark.parametrize("fmt", ["w4g64", "w2g32", "w8", "w4zg64"])
def test_the_instructions(fmt):
    """2 x 2 tiles: four products for two loads of each side, and each tile's shape in the configuration."""
    schedule = get_schedule("mpgemm.x86_amx")
    workload = parse_workload(f"mpgemm:m=64,n=64,k=512,w={fmt},a=a8")
    space = schedule.space(workload, SPR)
    kernel = schedule.lower(workload, space.default, SPR)
    text = assembly([kernel], SPR)
    product = "tdpbsud" if "z" in fmt else "tdpbssd"
    for instruction in ("ldtilecfg", "tilerelease", product, "tileloadd", "tilestored"):
        assert re.search(rf"\b{instruction}\b", text), instruction
    assert len(re.findall(rf"\b{product}\b", text)) % 4 == 0
    assert "amx-int8" in kernel.features
