"""``mimo-compile inspect --op SPEC --target cuda:...``: CUDA kernels, as far as known without a GPU."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from mimo_compile.errors import EnvironmentMismatch, UsageError

if TYPE_CHECKING:
    from mimo_compile.cli.console import Console
    from mimo_compile.ir.hardware import Hardware
    from mimo_compile.ir.workload import Workload
    from mimo_compile.schedules.base import Kernel
    from mimo_compile.schedules.cuda.nvcc import Binary
    from mimo_compile.search.space import Candidate, JointSpace

NOTE = "No GPU has run this: predicted times are the least that the work can take (docs/cuda.md)"


def run_cuda(args: argparse.Namespace, workload: Workload, hardware: Hardware) -> int:
    """Show the default of each schedule: launches, what they take, code if asked for; return 0.

    Raises:
        UsageError: no schedule supports the workload, or options are about measurements.
        EnvironmentMismatch: code is asked for, and the tool that makes it is not installed.
        MimoError: a tool refuses a kernel.
    """
    from mimo_compile.cost_models.gpu import roofline_s
    from mimo_compile.ir.ops import get_op
    from mimo_compile.search.space import JointSpace

    if args.objective is not None or args.db is not None:
        raise UsageError(
            f"--objective and --db are about what was measured, and on {hardware.name} nothing was"
        )
    console: Console = args.console
    space = JointSpace(workload, hardware)
    counts = get_op(workload.op).counts(workload)
    code = "ptx" if args.ptx else "sass" if args.sass else ""
    rows = [_described(space, c, code) for c in space.defaults()[: args.limit]]
    value = {
        "ok": True, "workload": str(workload), "target": hardware.id, "threads": hardware.threads,
        "necessary": {"ops": dict(counts.ops), "bytes": dict(counts.bytes)},
        "roofline_us": 1e6 * roofline_s(counts, hardware),
        "spaces": {n: s.size for n, s in space.spaces.items()}, "measured": 0, "kernels": rows,
    }  # fmt: skip
    if code:
        for row in rows:
            console.say(f"// {row['schedule']} {_knobs(row['config'])}\n{row['text']}")
    else:
        _show(console, value)
    console.result(value)
    return 0


def _described(space: JointSpace, candidate: Candidate, code: str) -> dict[str, Any]:
    """Return what is known of one candidate without a GPU."""
    from mimo_compile.schedules.cuda.nvcc import compile_device, ptx_of
    from mimo_compile.schedules.cuda.sass import disassemble

    schedule, hardware = space.schedules[candidate.schedule], space.hardware
    kernel = schedule.lower(space.workload, space.config(candidate), hardware)
    row: dict[str, Any] = {
        "schedule": candidate.schedule, "config": candidate.config, "kernel": kernel.name,
    }  # fmt: skip
    if code == "ptx":
        return {**row, "text": ptx_of(kernel, hardware)}
    if code == "sass":
        return {**row, "text": disassemble(compile_device(kernel, hardware))}
    try:
        binary = compile_device(kernel, hardware)
    except EnvironmentMismatch as error:  # launches are known all the same
        return {**row, "not_compiled": str(error), **launches_of(kernel, hardware, None)}
    return {
        **row, "not_compiled": None, "warnings": list(binary.warnings),
        **_instructions(kernel, hardware, binary), **launches_of(kernel, hardware, binary),
    }  # fmt: skip


def _instructions(kernel: Kernel, hardware: Hardware, binary: Binary) -> dict[str, Any]:
    """Return where instructions were looked for, which are missing, and what uses local memory."""
    from mimo_compile.schedules.cuda.sass import instructions

    found = instructions(kernel, hardware, binary)
    expected = kernel.device.expected if kernel.device else ()
    return {
        "instructions": {
            "read": found.read, "expected": list(expected), "missing": list(found.missing),
            "unknown": list(found.unknown), "local": found.local, "opcodes": dict(found.opcodes),
        }
    }  # fmt: skip


def launches_of(kernel: Kernel, hardware: Hardware, binary: Binary | None) -> dict[str, Any]:
    """Return each launch with what it takes and how full an SM is, and the predicted time."""
    from mimo_compile.cost_models.gpu import occupancy, predict
    from mimo_compile.pipeline.device import launch_shape
    from mimo_compile.schedules.cuda.limits import array_bytes, code_of

    code, rows, shapes = code_of(kernel), [], []
    for launch in code.launches:
        usage = binary.usage[launch.symbol] if binary else None
        shape = launch_shape(launch, usage)
        held = occupancy(shape, hardware)
        shapes.append(shape)
        rows.append(
            {
                "symbol": launch.symbol, "grid": list(launch.grid), "threads": launch.threads,
                "cluster": launch.cluster, "shared_bytes": shape.shared_bytes,
                "registers": usage.registers if usage else None,
                "stack_bytes": usage.stack_bytes if usage else None,
                "spill_bytes": usage.spill_bytes if usage else None,
                "blocks_per_sm": held.blocks, "limit": held.limit, "occupancy": held.share,
                "waves": held.waves,
            }
        )  # fmt: skip
    best = predict(kernel.counts, shapes, hardware)
    return {
        "launches": rows,
        "scratch_bytes": sum(array_bytes(a) for a in code.scratch.values()),
        "predicted_us": 1e6 * best.seconds,
        "bound": best.limit,
        "parts_us": {name: 1e6 * s for name, s in best.parts.items()},
    }


def _knobs(config: dict[str, Any]) -> str:
    return " ".join(f"{k}={v}" for k, v in config.items())


def _show(console: Console, value: dict[str, Any]) -> None:
    from mimo_compile.cli.console import number, size, table

    moved = value["necessary"]["bytes"].get("dram", 0.0)
    console.say(f"{value['workload']} on {value['target']}")
    console.say(f"necessary: {size(moved)}; roofline {number(value['roofline_us'])} us")
    console.say("configs: " + ", ".join(f"{n} {s}" for n, s in value["spaces"].items()))
    for row in value["kernels"]:
        console.say(f"\n{row['schedule']} {_knobs(row['config'])}")
        console.say(
            f"  predicted {number(row['predicted_us'])} us at least, bound by {row['bound']}; "
            f"scratch {size(row['scratch_bytes'])}"
        )
        lines = [
            (
                one["symbol"], "x".join(str(n) for n in one["grid"]), one["threads"], one["registers"],
                one["shared_bytes"], one["spill_bytes"], f"{one['blocks_per_sm']} ({one['limit']})",
                f"{100 * one['occupancy']:.0f} %", f"{one['waves']:.2f}",
            )
            for one in row["launches"]
        ]  # fmt: skip
        header = (
            "launch", "grid", "threads", "registers", "shared", "spills", "blocks on an SM", "warps",
            "waves",
        )  # fmt: skip
        text = table(lines, header, right="llrrrrlrr")
        console.say("\n".join(f"  {line}" for line in text.splitlines()))
        if row["not_compiled"]:
            console.say(f"  not compiled: {row['not_compiled']}")
            continue
        _show_instructions(console, row)
    console.say(f"\n{NOTE}")


def _show_instructions(console: Console, row: dict[str, Any]) -> None:
    found = row["instructions"]
    if found["expected"]:
        there = [e for e in found["expected"] if e not in {*found["missing"], *found["unknown"]}]
        parts = [
            (there, "there"),
            (found["missing"], "MISSING"),
            (found["unknown"], "not looked for"),
        ]
        text = "; ".join(f"{', '.join(names)} {what}" for names, what in parts if names)
        console.say(f"  instructions ({found['read']}): {text}")
    if found["local"]:
        what = "instructions on" if found["read"] == "sass" else "bytes of"
        console.say(f"  {found['local']} {what} local memory")
    for line in row["warnings"]:
        console.say(f"  {line}")
