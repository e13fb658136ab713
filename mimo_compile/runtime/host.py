"""Artifacts for CPUs: their code linked into this process, on its memory."""

from __future__ import annotations

import importlib.metadata
import os
import re
from typing import TYPE_CHECKING

from mimo_compile import _tvm
from mimo_compile.errors import EnvironmentMismatch
from mimo_compile.runtime import cpu
from mimo_compile.runtime.entry import BoundEntry, Memory
from mimo_compile.runtime.expert_calls import spare
from mimo_compile.runtime.expert_memory import ExpertMemory, apart_of, experts_of
from mimo_compile.runtime.memory import Zeroed
from mimo_compile.runtime.pages import pool_of, pooled_states
from mimo_compile.runtime.program import Entry, Manifest
from mimo_compile.runtime.store import States
from mimo_compile.runtime.threads import thread_count, use_threads

if TYPE_CHECKING:
    from mimo_compile.runtime.container import Parts


class Host:
    """See `machine.Machine`."""

    def __init__(
        self,
        parts: Parts,
        threads: int | None,
        kv_store: str | os.PathLike[str] | None,
        expert_memory: int | str | ExpertMemory | None,
    ) -> None:
        """Link the code and reserve memory; arguments as in `module.load`."""
        manifest, entries = parts.manifest, parts.programs.entries
        self._where = parts.where
        self.threads = thread_count(threads, manifest.target.threads)
        cpu.check_object(parts.code, parts.where)
        if "amx-tile" in manifest.target.features:
            cpu.permit_amx()
        code = _tvm.load_object(parts.code)
        self.experts = None if expert_memory is None else experts_of(parts, expert_memory)
        self._apart = apart_of(manifest) if self.experts is None else frozenset()
        arena = Zeroed(max((e.arena_bytes for e in entries.values()), default=0), huge=True)
        batch = 1 if manifest.decoder is None else manifest.decoder.batch
        shared = pooled_states(manifest)
        self._states = States(manifest, batch, shared, kv_store)
        self.states = self._states.bytes
        """Memory of each state, of all sequences."""
        self._memory = Memory(
            arena.bytes, self.states, parts.weights, code, parts.where, batch, shared, self.experts
        )
        self.pool = pool_of(manifest, self.states, batch, self._memory.copy_states)

    def enter(self) -> None:
        """Set the calling thread's pool of kernel threads."""
        self._states.check()
        if self.experts is not None:
            self.experts.check()
        use_threads(self.threads)

    def bound(self, name: str, program: Entry, slot: int) -> BoundEntry:
        """Bind an entry point's buffers and kernels."""
        made = BoundEntry(name, program, self._memory, self._where, slot)
        spare(made, self._apart)
        return made

    def clear(self) -> None:
        """Give the states' memory back."""
        self._states.clear()
        if self.pool is not None:
            self.pool.clear()


def open_machine(
    parts: Parts,
    *,
    threads: int | None,
    kv_store: str | os.PathLike[str] | None,
    expert_memory: int | str | ExpertMemory | None,
) -> Host:
    """Link an artifact; see `machine.machine_of`."""
    return Host(parts, threads, kv_store, expert_memory)


def check(manifest: Manifest, where: str) -> None:
    """Check that TVM is of the series that made the code, and the CPU has its features.

    Raises:
        EnvironmentMismatch: They do not fit; the message says what is missing, and the remedy.
    """
    again = f"Compile it for this machine: mimo-compile compile SRC --target cpu -o {where}"
    _tvm.check_versions()
    for name in ("apache-tvm", "apache-tvm-ffi"):
        built, here = manifest.versions.get(name), importlib.metadata.version(name)
        if built is None or series(built) != series(here):
            raise EnvironmentMismatch(
                f"the code was built with {name} {built or 'of unknown version'}, "
                f"{here} is installed",
                where=where,
                remedy=f"Run: pip install '{name}=={built}'. Or: {again}" if built else again,
            )
    missing = sorted(set(manifest.target.features) - cpu.features())
    if missing:
        raise EnvironmentMismatch(
            f"the artifact was built for {manifest.target.name}; this CPU lacks "
            f"{', '.join(missing)}",
            where=where,
            remedy=again,
        )


def series(version: str) -> str:
    """Return major and minor number: within them compiled code and libraries fit."""
    found = re.match(r"\d+\.\d+(?=\D|$)", version)
    return found[0] if found else version
