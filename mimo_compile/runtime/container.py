"""Opens an artifact: everything is checked before anything in it is used."""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
import zlib
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np

from mimo_compile.errors import ArtifactError, InputError, UsageError
from mimo_compile.runtime import check, machine, strict_json, zipform
from mimo_compile.runtime.program import SCHEMA, Manifest, Programs
from mimo_compile.runtime.weights import MappedWeights, OpenFile, WeightSource

Verify = Literal["lazy", "full"]

MAX_MANIFEST = 1 << 20
"""Bytes."""


@dataclass(frozen=True)
class Parts:
    """What a module is made of, checked."""

    manifest: Manifest
    programs: Programs
    code: bytes
    weights: WeightSource
    texts: dict[str, bytes]
    """The optional members: `config.json`, `records.jsonl`, `tokenizer.json`."""
    where: str
    """Path of the artifact, for messages."""


def open_artifact(
    path: str | os.PathLike[str], *, verify: Verify = "lazy", for_this_machine: bool = True
) -> Parts:
    """Open an artifact and check it: form, schema, versions, target, hashes, programs.

    Nothing is executed and nothing written. The weights are mapped; with `verify="lazy"` each
    MiB of them is hashed when a tensor in it is first prepared. The file must not be changed
    in place while it is in use; replacing it by another one is safe.

    Args:
        path: The file.
        verify: `"full"` hashes all weights now.
        for_this_machine: False skips what only matters to run it: versions and target.

    Raises:
        InputError: The file cannot be read.
        ArtifactError: It is damaged, of another schema, or no artifact.
        EnvironmentMismatch: It was built for another machine or other versions.
    """
    if verify not in ("lazy", "full"):
        raise UsageError(f"verify={verify!r}", remedy='Use "lazy" or "full".')
    where = os.fspath(path)
    file, mapping = _map(where)
    data = np.frombuffer(mapping, np.uint8)
    view = data.data
    slots, starts, stated = zipform.read(view, where)
    spans = {s.name: (at, at + s.size) for s, at in zip(slots, starts, strict=True)}
    crcs = {s.name: s.crc for s in slots}

    begin, end = spans.pop(zipform.MANIFEST)
    if end - begin > MAX_MANIFEST:
        raise ArtifactError(f"its manifest is longer than {MAX_MANIFEST} bytes", where=where)
    text = bytes(view[begin:end])
    if hashlib.sha256(text).hexdigest() != stated or zlib.crc32(text) != crcs[zipform.MANIFEST]:
        raise _damaged(zipform.MANIFEST, where)
    manifest = read_manifest(text, where)
    if for_this_machine:
        machine.check(manifest, where)

    if {name: end - begin for name, (begin, end) in spans.items()} != {
        name: member.bytes for name, member in manifest.members.items()
    }:
        raise ArtifactError("its members are not those of its manifest", where=where)
    texts: dict[str, bytes] = {}
    for name, (begin, end) in spans.items():
        if name == zipform.WEIGHTS:
            continue
        # A copy: what is hashed is what is used, whatever happens to the file meanwhile.
        member = bytes(view[begin:end])
        found = hashlib.sha256(member).hexdigest()
        if found != manifest.members[name].sha256 or zlib.crc32(member) != crcs[name]:
            raise _damaged(name, where)
        texts[name] = member
    begin, end = spans[zipform.WEIGHTS]
    facts = manifest.members[zipform.WEIGHTS]
    weights = MappedWeights(data[begin:end], facts, where, file, begin)
    programs = read_programs(texts.pop(zipform.PROGRAMS), where)
    check.check_programs(manifest, programs, weights.spots, where)
    if verify == "full":
        weights.prepare_all()
    name = machine.code_member(manifest, where)
    if name not in texts:
        raise ArtifactError(f"member {name} is missing", where=where)
    code = texts.pop(name)
    check.check_code(manifest, programs, code, where)
    return Parts(manifest, programs, code, weights, texts, where)


def _map(where: str) -> tuple[OpenFile, mmap.mmap]:
    """Open and map a regular file for reading."""
    try:
        # Without O_NONBLOCK, a named pipe without a writer would block here.
        descriptor = os.open(where, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"the artifact cannot be read: {reason}", file=where) from error
    file = OpenFile(descriptor)
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise InputError("the artifact is not a regular file", file=where)
        if not facts.st_size:
            raise ArtifactError("the file is empty", where=where, remedy="Compile it again.")
        return file, mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise InputError(f"the artifact cannot be mapped: {error.strerror}", file=where) from error


def _damaged(name: str, where: str) -> ArtifactError:
    return ArtifactError(
        f"member {name} is damaged: it differs from its hash",
        where=where,
        remedy="Copy the file again or compile it again.",
    )


def read_manifest(text: bytes, where: str) -> Manifest:
    """Decode a manifest; a newer schema is refused before anything else in it is looked at.

    Raises:
        ArtifactError: It is malformed or of another schema.
    """
    place = f"{zipform.MANIFEST} of {where}"
    raw = strict_json.decode(text, place)
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if type(schema) is not int or schema < 1:
        raise ArtifactError("the manifest states no schema version", where=place)
    if schema > SCHEMA:
        raise ArtifactError(
            f"the artifact has schema {schema}, this version of mimo-compile reads up to {SCHEMA}",
            where=where,
            remedy="Run: pip install --upgrade mimo-compile",
        )
    try:
        return msgspec.convert(raw, Manifest)
    except msgspec.ValidationError as error:
        raise ArtifactError(f"malformed manifest: {error}", where=place) from error


def read_programs(text: bytes, where: str) -> Programs:
    """Decode the programs.

    Raises:
        ArtifactError: They are malformed.
    """
    place = f"{zipform.PROGRAMS} of {where}"
    try:
        return msgspec.convert(strict_json.decode(text, place), Programs)
    except msgspec.ValidationError as error:
        raise ArtifactError(f"malformed programs: {error}", where=place) from error
