"""Artifacts for GPUs: arena, weights and states in the GPU's memory, entry points as CUDA graphs.

Inputs are copied from memory of this process, then the kernels run, then outputs are copied back; all of it
is one graph. The first run of an entry point goes kernel by kernel and waits for each, so that one that fails
is named; then the graph is recorded, and later runs are one launch each.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from math import prod
from typing import TYPE_CHECKING

from mimo_compile.errors import ArtifactError, EnvironmentMismatch, MimoError, UsageError
from mimo_compile.runtime import device_code, dtypes, gpu_device
from mimo_compile.runtime.entry import state_spans
from mimo_compile.runtime.gpu_entry import DeviceEntry
from mimo_compile.runtime.memory import Bytes, as_array
from mimo_compile.runtime.pages import PagePool, page_extent, pooled_states
from mimo_compile.runtime.program import Buffer, Entry, Manifest, Pool

if TYPE_CHECKING:
    from mimo_compile.runtime.container import Parts
    from mimo_compile.runtime.expert_memory import ExpertMemory

_BOUNDARY = 256
_PIECE = 64 << 20
"""Bytes of weights that are copied at a time."""
_CAPABILITIES = {"sm_80": (8, 0), "sm_90a": (9, 0)}
"""What runs on which GPU: kernels take as much shared memory as theirs has, and sm_90a has no successor."""
_KNOWN = {"sm_80": "A100", "sm_90a": "H100, H200"}


class GpuMachine:
    """See `machine.Machine`."""

    threads = 1
    experts = None

    def __init__(self, parts: Parts, device: gpu_device.Device) -> None:
        """Reserve the GPU's memory: for weights, which come when they are needed, and all else.

        Raises:
            MimoError: There is not enough; the message says of what.
        """
        manifest, entries = parts.manifest, parts.programs.entries
        self.where, self.device, self._manifest = parts.where, device, manifest
        self._weights = parts.weights
        self._batch = 1 if manifest.decoder is None else manifest.decoder.batch
        self._shared = pooled_states(manifest)
        self.code = device_code.decode(parts.code, parts.where)
        device.enter()
        spans, size = state_spans(manifest.states, self._batch, _BOUNDARY, self._shared)
        at = 0
        self._place_of_weight: dict[str, int] = {}
        for name, spot in parts.weights.spots.items():
            self._place_of_weight[name] = at
            at += -(-(spot.end - spot.begin) // _BOUNDARY) * _BOUNDARY
        self._weight_memory = device.allocate(at, f"the weights of {manifest.name}")
        self._state_bytes = size
        self._state_memory = device.allocate(size, f"the states of {manifest.name}")
        self._states = {
            n: (self._state_memory + int(s.start), int(s.stop - s.start)) for n, s in spans.items()
        }
        arena = max((e.arena_bytes for e in entries.values()), default=0)
        self._arena = device.allocate(arena, f"temporary arrays of {manifest.name}")
        self.scratch = device.allocate(
            self.code.scratch_bytes, f"temporary arrays of kernels of {manifest.name}"
        )
        self._there: set[str] = set()
        self._tables: Bytes | None = None
        self.pool = self._pages()
        self._clear_states()

    def enter(self) -> None:
        """Make the GPU usable in the calling thread."""
        self.device.enter()

    def bound(self, name: str, program: Entry, slot: int) -> DeviceEntry:
        """Bind an entry point, whose weights are copied to the GPU now."""
        return DeviceEntry(name, program, self, slot)

    def clear(self) -> None:
        """Make all states zero, and take all pages back."""
        self.device.enter()
        self._clear_states()
        if self.pool is not None:
            self.pool.clear()

    def _clear_states(self) -> None:
        self.device.zero(self._state_memory, self._state_bytes)
        self.device.wait()

    def prepare(self, buffers: Iterable[Buffer]) -> None:
        """Copy the weights among these buffers to the GPU, hashed, unless they are there.

        Raises:
            ArtifactError: They differ from their hash.
        """
        wanted = {b.source: None for b in buffers if b.kind == "weight"}
        missing = [name for name in wanted if name not in self._there]
        self._weights.prepare(missing)
        for name in missing:
            data, place = (
                self._weights.data(name),
                self._weight_memory + self._place_of_weight[name],
            )
            for begin in range(0, data.size, _PIECE):
                self.device.write(place + begin, data[begin : begin + _PIECE])
            self.device.wait()  # before what was mapped may go
            self._there.add(name)

    def place(self, buffer: Buffer, slot: int) -> int:
        """Return the address of a buffer; of a state that each sequence has, of the one in a slot."""
        if buffer.kind == "arena":
            return self._arena + buffer.offset
        if buffer.kind == "weight":
            return self._weight_memory + self._place_of_weight[buffer.source] + buffer.offset
        start, _ = self._states[buffer.source]
        before = 0 if buffer.source in self._shared else self._each(buffer.source) * slot
        return start + before + buffer.offset

    def _each(self, state: str) -> int:
        """Return the bytes of a state of one sequence."""
        _, size = self._states[state]
        return size if state in self._shared else size // self._batch

    def table(self, buffer: Buffer, slot: int) -> Bytes | None:
        """Return what is to be copied into a buffer before kernels read it: block tables of the pool."""
        pool = None if self._manifest.decoder is None else self._manifest.decoder.pool
        if pool is None or self._tables is None:
            return None
        if buffer.kind != "state" or buffer.source != pool.table:
            return None
        begin = self._each(pool.table) * slot + buffer.offset
        return self._tables[begin : begin + dtypes.size(buffer.dtype, buffer.shape)]

    def _pages(self) -> PagePool | None:
        pool = None if self._manifest.decoder is None else self._manifest.decoder.pool
        if pool is None:
            return None
        state = self._manifest.states[pool.table]
        self._tables = self.device.host(self._states[pool.table][1])
        tables = as_array(self._tables, state.dtype, (self._batch, *state.shape[1:]))
        # not of the machine: it has the pool, and its memory is to go as soon as nobody has it
        copy_page = _page_copier(self.device, self._manifest, pool, self._states)
        alone = [
            (start, self._each(n))
            for n, (start, _) in self._states.items()
            if n not in self._shared
        ]
        return PagePool(pool, tables, copy_page, _slot_copier(self.device, alone))


def _page_copier(
    device: gpu_device.Device, manifest: Manifest, pool: Pool, places: Mapping[str, tuple[int, int]]
) -> Callable[[int, int], None]:
    """Return what queues copies of a page to another one, of all caches; ``places``: addresses and bytes."""
    strips = []  # address, bytes of a page
    for name in pool.states:
        (start, size), shape = places[name], manifest.states[name].shape
        rows = prod(shape[: page_extent(manifest.target.kind, shape)])
        strips += [(start + r * (size // rows), size // rows // pool.pages) for r in range(rows)]

    def copy_page(source: int, page: int) -> None:
        device.enter()
        for first, each in strips:
            device.copy(first + page * each, first + source * each, each)

    return copy_page


def _slot_copier(
    device: gpu_device.Device, places: Iterable[tuple[int, int]]
) -> Callable[[int, int], None]:
    """Return what queues copies of a sequence's own states to another's; ``places``: addresses and bytes."""

    def copy(source: int, slot: int) -> None:
        device.enter()
        for start, each in places:
            device.copy(start + slot * each, start + source * each, each)

    return copy


def open_machine(
    parts: Parts,
    *,
    threads: int | None,
    kv_store: str | os.PathLike[str] | None,
    expert_memory: int | str | ExpertMemory | None,
) -> GpuMachine:
    """Reserve this machine's GPU for an artifact; see `machine.machine_of`."""
    name = parts.manifest.target.name
    if threads is not None:
        raise UsageError(f"--threads means nothing to {name}", remedy="Leave it out.")
    for option, value in (("--kv-store", kv_store), ("--expert-memory", expert_memory)):
        if value is not None:
            raise UsageError(
                f"{option}: the artifact is for {name}, and everything of it is in the GPU's memory",
                remedy="Leave it out, or compile for a CPU.",
            )
    return GpuMachine(parts, _fitting(parts.manifest, parts.where))


def check(manifest: Manifest, where: str) -> None:
    """Check that this machine has the GPU that the code is for, and a driver that knows it.

    Raises:
        EnvironmentMismatch: It has not; the message says what is missing, and the remedy.
    """
    _fitting(manifest, where)


def _fitting(manifest: Manifest, where: str) -> gpu_device.Device:
    """Return this machine's GPU if it runs an artifact's code."""
    target = manifest.target
    arch = device_code.arch_of(target.features)
    wanted = _CAPABILITIES[arch]
    gpu = f"a GPU of compute capability {wanted[0]}.{wanted[1]} ({_KNOWN[arch]})"
    remedy = (
        f"Run it where there is {gpu}, or compile it for this machine: mimo-compile compile SRC "
        f"--target cpu -o {where}"
    )

    def misfit(why: str, remedy: str = remedy) -> EnvironmentMismatch:
        return EnvironmentMismatch(
            f"the artifact is for {target.name}, and this machine {why}", where=where, remedy=remedy
        )

    built = manifest.versions.get("cuda", "")
    release = re.fullmatch(r"([0-9]{1,4})\.[0-9]{1,4}", built)
    if release is None:
        raise ArtifactError(
            f"the manifest says that the code was made by CUDA {built!r}, which is no release such as 13.0",
            where=where,
            remedy="Compile it again.",
        )
    major_release = int(release[1])
    try:
        device = gpu_device.open_device()
    except MimoError as error:
        raise misfit(
            f"has no GPU that can be used: {error.what}", error.remedy or remedy
        ) from error
    if device.capability != wanted:
        major, minor = device.capability
        raise misfit(f"has {device.name}, of compute capability {major}.{minor}")
    if device.cuda[0] < major_release:
        here = ".".join(map(str, device.cuda))
        raise misfit(
            f"has a driver of CUDA {here}; its code was made by CUDA {built}",
            f"Install a driver of CUDA {major_release} or later, or compile it again with nvcc "
            f"{device.cuda[0]}.",
        )
    return device
