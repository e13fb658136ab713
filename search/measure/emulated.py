"""Prove CUDA kernels without a GPU: run them on the CPU, and judge the results as those of any kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mimo_compile.errors import VerificationError
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.ir.ops.base import Array
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules import get_schedule
from mimo_compile.schedules.base import Kernel, Schedule
from mimo_compile.schedules.cuda.emulate import emulate
from mimo_compile.search.measure.cases import make_case
from mimo_compile.search.measure.verify import judge

ORDERS = (0, 1)
"""Orders of warps and blocks in which each kernel runs: the first that can go on, the last that can."""


@dataclass(frozen=True, slots=True, eq=False)
class Emulated:
    """What `check_emulated` saw, for further assertions."""

    kernel: Kernel
    inputs: dict[str, Array]
    outputs: dict[str, Array]
    """Canonical outputs and mutated states."""
    expected: dict[str, Array]
    error_ratio: float
    """Largest error as a part of its bound."""


def check_emulated(
    workload: Workload | str,
    schedule: Schedule | str,
    config: Any,
    hardware: Hardware,
    seed: int = 0,
    *,
    inputs: Mapping[str, Array] | None = None,
    orders: tuple[int, ...] = ORDERS,
    run: Callable[..., dict[str, Array]] = emulate,
    most_ratio: float = 1.0,
) -> Emulated:
    """Run one config of a CUDA schedule and compare its results with the op's reference.

    Args:
        workload: Or its text.
        schedule: Or its name.
        config: None: the space's default.
        hardware: A CUDA target that the schedule supports.
        seed: Of fresh inputs.
        inputs: Canonical arrays that replace the fresh ones of the same name.
        orders: See `emulate`; results must be the same in all, bit for bit.
        run: What runs a kernel: on the CPU, or on a GPU (`schedules.cuda.driver.run`).
        most_ratio: Part of the bound that errors may take: below 1 for arithmetic that is known to be better
            than what the op leaves to kernels.

    Raises:
        VerificationError: A result outside the op's bound (its `exact_bound` where the schedule says so) or
            the part of it that is asked for, results that depend on the order of warps, or whatever
            `emulate` finds.
        EnvironmentMismatch: There is no C++ compiler.
    """
    workload = parse_workload(workload) if isinstance(workload, str) else workload
    schedule = get_schedule(schedule) if isinstance(schedule, str) else schedule
    if not schedule.supports(workload, hardware):
        raise ValueError(f"{schedule.name} does not support {workload} on {hardware.name}")
    space = schedule.space(workload, hardware)
    config = space.default if config is None else config
    if not space.legal(config):
        raise ValueError(f"{schedule.name}: {config} is not legal for {workload}")
    op, case = get_op(workload.op), make_case(workload, seed)
    if inputs:
        given = {**case.inputs, **inputs}
        expected = op.reference(workload, given)
        bound = op.bound(workload, given, expected)
        case = replace(case, inputs=given, expected=expected, bound=bound)
    exact = schedule.exact(config)
    bound = op.exact_bound(workload, case.inputs, case.expected) if exact else case.bound
    kernel = schedule.lower(workload, config, hardware)
    where = f"{schedule.name} {config} for {workload}"
    memory = device_arrays(workload, schedule, config, case.inputs)
    runs = [run(kernel, hardware, memory, order=order) for order in orders]
    for order, other in zip(orders[1:], runs[1:], strict=True):
        for name, array in other.items():
            if array.tobytes() != runs[0][name].tobytes():
                raise VerificationError(
                    f"{name} depends on the order of warps: {orders[0]} and {order} differ",
                    where=where,
                )
    # a state's arrays that the kernel does not write take part in what the written ones mean
    states = {a.name: memory[a.name] for a in kernel.args if a.role == "state"} | {
        a.name: runs[0][a.name] for a in kernel.args if a.role == "state" and a.mutated
    }
    states = schedule.unpack_state(workload, config, states) if states else {}
    got = {name: array for name, array in states.items() if name in case.expected}
    got |= {a.name: runs[0][a.name] for a in kernel.args if a.role == "output"}
    ratio, message = judge(case.args, got, case.expected, bound, case.inputs)
    if message:
        raise VerificationError(message, where=where)
    if ratio > most_ratio:
        raise VerificationError(
            f"errors of {ratio:.3g} of the op's bound, {most_ratio:.3g} is asked for", where=where
        )
    return Emulated(kernel, dict(case.inputs), got, dict(case.expected), ratio)


def device_arrays(
    workload: Workload, schedule: Schedule, config: Any, inputs: Mapping[str, Array]
) -> dict[str, Array]:
    """Return canonical inputs, weights and states as a kernel of a config wants them in memory."""
    args = get_op(workload.op).args(workload)
    constant = {a.name: inputs[a.name] for a in args if a.role in ("weight", "state")}
    plain = {a.name: inputs[a.name] for a in args if a.role == "input"}
    return plain | schedule.pack(workload, config, constant)
