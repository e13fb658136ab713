"""Kernels whose orders have one name give a token the same bits, whatever number of tokens they are for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from harness import Arrays, compiled, guarded, poison, raw

from mimo_compile._tvm import from_numpy
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules import get_schedule, schedules_for
from mimo_compile.schedules.base import Schedule

CPU = local_cpu()


def one_token(workload: Workload) -> Workload:
    """Return the workload for one token."""
    name = "m" if workload.op == "mpgemm" else "t"
    return workload.replace(**{name: 1})


class Runner:
    """A kernel with its canonical inputs packed in guarded memory, states included."""

    def __init__(self, schedule: Schedule, workload: Workload, config: Any, arrays: Arrays) -> None:
        self.schedule, self.workload, self.config = schedule, workload, config
        self.roles = {a.name: a.role for a in get_op(workload.op).args(workload)}
        kernel = schedule.lower(workload, config, CPU)
        constant = {n: a for n, a in arrays.items() if self.roles[n] in ("weight", "state")}
        packed = schedule.pack(workload, config, constant)
        self.memory: Arrays = {}
        for arg in kernel.args:
            source = (
                poison(arg.shape, arg.dtype)
                if arg.role == "output"
                else arrays[arg.name]
                if arg.role == "input"
                else packed[arg.name]
            )
            self.memory[arg.name], _ = guarded(source, 0 if arg.role == "state" else 64)
        self.args = kernel.args
        self.tensors = [from_numpy(self.memory[a.name]) for a in kernel.args]
        self.call = compiled(kernel, CPU)[kernel.name]

    def run(self) -> Arrays:
        """Run once; returns copies of the outputs."""
        self.call(*self.tensors)
        return {a.name: self.memory[a.name].copy() for a in self.args if a.role == "output"}

    def states(self) -> Arrays:
        """Return the states, canonical."""
        packed = {a.name: self.memory[a.name] for a in self.args if a.role == "state"}
        return self.schedule.unpack_state(self.workload, self.config, packed)


def bits(array: Any) -> Any:
    """Return numbers as they compare: the two zeros are one."""
    return raw(array + 0) if array.dtype == np.float32 else raw(array)


def compare(
    schedule: Schedule, config: Any, one: Schedule, single: Any, workload: Workload, arrays: Arrays
) -> None:
    """Assert that a call for all tokens and a call for each of them give the same bits."""
    alone, op = one_token(workload), get_op(workload.op)
    shapes = {a.name: a.shape for a in op.args(alone)}
    together = Runner(schedule, workload, config, arrays)
    whole, held = together.run(), together.states()
    count = int(arrays["pos"][1]) if "pos" in arrays else len(whole[next(iter(whole))])

    def row(name: str, i: int) -> Any:
        array = arrays[name]
        if name == "pos":
            return np.array([array[0] + i, 1], np.int32)
        return array if array.shape == shapes[name] else np.ascontiguousarray(array[i : i + 1])

    each = Runner(one, alone, single, {name: row(name, 0) for name in arrays})
    where = f"{workload}: {schedule.name} {config} and {one.name} {single}"
    for i in range(count):
        for arg in each.args:
            if arg.role == "input":
                each.memory[arg.name][...] = row(arg.name, i)
        for name, got in each.run().items():
            assert np.array_equal(bits(got[0]), bits(whole[name][i])), f"{where}: {name}, token {i}"
    for name, state in each.states().items():
        assert np.array_equal(raw(state), raw(held[name])), f"{where}: {name}"


def ways(workload: Workload) -> dict[str, list[tuple[Schedule, Any]]]:
    """Return all configs of all schedules that promise an order, by its name."""
    out: dict[str, list[tuple[Schedule, Any]]] = {}
    for schedule in schedules_for(workload, CPU):
        for config in schedule.space(workload, CPU):
            order = schedule.order(workload, config, CPU)
            if order is not None:
                out.setdefault(order, []).append((schedule, config))
    return out


def try_pairs(text: str, count: int, seed: int) -> None:
    """Compare kernels of some tokens with kernels of one that promise the same order, drawn at random."""
    workload, rng = parse_workload(text), np.random.default_rng(seed)
    several, single = ways(workload), ways(one_token(workload))
    names = sorted(several.keys() & single.keys())
    assert names, text
    for _ in range(count):
        name = names[rng.integers(len(names))]
        found, alone = several[name], single[name]
        schedule, config = found[rng.integers(len(found))]
        one, config_of_one = alone[rng.integers(len(alone))]
        arrays = get_op(workload.op).make_inputs(workload, rng)
        compare(schedule, config, one, config_of_one, workload, arrays)


FEW = (
    "mpgemm:m=4,n=20,k=96",
    "cached_attention:t=4,h=4,kv=1,d=32,dv=32,cap=160",
    "cached_attention:t=4,h=4,kv=2,d=32,dv=32,cap=112,window=48,sink=1",
    "cached_attention:t=4,h=4,kv=2,d=32,dv=32,cap=112,window=48,sink=1,c=bf16",
)
MANY = (
    *FEW,
    "rms_norm:t=4,d=96,residual=1",
    "cached_attention:t=4,h=4,kv=2,d=64,dv=32,cap=384,window=128,sink=1",
    "cached_attention:t=16,h=8,kv=2,d=64,dv=64,cap=512,c=bf16",
    "cached_attention:t=4,h=4,kv=1,d=64,dv=64,cap=512,c=i8,tail=320",
    "cached_attention:t=4,h=4,kv=1,d=64,dv=64,cap=512,c=i4,tail=320",
    "cached_attention:t=4,h=4,kv=1,d=64,dv=32,cap=512,c=e4m3",
    "cached_attention:t=4,h=4,kv=1,d=64,dv=32,cap=384,window=128,c=e4m3",
    "kv_append:t=4,h=4,kv=2,d=64,dv=32,cap=384,rot=32,vscale=0.707",
    "kv_append:t=4,h=4,kv=1,d=64,dv=64,cap=512,rot=32,c=i4,tail=320",
    "kv_append:t=4,h=4,kv=1,d=64,dv=64,cap=512,rot=32,norm=1,c=bf16",
    "moe:t=4,e=8,k=2,d=128,f=64,w=w8,a=a8",
    "moe:t=4,e=8,k=2,d=128,f=64,w=w4g64,a=a8",
    "moe:t=4,e=8,k=2,d=128,f=64",
    "moe:t=4,e=2,k=2,d=128,f=64,w=w4g64,a=abf16",
    "mpgemm:m=4,n=48,k=256,w=bf16,a=abf16",
    "mpgemm:m=4,n=48,k=256,w=w8,a=a8",
    "mpgemm:m=16,n=48,k=192,w=w4g64,a=a8",
    "mpgemm:m=4,n=48,k=256,w=w4g64",
    "mpgemm:m=4,n=48,k=256,w=w2g64,a=a8",
    "mpgemm:m=4,n=48,k=256,w=w1.58,a=a8",
    "mpgemm:m=4,n=48,k=256,w=bf16",
    "mpgemm:m=4,n=48,k=256,w=nf4g64,a=a8",
    "mpgemm:m=4,n=48,k=256,w=afp4g64",
    "mpgemm:m=4,n=64,k=256,w=complex2,a=a8",
    "swiglu:t=4,f=72",
    "rope_table:t=4,rot=32",
    "route:t=4,e=8,k=2,scoring=sigmoid,bias=1",
    "embed:t=4,v=64,d=72,w=bf16",
)


@pytest.mark.parametrize("text", FEW)
def test_orders_of_one_name_give_the_same_bits(text: str) -> None:
    try_pairs(text, 1, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("text", MANY)
def test_orders_of_one_name_give_the_same_bits_in_many_pairs(text: str) -> None:
    try_pairs(text, 3, seed=1)


def test_no_order_is_promised_where_sums_are_made_of_as_many_as_fit() -> None:
    """Dots of pairs: a register tile of few sums makes each of several, one of many does not."""
    for op, rest in (("mpgemm", "m=4,n=48,k=128"), ("moe", "t=4,e=2,k=2,d=128,f=64")):
        for weights in ("w4g64", "bf16"):
            workload, schedule = (
                parse_workload(f"{op}:{rest},w={weights},a=abf16"),
                get_schedule(f"{op}.x86_bf16"),
            )
            config = schedule.config()
            assert schedule.order(workload, config, CPU) is None, f"{schedule.name} {workload}"


def test_no_order_is_promised_where_neighbours_change_the_steps() -> None:
    """A window that begins elsewhere for each query of a tile, parts that all of a tile is divided into."""
    workload = parse_workload("cached_attention:t=4,h=4,kv=2,d=32,dv=32,cap=112,window=48")
    (schedule,) = [s for s in schedules_for(workload, CPU) if s.name.endswith("x86_flash")]
    make: Any = schedule.config

    def order(workload: Workload, **knobs: int) -> str | None:
        return schedule.order(workload, make(**knobs), CPU)

    narrow = workload.replace(cap=64)  # 16 slots besides the window, of which a tile takes 4
    assert order(narrow, tile=2, block=16) is None and order(
        narrow.replace(cap=80), tile=4, block=16
    )
    assert order(narrow, tile=4, block=16) is None and order(narrow, tile=1, block=16)
    full = parse_workload("cached_attention:t=4,h=4,kv=2,d=32,dv=32,cap=512")
    assert order(workload, tile=4, block=32) is None and order(workload, tile=4, block=16)
    assert order(full, tile=2, block=32, splits=2) is None
    assert order(full, tile=2, block=32) == order(one_token(full), tile=1, block=32)
    assert order(full, tile=1, block=32, splits=2) == order(one_token(full), block=32, splits=2)
    assert order(full, tile=1, block=32) != order(full, tile=1, block=64)
