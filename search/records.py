"""One measured candidate: its identity, its verdict, its numbers, and a checksum over all of it.

A record is one line of JSON that carries its own checksum, in the database and in exported files
alike, so that damage is found wherever the line turns up.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from enum import StrEnum
from functools import cache
from typing import Any

import msgspec

from mimo_compile.errors import InputError
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.simulated import SIMULATED

SCHEMA = 1
"""Version of the record; a reader refuses newer ones."""

_SUM = b',"sum":"'
_LATER = (b',"device":""}', b',"worker":""}', b',"twin":""}')
"""Fields that came after the first records, last first: left out at the end of a line where empty."""


NODES_VANISHED = "nodes vanished below it"
"""Part of the message of a crash that need not be the candidate's fault."""


class Verdict(StrEnum):
    """How the trial of a candidate ended; every one is stored."""

    OK = "ok"
    WRONG = "wrong"
    """A result differed from the reference, an input changed, or memory beyond a buffer was written."""
    BUILD_FAILED = "build_failed"
    TIMEOUT = "timeout"
    CRASH = "crash"
    OOM = "oom"
    DEVICE_LOST = "device_lost"
    SUSPICIOUS = "suspicious"
    """Correct, but faster than the machine can be."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the database. Times are microseconds of one kernel call, energies millijoules.

    ``None`` means not measured. ``energy_mj`` holds measured joules only (``energy_source`` names
    the meter); joules computed from counts stand in ``modelled_mj``.
    """

    key: str
    workload: str
    schedule: str
    schedule_version: int
    config: dict[str, int | float | str | bool]
    hardware: str
    features: tuple[str, ...]
    """ISA features of the target, sorted."""
    threads: int
    cache: str
    """``cold`` (weights and states come from memory), ``hot``, or ``simulated``: no clock was read, the time
    is that of a cycle model (and the target does not exist)."""
    versions: dict[str, str]
    verdict: Verdict
    phase: str = "search"
    """``search``, or ``confirm`` for the interleaved comparison at the end."""
    inputs: str = "op"
    """Distribution of the inputs: ``op`` is the op's own generator."""
    seed: int = 0
    latency_us: float | None = None
    p10_us: float | None = None
    p90_us: float | None = None
    cv: float | None = None
    """Standard deviation over mean of the timed batches."""
    calls: int = 0
    energy_mj: float | None = None
    energy_spread_mj: float | None = None
    energy_source: str = ""
    energy_window_s: float | None = None
    modelled_mj: float | None = None
    error_ratio: float | None = None
    """Largest error over its allowed bound; at most 1 when correct."""
    message: str = ""
    code_hash: str = ""
    requires: tuple[str, ...] = ()
    """ISA features that the code uses."""
    ops: dict[str, float] = {}
    """Operations by kind that the kernel declares."""
    bytes: dict[str, float] = {}
    """Bytes by memory level that the kernel declares."""
    time: float = 0.0
    """Seconds since 1970 when it was measured."""
    schema: int = SCHEMA
    twin: str = ""
    """Key of a record whose code this candidate becomes, byte for byte: the figures are that one's, no clock
    was read for this one."""
    worker: str = ""
    """Who on a farm came to the verdict, ``NAME/DEVICE``, or ``NAME`` where that was a build; "": no farm."""
    device: str = ""
    """The GPU that ran it, with its clock and temperature meanwhile as far as they are known; "" for CPUs."""

    @property
    def ok(self) -> bool:
        """True when the candidate may be used."""
        return self.verdict is Verdict.OK

    @property
    def simulated(self) -> bool:
        """True when the time is a model's, not a clock's."""
        return self.cache == SIMULATED


def versions() -> dict[str, str]:
    """Return the versions that decide which code a candidate becomes."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    out = {}
    for name in ("apache-tvm", "apache-tvm-ffi"):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = "absent"
    return out


def record_key(
    workload: str,
    schedule: str,
    schedule_version: int,
    config: Mapping[str, Any],
    hardware: Hardware,
    cache: str,
    tool_versions: Mapping[str, str],
) -> str:
    """Return the content hash that identifies a candidate on a target (64 hex digits)."""
    parts = [
        workload, schedule, schedule_version, dict(sorted(config.items())), sorted(hardware.features),
        hardware.threads, hardware.id, cache, dict(sorted(tool_versions.items())),
    ]  # fmt: skip
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


def _sum(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()[:32]


def seal(body: bytes) -> str:
    """Return a JSON object as a line that ends with its checksum."""
    return (body[:-1] + _SUM + _sum(body).encode() + b'"}').decode()


def unseal(line: bytes, *, what: str = "a tuning record", file: object) -> bytes:
    """Return the JSON object in a line that `seal` made.

    Raises:
        InputError: the line is damaged, or something else; ``what`` names it.
    """
    head, mark, tail = line.strip().rpartition(_SUM)
    body = head + b"}"
    if not mark or tail != _sum(body).encode() + b'"}':
        raise InputError(f"{what} does not match its checksum", file=file)
    return body


def encode(record: Record) -> str:
    """Return the record as one line of JSON that ends with its checksum.

    Raises:
        ValueError: a number makes no sense (a time that is not positive and finite, say).
    """
    _validate(record)
    body = msgspec.json.encode(record)
    for field in _LATER:  # written only where there is one: older lines stay what they are
        if not body.endswith(field):
            break
        body = body[: -len(field)] + b"}"
    return seal(body)


def decode(line: str | bytes, *, file: object = "record") -> Record:
    """Read one line written by `encode` and check it.

    Raises:
        InputError: damaged, of a newer schema, or not a record at all.
    """
    body = unseal(line.encode() if isinstance(line, str) else line, file=file)
    try:
        record = msgspec.json.decode(body, type=Record)
        if record.schema > SCHEMA:
            raise InputError(
                f"a tuning record has schema {record.schema}, this version reads up to {SCHEMA}",
                file=file,
                remedy="Update mimo-compile",
            )
        _validate(record)
    except (msgspec.DecodeError, ValueError) as error:
        raise InputError(f"not a tuning record: {error}", file=file) from error
    return record


def checksum(line: str) -> str:
    """Return the checksum part of an encoded record: its identity when databases are merged."""
    return line.rstrip()[-34:-2]


def _validate(record: Record) -> None:
    numbers = {
        "latency_us": record.latency_us, "energy_mj": record.energy_mj, "modelled_mj": record.modelled_mj,
        "p10_us": record.p10_us, "p90_us": record.p90_us,
    }  # fmt: skip
    for name, value in numbers.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value} is not a positive number")
    if record.ok and record.latency_us is None:
        raise ValueError("verdict ok without a latency")
    if record.energy_mj is not None and not record.energy_source:
        raise ValueError("energy without its source")
