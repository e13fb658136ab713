"""What this machine really does: read bandwidth by level and threads, multiply-add and dot-product peaks.

Takes a few seconds, once for each machine, in a child process; the figures are kept in the user's cache
folder. The best of many short batches counts, since other load can only slow a batch down.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mimo_compile.cost_models import simulated
from mimo_compile.cost_models.analytic import DeviceModel
from mimo_compile.errors import MimoError
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.workload import Workload

SCHEMA = 1
_VECTOR = 64  # bytes


@dataclass(frozen=True, slots=True)
class Calibration:
    """Measured rates: operations/s of one thread, bytes/s with 1, 2, ... threads together."""

    hardware: str
    ops_per_s: dict[str, float]
    bytes_per_s: dict[str, tuple[float, ...]]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        levels = {k: list(v) for k, v in self.bytes_per_s.items()}
        return {
            "schema": SCHEMA, "hardware": self.hardware, "ops_per_s": self.ops_per_s, "bytes_per_s": levels,
        }  # fmt: skip


def cache_path(hardware: Hardware) -> Path:
    """Return where a machine's calibration is kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    text = json.dumps([hardware.id, sorted(hardware.features), hardware.cores, hardware.l3_bytes])
    name = f"calibration-{hardware.id}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
    return Path(base) / "mimo_compile" / name


def load(hardware: Hardware) -> Calibration | None:
    """Return the kept calibration of a machine; None when there is none or it is damaged."""
    try:
        values = json.loads(cache_path(hardware).read_text())
        if values["schema"] != SCHEMA or values["hardware"] != hardware.id:
            return None
        ops = {str(k): float(v) for k, v in values["ops_per_s"].items()}
        levels = {str(k): tuple(float(x) for x in v) for k, v in values["bytes_per_s"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        return None  # RuntimeError: the user has no home folder, or the file is nested too deep
    rates = [*ops.values(), *(x for v in levels.values() for x in v)]
    if not rates or not all(0 < r < 1e16 for r in rates):
        return None
    return Calibration(hardware.id, ops, levels)


def _store(hardware: Hardware, calibration: Calibration) -> None:
    """Keep a calibration where that is possible; elsewhere each search makes its own."""
    with contextlib.suppress(OSError, RuntimeError):
        path = cache_path(hardware)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(json.dumps(calibration.to_json()))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def device_model(hardware: Hardware, *, measure: bool = False) -> DeviceModel:
    """Return a machine's rates: measured if it was calibrated (or is now, with ``measure``), else guessed.

    Those of a simulated target are its model's, those of a GPU published ones.
    """
    if hardware.kind == "sim":
        return simulated.device_model(hardware)
    if hardware.kind == "cuda":
        return DeviceModel.guess(hardware)
    calibration = load(hardware)
    if calibration is None and measure:
        calibration = calibrate(hardware)
    guess = DeviceModel.guess(hardware)
    return guess if calibration is None else guess.calibrated(calibration.to_json())


def calibrate(hardware: Hardware) -> Calibration:
    """Measure this machine (about five seconds) and keep the result.

    Raises:
        MimoError: a calibration kernel cannot be built or run.
    """
    from mimo_compile.search import calibration_kernels as kernels
    from mimo_compile.search.measure import Measurer, Timing

    timing = Timing(warm_up_s=0.05, batches=100, batch_s=0.002, budget_s=0.3, cache="hot")
    with Measurer(
        hardware, timing=timing, device=DeviceModel.guess(hardware), builders=1
    ) as measurer:
        ops: dict[str, float] = {}
        for kind, schedule in (("fma_f32", kernels.FmaPeak()), ("dot_i8", kernels.DotPeak())):
            work = Workload.parse("calibrate:tasks=1,chunk=16,reps=20000")
            if schedule.supports(work, hardware):
                lanes = 16 if kind == "fma_f32" else 64
                total = lanes * kernels.CHAINS * 20000
                ops[kind] = total / _seconds(measurer, schedule, work, hardware.with_threads(1))
        levels: dict[str, list[float]] = {"l1": [], "l2": [], "dram": []}
        for threads in _thread_counts(hardware.cores):
            for level, chunk, reps in _sizes(hardware, threads):
                work = Workload.parse(f"calibrate:tasks={threads},chunk={chunk},reps={reps}")
                moved = _VECTOR * threads * chunk * reps
                target = hardware.with_threads(threads)
                rate = moved / _seconds(measurer, kernels.ReadBandwidth(), work, target)
                steps = levels[level]
                while (
                    len(steps) < threads - 1
                ):  # thread counts between those measured: the lower one
                    steps.append(steps[-1])
                steps.append(max(rate, steps[-1] if steps else 0.0))
    result = Calibration(hardware.id, ops, {k: tuple(v) for k, v in levels.items()})
    _store(hardware, result)
    return result


def _thread_counts(cores: int) -> list[int]:
    steps = {1, 2, cores // 4, cores // 2, cores}
    return sorted(s for s in steps if 1 <= s <= cores)


def _sizes(hardware: Hardware, threads: int) -> list[tuple[str, int, int]]:
    """Return (level, vectors for each thread, repetitions) of the buffers to read."""
    l1 = hardware.l1d_bytes // 2 // _VECTOR // 8 * 8
    l2 = hardware.l2_bytes // 2 // _VECTOR // 8 * 8
    dram = min(512 << 20, max(64 << 20, 3 * hardware.l3_bytes)) // threads // _VECTOR // 8 * 8
    return [
        ("l1", l1, max(1, (4 << 20) // l1 // _VECTOR)),
        ("l2", l2, max(1, (4 << 20) // l2 // _VECTOR)),
        ("dram", dram, 1),
    ]


def _seconds(measurer: Any, schedule: Any, workload: Workload, hardware: Hardware) -> float:
    """Build and run one calibration kernel; return the least seconds of a call."""
    from mimo_compile.search.space import JointSpace

    space = JointSpace(workload, hardware, [schedule])
    candidate = space.defaults()[0]
    built = measurer.build(space, [candidate])[0]
    if built.status != "ok":
        raise MimoError(f"the calibration kernel {schedule.name} cannot be built: {built.message}")
    seconds = measurer.time_plain(
        candidate, built.value, hardware.threads, _random_input(built.value)
    )
    if seconds is None:
        raise MimoError(f"the calibration kernel {schedule.name} cannot be run")
    return float(seconds)


def _random_input(facts: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    shape = next(tuple(a["shape"]) for a in facts["args"] if a["name"] == "x")
    block = rng.random((min(shape[0] * shape[1], 4096), 16), dtype=np.float32)
    return {"x": np.resize(block, shape).astype(np.float32)}
