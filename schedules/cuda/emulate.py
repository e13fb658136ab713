"""CUDA text run on the CPU, thread by thread, to prove kernels where there is no GPU.

The text is compiled as it is by the host's C++ compiler; the device headers bring the other form of each of
their words (``MIMO_EMULATE``), which check what a GPU would not: that all lanes of a warp meet in the same
place, that nothing waits for ever, that asynchronous copies are waited for, that addresses are aligned and
inside their arrays. The threads of a block, or of a cluster of blocks, are fibers of one process; blocks, and
clusters, run one after the other.

Plain loads and stores are instrumented by the compiler (``-fsanitize=thread``, whose library the emulator
replaces), so that each is held against its array's extent, and against what other threads did there: two
that nothing orders are a race (`device/emulation/race.cuh`).

What it cannot see: some races between lanes of one warp, those in large arrays, time, and what nvcc makes of
the text (contracted multiply-adds, too); docs/cuda.md has the list. Blocks of no cluster that wait for each
other are not emulated, nor are clusters of more than 1024 threads.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np

from mimo_compile.errors import EnvironmentMismatch, VerificationError
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops.base import Array
from mimo_compile.schedules.base import Kernel
from mimo_compile.schedules.cuda import limits
from mimo_compile.schedules.cuda.code import DeviceCode, TensorMap
from mimo_compile.schedules.cuda.memory import Cell, carrier, cells_of

DEVICE = Path(__file__).parent / "device"
COMMON = (
    "-std=c++17", "-w", "-Wno-psabi", "-ffp-contract=off", "-fno-strict-aliasing", "-fno-stack-protector",
    "-fpie",
)  # fmt: skip
"""Options of the compiler: sums are not contracted, so that a result does not depend on the host."""
KERNEL = (
    *COMMON, "-O1", "-g1", "-gdwarf-4", "-fstack-clash-protection", "-fsanitize=alignment,bounds,thread",
    "-fsanitize-undefined-trap-on-error", "-fno-thread-jumps",
)  # fmt: skip
"""Those of a kernel's text: each plain access calls the emulator, in the place of the library for threads.
Jumps are not threaded: it copies words behind a branch into its arms, where warps would seem to diverge."""


class EmulationError(VerificationError):
    """Emulated code did what it must not, or did not compile; the message names the thread and the place."""


@cache
def compiler() -> str | None:
    """Return the host's C++ compiler: ``CXX``, else g++ or clang++; None where there is none."""
    names = [os.environ.get("CXX", ""), "g++", "clang++"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


def emulate(
    kernel: Kernel,
    hardware: Hardware,
    arrays: Mapping[str, Array],
    *,
    order: int = 0,
    timeout_s: float = 300,
) -> dict[str, Array]:
    """Run the launches of a kernel.

    Args:
        kernel: One with `Kernel.device`.
        hardware: The GPU whose limits hold.
        arrays: Its inputs, packed weights and packed states, by the names of `Kernel.args`.
        order: Which warp goes on where several can: 0 the first, 1 the last, others are seeds. Arrays end at
            a forbidden page; with odd orders they begin behind one.
        timeout_s: Longest time.

    Returns:
        Outputs and mutated states, by name, as the kernel left them. What it did not write is NaN, the
        smallest signed or the largest unsigned integer.

    Raises:
        EmulationError: The code did something that it must not, or is no C++.
        EnvironmentMismatch: There is no C++ compiler.
        ValueError: The GPU cannot do a launch of the kernel (`limits.check`).
    """
    code = limits.check(kernel, hardware)
    cells = cells_of(kernel, code)
    memory = [cell.filled(arrays) for cell in cells]
    program = _built(_source(kernel.name, code, cells))
    with tempfile.TemporaryDirectory(prefix="mimo-emulate-") as name:
        folder = Path(name)
        with (folder / "memory").open("wb") as file:
            for array in memory:
                file.write(np.ascontiguousarray(array).tobytes())
        _run(kernel.name, [str(program), name, str(order), str(order % 2)], timeout_s)
        raw = (folder / "results").read_bytes()
    out: dict[str, Array] = {}
    at = 0
    for cell, array in zip(cells, memory, strict=True):
        if cell.written:
            values = np.frombuffer(raw, array.dtype, array.size, at).reshape(array.shape).copy()
            at += array.nbytes
            if not cell.scratch:
                out[cell.name] = values
    return out


def _source(name: str, code: DeviceCode, cells: list[Cell]) -> str:
    """Return the program: the text as it is, then a `main` that makes the launches."""
    place = {cell.name: i for i, cell in enumerate(cells)}
    table = [
        f'    {{"{c.name}", {limits.array_bytes(c.arg)}u, {str(c.written).lower()}}},'
        for c in cells
    ]
    lines = [
        "#define MIMO_EMULATE 1",
        '#include "emulation/launch.cuh"',
        f'#line 1 "{name}.cu"',
        code.text,
        "int main(int, char** arguments) {",
        "  emulated::start(arguments, {",
        *table,
        "  });",
    ]
    for launch in code.launches:
        operands = ", ".join(_operand(o, place) for o in launch.operands)
        x, y, z = launch.grid
        lines.append(
            f'  emulated::launch<{launch.symbol}>("{launch.symbol}", {{{x}u, {y}u, {z}u}}, '
            f"{launch.threads}, {launch.shared_bytes}, {launch.cluster}, {{{operands}}});"
        )
    return "\n".join([*lines, "  return emulated::finish();", "}", ""])


def _operand(operand: str | int | float | TensorMap, place: Mapping[str, int]) -> str:
    if isinstance(operand, str):
        return f"emulated::pointer({place[operand]})"
    if isinstance(operand, TensorMap):
        m = operand
        sizes = (
            carrier(m.dtype).itemsize,
            m.rows,
            m.columns,
            m.box_rows,
            m.box_columns,
            m.swizzle,
        )
        return f"emulated::tensor_map({', '.join(map(str, (place[m.array], *sizes)))})"
    if isinstance(operand, int):
        return f"emulated::integer({operand})"
    return f"emulated::real({float(np.float32(operand)).hex()}f)"


@cache
def _folder() -> Path:
    """Return this process's folder of programs; it goes with the process."""
    folder = Path(tempfile.mkdtemp(prefix="mimo-emulate-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def _runtime(cxx: str) -> Path:
    """Compile what all emulated texts are linked with."""
    built = _folder() / "runtime.o"
    source = DEVICE / "emulation" / "runtime.cuh"
    _compile([cxx, *COMMON, "-O2", "-x", "c++", "-c", "-o", str(built), str(source)])
    return built


@cache
def _built(source: str) -> Path:
    """Compile a program; one of the same source comes for free."""
    cxx = compiler()
    if cxx is None:
        raise EnvironmentMismatch(
            "emulating CUDA code needs a C++ compiler",
            remedy="Install g++ or clang++, or name one in CXX",
        )
    runtime = _runtime(cxx)
    stem = _folder() / hashlib.sha256(source.encode()).hexdigest()[:16]
    text, code, program = (stem.with_suffix(s) for s in (".cpp", ".o", ".run"))
    text.write_text(source, encoding="utf-8")
    _compile([cxx, *KERNEL, "-I", str(DEVICE), "-c", "-o", str(code), str(text)])
    _compile([cxx, "-pie", "-o", str(program), str(code), str(runtime)])
    return program


def _compile(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        raise EmulationError(
            f"the host's compiler refuses the text: {'; '.join(errors[:3])}", where=command[0]
        )


def _run(name: str, command: list[str], timeout_s: float) -> None:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise EmulationError(f"not at its end after {timeout_s:g} s", where=name) from None
    if done.returncode == 0:
        return
    said = done.stderr.strip().splitlines()
    text = said[-1] if said else f"ended with {done.returncode}"
    raise EmulationError(_with_line(text, command[0]), where=name)


def _with_line(text: str, program: str) -> str:
    """Replace the address of an access by its line, where binutils are installed."""
    found = re.search(r"at (0x[0-9a-f]+)", text)
    tool = shutil.which("addr2line")
    if found is None or tool is None:
        return text
    address = hex(int(found[1], 16) - 1)  # of the call itself
    command = [tool, "-i", "-e", program, address]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line.rsplit("/", 1)[-1].split(" ")[0] for line in done.stdout.splitlines()]
    lines = [line for line in lines if not line.startswith("launch.cuh")]
    return text.replace(found[0], "in " + " < ".join(lines)) if lines else text
