"""Kernels in the child that owns the GPU, with a driver in the place of NVIDIA's."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from gpu_stand_in import MISSING, compile_driver

from mimo_compile._cuda import CudaError, Driver, Launch
from mimo_compile.runtime.device_code import Argument, DeviceKernel, Scratch
from mimo_compile.search.measure import slots
from mimo_compile.search.measure.gpu_slot import GRAPHS, SETS, GpuSlot

pytestmark = pytest.mark.skipif(MISSING, reason="cuda.h or gcc is not installed")
N = 40
ARGS = (
    Argument("w", "weight", (N,), "float32"),
    Argument("x", "input", (N,), "float32"),
    Argument("y", "output", (N,), "float32"),
)
TWICE = Launch("twice", (1, 1, 1), 128, ("w", "half", N))
PLUS = Launch("plus", (1, 1, 1), 128, ("half", "x", "y", N))
WHOLE, OTHER = 4 * N, 2 * 4 * N
"""Bytes of the weights, and of the other arguments."""
SCRATCH = (Scratch("half", (N,), "float32", 0), Scratch("rest", (N,), "float32", 256))


@pytest.fixture(scope="module")
def on(tmp_path_factory) -> Driver:
    made = Driver(str(compile_driver(tmp_path_factory.mktemp("driver"))))
    made._library.fake_told.restype = ctypes.c_char_p
    made._library.fake_first.restype = ctypes.c_uint64
    made.enter()
    assert made.uuid == "GPU-00112233-4455-6677-8899-aabbccddeeff"
    return made


@pytest.fixture
def make(on: Driver, tmp_path: Path) -> Iterator[Any]:
    """Load ``y = 2 w + x`` with launches behind it, and take care that all is given back."""
    loaded = []

    def load(*more: Launch, dram: float | None = None, **shapes: tuple[int, ...]) -> GpuSlot:
        (tmp_path / "code").write_bytes(b"\x7fELF\0\1")
        files = {}
        for name, value in (("w", 3.0), ("x", 0.5)):
            files[name] = str(tmp_path / f"{name}.npy")
            np.save(files[name], np.full(shapes.get(name, (N,)), value, np.float32))
        kernel = DeviceKernel(ARGS, (TWICE, PLUS, *more), SCRATCH)
        args = [
            {**msgspec.to_builtins(a), "mutated": a.mutated, "file": files.get(a.name)}
            for a in ARGS
        ]
        slot = GpuSlot(
            on,
            {
                "code": str(tmp_path / "code"),
                "args": args,
                "device": msgspec.to_builtins(kernel),
                "bytes": {} if dram is None else {"dram": dram},
            },
        )
        loaded.append(slot)
        slots.SLOTS["a"] = slot
        return slot

    before = on._library.fake_held()
    yield load
    slots.drop({})
    assert on._library.fake_held() == before


def check(tmp_path: Path) -> tuple[dict[str, Any], np.ndarray]:
    folder = tmp_path / "results"
    folder.mkdir(exist_ok=True)
    return slots.check({"slot": "a", "folder": str(folder)}), np.load(folder / "y.npy")


def test_results_come_back_and_nothing_else_changed(make, tmp_path) -> None:
    make()
    seen, y = check(tmp_path)
    assert (y == 6.5).all() and seen == {
        "overrun": [],
        "modified": [],
        "differs": [],
        "forked": False,
    }
    assert slots.again({"slot": "a"}) == seen


@pytest.mark.parametrize(
    ("launch", "name"),
    [
        (Launch("beyond", (1, 1, 1), 32, ("y", N)), ("overrun", ["y"])),
        (Launch("beyond", (1, 1, 1), 32, ("w", -1)), ("overrun", ["w"])),
        (Launch("beyond", (1, 1, 1), 32, ("half", N + 7)), ("overrun", ["half"])),
        (Launch("beyond", (1, 1, 1), 32, ("x", 3)), ("modified", ["x"])),
        # nobody wrote the array that is read
        (Launch("plus", (1, 1, 1), 32, ("rest", "x", "y", N)), ("differs", ["y"])),
    ],
)
def test_what_a_kernel_must_not_do_is_seen(make, tmp_path, launch, name) -> None:
    make(launch)
    seen, _ = check(tmp_path)
    assert seen[name[0]] == name[1]


def test_weights_rotate_and_calls_are_graphs(make, on, tmp_path) -> None:
    slot = make()
    check(tmp_path)
    on._library.fake_told()
    assert (
        slot.rotate(3 * 4 * N - 1, 1 << 30) == 4 * 4 * N
    )  # three are as much as is asked for, and one more
    assert slot.rotate(1 << 30, 10 * 4 * N) == 10 * 4 * N  # as many as there is memory for
    assert slot.batch(5, 8) == pytest.approx(0.25e-3 / 5)
    told = Counter(on._library.fake_told().decode().split())
    assert told == {"graph": 2, "replay": 2, "twice": 10, "plus": 10}, (
        "the sets before it run untimed"
    )
    slot.batch(5, 18)
    assert "graph" not in on._library.fake_told().decode(), "the same calls are the same graph"
    _, y = check(tmp_path)
    assert (y == 6.5).all()
    assert slot.rotate(1 << 40, 1 << 40) == SETS * 4 * N


def test_timing_and_spinning(make, on) -> None:
    make()
    request = {
        "slots": ["a"], "rotate_bytes": 400, "memory_bytes": 1 << 20, "warm_up_s": 1e-4, "batch_s": 1e-3,
        "batches": 3, "budget_s": 1.0, "stop_above_s": 1.0,
    }  # fmt: skip
    found = slots.timing(request)
    assert found["seconds"] == [[pytest.approx(0.25e-3 / 4)] * 3] and found["calls"] == [12]
    assert found["device"] == "Stand-in"
    on._library.fake_told()
    spun = slots.spin({"slot": "a", "seconds": 0.01})
    told = Counter(on._library.fake_told().decode().split())
    assert spun["calls"] == told["plus"] - 2 and spun["seconds"] >= 0.01 and told["replay"] >= 3


def test_failures_are_named_and_nothing_stays(make, on) -> None:
    with pytest.raises(CudaError, match="cuModuleGetFunction"):
        make(Launch("absent", (1, 1, 1), 32, ()))
    with pytest.raises(
        ValueError, match=r"w: the kernel wants float32\[40\], packing gave float32\[39\]"
    ):
        make(w=(39,))


def read(on: Driver, calls: int) -> list[int]:
    """Return which weights each call read since the stand-in was last asked; a call is two launches."""
    return [on._library.fake_first(2 * i) for i in range(calls)]


def test_timed_calls_read_set_after_set(make, on) -> None:
    slot = make()
    slot.rotate(3 * 4 * N - 1, 1 << 30)
    on._library.fake_told()
    slot.batch(3, 1)
    before, timed = read(on, 6)[:3], read(on, 6)[3:]
    assert len({*before, *timed}) == 4 and len({*timed}) == 3 == len({*before})
    assert before[1:] == [timed[2], slot.buffers[0].address], "which end where the timed ones begin"
    on._library.fake_told()
    slot.batch(3, 4)
    assert read(on, 6)[:3] == timed, "the last timed ones are the next ones before"


@pytest.mark.parametrize(
    ("dram", "wanted", "memory", "found"),
    [
        (
            OTHER + WHOLE / 8,
            WHOLE,
            1 << 30,
            9 * WHOLE // 8,
        ),  # eight calls read as much as all weights
        (OTHER + WHOLE, WHOLE, 1 << 30, 2 * WHOLE),
        (9 * WHOLE, WHOLE, 1 << 30, 2 * WHOLE),  # it reads them more than once
        (OTHER, 1 << 30, 5 * WHOLE, 5),  # memory is for whole sets
    ],
)
def test_sets_are_counted_by_what_a_call_reads(make, dram, wanted, memory, found) -> None:
    assert make(dram=dram).rotate(wanted, memory) == found


def test_half_of_what_is_free_stays_free(make, on) -> None:
    slot = make()
    before, left, total = ctypes.c_size_t(), ctypes.c_size_t(), ctypes.c_size_t()
    machine = on._library.fake_machine
    machine.argtypes = (*3 * (ctypes.c_int,), ctypes.c_longlong)
    try:
        machine(90, 13000, 1, 1 << 18)
        on("cuMemGetInfo_v2", ctypes.byref(before), ctypes.byref(total))
        assert 2 * WHOLE < slot.rotate(1 << 40, 1 << 40) < SETS * WHOLE
        on("cuMemGetInfo_v2", ctypes.byref(left), ctypes.byref(total))
        assert left.value >= before.value // 2
    finally:
        machine(90, 13000, 1, 1 << 40)


def test_copies_hold_the_first_contents(make, on, tmp_path) -> None:
    slot = make()
    slot.rotate(4 * 4 * N, 1 << 30)
    on._library.fake_told()
    slot.batch(4, 1)
    places = set(read(on, 8))
    assert len(places) == 5
    for place in places:
        held = np.frombuffer((ctypes.c_ubyte * (4 * N)).from_address(place), np.float32)
        assert (held == 3.0).all()


def test_graphs_in_use_are_kept(make, on) -> None:
    slot = make()
    slot.rotate(62 * 4 * N, 1 << 30)
    order: list[int] = []
    for start in range(
        63
    ):  # far more than are kept; that before is the oldest of them when it is used
        slot.batch(1, start)
        on._library.fake_told()
        slot.batch(8, start)
        order.append(read(on, 9)[8])
        if start > 8:
            assert read(on, 8) == order[start - 8 : start]
    assert len(slot._graphs) <= GRAPHS and len({*order}) == 63
