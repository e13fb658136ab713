"""Records as a search would store them, for a workload that is never run."""

from __future__ import annotations

from mimo_compile.ir.hardware import PRESETS
from mimo_compile.search.records import Record, Verdict, record_key, versions

HW = PRESETS["x86-64-v3"].with_threads(2)
WORKLOAD = "swiglu:t=4,f=64"


def record(i: int = 0, latency: float | None = None, verdict: str = "ok", **more: object) -> Record:
    config = {"tile": i}
    workload = str(more.pop("workload", WORKLOAD))
    cache = str(more.pop("cache", "cold"))
    key = record_key(workload, "swiglu.x", 1, config, HW, cache, versions())
    values = {
        "key": key, "workload": workload, "schedule": "swiglu.x", "schedule_version": 1, "config": config,
        "hardware": HW.id, "features": tuple(sorted(HW.features)), "threads": HW.threads, "cache": cache,
        "versions": versions(), "verdict": Verdict(verdict), "time": 1.0 + i,
        "latency_us": (latency or 10.0 + i) if verdict == "ok" else latency,
    }  # fmt: skip
    return Record(**{**values, **more})
