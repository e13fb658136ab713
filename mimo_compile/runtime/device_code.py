"""``code.cuda``: machine code of GPU kernels, the launches that make a call of each, and their CUDA text.

The member is laid out as a safetensors file is: the length of a header (8 bytes, little-endian), the header
(strict JSON, `Table`), then cubins and texts on 64-byte boundaries. Kernels of one text share both.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import msgspec

from mimo_compile._cuda import MAP_ELEMENTS, Launch, TensorMap
from mimo_compile.errors import ArtifactError
from mimo_compile.runtime import dtypes, strict_json
from mimo_compile.runtime.program import Programs

ALIGNMENT = 64
SCRATCH_ALIGNMENT = 256
"""Bytes: on which scratch arrays begin, as what ``cuMemAlloc`` returns does."""
_SYMBOL = re.compile(r"[A-Za-z_]\w*\Z")
MOST_GRID = (2**31 - 1, 65535, 65535)
MOST_THREADS = 1024
MOST_CLUSTER = 8
"""Blocks of a cluster, on any GPU that has them."""


class Argument(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One argument of a kernel: the buffers of a call stand in the order of these."""

    name: str
    role: Literal["input", "weight", "state", "output"]
    shape: tuple[int, ...]
    dtype: str
    mutated: bool = False


class Scratch(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """An array that the launches of a call share, at a byte of memory that all kernels have in turn."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    zeroed: bool = False
    """Zero before the first launch of each call."""

    @property
    def bytes(self) -> int:
        """Its size."""
        return dtypes.size(self.dtype, self.shape)


class Usage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a function takes, as the compiler says: registers of a thread, and bytes."""

    registers: int
    shared_bytes: int = 0
    stack_bytes: int = 0
    spill_bytes: int = 0


class DeviceKernel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One kernel: the launches of a call, in their order on one stream."""

    args: tuple[Argument, ...]
    launches: tuple[Launch, ...]
    scratch: tuple[Scratch, ...] = ()
    usage: dict[str, Usage] = {}
    """By symbol."""
    predicted_us: float = 0.0
    """The least time of a call, by a model that was fitted to nothing; 0: not predicted."""

    @property
    def scratch_bytes(self) -> int:
        """Bytes of scratch memory that a call needs."""
        return max((s.offset + s.bytes for s in self.scratch), default=0)


class Span(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """Where something lies behind the header: its first byte, and its bytes."""

    begin: int
    size: int


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The header."""

    arch: str
    """What the machine code is for, e.g. ``sm_90a``."""
    kernels: dict[str, DeviceKernel]
    cubins: dict[str, Span]
    """By kernel, as are the texts."""
    texts: dict[str, Span]


@dataclass(frozen=True, slots=True)
class Code:
    """The member, decoded."""

    table: Table
    _data: memoryview

    def cubin(self, kernel: str) -> bytes:
        """Return the machine code of a kernel."""
        return self._bytes(self.table.cubins[kernel])

    def text(self, kernel: str) -> str:
        """Return the CUDA text of a kernel."""
        return self._bytes(self.table.texts[kernel]).decode()

    def _bytes(self, span: Span) -> bytes:
        return bytes(self._data[span.begin : span.begin + span.size])

    @property
    def scratch_bytes(self) -> int:
        """Bytes of scratch memory that kernels need, which take it in turn."""
        return max((k.scratch_bytes for k in self.table.kernels.values()), default=0)


@dataclass(frozen=True, slots=True)
class Made:
    """A kernel with its machine code and the text that this was made from."""

    kernel: DeviceKernel
    cubin: bytes
    text: str


def encode(arch: str, kernels: Mapping[str, Made]) -> bytes:
    """Return the member.

    Raises:
        ArtifactError: what `decode` would refuse.
    """
    parts: list[bytes] = []
    spans: dict[str, Span] = {}
    end = 0

    def place(data: bytes) -> Span:
        nonlocal end
        key = hashlib.sha256(data).hexdigest()
        if key not in spans:
            spans[key] = Span(end, len(data))
            parts.extend((data, bytes(-len(data) % ALIGNMENT)))
            end += len(data) + -len(data) % ALIGNMENT
        return spans[key]

    cubins = {name: place(made.cubin) for name, made in kernels.items()}
    texts = {name: place(made.text.encode()) for name, made in kernels.items()}
    table = Table(arch, {n: made.kernel for n, made in kernels.items()}, cubins, texts)
    header = msgspec.json.encode(table)
    header += b" " * (-(8 + len(header)) % ALIGNMENT)
    out = b"".join([len(header).to_bytes(8, "little"), header, *parts])
    decode(out, "code.cuda")
    return out


def decode(data: bytes, where: str) -> Code:
    """Read the member.

    Raises:
        ArtifactError: it is malformed; ``where`` names the place.
    """
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise ArtifactError("the code of its kernels is cut short", where=where)
    raw = strict_json.decode(data[8 : 8 + size], where)
    try:
        table = msgspec.convert(raw, Table)
    except msgspec.ValidationError as error:
        raise ArtifactError(f"malformed table of kernels: {error}", where=where) from error
    body = memoryview(data)[8 + size :]
    for name, kernel in table.kernels.items():
        spans = [found.get(name) for found in (table.cubins, table.texts)]
        if any(s is None or s.begin < 0 or not 0 <= s.size <= len(body) - s.begin for s in spans):
            raise ArtifactError(
                f"the code of kernel {name} lies outside of the member", where=where
            )
        if problem := _problem(kernel):
            raise ArtifactError(f"kernel {name} {problem}", where=where)
    return Code(table, body)


def arch_of(features: Collection[str]) -> str:
    """Return the architecture of a target with these features; newer ones have those of older ones."""
    return "sm_90a" if "sm_90a" in features else "sm_80"


def check_calls(code: Code, programs: Programs, where: str) -> None:
    """Check that each call of the entry points gives a kernel what it takes.

    Raises:
        ArtifactError: it does not; the message names the call.
    """
    for name, entry in programs.entries.items():
        for at, call in enumerate(entry.calls):
            kernel = code.table.kernels.get(call.kernel)
            place = f"{call.label or 'a call'}, call {at} of entry {name} of {where}"
            if kernel is None:
                raise ArtifactError(f"kernel {call.kernel} is missing in the code", where=place)
            given = [(entry.buffers[i].dtype, entry.buffers[i].shape) for i in call.args]
            taken = [(a.dtype, a.shape) for a in kernel.args]
            if given != taken:
                raise ArtifactError(
                    f"kernel {call.kernel} takes {', '.join(dtypes.spell(*t) for t in taken)} and is "
                    f"given {', '.join(dtypes.spell(*t) for t in given)}",
                    where=place,
                )


def _problem(kernel: DeviceKernel) -> str:
    """Return what is wrong with a kernel of a table, or nothing."""
    arrays = {a.name: (a.dtype, a.shape) for a in kernel.args}
    arrays |= {s.name: (s.dtype, s.shape) for s in kernel.scratch}
    if len(arrays) != len(kernel.args) + len(kernel.scratch):
        return "has two arrays of one name"
    for dtype, shape in arrays.values():
        if not dtypes.known(dtype) or not all(0 <= n < 1 << 48 for n in shape):
            return f"has an array of {dtypes.spell(dtype, shape)}"
    if any(s.offset < 0 or s.offset % SCRATCH_ALIGNMENT for s in kernel.scratch):
        return "has scratch memory off its boundary"
    if not kernel.launches:
        return "launches nothing"
    sizes = {name: dtypes.size(*array) for name, array in arrays.items()}
    return next(filter(None, (_launch_problem(x, sizes) for x in kernel.launches)), "")


def _launch_problem(launch: Launch, sizes: Mapping[str, int]) -> str:
    if not _SYMBOL.match(launch.symbol):
        return f"launches {launch.symbol[:80]!r}"
    if any(not 1 <= n <= most for n, most in zip(launch.grid, MOST_GRID, strict=True)):
        return f"launches a grid of {launch.grid}"
    if not 1 <= launch.threads <= MOST_THREADS or not 0 <= launch.shared_bytes < 1 << 20:
        return f"launches blocks of {launch.threads} threads and {launch.shared_bytes} shared bytes"
    if not 1 <= launch.cluster <= MOST_CLUSTER or launch.grid[0] % launch.cluster:
        return f"launches clusters of {launch.cluster} blocks in a grid of {launch.grid}"
    for operand in launch.operands:
        if isinstance(operand, str) and operand not in sizes:
            return f"is given {operand[:80]!r}, which is none of its arrays"
        if isinstance(operand, int) and not -(2**31) <= operand < 2**31:
            return f"is given {operand}, which is no int32"
        if isinstance(operand, float) and not math.isfinite(operand):
            return f"is given {operand}"
        if isinstance(operand, TensorMap) and (problem := _map_problem(operand, sizes)):
            return f"has a tensor map of {problem}"
    return ""


def _map_problem(given: TensorMap, sizes: Mapping[str, int]) -> str:
    if given.array not in sizes:
        return f"{given.array[:80]!r}, which is none of its arrays"
    if given.dtype not in MAP_ELEMENTS:
        return f"elements of {given.dtype[:80]!r}"
    if min(given.rows, given.columns, given.box_rows, given.box_columns) < 1:
        return f"{given.rows} x {given.columns}"
    if given.bytes > sizes[given.array]:
        return f"{given.bytes} bytes over the {sizes[given.array]} of {given.array}"
    return ""
