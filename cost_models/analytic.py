"""Time and energy from counts alone: a roofline, and a sum over operations and bytes.

    time   = launch + max over units of (operations / peak), and over levels of (bytes / bandwidth)
    energy = P_idle * time + sum_op n_op * e_op + sum_level bytes_level * e_level

The energy coefficients are order-of-magnitude literature values for a 5-7 nm server CPU (arithmetic and
cache accesses after M. Horowitz, ISSCC 2014, scaled; DRAM at about 15 pJ/bit): good for ranking kernels by
where their energy goes, not for absolute joules. What they give is always marked *modelled*.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mimo_compile.cost_models import gpu
from mimo_compile.ir.counts import LEVELS, OP_KINDS, Counts
from mimo_compile.ir.hardware import Hardware

ENERGY_OP_PJ = {
    "fma_f32": 2.5, "add_f32": 1.0, "exp_f32": 25.0, "dot_i8": 0.4, "tile_i8": 0.2, "unpack_u8": 0.15,
    "shuffle_u8": 0.2, "int_op": 0.3, "dot_bf16": 1.3, "tile_bf16": 0.6,
}  # fmt: skip
"""Picojoules of one scalar operation, instruction overhead of a wide vector shared by its lanes."""
ENERGY_BYTE_PJ = {"dram": 120.0, "l3": 15.0, "l2": 8.0, "l1": 1.5}
"""Picojoules of one byte brought from a level."""
IDLE_W_PER_CORE = 4.0
"""Watts of a core and its share of the uncore while it runs, apart from the work itself."""
HBM_PJ = 40.0
"""Picojoules of one byte from the stacked memory of a GPU, an assumption: 4 pJ/bit there, and the way."""
IDLE_W_OF_GPU = 100.0
"""Watts of a GPU that computes nothing, an assumption."""

# Scalar operations per cycle and core for 512-bit vectors; halved for 256-bit ones.
_PER_CYCLE = {
    "fma_f32": 32.0, "add_f32": 32.0, "exp_f32": 2.0, "dot_i8": 128.0, "tile_i8": 1024.0, "unpack_u8": 64.0,
    "shuffle_u8": 64.0, "int_op": 32.0, "dot_bf16": 64.0, "tile_bf16": 512.0,
}  # fmt: skip
_IN_FLIGHT = 4.0
"""Accumulators below which kernels wait for their own sums: the latency of a multiply-add in cycles."""
_CALL_US = 0.5
"""Cost of one call on one thread."""
_GUESSED_HZ = 3.0e9
_FLOOR_HZ = 4.5e9


@dataclass(frozen=True, slots=True)
class DeviceModel:
    """Rates and energies of a machine. Rates: operations/s of one thread; bytes/s by level and threads."""

    ops_per_s: Mapping[str, float]
    bytes_per_s: Mapping[str, tuple[float, ...]]
    """For each level the bandwidth with 1, 2, ... threads together; the last entry holds for more."""
    launch_us: float = 2.0
    """Cost of one call with a parallel region."""
    idle_w: float = 8.0
    op_pj: Mapping[str, float] = field(default_factory=lambda: ENERGY_OP_PJ)
    byte_pj: Mapping[str, float] = field(default_factory=lambda: ENERGY_BYTE_PJ)
    measured: frozenset[str] = frozenset()
    """Which of the rates come from a calibration rather than from a guess."""

    @classmethod
    def guess(cls, hardware: Hardware) -> DeviceModel:
        """Return typical rates for hardware that was not calibrated, of GPUs published ones."""
        if hardware.gpu is not None:
            return cls(
                *gpu.rates_of(hardware),
                idle_w=IDLE_W_OF_GPU,
                byte_pj=ENERGY_BYTE_PJ | {"dram": HBM_PJ},
            )
        wide = 1.0 if hardware.has_avx512 else 0.5
        ops = {k: v * wide * _GUESSED_HZ for k, v in _PER_CYCLE.items()}
        if not hardware.has_vnni and "avxvnni" not in hardware.features:
            ops["dot_i8"] /= 3
        counts = range(1, hardware.cores + 1)
        socket = min(300e9, 20e9 * max(1, hardware.cores))
        levels = {
            "l1": tuple(150e9 * n for n in counts),
            "l2": tuple(60e9 * n for n in counts),
            "l3": tuple(30e9 * n for n in counts),
            "dram": tuple(min(socket, 15e9 * n) for n in counts),
        }
        return cls(ops, levels, idle_w=IDLE_W_PER_CORE * hardware.threads)

    def calibrated(self, rates: Mapping[str, Any]) -> DeviceModel:
        """Return a copy with measured rates: ``{"ops_per_s": {...}, "bytes_per_s": {level: [...]}}``."""
        ops = {k: float(v) for k, v in rates.get("ops_per_s", {}).items() if k in OP_KINDS}
        levels = {
            k: tuple(float(x) for x in v)
            for k, v in rates.get("bytes_per_s", {}).items()
            if k in LEVELS and v
        }
        measured = frozenset({*ops, *levels})
        if {"l2", "dram"} <= set(levels) and "l3" not in levels:  # between its neighbours
            pairs = zip(levels["l2"], levels["dram"], strict=False)
            levels["l3"] = tuple((near * far) ** 0.5 for near, far in pairs)
        scale = ops.get("fma_f32", 0.0) / self.ops_per_s["fma_f32"] if "fma_f32" in ops else 1.0
        scaled = {k: v * scale for k, v in self.ops_per_s.items()}
        return replace(
            self,
            ops_per_s={**scaled, **ops},
            bytes_per_s={**self.bytes_per_s, **levels},
            measured=measured,
        )

    def bandwidth(self, level: str, threads: int) -> float:
        """Return bytes/s that ``threads`` threads read from a level together."""
        steps = self.bytes_per_s[level]
        return steps[min(max(threads, 1), len(steps)) - 1]

    def latency_us(self, counts: Counts, hardware: Hardware) -> float:
        """Predict microseconds of one call with data in memory.

        Counts without traits are taken as spread evenly over all threads, by vectors that keep the
        units busy; traits say by how much a kernel falls short of that.
        """
        if counts.parts:
            return sum(self.latency_us(p, hardware) for p in counts.parts)
        units = self.units_us(counts, hardware)
        return units.pop("launch") + max(units.values())

    def units_us(self, counts: Counts, hardware: Hardware) -> dict[str, float]:
        """Return microseconds by what takes them: ``compute``, each memory level, and ``launch``.

        All but ``launch`` run at the same time.
        """
        threads, traits = hardware.threads, counts.traits
        active = min(threads, int(traits.get("tasks", threads)))
        share = max(traits.get("share", 1 / threads), 1 / threads)
        native = 16.0 if hardware.has_avx512 else 8.0
        narrow = max(1.0, native / traits.get("lanes", native))
        waiting = max(1.0, _IN_FLIGHT / traits.get("sums", _IN_FLIGHT))
        slow = dict.fromkeys(("fma_f32", "dot_i8", "dot_bf16"), waiting * narrow)
        times = [n / self.ops_per_s[k] * slow.get(k, narrow) * share for k, n in counts.ops.items()]
        # Operations of different kinds compete for the same vector ports: half of the rest adds up.
        compute = max(times, default=0.0) * 0.5 + sum(times) * 0.5
        out = {"compute": 1e6 * compute}
        for level, amount in counts.bytes.items():
            out[level] = 1e6 * amount / self.bandwidth(level, active) * share * active
        out["launch"] = self.launch_us if active > 1 or not traits else _CALL_US
        return out

    def energy_mj(self, counts: Counts, latency_us: float) -> float:
        """Model millijoules of one call that takes ``latency_us``."""
        work = sum(n * self.op_pj[k] for k, n in counts.ops.items())
        traffic = sum(b * self.byte_pj[lv] for lv, b in counts.bytes.items())
        return self.idle_w * latency_us * 1e-3 + (work + traffic) * 1e-9

    def floor_us(self, necessary: Counts, hardware: Hardware) -> float | None:
        """Return the least microseconds the necessary work can take, None before a calibration.

        Rates count at the calibrated or at a nominal 4.5 GHz value, whichever
        is faster, since a calibration beside other load comes out too slow. 8-bit dot products set no
        floor: table look-up avoids them, and matrix tiles beat the calibrated vector loop.
        """
        if not self.measured:
            return None
        threads = hardware.threads
        wide = 1.0 if hardware.has_avx512 else 0.5
        nominal = 128.0 * wide * _FLOOR_HZ * threads  # two vector loads in each cycle
        fastest = max(nominal, *(self.bandwidth(lv, threads) for lv in LEVELS))
        times = [necessary.bytes.get("dram", 0.0) / fastest]
        tiles = any(f.startswith("amx") for f in hardware.features)
        if "fma_f32" in self.measured and not tiles:
            peak = max(self.ops_per_s["fma_f32"], _PER_CYCLE["fma_f32"] * wide * _FLOOR_HZ)
            times.append(necessary.ops.get("fma_f32", 0.0) / (peak * threads))
        return 1e6 * max(times)
