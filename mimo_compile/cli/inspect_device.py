"""``mimo-compile inspect OUT.mimo`` for a GPU's artifact: its kernels, and the code of one of them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from mimo_compile.errors import UsageError

if TYPE_CHECKING:
    from mimo_compile.cli.console import Console
    from mimo_compile.runtime.container import Parts
    from mimo_compile.runtime.device_code import Code
    from mimo_compile.runtime.program import Choice

NOTE = "No GPU has run this: predicted times are the least that the work can take (docs/cuda.md)"


def scratch_bytes(parts: Parts) -> int:
    """Return the bytes of the memory that kernels of a GPU take in turn."""
    from mimo_compile.runtime.device_code import decode

    return decode(parts.code, parts.where).scratch_bytes


def show_device(console: Console, parts: Parts) -> dict[str, Any]:
    """Print what each kernel takes and is predicted to take; return it as plain values."""
    from mimo_compile.cli.console import number, table
    from mimo_compile.runtime.device_code import decode

    code = decode(parts.code, parts.where)
    workloads = {c.kernel: c.workload for c in parts.manifest.plan}
    rows, lines = [], []
    for name, kernel in sorted(code.table.kernels.items(), key=lambda k: workloads.get(k[0], k[0])):
        launches = [
            {
                "symbol": x.symbol, "grid": list(x.grid), "threads": x.threads,
                "registers": used.registers if used else None,
                "shared_bytes": x.shared_bytes + (used.shared_bytes if used else 0),
                "spill_bytes": used.spill_bytes if used else None,
            }
            for x in kernel.launches
            for used in [kernel.usage.get(x.symbol)]
        ]  # fmt: skip
        rows.append(
            {
                "kernel": name, "workload": workloads.get(name), "launches": launches,
                "scratch_bytes": kernel.scratch_bytes, "predicted_us": kernel.predicted_us or None,
            }
        )  # fmt: skip
        for at, one in enumerate(launches):
            first = (
                (workloads.get(name, name), number(kernel.predicted_us or None))
                if not at
                else ("", "")
            )
            lines.append(
                (
                    *first, one["symbol"], _extents(one["grid"]), one["threads"],
                    one["registers"], one["shared_bytes"], one["spill_bytes"],
                )
            )  # fmt: skip
    header = (
        "workload", "us at least", "launch", "grid", "threads", "registers", "shared", "spills",
    )  # fmt: skip
    console.say("\n" + table(lines, header, right="lrllrrrr"))
    console.say(
        f"\ncode      {code.table.arch}, by CUDA {parts.manifest.versions.get('cuda', 'unknown')}, "
        f"{len(set(code.table.cubins.values()))} cubins for {len(rows)} kernels"
    )
    least = predicted_entries(parts, code)
    console.say(
        "\n"
        + table([(n, number(us)) for n, us in least.items()], ("entry", "us at least"), right="lr")
    )
    console.say(NOTE)
    return {"arch": code.table.arch, "kernels": rows, "predicted_us": least}


def predicted_entries(parts: Parts, code: Code) -> dict[str, float | None]:
    """Return the least microseconds of the kernels of each entry point; None: not predicted of all."""
    out: dict[str, float | None] = {}
    for name in parts.manifest.entries:
        each = [
            (count, code.table.kernels[c.kernel].predicted_us)
            for c in parts.manifest.plan
            if (count := c.calls.get(name, 0))
        ]
        known = bool(each) and all(us for _, us in each)  # 0.0: not predicted
        out[name] = sum(n * us for n, us in each) if known else None
    return out


def _extents(grid: Any) -> str:
    return "x".join(str(n) for n in grid)


def show_code(args: argparse.Namespace, parts: Parts, choice: Choice) -> int:
    """Print the CUDA text of an artifact's kernel, or what it is compiled to; return 0.

    Raises:
        UsageError: the artifact is for a CPU.
        EnvironmentMismatch: nvcc or nvdisasm is not installed.
    """
    from mimo_compile.runtime.device_code import decode

    console: Console = args.console
    if parts.manifest.target.kind != "cuda":
        raise UsageError(
            f"--cuda, --ptx and --sass show code of GPUs, and {args.artifact} is for "
            f"{parts.manifest.target.name}",
            remedy="use --tir or --asm",
        )
    code = decode(parts.code, parts.where)
    if args.sass:
        from mimo_compile.schedules.cuda.nvcc import Binary
        from mimo_compile.schedules.cuda.sass import disassemble

        text = disassemble(Binary(code.table.arch, code.cubin(choice.kernel), {}))
    elif args.ptx:
        from mimo_compile.bench.runnable import hardware_of
        from mimo_compile.schedules.cuda.nvcc import ptx_of
        from mimo_compile.schedules.cuda.table import kernel_of

        table = code.table.kernels[choice.kernel]
        kernel = kernel_of(choice.kernel, table, code.text(choice.kernel))
        text = ptx_of(kernel, hardware_of(parts.manifest))
    else:
        text = code.text(choice.kernel)
    knobs = " ".join(f"{k}={v}" for k, v in choice.config.items())
    console.say(f"// {choice.workload}\n// {choice.schedule} {knobs}")
    console.say(text)
    console.result({"ok": True, "workload": choice.workload, "kernel": choice.kernel, "text": text})
    return 0
