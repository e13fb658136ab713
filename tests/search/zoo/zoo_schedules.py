"""Kernels that are wrong in every way we know, as schedules of the op `embed` (y = table[ids], exact)."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from mimo_compile import _tvm
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Kernel, Schedule, Space

_tvm.compiler()

from tvm.script import tirx as T

CORRECT = ("honest", "honest_parallel", "slow", "chatty")
WRONG = (
    "nothing", "half", "tail", "past_end", "before_start", "not_a_number", "changes_weight", "changes_input",
    "adds_to_output", "keeps_larger", "only_first_time", "low_precision", "wrong_row", "forks",
)  # fmt: skip
CRASH = ("wild_write", "aborts", "exits", "divides_by_zero")
HANG = ("hangs",)
HOSTILE = ("floods", "detaches", "ignores_term", "writes_file", "eats_memory")
BUILD = ("llvm_abort", "lower_raises", "lower_exits", "bad_arguments", "bad_packing")
MEMORY = ("lower_allocates",)
BUILD_HANG = ("lower_hangs",)
FAULTS = CORRECT + WRONG + CRASH + HANG + HOSTILE + BUILD + MEMORY + BUILD_HANG


@dataclass(frozen=True, slots=True)
class ZooConfig:
    fault: str = "honest"
    knob: int = 0


def _loops(t: int, d: int, v: int, fault: str) -> Any:
    rows = t // 2 if fault == "half" else 0 if fault == "nothing" else t
    columns = d - 1 if fault == "tail" else d
    shift = 1 if fault == "wrong_row" else 0

    @T.prim_func(s_tir=True)
    def copy(
        ids: T.Buffer((t,), "int32"),
        table: T.Buffer((v, d), "float32"),
        y: T.Buffer((t, d), "float32"),
    ):
        for i, j in T.grid(rows, columns):
            with T.sblock("y"):
                vi, vj = T.axis.remap("SS", [i, j])
                y[vi, vj] = table[(ids[vi] + shift) % v, vj]

    return copy


def _parallel(t: int, d: int, v: int) -> Any:
    @T.prim_func(s_tir=True)
    def copy(
        ids: T.Buffer((t,), "int32"),
        table: T.Buffer((v, d), "float32"),
        y: T.Buffer((t, d), "float32"),
    ):
        for i in T.parallel(t):
            for j in range(d):
                with T.sblock("y"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    y[vi, vj] = table[ids[vi], vj]

    return copy


def _mixing(t: int, d: int, v: int, fault: str) -> Any:
    adds = fault == "adds_to_output"

    @T.prim_func(s_tir=True)
    def copy(
        ids: T.Buffer((t,), "int32"),
        table: T.Buffer((v, d), "float32"),
        y: T.Buffer((t, d), "float32"),
    ):
        for i, j in T.grid(t, d):
            with T.sblock("y"):
                vi, vj = T.axis.remap("SS", [i, j])
                if adds:
                    y[vi, vj] = y[vi, vj] + table[ids[vi], vj]
                else:
                    y[vi, vj] = T.max(table[ids[vi], vj], y[vi, vj])

    return copy


def _first_time(t: int, d: int, v: int) -> Any:
    @T.prim_func(s_tir=True)
    def copy(
        ids: T.Buffer((t,), "int32"),
        table: T.Buffer((v, d), "float32"),
        y: T.Buffer((t, d), "float32"),
    ):
        with T.sblock("root"):
            T.reads(ids[0:t], table[0:v, 0:d], y[0:t, 0:d])
            T.writes(y[0:t, 0:d])
            if T.isnan(y[0, 0]):
                for i, j in T.grid(t, d):
                    y[i, j] = table[ids[i], j]

    return copy


def _half_precision(t: int, d: int, v: int) -> Any:
    @T.prim_func(s_tir=True)
    def copy(
        ids: T.Buffer((t,), "int32"),
        table: T.Buffer((v, d), "float32"),
        y: T.Buffer((t, d), "float32"),
    ):
        for i, j in T.grid(t, d):
            with T.sblock("y"):
                vi, vj = T.axis.remap("SS", [i, j])
                y[vi, vj] = T.cast(T.cast(table[ids[vi], vj], "float16"), "float32")

    return copy


def _then_store(t: int, d: int, v: int, fault: str) -> Any:
    row, column = {
        "past_end": (t - 1, d), "before_start": (0, -1), "wild_write": (0, 1 << 30), "not_a_number": (0, 0),
    }[fault]  # fmt: skip
    value = float("nan") if fault == "not_a_number" else 1.0

    @T.prim_func(s_tir=True)
    def copy(
        ids: T.Buffer((t,), "int32"),
        table: T.Buffer((v, d), "float32"),
        y: T.Buffer((t, d), "float32"),
    ):
        with T.sblock("root"):
            T.reads(ids[0:t], table[0:v, 0:d])
            T.writes(y[0:t, 0:d])
            for i, j in T.grid(t, d):
                y[i, j] = table[ids[i], j]
            y[row, T.int64(column)] = T.float32(value)

    return copy


def _change(t: int, d: int, v: int, fault: str) -> Any:
    weight = fault == "changes_weight"

    @T.prim_func(s_tir=True)
    def copy(
        ids: T.Buffer((t,), "int32"),
        table: T.Buffer((v, d), "float32"),
        y: T.Buffer((t, d), "float32"),
    ):
        with T.sblock("root"):
            T.reads(ids[0:t], table[0:v, 0:d])
            T.writes(y[0:t, 0:d], table[0:v, 0:d], ids[0:t])
            for i, j in T.grid(t, d):
                y[i, j] = table[ids[i], j]
            if weight:
                table[v - 1, d - 1] = T.float32(7)
            else:
                ids[t - 1] = 3

    return copy


def _then_call(t: int, d: int, v: int, name: str, argument: int) -> Any:
    @T.prim_func(s_tir=True)
    def copy(
        ids: T.Buffer((t,), "int32"),
        table: T.Buffer((v, d), "float32"),
        y: T.Buffer((t, d), "float32"),
    ):
        with T.sblock("root"):
            T.reads(ids[0:t], table[0:v, 0:d])
            T.writes(y[0:t, 0:d])
            for i, j in T.grid(t, d):
                y[i, j] = table[ids[i], j]
            T.evaluate(T.call_extern("int32", name, T.int32(argument)))

    return copy


def _shout(t: int, d: int, v: int) -> Any:
    @T.prim_func(s_tir=True)
    def copy(
        ids: T.Buffer((t,), "int32"),
        table: T.Buffer((v, d), "float32"),
        y: T.Buffer((t, d), "float32"),
    ):
        with T.sblock("root"):
            T.reads(ids[0:t], table[0:v, 0:d])
            T.writes(y[0:t, 0:d])
            for i, j in T.grid(t, d):
                y[i, j] = table[ids[i], j]
            for _ in range(2000):
                T.evaluate(T.call_extern("int32", "putchar", T.int32(120)))

    return copy


def _no_such_instruction(t: int, d: int, v: int) -> Any:
    @T.prim_func(s_tir=True)
    def copy(
        ids: T.Buffer((t,), "int32"),
        table: T.Buffer((v, d), "float32"),
        y: T.Buffer((t, d), "float32"),
    ):
        with T.sblock("root"):
            T.reads(ids[0:t], table[0:v, 0:d])
            T.writes(y[0:t, 0:d])
            T.evaluate(T.call_llvm_intrin("void", "llvm.x86.ldtilecfg", T.address_of(table[0, 0])))

    return copy


def _hostile(t: int, d: int, v: int, fault: str) -> Any:
    @T.inline
    def harm():
        if fault == "floods":
            for _ in range(1 << 34):
                T.evaluate(T.call_extern("int32", "puts", "x" * 1000))
        elif fault == "detaches":
            if T.call_extern("int32", "fork") == 0:
                if T.call_extern("int32", "setsid") >= 0:  # noqa: SIM102
                    if T.call_extern("int32", "fork") == 0:
                        T.evaluate(T.call_extern("int32", "sleep", 600))
                T.evaluate(T.call_extern("int32", "_exit", 0))
            T.evaluate(T.call_extern("int32", "usleep", 100_000))
        elif fault == "ignores_term":
            T.evaluate(T.call_extern("int64", "signal", 15, T.int64(1)))  # SIG_IGN
            T.evaluate(T.call_extern("int32", "sleep", 600))
        elif fault == "writes_file":
            T.evaluate(T.call_extern("int32", "creat", "mimo_zoo_was_here", 0o600))
        elif fault == "eats_memory":
            for _ in range(1 << 20):
                T.evaluate(
                    T.call_extern(
                        "int64", "memset", T.call_extern("handle", "malloc", T.int64(1 << 30)), 1,
                        T.int64(1),
                    )
                )  # fmt: skip

    @T.prim_func(s_tir=True)
    def copy(
        ids: T.Buffer((t,), "int32"),
        table: T.Buffer((v, d), "float32"),
        y: T.Buffer((t, d), "float32"),
    ):
        with T.sblock("root"):
            T.reads(ids[0:t], table[0:v, 0:d])
            T.writes(y[0:t, 0:d])
            for i, j in T.grid(t, d):
                y[i, j] = table[ids[i], j]
            harm()

    return copy


_EXTERN = {
    "hangs": ("pause", 0), "aborts": ("abort", 0), "exits": ("_exit", 0), "divides_by_zero": ("raise", 8),
    "forks": ("fork", 0), "slow": ("usleep", 3000),
}  # fmt: skip


class Zoo(Schedule):
    name = "embed.zoo"
    op = "embed"
    config = ZooConfig
    faults: tuple[str, ...] = FAULTS

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        return True

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        knobs = {"fault": self.faults, "knob": (0, 1, 2, 3)}
        return Space(ZooConfig, knobs, ZooConfig(self.faults[0]))

    def pack(self, workload: Workload, config: ZooConfig, arrays: Any) -> Any:
        if config.fault == "bad_packing" and "table" in arrays:
            return {"table": arrays["table"].T}
        return super().pack(workload, config, arrays)

    def layouts(self, workload: Workload, config: ZooConfig) -> dict[str, str]:
        return {"table": "transposed"} if config.fault == "bad_packing" else {}

    def lower(self, workload: Workload, config: ZooConfig, hardware: Hardware) -> Kernel:
        op = get_op("embed")
        p = op.full(workload)
        t, d, v, fault = p["t"], p["d"], p["v"], config.fault
        if fault == "lower_hangs":
            time.sleep(1000)
        if fault == "lower_raises":
            raise ValueError("this config has no kernel")
        if fault == "lower_exits":
            os._exit(3)
        if fault == "lower_allocates":
            np.ones(1 << 38, np.uint8)
        name = f"zoo_{fault}_{config.knob}"
        if fault in _EXTERN:
            func = _then_call(t, d, v, *_EXTERN[fault])
        elif fault in ("past_end", "before_start", "wild_write", "not_a_number"):
            func = _then_store(t, d, v, fault)
        elif fault in ("changes_weight", "changes_input"):
            func = _change(t, d, v, fault)
        elif fault in ("adds_to_output", "keeps_larger"):
            func = _mixing(t, d, v, fault)
        elif fault == "only_first_time":
            func = _first_time(t, d, v)
        elif fault == "low_precision":
            func = _half_precision(t, d, v)
        elif fault == "llvm_abort":
            func = _no_such_instruction(t, d, v)
        elif fault == "honest_parallel":
            func = _parallel(t, d, v)
        elif fault in HOSTILE:
            func = _hostile(t, d, v, fault)
        elif fault == "chatty":
            func = _shout(t, d, v)
        else:
            func = _loops(t, d, v, fault)
        args = op.args(workload)
        if fault == "bad_arguments":
            args = args[::-1]
        return Kernel(name, func.with_attr("global_symbol", name), args, op.counts(workload))


class Honest(Zoo):
    """Only correct kernels, some of them slow; four knob values each."""

    name = "embed.honest"
    faults = ("honest_parallel", "honest", "slow")


class Many(Zoo):
    """Thousands of correct kernels that are equally fast; each is other code than all others."""

    name = "embed.many"

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        knobs = {"fault": ("honest",), "knob": tuple(range(5000))}
        return Space(ZooConfig, knobs, ZooConfig("honest"))

    def lower(self, workload: Workload, config: ZooConfig, hardware: Hardware) -> Kernel:
        p, name = get_op("embed").full(workload), f"many_{config.knob}"
        func = _then_call(p["t"], p["d"], p["v"], "srand", config.knob)
        args, counts = get_op("embed").args(workload), get_op("embed").counts(workload)
        return Kernel(name, func.with_attr("global_symbol", name), args, counts)
