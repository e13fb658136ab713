"""The building child: (workload, schedule, config, hardware) -> object code. Holds the compiler."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec

from mimo_compile.errors import MimoError
from mimo_compile.ir import functions
from mimo_compile.ir.gpu import Gpu
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Kernel, Schedule
from mimo_compile.search.measure.child import serve

SYMBOL = "candidate"
"""Name of every kernel that is measured: its own, which tells the config, would make any two codes differ."""


@cache
def find_schedule(reference: str) -> Schedule:
    """Import ``module:Class``. The parent names classes of its own process, never text from a record."""
    module, _, name = reference.partition(":")
    cls: Any = import_module(module)
    for part in name.split("."):
        cls = getattr(cls, part)
    schedule: Schedule = cls()
    return schedule


def _hardware(values: dict[str, Any]) -> Hardware:
    gpu = Gpu(**values["gpu"]) if values.get("gpu") else None
    return Hardware(**{**values, "features": frozenset(values["features"]), "gpu": gpu})


def find_workload(text: str, function: str = "") -> Workload:
    """Parse a workload; a generic one is known by the text of its function."""
    workload = Workload.parse(text)
    if function:
        functions.learn(workload, function)
    return workload


def _lower(request: dict[str, Any]) -> tuple[Kernel, Hardware]:
    schedule, hardware = find_schedule(request["schedule"]), _hardware(request["hardware"])
    config = schedule.config_from_json(request["config"])
    return schedule.lower(
        find_workload(request["workload"], request.get("function", "")), config, hardware
    ), hardware


def _facts(kernel: Kernel) -> dict[str, Any]:
    return {
        "symbol": kernel.name,
        "args": [asdict(a) for a in kernel.args],
        "ops": dict(kernel.counts.ops),
        "bytes": dict(kernel.counts.bytes),
        "requires": sorted(kernel.features),
        "workspace_bytes": kernel.workspace_bytes,
    }


def describe(request: dict[str, Any]) -> dict[str, Any]:
    """Return the work that the kernel declares, without compiling it."""
    schedule, hardware = find_schedule(request["schedule"]), _hardware(request["hardware"])
    config = schedule.config_from_json(request["config"])
    counts = schedule.work(
        find_workload(request["workload"], request.get("function", "")), config, hardware
    )
    return {"ops": dict(counts.ops), "bytes": dict(counts.bytes)}


def build(request: dict[str, Any]) -> dict[str, Any]:
    """Compile to the file ``out``; return what the kernel declares and the code's hash."""
    kernel, hardware = _lower(request)
    if kernel.device is not None:
        return _build_device(kernel, hardware, Path(request["out"]))
    from mimo_compile.schedules.compile import compile_kernel

    kernel = replace(kernel, name=SYMBOL)
    code = compile_kernel(kernel, hardware)
    Path(request["out"]).write_bytes(code)
    return {**_facts(kernel), "code_hash": hashlib.sha256(code).hexdigest()}


def _build_device(kernel: Kernel, hardware: Hardware, out: Path) -> dict[str, Any]:
    """Compile CUDA code; the facts have its launches besides, by which the child of the GPU calls it.

    Raises:
        MimoError: nvcc refuses it, or makes of it what can only be slow: registers that spill, serialised
            ``wgmma``, other instructions than the schedule counts on.
    """
    from mimo_compile.schedules.cuda.nvcc import compile_device
    from mimo_compile.schedules.cuda.sass import instructions
    from mimo_compile.schedules.cuda.table import table_of

    binary = compile_device(kernel, hardware)
    found = instructions(kernel, hardware, binary)
    if binary.slow:
        raise MimoError(binary.slow)
    if found.local:
        raise MimoError(f"it uses local memory: {found.local} loads and stores")
    if found.missing:
        raise MimoError(f"its code has no {', '.join(found.missing)}")
    out.write_bytes(binary.cubin)
    table = table_of(kernel, binary)
    digest = hashlib.sha256(binary.cubin + msgspec.json.encode(table)).hexdigest()
    return {**_facts(kernel), "code_hash": digest, "device": msgspec.to_builtins(table)}


def _warm_up() -> None:
    from mimo_compile import _tvm

    _tvm.compiler()
    import torch  # noqa: F401  (the ops' definitions need it: better now than within a build's limit)


if __name__ == "__main__":
    serve({"describe": describe, "build": build}, _warm_up)
