"""Published figures of simulated machines beside what the models give: how far to trust them.

Each figure says how it came about: ``fitted`` ones set a constant or settled how a stage was read,
``predicted`` ones were compared afterwards. Tolerances are 15 % but for three figures, which say why.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from mimo_compile.cost_models.simulated import lut_tensor_core as gpu_model
from mimo_compile.cost_models.simulated import roma
from mimo_compile.cost_models.simulated.lut_area import LookupArray, dot_product_ratio, shapes
from mimo_compile.cost_models.simulated.lut_tensor_core import A100, FP16, INT8, Gpu, Unit, lut
from mimo_compile.ir.simulated import LmmaConfig


@dataclass(frozen=True, slots=True)
class Figure:
    """One published number and its model's."""

    machine: str
    what: str
    unit: str
    published: float
    modelled: float
    how: str
    """``fitted`` or ``predicted``."""
    tolerance: float = 0.15
    """Relative deviation up to which the model is taken to reproduce the figure."""

    @property
    def error(self) -> float:
        """Relative deviation of the model."""
        return self.modelled / self.published - 1


@dataclass(frozen=True, slots=True)
class Decoder:
    """A decoder layer on a GPU: its matrices, and what else passes over memory."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    matrices: tuple[tuple[int, int], ...]
    """(N, K) of a layer's matmuls."""
    elementwise: float
    """fp16 values that norms, residuals, rotary embedding and activation read and write for a token."""

    @property
    def inputs(self) -> int:
        """Activations of a token that matmuls read."""
        return sum(k for _, k in self.matrices)


BITNET_3B = Decoder(
    26,
    3200,
    8640,
    32,
    ((9600, 3200), (3200, 3200), (17280, 3200), (3200, 8640)),
    12 * 3200 + 3 * 8640,
)
"""Gated FFN; gate and up are one matrix, so are query, key and value. Values: two fused add-and-norm of 4
hidden each, rotary embedding 4 hidden, gated activation 3 ffn."""
OPT_175B = Decoder(
    96, 12288, 49152, 96,
    ((36864, 12288), (12288, 12288), (49152, 12288), (12288, 49152)), 8 * 12288 + 2 * 49152,
)  # fmt: skip


def unit_of(name: str) -> Unit:
    """Return a way to multiply by its name in the published table; LUT units with the paper's int8 tables."""
    if name in ("fp16", "int8"):
        return {"fp16": FP16, "int8": INT8}[name]
    config = LmmaConfig(table="i8", scale=int(name[4:-1]), registers=2, tile_k=256)
    return lut(config, 2, out_bytes=2.0)


@cache
def layer_us(
    model: Decoder, unit: str, batch: int, sequence: int, gpu: Gpu = A100
) -> dict[str, float]:
    """Return microseconds of one layer by part, tables not counted.

    Attention is not fused (scores in fp16 are written, read and written by the softmax, and read) and
    runs on FP16 units; a sequence of one token has none. Of each kernel the best tile counts.
    """
    tokens = batch * sequence
    matmuls = sum(
        gpu_model.best_gemm_us(gpu, unit_of(unit), (tokens, n, k)) for n, k in model.matrices
    )
    memory = gpu.dram_bytes_per_s * 1e-6
    kernels = len(model.matrices) + 4
    attention = 0.0
    if sequence > 1:
        scores = float(batch * model.heads * sequence * sequence)
        peak = FP16.macs * gpu.tensor_cores * gpu.sms * gpu.hz * gpu.issue * 1e-6
        product = scores * model.hidden / model.heads / peak
        moved = 2 * scores / memory
        attention = 2 * max(product, moved) + 2 * moved
        kernels += 3
    return {
        "matmuls": matmuls,
        "elementwise": 2 * tokens * model.elementwise / memory,
        "attention": attention,
        "launches": kernels * gpu.launch_us,
    }


def model_ms(model: Decoder, unit: str, batch: int, sequence: int, gpu: Gpu = A100) -> float:
    """Return milliseconds of all layers (embedding and head not counted)."""
    return model.layers * sum(layer_us(model, unit, batch, sequence, gpu).values()) / 1e3


def table_share(precompute: str, batch: int, sequence: int, gpu: Gpu = A100) -> float:
    """Return the time for tables as a share of the rest: a layer of OPT-175B, 8x units, int8 tables."""
    config = LmmaConfig(table="i8", precompute=precompute, scale=8, registers=2)
    rest = sum(layer_us(OPT_175B, "lut-8x", batch, sequence, gpu).values())
    tables = sum(
        gpu_model.tables_us(gpu, config, float(batch * sequence * k)) for _, k in OPT_175B.matrices
    )
    return tables / rest


PREFILL, DECODE = (1, 2048), (1024, 1)
_TIMES = {
    "fp16": (106.71, 41.15), "int8": (67.06, 21.70), "lut-4x": (42.49, 11.41), "lut-8x": (38.02, 7.47),
}  # fmt: skip


def lut_tensor_core() -> Iterator[Figure]:
    """Yield the figures of LUT Tensor Core (ISCA 2025)."""
    name = "lut-tensor-core"
    for unit, times in _TIMES.items():
        for (batch, sequence), published in zip((PREFILL, DECODE), times, strict=True):
            modelled = model_ms(BITNET_3B, unit, batch, sequence)
            how = "fitted" if (unit, batch) == ("fp16", 1024) else "predicted"
            what = f"BitNet-3B W2A8, {unit}, batch {batch} x {sequence}"
            yield Figure(name, what, "ms", published, modelled, how)
    gain = model_ms(BITNET_3B, "fp16", *DECODE) / model_ms(BITNET_3B, "lut-8x", *DECODE)
    yield Figure(name, "lut-8x over fp16, batch 1024 x 1", "x", 5.51, gain, "predicted")
    for precompute, share in (("split", (16.47, 24.41)), ("fused", (2.62, 2.52))):
        for (batch, sequence), published in zip((PREFILL, DECODE), share, strict=True):
            modelled = 100 * table_share(precompute, batch, sequence)
            how = "fitted" if (precompute, batch) == ("split", 1) else "predicted"
            what = f"tables {precompute}, batch {batch} x {sequence}"
            tolerance = 0.15 if precompute == "split" else 0.20  # half a percentage point
            yield Figure(name, what, "%", published, modelled, how, tolerance)
    base = LookupArray(symmetric=False, precompute=True).area
    steps = (
        (
            "weights read as +-1 (8 entries)",
            1.317,
            LookupArray(negate_offline=False, precompute=True),
        ),
        ("and negation done offline", 1.351, LookupArray(precompute=True)),
        ("and tables made by software", 1.440, LookupArray()),
    )
    for what, published, array in steps:
        yield Figure(name, f"density: {what}", "x", published, base / array.area, "predicted")
    ratio = dot_product_ratio()
    what = "density: W1A16 dot product over FP16"
    yield Figure(name, what, "x", 61.55 / 3.39, ratio, "predicted", 0.25)


def densest_shape(table_bits: int = 16) -> tuple[int, int, int]:
    """Return the LMMA shape with the least area among those of 512 multiply-adds (published: 2, 64, 4)."""

    def area(shape: tuple[int, int, int]) -> float:
        m, n, k = shape
        return LookupArray(m, n, k, table_bits).area

    return min(sorted(shapes()), key=area)


def roma_figures() -> Iterator[Figure]:
    """Yield the figures of ROMA (arXiv 2503.12988): Llama-3-8B with two-bit base weights."""
    name, model = "roma", roma.LLAMA3_8B
    for past, published, how in ((0, 31.8, "fitted"), (1024, 24.6, "predicted")):
        modelled = roma.tokens_per_s(model, past) / 1e3
        yield Figure(name, f"decode, {past} tokens in KV", "Ktok/s", published, modelled, how)
    for tokens, published in ((256, 5.6), (4096, 140.2)):
        modelled = roma.first_token_ms(model, tokens)
        yield Figure(name, f"first token after {tokens}", "ms", published, modelled, "predicted")
    gib = model.base_bytes / 2**30
    yield Figure(name, "ROM for the 8B base at two bits", "GiB", 1.86, gib, "predicted")


def figures() -> list[Figure]:
    """Return all figures of all machines."""
    return [*lut_tensor_core(), *roma_figures()]
