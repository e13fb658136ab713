"""Real CUDA kernels through a device batch: what travels is enough to run them, and to judge them afterwards.

Memory is that of the stand-in for the driver; a call emulates the kernel's text with the launches and arrays
of the batch, as they were read from its folder.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from gpu_stand_in import MISSING, compile_driver

from mimo_compile._cuda import Driver
from mimo_compile.ir.hardware import CUDA
from mimo_compile.ir.ops import parse_workload
from mimo_compile.runtime.device_code import DeviceKernel
from mimo_compile.schedules import get_schedule
from mimo_compile.schedules.cuda.emulate import compiler, emulate
from mimo_compile.schedules.cuda.limits import array_bytes, code_of
from mimo_compile.schedules.cuda.memory import carrier
from mimo_compile.schedules.cuda.nvcc import find_tool
from mimo_compile.schedules.cuda.table import kernel_of
from mimo_compile.search.database import Database
from mimo_compile.search.device_batch import runner
from mimo_compile.search.device_batch.files import Folder, Job, Unit
from mimo_compile.search.measure import Limits, Timing, gpu_slot, slots
from mimo_compile.search.measure.worker import Reply
from mimo_compile.search.records import Verdict
from mimo_compile.search.tune import tune_workloads

pytestmark = [
    pytest.mark.slow,
    pytest.mark.compile,
    pytest.mark.skipif(
        MISSING or find_tool("nvcc") is None or compiler() is None,
        reason="nvcc, cuda.h, gcc or a C++ compiler is not installed",
    ),
]
H200 = CUDA["cuda:sm_90a"]
WORKLOADS = {
    "mpgemm:m=2,n=40,k=128,w=w4g64,a=a8": {"mpgemm.cuda_gemv"},
    "mpgemm:m=70,n=72,k=136,w=bf16,a=abf16": {"mpgemm.cuda_wgmma", "mpgemm.cuda_mma"},
    "kv_append:t=2,h=4,kv=2,d=40,dv=32,cap=64,rot=16,c=bf16": {"kv_append.cuda"},
    "cached_attention:t=1,h=4,kv=2,d=40,dv=32,cap=100,c=bf16": {"cached_attention.cuda_decode"},
}
"""Each with schedules that have to be among those that are run: tensor maps, states, two cases, scratch."""


class Emulated:
    """`_cuda.Launches` of a kernel whose text is known; arrays lie where the stand-in has them."""

    job: Job
    unit: Unit

    def __init__(self, on: Any, module: Any, launches: Any, place: Any) -> None:
        schedule = get_schedule(self.job.schedule)
        config = schedule.config_from_json(self.job.config)
        made = schedule.lower(parse_workload(self.unit.workload), config, H200)
        table = msgspec.convert(self.job.facts["device"], DeviceKernel)
        assert table.launches == launches
        self.kernel = kernel_of("kernel", table, code_of(made).text)
        self.place = place

    def __call__(self, stream: Any = None) -> None:
        args = {a.name: a for a in self.kernel.args}

        def array(arg: Any) -> np.ndarray:
            memory = (ctypes.c_ubyte * array_bytes(arg)).from_address(self.place(arg.name))
            return np.frombuffer(memory, carrier(arg.dtype)).reshape(arg.shape)

        given = {a.name: array(a).copy() for a in args.values() if a.role != "output"}
        for name, values in emulate(self.kernel, H200, given).items():
            array(args[name])[...] = values


class InPlace:
    """A pool of one child that is this process."""

    def __init__(self, on: Driver) -> None:
        def load(request: dict[str, Any]) -> dict[str, Any]:
            if old := slots.SLOTS.pop(request["slot"], None):
                old.close()
            slots.SLOTS[request["slot"]] = gpu_slot.GpuSlot(on, request)
            return {}

        self.handlers = slots.handlers(load)

    def call(self, request: Any, limit_s: float) -> Reply:
        sent = msgspec.json.decode(msgspec.json.encode(request))
        return Reply("ok", self.handlers[sent["do"]](sent))

    def close(self) -> None:
        slots.drop({})


def test_what_travels_is_enough(tmp_path: Path, tmp_path_factory, monkeypatch) -> None:
    on = Driver(str(compile_driver(tmp_path_factory.mktemp("driver"))))
    on.enter()
    monkeypatch.setattr(gpu_slot, "Launches", Emulated)
    monkeypatch.setattr(gpu_slot.GpuSlot, "batch", lambda self, number, start: 1e-5)
    monkeypatch.setattr(runner, "local_cuda", lambda: H200)
    monkeypatch.setattr(runner, "Pool", lambda *a, **k: InPlace(on))
    workloads = {parse_workload(text): 1.0 for text in WORKLOADS}
    quick = Timing(warm_up_s=0.001, batches=3, batch_s=0.001, budget_s=0.05)
    how = {"trials": 10, "timing": quick, "device_batch": tmp_path / "batch"}
    with Database(tmp_path / "records.db") as db:
        tune_workloads(workloads, H200, db=db, **how)
        folder = Folder(tmp_path / "batch")
        batch = folder.read()
        assert batch.header.limits == Limits()
        with runner._Runner(folder, batch) as running:
            for unit in batch.units:
                Emulated.unit, (Emulated.job,) = unit, unit.jobs
                folder.add(running.run(unit))
        tune_workloads(workloads, H200, db=db, **how)
        records = list(db)
    assert len(records) == len(batch.units) >= 5
    assert {r.verdict for r in records} == {Verdict.OK}, [r.message for r in records]
    assert all(r.latency_us == pytest.approx(10.0) and r.error_ratio <= 1 for r in records)
    for text, schedules in WORKLOADS.items():
        assert schedules <= {r.schedule for r in records if r.workload == str(parse_workload(text))}
    assert {len(job.cases) for unit in batch.units for job in unit.jobs} == {1, 2}
    maps = [u for u in batch.units if "box_rows" in str(u.jobs[0].facts["device"])]
    assert maps, "a kernel with tensor maps"
