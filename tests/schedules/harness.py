"""Prove a kernel against its op's reference: pack, compile, run on poisoned outputs, compare."""

from __future__ import annotations

import ctypes
import mmap
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mimo_compile._tvm import as_aligned, from_numpy, load_object, runtime, set_threads
from mimo_compile.ir.hardware import Hardware, local_cpu
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Kernel, Schedule
from mimo_compile.schedules.compile import compile_kernel

Arrays = dict[str, np.ndarray[Any, Any]]
torch.set_num_threads(1)  # references are many small matmuls; kernels need the other cores
KEPT = 64
_compiled: OrderedDict[tuple[str, str, str], tuple[Any, Any]] = OrderedDict()
"""Name, hardware and target of kernels -> function and code; what was used last comes last."""
GUARD = 64
"""Bytes of canary behind arrays that are not states of a kernel; a forbidden page follows states at once."""
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Checked:
    """What `check` saw, for further assertions."""

    kernel: Kernel
    inputs: Arrays
    memory: Arrays
    outputs: Arrays
    expected: Arrays
    call: Any
    """Runs the kernel once more on the same memory."""


def sample_config(schedule: Schedule, workload: Workload, hardware: Hardware, seed: int) -> Any:
    """Return a legal config drawn uniformly from the product of the space's knobs."""
    space = schedule.space(workload, hardware)
    rng = np.random.default_rng(seed)
    for _ in range(1000):
        config = space.make(**{k: v[rng.integers(len(v))] for k, v in space.knobs.items()})
        if space.legal(config):
            return config
    return space.default


def check(
    schedule: Schedule,
    workload: Workload | str,
    config: Any = None,
    seed: int = 0,
    *,
    inputs: Mapping[str, np.ndarray[Any, Any]] | None = None,
    hardware: Hardware | None = None,
    threads: int | None = None,
) -> Checked:
    """Run one config of a schedule and compare each result with its reference, within its bound.

    Args:
        schedule: The schedule.
        workload: Or its text.
        config: Default: the space's default.
        seed: Of fresh inputs.
        inputs: Canonical arrays that replace the fresh ones of the same name.
        hardware: Default: this machine.
        threads: Threads of the pool while the kernel runs; default: all.

    Raises:
        AssertionError: A result outside its bound, unwritten or not finite, a write behind the
            end of an array, an input that changed, or two runs that differ.
    """
    workload = parse_workload(workload) if isinstance(workload, str) else workload
    hardware = hardware or local_cpu()
    op = get_op(workload.op)
    assert schedule.supports(workload, hardware), f"{schedule.name} does not support {workload}"
    space = schedule.space(workload, hardware)
    config = space.default if config is None else config
    assert space.legal(config), f"{config} is not legal"
    json = schedule.config_to_json(config)
    assert schedule.config_from_json(json) == config, "config does not survive JSON"
    arrays = {**op.make_inputs(workload, np.random.default_rng(seed)), **(inputs or {})}
    expected = op.reference(workload, arrays)
    bounds = op.bound(workload, arrays, expected)
    kernel = schedule.lower(workload, config, hardware)
    where = f"{schedule.name} {workload} {config}"
    assert not hardware.missing(kernel.features), f"{where}: {hardware.missing(kernel.features)}"

    roles = {a.name: a for a in op.args(workload)}
    constant = {n: a for n, a in arrays.items() if roles[n].role in ("weight", "state")}
    packed = schedule.pack(workload, config, constant)
    memory: Arrays = {}
    canaries: Arrays = {}
    for arg in kernel.args:
        if arg.role == "output":
            source = poison(arg.shape, arg.dtype)
        else:
            source = packed[arg.name] if arg.role != "input" else arrays[arg.name]
        assert source.shape == arg.shape, f"{where}: {arg.name} {source.shape} != {arg.shape}"
        assert source.dtype == np_dtype(arg.dtype), f"{where}: {arg.name} is {source.dtype}"
        canary = 0 if arg.role == "state" else GUARD
        memory[arg.name], canaries[arg.name] = guarded(source, canary)
    before = {a.name: memory[a.name].copy() for a in kernel.args}
    code = compiled(kernel, hardware)
    tensors = [from_numpy(memory[a.name]) for a in kernel.args]
    set_threads(threads or hardware.threads)

    def call() -> None:
        code[kernel.name](*tensors)

    def results() -> Arrays:
        states = {a.name: memory[a.name] for a in kernel.args if a.role == "state"}
        states = schedule.unpack_state(workload, config, states)
        out = {name: array for name, array in states.items() if name in expected}
        return out | {a.name: memory[a.name] for a in kernel.args if a.role == "output"}

    call()
    first = {n: a.copy() for n, a in results().items()}
    for name, want in expected.items():
        compare(where, name, first[name], want, bounds[name])
    for arg in kernel.args:
        assert (canaries[arg.name] == 0xA5).all(), f"{where}: wrote behind the end of {arg.name}"
        if arg.role in ("input", "weight") or (arg.role == "state" and not arg.mutated):
            assert np.array_equal(raw(memory[arg.name]), raw(before[arg.name])), (
                f"{where}: {arg.name} was changed"
            )
    for name, values in before.items():
        memory[name][...] = values
    call()
    for name, again in results().items():
        assert np.array_equal(raw(again), raw(first[name])), f"{where}: {name} differs between runs"
    return Checked(kernel, arrays, memory, first, expected, call)


def compiled(kernel: Kernel, hardware: Hardware) -> Any:
    """Compile and link a kernel; one of the last `KEPT` functions, for the same hardware, comes for free."""
    key = (kernel.name, str(hardware), str(kernel.target))
    func, code = _compiled.pop(key, (None, None))
    if func is None or not runtime().structural_equal(func, kernel.func):
        func, code = kernel.func, load_object(compile_kernel(kernel, hardware))
    _compiled[key] = func, code
    if len(_compiled) > KEPT:
        _compiled.popitem(last=False)
    return code


def compare(where: str, name: str, got: Any, want: Any, bound: Any) -> None:
    """Assert that each element is within its bound; of an infinity, that it is met."""
    assert got.shape == want.shape, f"{where}: {name} {got.shape} != {want.shape}"
    if got.dtype == np.uint16:  # bfloat16 bits
        got = (got.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):
        error = np.abs(got.astype(np.float64) - want)
    bad = ~((error <= bound) | (np.isinf(want) & (got == want)))
    if bad.any():
        index = tuple(int(i) for i in np.argwhere(bad)[0])
        raise AssertionError(
            f"{where}: {int(bad.sum())} of {bad.size} elements of {name} are off, first at "
            f"{index}: {got[index]!r} instead of {want[index]!r}, "
            f"bound {np.broadcast_to(bound, want.shape)[index]:.3g}"
        )


def poison(shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, Any]:
    """Return an array that an honest kernel overwrites: NaN, or the smallest integer."""
    kind = np_dtype(dtype)
    if dtype == "bfloat16":
        return np.full(shape, 0x7FC0, kind)
    return np.full(shape, np.nan if kind.kind == "f" else np.iinfo(kind).min, kind)


def guarded(
    source: np.ndarray[Any, Any], canary: int = GUARD
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return an aligned copy and the canary bytes that follow it in memory, at least so many.

    Behind the canary lies a page that may neither be read nor written, so that a kernel that goes so far
    over an array's end dies here, and not only where nothing happens to follow the array.
    """
    room = -(-(source.nbytes + canary) // 64) * 64
    pages = -(-room // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    bytes_ = np.frombuffer(memory, np.uint8)
    assert _LIBC.mprotect(ctypes.c_void_p(bytes_.ctypes.data + pages), mmap.PAGESIZE, 0) == 0
    bytes_ = bytes_[pages - room : pages]
    copy = np.ndarray(source.shape, source.dtype, buffer=bytes_)
    copy[...] = source
    bytes_[source.nbytes :] = 0xA5
    assert as_aligned(copy) is copy
    return copy, bytes_[source.nbytes :]


def np_dtype(name: str) -> np.dtype[Any]:
    """Return the numpy dtype that carries an argument's elements (bfloat16 travels as uint16)."""
    return np.dtype("uint16" if name == "bfloat16" else name)


def raw(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return an array's bytes, so that NaN equals NaN."""
    return np.ascontiguousarray(array).view(np.uint8)
