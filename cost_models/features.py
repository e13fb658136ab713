"""Numbers that describe a candidate to a learned model; no profiler and no machine code is needed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from mimo_compile.cost_models.analytic import DeviceModel
from mimo_compile.ir.counts import LEVELS, OP_KINDS, Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.workload import Workload

Features = dict[str, float]
"""By name. Names with ``=`` are yes/no marks (absent: 0); other absent names are missing values."""

_ISA = ("avx2", "avx512f", "avx512vnni", "avx512vbmi", "avx512bf16", "amx-int8", "amx-bf16")


def extract(
    workload: Workload,
    hardware: Hardware,
    counts: Counts,
    schedule: str,
    knobs: Mapping[str, int | float | str | bool],
    device: DeviceModel,
) -> Features:
    """Return the features of a candidate.

    Args:
        workload: What it computes; numeric parameters enter as logarithms, the others as marks.
        hardware: Where it runs.
        counts: What its kernel declares.
        schedule: Its algorithm.
        knobs: Its config as plain values.
        device: Rates for the analytic prediction, itself a feature.
    """
    out: Features = {f"schedule={schedule}": 1.0, f"op={workload.op}": 1.0}
    for kind in OP_KINDS:
        out[f"ops.{kind}"] = math.log1p(counts.ops.get(kind, 0.0))
    for level in LEVELS:
        out[f"bytes.{level}"] = math.log1p(counts.bytes.get(level, 0.0))
    for trait, amount in counts.traits.items():  # absent where a kernel states none
        out[f"trait.{trait}"] = math.log2(amount) if amount > 0 else 0.0
    moved = max(counts.bytes.get("dram", 0.0), 1.0)
    out["intensity"] = math.log1p(counts.flops / moved)
    out["reuse"] = math.log1p(max(counts.bytes.values(), default=0.0) / moved)
    out["analytic"] = math.log(device.latency_us(counts, hardware))
    for name, value in workload.params:
        out.update(_value(f"w.{name}", value))
    for name, value in knobs.items():
        out.update(_value(f"{schedule}.{name}", value))
    out["threads"] = float(hardware.threads)
    for size in ("l1d_bytes", "l2_bytes", "l3_bytes"):
        out[size] = math.log2(getattr(hardware, size))
        out[f"fit.{size}"] = math.log(moved / getattr(hardware, size))
        if tile := counts.traits.get("tile_bytes"):
            out[f"tile.{size}"] = math.log(tile / getattr(hardware, size))
    out.update({f"isa={f}": 1.0 for f in _ISA if f in hardware.features})
    if any(not math.isfinite(v) for v in out.values()):
        bad = sorted(k for k, v in out.items() if not math.isfinite(v))
        raise ValueError(f"features {bad} of {workload} are not finite")
    return out


def _value(name: str, value: int | float | str | bool) -> Features:
    if isinstance(value, str):
        return {f"{name}={value}": 1.0}
    if isinstance(value, bool) or value < 0:
        return {name: float(value)}
    return {name: math.log2(1.0 + float(value))}


def columns_of(rows: Iterable[Features]) -> tuple[str, ...]:
    """Return the sorted union of feature names."""
    return tuple(sorted({name for row in rows for name in row}))


def matrix(rows: Sequence[Features], columns: Sequence[str]) -> npt.NDArray[np.float32]:
    """Return ``[rows, columns]`` float32; unknown names are dropped, missing values are NaN."""
    out = np.empty((len(rows), len(columns)), np.float32)
    for i, row in enumerate(rows):
        out[i] = [row.get(c, 0.0 if "=" in c else math.nan) for c in columns]
    return out
