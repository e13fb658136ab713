"""Numbers that describe a candidate to a learned model; no profiler and no machine code is needed.

Each name is ``group.detail``; the groups can be left out one by one (`without`), which is how
``benchmarks/cost_models.py`` tells what each of them is worth. Nothing is absolute that can be relative to
the machine, so that one model serves several machines and shapes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from mimo_compile.cost_models.analytic import DeviceModel
from mimo_compile.cost_models.gpu import LaunchShape, occupancy
from mimo_compile.errors import MimoError
from mimo_compile.ir.counts import LAUNCH, LEVELS, OP_KINDS, Counts
from mimo_compile.ir.formats import parse_act_format, parse_weight_format
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.workload import Workload

Features = dict[str, float]
"""By name. Names with ``=`` are yes/no marks (absent: 0); other absent names are missing values."""

VERSION = 3
"""Raised when a name goes or means something else: models trained on other features are refused. New names
alone do not raise it: a model reads the columns that it was trained with."""

GROUPS: dict[str, str] = {
    "identity": "op and algorithm",
    "workload": "extents and other parameters",
    "format": "bits, group size, zero points and family of weights; bits of activations",
    "work": "operations by kind, their mix, and what exceeds the necessary",
    "traffic": "bytes by memory level, and what exceeds the necessary",
    "reuse": "arithmetic intensity; bytes of each level over those of the one behind it",
    "roof": "microseconds of each unit by the roofline, over the longest",
    "tiles": "bytes of the inner loop, and of all, against each cache; padding",
    "vector": "lanes, accumulators, loads for each multiply-add",
    "parallel": "threads, tasks, evenness, the last wave",
    "launch": "cost of the call",
    "sm": "of GPUs: launches, threads and shared memory of a block, how many blocks an SM holds, waves",
    "knobs": "the config as it is",
    "hardware": "cores, caches, ISA, rates",
}
"""What each group holds. Rows for energy models have a further one, ``energy`` (see `with_energy`)."""

ANALYTIC = "roof.analytic"
"""Logarithm of the roofline's microseconds: what latency models correct."""
MODELLED = "energy.modelled"
"""Logarithm of the modelled millijoules at the latency that is known: what energy models correct."""

ISA = ("avx2", "avx512f", "avx512vnni", "avx512vbmi", "avx512bf16", "amx-int8", "amx-bf16")
"""Features of CPUs that make another machine of it."""
_CACHES = ("l1d_bytes", "l2_bytes", "l3_bytes")


class Extractor:
    """Features of one workload's candidates on one machine; what they share is computed once."""

    def __init__(self, workload: Workload, hardware: Hardware, device: DeviceModel) -> None:
        """Prepare; ``device`` has the rates for the roofline."""
        self.workload = workload
        self.hardware = hardware
        self.device = device
        self.need = get_op(workload.op).counts(workload)
        self._need_ops = sum(self.need.ops.values())
        self._caches = [float(getattr(hardware, size)) for size in _CACHES]
        self._knobs: dict[tuple[str, str, type, int | float | str | bool], Features] = {}
        """Features of values that configs had."""
        self._shared = {
            f"identity.op={workload.op}": 1.0,
            **_workload(workload),
            **_hardware(hardware, device),
        }

    def __call__(
        self, counts: Counts, schedule: str, knobs: Mapping[str, int | float | str | bool]
    ) -> Features:
        """Return the features of a candidate.

        Args:
            counts: What its kernel declares.
            schedule: Its algorithm.
            knobs: Its config as plain values.

        Raises:
            ValueError: a number is not finite.
        """
        out = self._shared.copy()
        out[f"identity.schedule={schedule}"] = 1.0
        self._work(counts, out)
        self._traffic(counts, out)
        self._roof(counts, out)
        self._traits(counts, out)
        self._launch(counts, out)
        for name, value in knobs.items():
            key = schedule, name, type(value), value
            if key not in self._knobs:
                self._knobs[key] = _value(f"knobs.{schedule}.{name}", value)
            out.update(self._knobs[key])
        if not all(map(math.isfinite, out.values())):
            bad = sorted(k for k, v in out.items() if not math.isfinite(v))
            raise ValueError(f"features {bad} of {self.workload} are not finite")
        return out

    def blocks(
        self, counts: Counts, schedule: str, knobs: Mapping[str, int | float | str | bool]
    ) -> tuple[Features, ...]:
        """Return a row for each part of a candidate's kernel, whose costs models add up.

        A part sees its own knobs, without its name, and those of the whole kernel: whatever is not named
        after a part, or after one that would be counted on from there (a block that was inlined). A kernel
        without parts is one.
        """
        if not counts.parts:
            return (self(counts, schedule, knobs),)
        stems = {_stem(part.name) for part in counts.parts}
        whole = {
            n: v
            for n, v in knobs.items()
            if "." not in n or _stem(n.partition(".")[0]) not in stems
        }
        rows = []
        for part in counts.parts:
            head = f"{part.name}."
            own = {n.removeprefix(head): v for n, v in knobs.items() if n.startswith(head)}
            row = self(part, schedule, whole | own)
            if "sm.launches" in row:  # of the whole kernel; a part knows of no others
                row["sm.launches"] = math.log2(len(counts.parts))
            rows.append(row)
        return tuple(rows)

    def retold(self, row: Features, counts: Counts) -> Features:
        """Return a row of another extractor of the same workload with this one's rates of the machine."""
        out = row | self._shared
        self._roof(counts, out)
        return out

    def _roof(self, counts: Counts, out: Features) -> None:
        units = self.device.units_us(counts, self.hardware)
        launch = units.pop("launch")
        longest = max(*units.values(), 1e-9)
        out[ANALYTIC] = math.log(launch + longest)
        for unit, us in units.items():
            out[_ROOF[unit]] = math.log(max(us, 1e-9) / longest)
        out["launch.us"] = launch
        out["launch.part"] = launch / (launch + longest)

    def _work(self, counts: Counts, out: Features) -> None:
        total = sum(counts.ops.values())
        out.update(_NO_WORK)
        for kind, n in counts.ops.items():
            work, share = _WORK[kind]
            out[work] = math.log1p(n)
            if total > 0:
                out[share] = n / total
        if (need := self._need_ops) > 0:
            out["work.extra"] = math.log(max(total, 1.0) / need)
        out["work.flops"] = math.log1p(counts.flops)

    def _traffic(self, counts: Counts, out: Features) -> None:
        moved = counts.bytes
        for level, name in _TRAFFIC.items():
            out[name] = math.log1p(moved.get(level, 0.0))
        far = max(moved.get("dram", 0.0), 1.0)
        if (need := self.need.bytes.get("dram", 0.0)) > 0:
            out["traffic.extra"] = math.log(far / need)
        out["reuse.intensity"] = math.log1p(counts.flops / far)
        out["reuse.total"] = math.log1p(max(moved.values(), default=0.0) / far)
        for behind, near, name in _REUSE:
            if behind in moved and near in moved:
                ratio = max(moved[near], 1.0) / max(moved[behind], 1.0)
                out[name] = math.log(ratio)
        for (all_of, _), size in zip(_TILES, self._caches, strict=True):
            out[all_of] = math.log(far / size)

    def _traits(self, counts: Counts, out: Features) -> None:
        """Add what a kernel says of how it works; absent where it says nothing."""
        traits, threads = counts.traits, self.hardware.threads
        for name, value in traits.items():
            if name in LAUNCH:
                continue
            out[_TRAITS[name]] = math.log2(value) if value > 0 else 0.0
        if tile := traits.get("tile_bytes"):
            for (_, one), size in zip(_TILES, self._caches, strict=True):
                out[one] = math.log(tile / size)
        if lanes := traits.get("lanes"):
            native = 16.0 if self.hardware.has_avx512 else 8.0
            out["vector.filled"] = math.log2(lanes / native)
        if tasks := traits.get("tasks"):
            waves = math.ceil(tasks / threads)
            out["parallel.waves"] = math.log2(waves)
            out["parallel.tail"] = 1.0 - tasks / (waves * threads)
        if share := traits.get("share"):
            out["parallel.uneven"] = math.log2(max(share * threads, 1.0))

    def _launch(self, counts: Counts, out: Features) -> None:
        """Add how a launch fills the SMs of a GPU; of a kernel of several, the one that takes longest.

        Registers limit it as well, but are not known before a kernel is compiled: what is told is how many a
        thread may have without fewer blocks.
        """
        if self.hardware.gpu is None:
            return
        out["sm.launches"] = math.log2(max(len(counts.parts), 1))
        longest = max(
            counts.parts or (counts,), key=lambda part: self.device.latency_us(part, self.hardware)
        )
        traits = longest.traits
        if not all(name in traits for name in LAUNCH):
            return
        blocks, threads, shared = (int(traits[name]) for name in LAUNCH)
        held = occupancy(LaunchShape(blocks, threads, 0, shared), self.hardware)
        if not held.blocks:
            return
        waves = max(held.waves, 1e-6)
        out["sm.blocks"] = math.log2(blocks)
        out["sm.threads"] = math.log2(threads)
        out["sm.shared"] = math.log2(1.0 + shared)
        out["sm.held"] = math.log2(held.blocks)
        out["sm.warps"] = held.share
        out["sm.waves"] = math.log2(waves)
        out["sm.tail"] = 1.0 - waves / math.ceil(waves)
        out["sm.registers"] = self.hardware.gpu.registers_per_sm / (threads * held.blocks)
        out[f"sm.limit={held.limit}"] = 1.0


_TRAITS = {
    "tasks": "parallel.tasks", "share": "parallel.share", "useful": "tiles.useful",
    "lanes": "vector.lanes", "sums": "vector.sums", "loads": "vector.loads",
    "tile_bytes": "tiles.tile_bytes",
}  # fmt: skip
_WORK = {k: (f"work.{k}", f"work.share.{k}") for k in OP_KINDS}
_NO_WORK = {work: 0.0 for work, _ in _WORK.values()}
_TRAFFIC = {k: f"traffic.{k}" for k in LEVELS}
_REUSE = [(behind, near, f"reuse.{near}") for behind, near in pairwise(LEVELS)]
_TILES = [(f"tiles.all.{size}", f"tiles.one.{size}") for size in _CACHES]
_ROOF = {unit: f"roof.{unit}" for unit in ("compute", *LEVELS)}


def extract(
    workload: Workload,
    hardware: Hardware,
    counts: Counts,
    schedule: str,
    knobs: Mapping[str, int | float | str | bool],
    device: DeviceModel,
) -> Features:
    """Return the features of one candidate; an `Extractor` is faster for many."""
    return Extractor(workload, hardware, device)(counts, schedule, knobs)


def with_energy(row: Features, counts: Counts, device: DeviceModel, latency_us: float) -> Features:
    """Return a row for energy models: with modelled millijoules at a latency that is known."""
    modelled = device.energy_mj(counts, latency_us)
    idle = device.energy_mj(Counts(), latency_us)
    return {
        **row,
        MODELLED: math.log(modelled),
        "energy.idle": idle / modelled,
        "energy.slow": math.log(latency_us) - row[ANALYTIC],
        "energy.latency": math.log(latency_us),
    }


def without(row: Features, groups: Collection[str]) -> Features:
    """Return a row without some groups; what models correct stays."""
    return {
        k: v
        for k, v in row.items()
        if k.partition(".")[0] not in groups or k in (ANALYTIC, MODELLED)
    }


def _stem(name: str) -> str:
    """Return the name of a part without its number."""
    return name.rstrip("0123456789")


def _workload(workload: Workload) -> Features:
    out: Features = {}
    for name, value in workload.params:
        out.update(_value(f"workload.{name}", value))
        if isinstance(value, str):
            out.update(_format(name, value))
    return out


def _format(name: str, text: str) -> Features:
    """Return what a parameter says if it is a format: unseen ones are near to others then."""
    try:
        if name == "a":
            act = parse_act_format(f"a{text.removeprefix('a')}")
            return {"format.act_bits": {"int8": 8.0, "f32": 32.0}.get(act.kind, 16.0)}
        fmt = parse_weight_format(text)
    except MimoError:
        return {}
    return {
        f"format.{name}.bits": fmt.bits_per_weight,
        f"format.{name}.group": math.log2(fmt.group) if fmt.group > 0 else 16.0,
        f"format.{name}.zero": float(fmt.has_zero),
        f"format.{name}.scales": float(fmt.scales_per_group),
        f"format.{name}.family={fmt.family}": 1.0,
    }


def _hardware(hardware: Hardware, device: DeviceModel) -> Features:
    out: Features = {f"hardware.isa={f}": 1.0 for f in ISA if f in hardware.features}
    out[f"hardware.kind={hardware.kind}"] = 1.0
    out["hardware.cores"] = math.log2(hardware.cores)
    out["parallel.threads"] = math.log2(hardware.threads)
    for size in _CACHES:
        out[f"hardware.{size}"] = math.log2(getattr(hardware, size))
    for kind, rate in device.ops_per_s.items():
        out[f"hardware.rate.{kind}"] = math.log2(rate)
    for level in device.bytes_per_s:
        out[f"hardware.bandwidth.{level}"] = math.log2(device.bandwidth(level, hardware.threads))
    out["hardware.idle_w"] = device.idle_w
    return out


def _value(name: str, value: int | float | str | bool) -> Features:
    if isinstance(value, str):
        return {f"{name}={value}": 1.0}
    if isinstance(value, bool) or value < 0:
        return {name: float(value)}
    return {name: math.log2(1.0 + float(value))}


def columns_of(rows: Iterable[Features]) -> tuple[str, ...]:
    """Return the sorted union of feature names."""
    names: set[str] = set()
    for row in rows:
        names.update(row)
    return tuple(sorted(names))


def matrix(rows: Sequence[Features], columns: Sequence[str]) -> npt.NDArray[np.float32]:
    """Return ``[rows, columns]`` float32; unknown names are dropped, missing values are NaN."""
    wanted = tuple(columns)
    out = np.empty((len(rows), len(wanted)), np.float32)
    for i, row in enumerate(rows):
        values = [*row.values(), 0.0, math.nan]
        out[i] = np.array(values)[_places(tuple(row), wanted)]
    return out


@lru_cache(maxsize=1024)
def _places(names: tuple[str, ...], columns: tuple[str, ...]) -> npt.NDArray[np.intp]:
    """Return where each column's value stands among those of the names, followed by 0 and NaN."""
    known = {name: i for i, name in enumerate(names)}
    return np.array([known.get(c, len(names) + ("=" not in c)) for c in columns], np.intp)
