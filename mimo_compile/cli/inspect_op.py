"""``mimo-compile inspect --op``: every schedule of a workload, and its candidates predicted and measured."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from mimo_compile.errors import UsageError

if TYPE_CHECKING:
    from mimo_compile.cli.console import Console


def run_op(args: argparse.Namespace) -> int:
    """Show what can be tried for a workload and what is known of it; return 0."""
    from mimo_compile.ir import functions
    from mimo_compile.ir.hardware import resolve_target
    from mimo_compile.ir.ops import get_op, parse_workload
    from mimo_compile.search.calibrate import device_model
    from mimo_compile.search.database import open_records
    from mimo_compile.search.explain import explain
    from mimo_compile.search.lookup import pareto, results_for
    from mimo_compile.search.objective import parse_objective
    from mimo_compile.search.space import JointSpace

    console: Console = args.console
    workload = parse_workload(args.op)
    hardware = resolve_target(args.target, args.threads)
    if hardware.kind == "cuda":
        from mimo_compile.cli.inspect_cuda import run_cuda

        return run_cuda(args, workload, hardware)
    if args.ptx or args.sass:
        raise UsageError(f"--ptx and --sass show code of GPUs, and the target is {hardware.name}")
    goal = parse_objective(args.objective or "latency")
    device, simulated = device_model(hardware), hardware.kind == "sim"
    with open_records(args.db) as db:  # a function may be kept beside the records
        if functions.is_function(workload):
            workload = functions.canonical(workload)
        space = JointSpace(workload, hardware)
        counts = get_op(workload.op).counts(workload)
        results = sorted(results_for(workload, hardware, db), key=lambda r: r.latency_us)
        found = None if simulated else explain(space, db, device, goal)
    front = {r.record.key for r in pareto(results)}
    defaults = {(c.schedule, c.knobs) for c in space.defaults()}
    rows: list[dict[str, Any]] = []
    for rank, result in enumerate(results):
        is_default = (
            result.record.schedule,
            tuple(sorted(result.record.config.items())),
        ) in defaults
        if rank < args.limit or is_default:
            rows.append(
                {
                    "schedule": result.record.schedule, "config": result.record.config,
                    "predicted_us": _predicted(space, result.record, device),
                    "measured_us": None if simulated else result.latency_us,
                    "simulated_us": result.latency_us if simulated else None,
                    "measured_mj": result.measured_mj,
                    "modelled_mj": result.modelled_mj, "pareto": result.record.key in front,
                    "default": is_default,
                }
            )  # fmt: skip
    known = {(r["schedule"], str(sorted(r["config"].items()))) for r in rows}
    for default in space.defaults():
        if (default.schedule, str(sorted(default.config.items()))) not in known:
            work = space.schedules[default.schedule].work(workload, space.config(default), hardware)
            latency = _latency_us(space, default, device)
            rows.append(
                {
                    "schedule": default.schedule, "config": default.config, "predicted_us": latency,
                    "measured_us": None, "simulated_us": None, "measured_mj": None,
                    "modelled_mj": None if simulated else device.energy_mj(work, latency),
                    "pareto": False, "default": True,
                }
            )  # fmt: skip
    value = {
        "ok": True, "workload": str(workload), "target": hardware.id, "threads": hardware.threads,
        "necessary": {"ops": dict(counts.ops), "bytes": dict(counts.bytes)},
        "roofline_us": device.latency_us(counts, hardware), "calibrated": bool(device.measured),
        "spaces": {n: s.size for n, s in space.spaces.items()}, "candidates": rows,
        "measured": 0 if simulated else len(results), "simulated": len(results) if simulated else 0,
        "why": None if found is None else found.to_json(),
    }  # fmt: skip
    _show(console, value)
    if found is not None:
        from mimo_compile.cli.why import show_why

        console.say()
        show_why(console, found)
    console.result(value)
    return 0


def _predicted(space: Any, record: Any, device: Any) -> float | None:
    candidate = space.adopt(record.schedule, record.config)
    if candidate is None:
        return None
    return _latency_us(space, candidate, device)


def _latency_us(space: Any, candidate: Any, device: Any) -> float:
    """Predict one candidate: by the cycle model of a simulated target, else by the roofline."""
    config = space.config(candidate)
    if space.hardware.kind == "sim":
        from mimo_compile.cost_models.simulated import estimate
        from mimo_compile.ir.simulated import Matmul

        return estimate(Matmul.of(space.workload), config).latency_us
    work = space.schedules[candidate.schedule].work(space.workload, config, space.hardware)
    latency: float = device.latency_us(work, space.hardware)
    return latency


def _show(console: Console, value: dict[str, Any]) -> None:
    from mimo_compile.cli.console import number, size, table

    how = "simulated" if value["target"].startswith("sim-") else "measured"
    used = how if how == "simulated" else f"{value['threads']} threads"
    console.say(f"{value['workload']} on {value['target']}, {used}")
    moved = value["necessary"]["bytes"].get("dram", 0.0)
    work = ", ".join(f"{number(n)} {k}" for k, n in value["necessary"]["ops"].items())
    rates = "calibrated rates"
    if how == "simulated":
        rates = "the model's rates"
    elif not value["calibrated"]:
        rates = "guessed rates: `mimo-compile targets --calibrate` measures them"
    console.say(
        f"necessary: {size(moved)}, {work}; roofline {number(value['roofline_us'])} us ({rates})"
    )
    console.say("configs: " + ", ".join(f"{n} {s}" for n, s in value["spaces"].items()))
    console.say(f"{value[how]} candidates {how} on this target\n")
    lines = [
        (
            row["schedule"], " ".join(f"{k}={v}" for k, v in row["config"].items()),
            number(row["predicted_us"]), number(row[f"{how}_us"]), number(row["measured_mj"]),
            number(row["modelled_mj"]), " ".join(n for n in ("pareto", "default") if row[n]),
        )
        for row in value["candidates"]
    ]  # fmt: skip
    header = (
        "schedule",
        "config",
        "predicted us",
        f"{how} us",
        "measured mJ",
        "modelled mJ",
        "front",
    )
    console.say(table(lines, header, right="llrrrrl"))
