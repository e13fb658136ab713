"""Every schedule with every weight format that it takes, and whole numbers whose sums are known exactly."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from harness import Arrays, compare, guarded, poison
from test_amx import SPR, PlainTiles

from mimo_compile._tvm import from_numpy, load_object, set_threads
from mimo_compile.errors import UsageError
from mimo_compile.ir.formats import (
    ACT_NAMES,
    E4M3_NAN,
    WeightFormat,
    parse_act_format,
    weight_formats,
)
from mimo_compile.ir.hardware import PRESETS, Hardware, local_cpu
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.ir.ops.mpgemm import magnitudes, real_weights
from mimo_compile.ir.ops.numerics import f32_to_bf16
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules import get_schedule, names_for
from mimo_compile.schedules.base import Kernel, Schedule
from mimo_compile.schedules.compile import compile_kernel

CPU = local_cpu()
OLDER = dataclasses.replace(CPU, features=CPU.features - {"avx512vbmi"})
"""This CPU, were it to permute bytes within 128 bits only."""
MACHINES = (CPU, OLDER, *(h for h in PRESETS.values() if h.features <= CPU.features))
"""What code can be generated for that runs here, the best first."""
TOKENS = (3, 19, 50)
"""No multiple of any tile; the others for schedules of many tokens."""
LONG = 14336
"""Columns of the widest matrices of usual models."""
EXACT = 2**24
"""float32 holds whole numbers up to it."""


@dataclass(frozen=True)
class Case:
    """A schedule that takes a format with an activation format, and hardware to generate code for."""

    schedule: Schedule
    fmt: WeightFormat
    act: str
    hardware: Hardware
    tokens: int

    def workload(self, n: int, k: int, m: int = 0, extra: str = "") -> Workload | None:
        """Return a workload of this case, or None where the schedule leaves the shape to others."""
        many = 2 if self.fmt.family == "complex" else 1
        shape = f"m={m or self.tokens},n={many * n},k={k + k % many}"
        try:
            found = parse_workload(f"mpgemm:{shape},w={self.fmt},a={self.act}{extra}")
        except UsageError:
            return None
        return found if self.schedule.supports(found, self.hardware) else None

    def __str__(self) -> str:
        return f"{self.schedule.name} {self.fmt},{self.act}"


@cache
def runnable(name: str) -> Schedule:
    """Return a schedule, matrix tiles replaced by ones in memory that every CPU has."""
    schedule = get_schedule(name)
    if not hasattr(schedule, "tiles_class"):
        return schedule
    kind = type(schedule)

    def supports(self: Any, workload: Workload, hardware: Hardware) -> bool:
        with_tiles = dataclasses.replace(hardware, features=hardware.features | SPR.features)
        return kind.supports(self, workload, with_tiles)

    def lower(self: Any, workload: Workload, config: Any, hardware: Hardware) -> Kernel:
        kernel = kind.lower(self, workload, config, hardware)
        return dataclasses.replace(kernel, features=frozenset())

    members = {"tiles_class": PlainTiles, "supports": supports, "lower": lower}
    made: Schedule = type(f"{kind.__name__}InMemory", (kind,), members)()
    return made


@cache
def cases(name: str) -> tuple[Case, ...]:
    """Return the cases of a schedule: each format and activation that it takes at one of some shapes."""
    schedule, found = runnable(name), []
    for fmt in weight_formats():
        for act in ACT_NAMES:
            tries = (Case(schedule, fmt, act, hardware, m) for hardware in MACHINES for m in TOKENS)
            case = next((c for c in tries if c.workload(17, 1440)), None)
            if case is not None:
                found.append(case)
    return tuple(found)


@cache
def standing_for_all(name: str) -> tuple[Case, ...]:
    """Return cases of a schedule: every base with each group and int8 activations, or with the first that it
    takes, and with each other kind of activations in one of the groups.

    Groups of the tensor are left out: kernels read them as those of rows.
    """
    found: dict[tuple[str, str], dict[str, Case]] = {}
    for case in sorted(cases(name), key=lambda c: c.act != "a8"):
        base, act = case.fmt.name.partition("g")[0], parse_act_format(case.act)
        kind, sizes = act.kind, str(max(case.fmt.group, 0))
        if act.group > 0:
            kind, sizes = "groups", f"{sizes} {case.act}"
        found.setdefault((base, kind), {}).setdefault(sizes, case)
    chosen: list[Case] = []
    bases: set[str] = set()
    for number, ((base, _), groups) in enumerate(found.items()):
        of_all = list(groups.values())
        chosen += [of_all[7 * number % len(of_all)]] if base in bases else of_all
        bases.add(base)
    return tuple(chosen)


def names() -> list[str]:
    """Return the matmul schedules that make code for CPUs."""
    return [n for n in names_for("mpgemm") if ".simulated." not in type(get_schedule(n)).__module__]


# -- whole numbers ---------------------------------------------------------------------------------


def adversarial(case: Case, workload: Workload, seed: int) -> Iterator[tuple[str, Arrays]]:
    """Yield names and canonical arrays whose products are whole numbers times a power of two.

    Rows of x, and each group of 16 columns in them, have 127 times a power of two as their largest
    magnitude or are zero: int8 activations are then what x is, whatever shares their scale.
    """
    fmt, rng = case.fmt, np.random.default_rng(seed)
    m, n, k = (workload.integer(name) for name in "mnk")
    if fmt.is_float:
        yield from _floats(fmt, m, n, k, rng)
        return
    for name, arrays in _coded(fmt, m, n, k, rng):
        if fmt.has_zero:
            points = rng.integers(0, fmt.max_code + 1, fmt.scale_shape(n, k)).astype(np.float32)
            arrays = {"zero": points, **arrays}
        yield name, arrays


def _floats(
    fmt: WeightFormat, m: int, n: int, k: int, rng: np.random.Generator
) -> Iterator[tuple[str, Arrays]]:
    for name, x in (
        ("all max", np.full((m, k), 127.0)), ("alternating", np.where(np.arange(k) % 2, 127.0, -127.0)),
        ("outlier", np.where(np.arange(k) == k // 3, 127.0 * 256, 0.0)), ("zero", np.zeros(k)),
        ("anything", rng.integers(-127, 128, (m, k))),
    ):  # fmt: skip
        w = rng.integers(-4, 5, (n, k)).astype(np.float32)
        x = np.ascontiguousarray(np.broadcast_to(x, (m, k)), np.float32)
        yield name, {"x": x, "w": f32_to_bf16(w) if fmt.bits == 16 else w}


def _coded(
    fmt: WeightFormat, m: int, n: int, k: int, rng: np.random.Generator
) -> Iterator[tuple[str, Arrays]]:
    rows, columns = fmt.code_shape(n, k)
    high, low, small = _codes(fmt)
    ones = np.ones(fmt.scale_shape(n, k), np.float32)
    turns = np.where(np.arange(columns) % 2, high, low).astype(np.uint8)
    top = np.full((rows, columns), high, np.uint8)
    bottom, alternating = np.full_like(top, low), np.tile(turns, (rows, 1))
    signs = np.where(np.arange(k) % 2, 127, -127).astype(np.float32) * np.ones((m, 1), "f4")
    most = np.full((m, k), 127, np.float32)
    outlier = np.zeros((m, k), np.float32)
    outlier[:, k // 3] = 127 * 256
    zero_row = np.where(np.arange(m)[:, None] == m // 2, 0, signs).astype(np.float32)
    mixed = rng.integers(-127, 128, (m, k)).astype(np.float32)
    mixed[:, ::16] = mixed[:, k // 2] = 127  # complex weights: both halves of a row
    powers = 2.0 ** rng.integers(-3, 2, ones.shape)
    # a few groups only, so that sums stay whole in float32 where each group is as large as can be
    few = ones * 0
    few[:, : fmt.scales_per_group] = few[:, -fmt.scales_per_group :] = 1
    some_zero = np.where(np.arange(ones.shape[1]) // fmt.scales_per_group % 3 == 1, 0, ones)
    any_code = rng.integers(0, fmt.max_code + 1, top.shape, dtype=np.uint8)
    if fmt.family == "fp8":
        any_code[np.isin(any_code, E4M3_NAN)] = 0
    row_of_zeros = alternating.copy()
    row_of_zeros[rows // 2] = small
    yield "all max", {"x": most, "codes": top, "scale": few}
    yield "all max, every group", {"x": most, "codes": top, "scale": ones}
    yield "all min", {"x": -most, "codes": bottom, "scale": few}
    yield "alternating signs", {"x": signs, "codes": alternating, "scale": few}
    yield "signs against each other", {"x": signs, "codes": top, "scale": ones}
    yield "single outlier", {"x": outlier, "codes": alternating, "scale": ones}
    yield "zero row of x", {"x": zero_row, "codes": any_code, "scale": powers}
    yield "zero row of weights", {"x": mixed, "codes": row_of_zeros, "scale": ones}
    yield "zero groups", {"x": mixed, "codes": any_code, "scale": some_zero}
    yield "anything", {"x": mixed, "codes": any_code, "scale": powers}
    if fmt.scales_per_group == 2:
        for side in (0, 1):
            one = ones.copy()
            one[:, side::2] = 0
            yield f"group without side {side}", {"x": mixed, "codes": any_code, "scale": one}
    if fmt.has_zero:
        for point in (0, fmt.max_code):
            zero = np.full(ones.shape, point, np.float32)
            yield f"zero point {point}", {"x": most, "codes": top, "scale": ones, "zero": zero}


def _codes(fmt: WeightFormat) -> tuple[int, int, int]:
    """Return the codes of the largest, the smallest and the least value."""
    if fmt.family == "complex":
        return 0, 2, 1
    if fmt.is_integer:
        return fmt.max_code, 0, int(fmt.fixed_zero)
    values = np.array(fmt.values)
    return int(np.nanargmax(values)), int(np.nanargmin(values)), int(np.nanargmin(abs(values)))


def exact_product(
    fmt: WeightFormat, act: str, inputs: Mapping[str, Any]
) -> tuple[np.ndarray[Any, Any], ...]:
    """Return y in int64 arithmetic, rounded once to float32, and which elements no kernel may round.

    No kernel may round sums whose terms' magnitudes add up to less than 2**24 of their unit, in any order;
    nor those of integer codes with one scale a row, which are formed in 32-bit integers and rounded once.
    """
    weights = real_weights(inputs, "", fmt).numpy()
    unit = np.min(2.0 ** np.floor(np.log2(abs(weights[weights != 0]))), initial=1.0) * 2.0**-8
    x, w = inputs["x"].astype(np.int64), (weights / unit).astype(np.int64)
    # values of NormalFloat are no whole numbers; with int8 activations kernels round them to 24 bits
    fractions = fmt.family == "codebook" and any(8 * value % 1 for value in fmt.values)
    if (fractions and parse_act_format(act).is_int8) or not np.array_equal(w * unit, weights):
        y = x @ weights.T
        return y, np.zeros_like(y, bool)
    while not (w & 1).any() and w.any():
        w, unit = w >> 1, unit * 2
    y = x @ w.T
    sizes = magnitudes(inputs, "", fmt, torch.from_numpy(weights), act).abs()
    size = (sizes.numpy() / unit).astype(np.int64)
    sure = np.abs(x) @ size.T < EXACT
    if act == "a8" and fmt.is_integer and fmt.groups(x.shape[1]) == 1:
        sure[...] = True
    return (y * unit).astype(np.float32), sure


# -- running ---------------------------------------------------------------------------------------


class Built:
    """One kernel, compiled once, to be run on any inputs."""

    def __init__(self, case: Case, workload: Workload, config: Any) -> None:
        self.case, self.workload, self.config = case, workload, config
        self.where = f"{case} {workload} {config}"
        self.kernel = case.schedule.lower(workload, config, case.hardware)
        self.code = load_object(compile_kernel(self.kernel, case.hardware))

    def run(self, inputs: Arrays) -> np.ndarray[Any, Any]:
        """Return y; y is poisoned before, and nothing behind it may be written."""
        weights = {n: a for n, a in inputs.items() if n != "x"}
        given = self.case.schedule.pack(self.workload, self.config, weights) | {"x": inputs["x"]}
        memory, canaries = {}, {}
        for arg in self.kernel.args:
            source = poison(arg.shape, arg.dtype) if arg.role == "output" else given[arg.name]
            assert source.shape == arg.shape, f"{self.where}: {arg.name} {source.shape}"
            memory[arg.name], canaries[arg.name] = guarded(source)
        set_threads(self.case.hardware.threads)
        self.code[self.kernel.name](*(from_numpy(memory[a.name]) for a in self.kernel.args))
        for name, canary in canaries.items():
            assert (canary == 0xA5).all(), f"{self.where}: wrote behind the end of {name}"
        return memory["y"]

    def prove(self, name: str, inputs: Arrays) -> int:
        """Compare with int64 arithmetic, to the bit where that can be asked; return how many elements."""
        where = f"{self.where}: {name}"
        op = get_op("mpgemm")
        y = self.run(inputs)
        exact, sure = exact_product(self.case.fmt, self.case.act, inputs)
        wrong = sure & (y != exact)
        if wrong.any():
            at = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise AssertionError(f"{where}: y{at} is {y[at]!r}, not {exact[at]!r}")
        if not sure.all():
            expected = op.reference(self.workload, inputs)
            bound = op.bound(self.workload, inputs, expected)["y"]
            compare(where, "y", y, expected["y"], bound)
        return int(sure.sum())
