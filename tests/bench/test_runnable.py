"""Memory of kernels that are timed: that of states is what a loaded artifact gives them."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest

from mimo_compile._tvm import ALIGNMENT
from mimo_compile.bench.runnable import Runnable
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.schedules import schedules_for

CPU = local_cpu()
LONG = 4 << 20
"""Bytes from which on numpy asks for huge pages."""


@pytest.fixture(scope="module")
def runnable():
    workload = parse_workload("cached_attention:t=1,h=1,kv=1,d=128,dv=128,cap=8192,len=16")
    schedule = schedules_for(workload, CPU)[0]
    inputs = get_op(workload.op).make_inputs(workload, np.random.default_rng(0))
    default = schedule.config_to_json(schedule.space(workload, CPU).default)
    return Runnable(workload, schedule, default, CPU, inputs)


def flags(address):
    """Return the flags of the mapping that an address lies in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, _, rest = line.partition(" ")
        if "-" in key and not key.endswith(":"):
            begin, end = (int(n, 16) for n in key.split("-"))
            inside = begin <= address < end
        elif inside and key == "VmFlags:":
            return rest.split()
    raise AssertionError(f"no mapping holds {address:#x}")


def test_states_that_are_timed_lie_on_small_pages_of_their_own(runnable):
    states = [a.name for a in runnable.kernel.args if a.role == "state"]
    assert states
    for name in states:
        held = runnable.arrays[name]
        copy = runnable._copy(name)
        assert held.nbytes >= LONG and np.array_equal(copy, held, equal_nan=True)
        for array in (held, copy):
            assert array.ctypes.data % mmap.PAGESIZE == 0
            assert "hg" not in flags(array.ctypes.data)


def test_all_else_lies_on_lines_of_caches_and_copies_are_of_states(runnable):
    for array in runnable.arrays.values():
        assert array.ctypes.data % ALIGNMENT == 0
    assert runnable.check() <= 1
    each = sum(runnable.arrays[a.name].nbytes for a in runnable.kernel.args if a.role == "state")
    sets = runnable.sets(2 * each, 4 * each)
    assert len(sets) == 3
    for at, arg in enumerate(runnable.kernel.args):
        places = {tensors[at].data_ptr() for tensors in sets}
        assert len(places) == (3 if arg.role == "state" else 1)
