"""Kernel schedules: for each op and hardware family, a space of configs and config -> kernel."""

from __future__ import annotations

if __name__ != "mimo_compile.schedules":
    raise ImportError("import mimo_compile.schedules, not schedules")

from importlib import import_module

from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Kernel, Schedule, Space

SCHEDULES: dict[str, dict[str, str]] = {
    "mpgemm": {
        "mpgemm.x86_vnni": "mpgemm.x86_vnni:X86Vnni",
        "mpgemm.x86_portable": "mpgemm.x86_portable:X86Portable",
        "mpgemm.x86_float": "mpgemm.x86_float:X86Float",
    },
    "cached_attention": {"cached_attention.x86_flash": "attention.x86_flash:X86Flash"},
    "kv_append": {"kv_append.x86": "attention.x86_append:X86Append"},
    "moe": {
        "moe.x86_vnni": "moe.x86_vnni:X86MoeVnni",
        "moe.x86_float": "moe.x86_float:X86MoeFloat",
    },
    "route": {"route.x86": "moe.x86_route:X86Route"},
    "rms_norm": {"rms_norm.x86": "elementwise.x86_rms_norm:X86RmsNorm"},
    "rope_table": {"rope_table.x86": "elementwise.x86_rope_table:X86RopeTable"},
    "swiglu": {"swiglu.x86": "elementwise.x86_swiglu:X86SwiGlu"},
    "embed": {"embed.x86": "elementwise.x86_embed:X86Embed"},
}
"""Op -> schedule name -> where its class lives; modules are imported on use."""


def get_schedule(name: str) -> Schedule:
    """Return a schedule by name (KeyError if there is none)."""
    for entries in SCHEDULES.values():
        if name in entries:
            module, _, cls = entries[name].partition(":")
            schedule: Schedule = getattr(import_module(f"mimo_compile.schedules.{module}"), cls)()
            return schedule
    raise KeyError(name)


def schedules_for(workload: Workload, hardware: Hardware) -> list[Schedule]:
    """Return the schedules that can compute a workload on the hardware, in order of preference."""
    found = (get_schedule(name) for name in SCHEDULES.get(workload.op, {}))
    return [s for s in found if s.supports(workload, hardware)]


__all__ = ["SCHEDULES", "Kernel", "Schedule", "Space", "get_schedule", "schedules_for"]
