"""Facts about the machine that belong beside every measurement."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from mimo_compile.ir.hardware import Hardware

_PACKAGES = ("mimo-compile", "apache-tvm", "apache-tvm-ffi", "torch", "numpy")


def package_versions(names: tuple[str, ...] = _PACKAGES) -> dict[str, str]:
    """Return the versions of installed packages; absent ones are left out."""
    out = {}
    for name in names:
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            continue
    return out


def machine_facts(hardware: Hardware) -> dict[str, Any]:
    """Return what a machine is: model, features, cores, caches in bytes, load, memory, versions."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "name": hardware.name,
        "id": hardware.id,
        "kind": hardware.kind,
        "features": sorted(hardware.features),
        "cores": hardware.cores,
        "threads": hardware.threads,
        "l1d_bytes": hardware.l1d_bytes,
        "l2_bytes": hardware.l2_bytes,
        "l3_bytes": hardware.l3_bytes,
        "memory_bytes": memory,
        "load": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": package_versions(),
    }
