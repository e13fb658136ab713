"""How full a launch makes a GPU, and the least time its work can take there: occupancy and a roofline.

    time = launches * cost of one + max over pipes of (operations of the busiest SM / rate of an SM),
           over device memory and L2 of max(bytes / bandwidth, bytes of the busiest SM / its port),
           and over shared memory, where counts name it (``l1``), of bytes of the busiest SM / its banks)

The busiest SM has ``ceil(blocks / SMs)`` of the blocks. Pipes and memories work at the same time, at their
peaks, and arrays come from device memory: latencies, bank conflicts and instructions that no count names come
on top. A kernel takes longer, unless it finds its arrays in L2. Nothing in here was fitted to a measurement.

Sources: throughput of instructions and limits of occupancy from the CUDA C++ Programming Guide; tensor cores
and L2 from NVIDIA's papers on the A100 (2020) and the H100 (2022), of which the H200 has the SMs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware, gpu_of

WARP = 32
_LAUNCH_S = 2e-6
"""From the end of one kernel to work of the next on the same stream. An assumption."""
_PORT_BYTES = 64.0
"""That one SM takes from L2 in a cycle."""
_BANKS_BYTES = 128.0
"""That one SM takes from its shared memory in a cycle, or gives it."""
_L2_BYTES = 5120.0
"""That all of them take in a cycle at most, published for the A100 and assumed for the H200."""

_SM80 = {
    "fma_f32": 64.0, "add_f32": 64.0, "exp_f32": 16.0, "int_op": 64.0, "dot_bf16": 128.0,
    "dot_i8": 256.0, "unpack_u8": 256.0, "shuffle_u8": 256.0, "tile_bf16": 1024.0, "tile_i8": 2048.0,
}  # fmt: skip
RATES: Mapping[str, Mapping[str, float]] = {
    "sm_80": _SM80,
    "sm_90a": {
        **_SM80, "fma_f32": 128.0, "add_f32": 128.0, "dot_bf16": 256.0, "tile_bf16": 2048.0,
        "tile_i8": 4096.0,
    },
}  # fmt: skip
"""Operations of an SM in a cycle, in the units of `ir.counts.OP_KINDS`. Of four bytes in a register: ``dp4a``
multiplies, ``lop3`` unpacks and ``prmt`` shuffles all at once, each taken at the rate of 32-bit integers.
Tiles of float16 count as ``tile_bf16``, those of float8 as ``tile_i8``: their rates are the same."""

_TENSOR_CORES = {
    "fma_f32": "tile_bf16", "dot_bf16": "tile_bf16", "tile_bf16": "tile_bf16", "dot_i8": "tile_i8",
    "tile_i8": "tile_i8",
}  # fmt: skip
"""The fastest unit for each kind of multiply-add."""


@dataclass(frozen=True, slots=True)
class LaunchShape:
    """What a launch asks for."""

    blocks: int
    threads: int
    """Of a block."""
    registers: int
    """Of a thread."""
    shared_bytes: int
    """Of a block, static and dynamic."""


@dataclass(frozen=True, slots=True)
class Occupancy:
    """How many blocks of a launch an SM holds at a time."""

    blocks: int
    """0: it cannot be launched."""
    limit: str
    """What keeps it from holding more: ``registers``, ``shared memory``, ``threads`` or ``blocks``."""
    warps: int
    """Of these blocks."""
    share: float
    """Of the warps that an SM can hold."""
    waves: float
    """Launch over what all SMs hold at a time."""


@dataclass(frozen=True, slots=True)
class Predicted:
    """The least time of one call. Unit: seconds."""

    seconds: float
    limit: str
    """What takes longest: an operation, ``dram``, ``l2``, ``l1`` or ``launch``."""
    parts: Mapping[str, float]
    """By what takes it; all but ``launch`` at the same time within each launch."""


def occupancy(launch: LaunchShape, hardware: Hardware) -> Occupancy:
    """Return how many blocks of a launch an SM holds."""
    gpu = gpu_of(hardware)
    warps = -(-launch.threads // WARP)
    most = gpu.threads_per_sm // WARP
    limits = {"threads": most // warps, "blocks": gpu.blocks_per_sm}
    if launch.registers:
        limits["registers"] = gpu.warps_with(launch.registers) // warps
    taken = -(-(launch.shared_bytes + gpu.shared_reserved) // 128) * 128
    limits["shared memory"] = gpu.shared_per_sm // taken
    limit = min(limits, key=lambda name: limits[name])
    held = limits[limit]
    waves = launch.blocks / (held * hardware.cores) if held else 0.0
    return Occupancy(held, limit, held * warps, held * warps / most, waves)


def predict(counts: Counts, launches: Sequence[LaunchShape], hardware: Hardware) -> Predicted:
    """Return the least time of a call that does ``counts`` in launches one after the other.

    Counts of several launches have a part for each of them, in their order.

    Raises:
        ValueError: a launch cannot be held by an SM, there is none, or counts do not say what each one does.
    """
    works = counts.parts if len(launches) > 1 else (counts,)
    if len(works) != len(launches):
        raise ValueError(f"{len(launches)} launches, and counts with parts for {len(counts.parts)}")
    for launch in launches:
        if not occupancy(launch, hardware).blocks:
            raise ValueError(f"no SM of {hardware.name} can hold a block of {launch}")
    parts: dict[str, float] = {"launch": _LAUNCH_S * len(launches)}
    seconds = parts["launch"]
    for work, launch in zip(works, launches, strict=True):
        times = _times(work, launch, hardware)
        seconds += max(times.values(), default=0.0)
        for name, value in times.items():
            parts[name] = parts.get(name, 0.0) + value
    return Predicted(seconds, max(parts, key=lambda name: parts[name]), parts)


def _times(counts: Counts, launch: LaunchShape, hardware: Hardware) -> dict[str, float]:
    """Return seconds of one launch by pipe and memory."""
    gpu = gpu_of(hardware)
    share = max(
        -(-launch.blocks // hardware.cores) / launch.blocks, counts.traits.get("share", 0.0)
    )
    rates = RATES[gpu.arch]
    times = {kind: n * share / (rates[kind] * gpu.clock_hz) for kind, n in counts.ops.items()}
    port = _PORT_BYTES * gpu.clock_hz
    far = counts.bytes.get("dram", 0.0)
    # what comes from memory passes through L2 and the port as well; there is no level between
    near = max(far, *(counts.bytes.get(level, 0.0) for level in ("l2", "l3")))
    times["dram"] = far / gpu.memory_bytes_per_s
    times["l2"] = max(near / (_L2_BYTES * gpu.clock_hz), near * share / port)
    if "l1" in counts.bytes:
        times["l1"] = counts.bytes["l1"] * share / (_BANKS_BYTES * gpu.clock_hz)
    return times


def roofline_s(necessary: Counts, hardware: Hardware) -> float:
    """Return the seconds that necessary work takes at least: one launch that fills all SMs evenly.

    An op does not say which unit multiplies: all multiply-adds count as those of tensor cores.
    """
    ops = {kind: n for kind, n in necessary.ops.items() if kind not in _TENSOR_CORES}
    for kind, unit in _TENSOR_CORES.items():
        ops[unit] = ops.get(unit, 0.0) + necessary.ops.get(kind, 0.0)
    even = LaunchShape(hardware.cores, WARP, 0, 0)
    return predict(Counts(ops, necessary.bytes), [even], hardware).seconds


def rates_of(hardware: Hardware) -> tuple[dict[str, float], dict[str, tuple[float, ...]]]:
    """Return operations/s of one SM by kind, and bytes/s of 1, 2, ... SMs together by level.

    For `analytic.DeviceModel`, which ranks candidates of a search by them: SMs are its threads.
    """
    gpu = gpu_of(hardware)
    port, count = _PORT_BYTES * gpu.clock_hz, range(1, hardware.cores + 1)
    near = tuple(min(n * port, _L2_BYTES * gpu.clock_hz) for n in count)
    levels = {
        "l1": tuple(n * _BANKS_BYTES * gpu.clock_hz for n in count),
        "l2": near,
        "l3": near,
        "dram": tuple(min(n * port, gpu.memory_bytes_per_s) for n in count),
    }
    return {kind: n * gpu.clock_hz for kind, n in RATES[gpu.arch].items()}, levels
