"""Each word of the device headers, as nvcc compiles it for the architectures that have it."""

from __future__ import annotations

import re

import pytest
from cuda_text import kernel_of
from test_cuda_emulator import SYNC
from test_cuda_tensor import GROUP, MMA

from mimo_compile.errors import EnvironmentMismatch
from mimo_compile.ir.hardware import CUDA
from mimo_compile.schedules.cuda.code import Launch
from mimo_compile.schedules.cuda.nvcc import compile_device, find_compiler, ptx_of


def _has_nvcc() -> bool:
    try:
        find_compiler()
    except EnvironmentMismatch:
        return False
    return True


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not _has_nvcc(), reason="needs nvcc of CUDA 12 or later"),
]

WORDS = """
extern "C" __global__ void rest(const uint32_t* x, const void* p, uint32_t* y, int* whole, float* real) {
  y[0] = f16x2_add(x[0], x[1]), y[1] = f16x2_sub(x[0], x[1]), y[2] = f16x2_mul(x[0], x[1]);
  y[3] = bf16x2_fma(x[0], x[1], x[2]);
  y[4] = __float_as_uint(bf16_low(x[3])), y[5] = __float_as_uint(bf16_high(x[3]));
  y[6] = ld_global_nc(x), y[7] = load8(p).y, y[8] = load16(p).w;
  y[9] = ld_global_nc(static_cast<const int*>(p)), real[1] = ld_global_nc(static_cast<const float*>(p));
  y[10] = shfl_xor(x[4], 3), y[11] = shfl_xor(int(x[4]), 3), y[12] = shfl(int(x[5]), 2);
  warp_sync();
  device_fence();
  whole[0] = atomic_add(whole + 1, 3), y[13] = atomic_add(y + 14, 4u), real[0] = atomic_add(real + 2, 1.0f);
}
"""
WIDTHS = (8, 16, 32, 64, 96, 128, 192, 256)
KINDS = {"bf16": ("float", "bf16.bf16"), "f16": ("float", "f16.f16"), "i8": ("int", "s8.s8"),
         "e4m3": ("float", "e4m3.e4m3")}  # fmt: skip
PRODUCT = """
extern "C" __global__ void __launch_bounds__(128) product_{kind}_{n}({sum}* y) {{
  MIMO_SHARED(smem);
  const uint64_t a = wgmma_descriptor(smem), b = wgmma_descriptor(smem + 8192);
  {sum} acc[{n} / 2];
  for (int i = 0; i < {n} / 2; ++i) acc[i] = 0;
  wgmma_fence();
  wgmma_{kind}<{n}>(acc, a, b, 1);
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < {n} / 2; ++i) y[i * 128 + threadIdx.x] = acc[i];
}}
"""
HELD = """
extern "C" __global__ void __launch_bounds__(128) held_{n}(const uint32_t* x, float* y) {{
  MIMO_SHARED(smem);
  const uint64_t b = wgmma_descriptor_across(smem, 2048);
  uint32_t a[4];
  for (int i = 0; i < 4; ++i) a[i] = x[i * 128 + threadIdx.x];
  float acc[{n} / 2];
  wgmma_fence();
  wgmma_bf16_held<{n}>(acc, a, b, 0);
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_pin(acc);
  wgmma_pin(a);
  for (int i = 0; i < {n} / 2; ++i) y[i * 128 + threadIdx.x] = acc[i];
}}
"""


def compiled(text: str, arch: str, symbol: str) -> str:
    """Compile a text to machine code; returns its PTX."""
    kernel, hardware = (
        kernel_of(text, {}, {}, (Launch(symbol, (1, 1, 1), 32, ()),)),
        CUDA[f"cuda:{arch}"],
    )
    binary = compile_device(kernel, hardware)
    assert binary.cubin
    assert all(u.spill_bytes == 0 for u in binary.usage.values()), binary.usage
    # `multiply` can be told to do what spoils it, so that the compiler orders its products one by one
    assert not [w for w in binary.warnings if "C75" in w and "'multiply'" not in w], binary.warnings
    return ptx_of(kernel, hardware)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_words_of_every_architecture(arch: str) -> None:
    ptx = compiled(SYNC + MMA + WORDS, arch, "rest")
    for word in (
        "ex2.approx.ftz.f32", "cvt.rn.bf16x2.f32", "cvt.rn.f16x2.f32", "fma.rn.f16x2", "fma.rn.bf16x2",
        "lop3.b32", "prmt.b32", "dp4a", "ld.global.nc.v4", "cp.async.cg.shared.global",
        "cp.async.wait_group", "bar.sync", "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32",
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32",
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16", "ldmatrix.sync.aligned.m8n8.x2.shared.b16",
    ):  # fmt: skip
        assert word in ptx, word
    assert ("f32.e4m3.e4m3.f32" in ptx) == (arch == "sm_90a")


def test_words_of_hopper() -> None:
    products = [
        PRODUCT.format(kind=kind, n=n, sum=sum_)
        for kind, (sum_, _) in KINDS.items() for n in WIDTHS
    ]  # fmt: skip
    held = [HELD.format(n=n) for n in (64, 128, 192, 256)]
    ptx = compiled(GROUP + "".join(products + held), "sm_90a", "multiply")
    assert len(re.findall(r"m64n\d+k16\.f32\.bf16\.bf16 .*, p, 1, 1, 1;", ptx)) == len(held)
    for kind, (_, types) in KINDS.items():
        for n in WIDTHS:
            depth = 16 if kind in ("bf16", "f16") else 32
            sums = "s32" if kind == "i8" else "f32"
            assert f"wgmma.mma_async.sync.aligned.m64n{n}k{depth}.{sums}.{types}" in ptx, (kind, n)
    for word in (
        "cp.async.bulk.tensor.2d.shared::cluster.global", "mbarrier.try_wait.parity", "setmaxnreg.dec",
        "setmaxnreg.inc", "mbarrier.arrive.expect_tx", "fence.mbarrier_init", "wgmma.wait_group",
    ):  # fmt: skip
        assert word in ptx, word
