"""Recorded spaces of toy workloads."""

from __future__ import annotations

from functools import cache

from toy_schedules import Other, Tiled, latency_us

from mimo_compile.cost_models.analytic import DeviceModel
from mimo_compile.ir.hardware import PRESETS
from mimo_compile.ir.ops import parse_workload
from mimo_compile.ir.workload import Workload
from mimo_compile.search.measure.recording import Recording
from mimo_compile.search.records import Record, Verdict, record_key, versions
from mimo_compile.search.space import JointSpace

HW = PRESETS["x86-64-v3"].with_threads(2)
DEVICE = DeviceModel.guess(HW)
SMALL = parse_workload("swiglu:t=4,f=64")
LARGE = parse_workload("swiglu:t=64,f=4096")


def schedules():
    return [Tiled(), Other()]


def recorded(workload: Workload, scale: float = 1.0, bad: float = 0.05) -> list[Record]:
    """The whole space of a workload; every twentieth candidate crashes."""
    return list(_recorded(workload, scale, bad))


@cache
def _recorded(workload: Workload, scale: float, bad: float) -> tuple[Record, ...]:
    out = []
    space = JointSpace(workload, HW, schedules())
    for i, c in enumerate(space):
        key = record_key(str(workload), c.schedule, 1, c.config, HW, "cold", versions())
        fails = bad and i % round(1 / bad) == 7 and c not in space.defaults()
        t = scale * latency_us(c.schedule, c.config)
        work = space.schedules[c.schedule].work(workload, space.config(c), HW)
        out.append(
            Record(
                key=key, workload=str(workload), schedule=c.schedule, schedule_version=1, config=c.config,
                hardware=HW.id, features=tuple(sorted(HW.features)), threads=2, cache="cold",
                versions=versions(), verdict=Verdict.WRONG if fails else Verdict.OK,
                latency_us=None if fails else t, ops=dict(work.ops), bytes=dict(work.bytes),
                modelled_mj=None if fails else DEVICE.energy_mj(work, t),
            )
        )  # fmt: skip
    return tuple(out)


def recording() -> Recording:
    """The whole space of the small workload."""
    rows = recorded(SMALL)
    space = JointSpace(SMALL, HW, schedules())
    works = [
        space.schedules[r.schedule].work(
            SMALL, space.schedules[r.schedule].config_from_json(r.config), HW
        )
        for r in rows
    ]
    return Recording(
        SMALL, HW, DEVICE, {"passes": 1},
        {n: {k: tuple(v) for k, v in s.knobs.items()} for n, s in space.spaces.items()},
        {c.schedule: c.knobs for c in space.defaults()}, tuple(rows),
        tuple(dict(w.traits) for w in works),
    )  # fmt: skip
