"""The bytes of an artifact around its members: a zip of one single form.

Name, size and CRC of the members determine every other byte. The writer emits these bytes; the
reader takes the three facts from the central directory, builds the same bytes again and compares.
So no offset, flag or length in a file is ever trusted, no byte lies outside a member or a header,
and ordinary zip tools still read the file.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from mimo_compile.errors import ArtifactError

MANIFEST = "manifest.json"
PROGRAMS = "programs.json"
CODES = {"cpu": "code.o", "cuda": "code.cuda"}
"""The member with the code of all kernels, by the kind of target; an artifact has one."""
WEIGHTS = "weights.safetensors"
REQUIRED = frozenset({MANIFEST, PROGRAMS, WEIGHTS})
"""Beside the code."""
OPTIONAL = frozenset({"config.json", "records.jsonl", "tokenizer.json"})
KNOWN = REQUIRED | OPTIONAL | frozenset(CODES.values())

PAGE = 4096
"""Bytes: boundary of the file on which the weights member begins, so that it maps as it lies."""

_COMMENT = b"sha256:"
_COMMENT_BYTES = len(_COMMENT) + 64
_DATE = 0x21  # 1980-01-01, the first day a zip can name; time 0
_FULL = 0xFFFFFFFF  # "see the zip64 field"
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_END = struct.Struct("<4s4H2IH")


class Slot(NamedTuple):
    """One member: its name, bytes and CRC-32."""

    name: str
    size: int
    crc: int


def member_order(names: Sequence[str]) -> list[str]:
    """Return the order in which members lie: the manifest first, the others by name."""
    return sorted(names, key=lambda name: (name != MANIFEST, name))


def layout(slots: Sequence[Slot]) -> list[tuple[int, int]]:
    """Return each member's (offset of its header, offset of its data) and nothing about its CRC."""
    places, offset = [], 0
    for slot in slots:
        start = offset + len(local_header(slot, offset))
        places.append((offset, start))
        offset = start + slot.size
    return places


def local_header(slot: Slot, offset: int) -> bytes:
    """Return the header that stands at `offset`, right before the member's data."""
    name = slot.name.encode("ascii")
    large = slot.size >= _FULL
    extra = struct.pack("<2H2Q", 1, 16, slot.size, slot.size) if large else b""
    if slot.name == WEIGHTS:  # a field of zeros moves the data to a page boundary
        start = offset + _LOCAL.size + len(name) + len(extra) + 6
        pad = -start % PAGE
        extra += struct.pack("<3H", 0xD935, 2 + pad, PAGE) + bytes(pad)
    size = _FULL if large else slot.size
    version = 45 if large else 10
    return (
        _LOCAL.pack(b"PK\3\4", version, 0, 0, 0, _DATE, slot.crc, size, size, len(name), len(extra))
        + name
        + extra
    )


def directory(slots: Sequence[Slot], manifest_sha256: str) -> bytes:
    """Return all that follows the last member: the central directory and the end records."""
    places = layout(slots)
    start = places[-1][1] + slots[-1].size
    entries = b"".join(
        _central(slot, offset) for slot, (offset, _) in zip(slots, places, strict=True)
    )
    count, size, tail = len(slots), len(entries), b""
    if start >= _FULL:
        tail = _END64.pack(b"PK\6\6", 44, 0x32D, 45, 0, 0, count, count, size, start)
        tail += _LOCATOR.pack(b"PK\6\7", 0, start + size, 1)
    comment = _COMMENT + manifest_sha256.encode("ascii")
    end = _END.pack(b"PK\5\6", 0, 0, count, count, size, min(start, _FULL), len(comment))
    return entries + tail + end + comment


def _central(slot: Slot, offset: int) -> bytes:
    name = slot.name.encode("ascii")
    large, far = slot.size >= _FULL, offset >= _FULL
    wide = [slot.size] * (2 * large) + [offset] * far
    extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    size = _FULL if large else slot.size
    head = _CENTRAL.pack(
        b"PK\1\2", 0x32D, 45 if wide else 10, 0, 0, 0, _DATE, slot.crc, size, size,
        len(name), len(extra), 0, 0, 0, 0o100644 << 16, min(offset, _FULL),
    )  # fmt: skip
    return head + name + extra


def read(view: memoryview, where: str) -> tuple[list[Slot], list[int], str]:
    """Check the form of a file and find its members; their contents are not looked at.

    Args:
        view: The whole file.
        where: Its path, for messages.

    Returns:
        The members, the offset of each one's data, and the SHA-256 that the file states for its
        manifest.

    Raises:
        ArtifactError: The file is not an artifact, incomplete, or differs from what the writer
            of artifacts makes in as much as one byte outside of the members' data.
    """
    end_at = len(view) - _END.size - _COMMENT_BYTES
    if end_at < 0 or bytes(view[end_at : end_at + 4]) != b"PK\5\6":
        raise ArtifactError(
            "this is not a whole artifact: it does not end like one",
            where=where,
            remedy="It may be cut short; copy it again or compile it again.",
        )
    comment = bytes(view[end_at + _END.size :])
    if not comment.startswith(_COMMENT):
        raise _foreign("the hash of the manifest is missing at its end", where)
    slots = _slots(view, end_at, where)
    names = [slot.name for slot in slots]
    for name in sorted(REQUIRED.difference(names)):
        raise ArtifactError(f"member {name} is missing", where=where)
    if sum(name in names for name in CODES.values()) != 1:
        raise ArtifactError(f"it must have one of {', '.join(CODES.values())}", where=where)
    if names != member_order(names):
        raise _foreign("its members are not in their order", where)
    places = layout(slots)
    stated = comment[len(_COMMENT) :].decode("ascii", "replace")
    try:
        tail = directory(slots, stated)
    except UnicodeEncodeError as error:
        raise _foreign("the hash of the manifest is damaged", where) from error
    start = places[-1][1] + slots[-1].size
    if start + len(tail) != len(view) or view[start:] != tail:
        raise _foreign("the sizes of its members do not add up to the file", where)
    for slot, (offset, data_at) in zip(slots, places, strict=True):
        if view[offset:data_at] != local_header(slot, offset):
            raise _foreign(f"the header of member {slot.name} differs from its entry", where)
    return slots, [data_at for _, data_at in places], stated


def _slots(view: memoryview, end_at: int, where: str) -> list[Slot]:
    """Read names, sizes and CRCs from the central directory."""
    _, _, _, _, count, size, start, _ = _END.unpack_from(view, end_at)
    stop = end_at
    if start == _FULL:
        stop = end_at - _LOCATOR.size - _END64.size
        if stop < 0:
            raise _foreign("its directory is missing", where)
        count, size, start = _END64.unpack_from(view, stop)[7:]
    if start + size != stop or not 0 < count <= len(KNOWN):
        raise _foreign(f"its directory of {count} members does not lie where it must", where)
    slots: list[Slot] = []
    at = start
    for _ in range(count):
        slot, at = _entry(view, at, stop, where)
        if any(slot.name == other.name for other in slots):
            raise ArtifactError(f"member {slot.name} occurs twice", where=where)
        slots.append(slot)
    return slots


def _entry(view: memoryview, at: int, stop: int, where: str) -> tuple[Slot, int]:
    if at + _CENTRAL.size > stop or bytes(view[at : at + 4]) != b"PK\1\2":
        raise _foreign("its directory is damaged", where)
    fields = _CENTRAL.unpack_from(view, at)
    flags, method, crc, packed, size, name_bytes, extra_bytes = (
        *fields[3:5], *fields[7:12],
    )  # fmt: skip
    at += _CENTRAL.size
    raw = bytes(view[at : min(at + name_bytes, stop)])
    name = raw.decode("ascii", "replace")
    if name not in KNOWN:
        raise ArtifactError(f"member {name[:80]!r} does not belong in an artifact", where=where)
    if flags & 0x2041:
        raise ArtifactError(f"member {name} is encrypted", where=where)
    if method:
        raise _foreign(f"member {name} is compressed (method {method}), not stored", where)
    at += name_bytes
    if size == _FULL:
        if extra_bytes < 20 or at + 20 > stop:
            raise _foreign(f"the size of member {name} is missing", where)
        tag, _, size, packed = struct.unpack_from("<2H2Q", view, at)
        if tag != 1:
            raise _foreign(f"the size of member {name} is missing", where)
    if packed != size or size > len(view):
        raise ArtifactError(
            f"member {name} states {size} bytes in a file of {len(view)}",
            where=where,
            remedy="The file is damaged; copy it again or compile it again.",
        )
    return Slot(name, size, crc), at + extra_bytes


def _foreign(what: str, where: str) -> ArtifactError:
    return ArtifactError(
        f"this artifact is damaged or was packed by another program: {what}",
        where=where,
        remedy="Use the original file or compile it again.",
    )
