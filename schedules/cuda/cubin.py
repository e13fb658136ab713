"""What machine code for NVIDIA GPUs says of its functions: launch bounds and clusters they were compiled for.

A cubin is an ELF file; section ``.nv.info.NAME`` has attributes of the function NAME: a format and a kind
of one byte each, then two bytes, which are the value itself or, in format 4, the length of the value that
follows. NVIDIA does not document the kinds; 5 is what ``cuobjdump -elf`` names EIATTR_MAX_THREADS, 0x3d
EIATTR_CTA_PER_CLUSTER; both are three 32-bit extents.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator

_SIZED, _MAX_THREADS, _CTA_PER_CLUSTER = 4, 5, 0x3D
_PREFIX = ".nv.info."


def most_threads(cubin: bytes) -> dict[str, int]:
    """Return the most threads of a block, by the names of those functions that have launch bounds.

    What is no cubin has no functions.
    """
    return {name: math.prod(found) for name, found in _extents(cubin, _MAX_THREADS).items()}


def clusters(cubin: bytes) -> dict[str, tuple[int, int, int]]:
    """Return the blocks of a cluster in x, y and z, by the names of those functions that declare clusters."""
    return _extents(cubin, _CTA_PER_CLUSTER)


def _extents(cubin: bytes, wanted: int) -> dict[str, tuple[int, int, int]]:
    """Return an attribute of three extents, by the names of the functions that have it."""
    found: dict[str, tuple[int, int, int]] = {}
    for name, data in _sections(cubin):
        if name.startswith(_PREFIX):
            for kind, value in _attributes(data):
                if kind == wanted and len(value) == 12:
                    x, y, z = struct.unpack("<3I", value)
                    found[name.removeprefix(_PREFIX)] = (x, y, z)
    return found


def _sections(cubin: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents of the sections of a 64-bit ELF file."""
    if cubin[:5] != b"\x7fELF\x02":
        return
    start = struct.unpack_from("<Q", cubin, 40)[0]
    each, count, names = struct.unpack_from("<3H", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, start + each * i) for i in range(count)]
    for header in headers:
        name = headers[names][4] + header[0]
        text = cubin[name : cubin.index(b"\0", name)].decode()
        yield text, cubin[header[4] : header[4] + header[5]]


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield kinds and values of a section's attributes."""
    at = 0
    while at + 4 <= len(data):
        form, kind, size = struct.unpack_from("<BBH", data, at)
        length = size if form == _SIZED else 0
        yield kind, data[at + 4 : at + 4 + length]
        at += 4 + length
