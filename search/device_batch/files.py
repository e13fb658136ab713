"""The folder of a device batch: what to run, the files for it, and what came of it.

::

    batch.jsonl          the batch: a header, one line for each unit of work, a last line that counts them
    files/HASH.npy       arrays, HASH.cubin machine code, each named by the SHA-256 of its bytes
    results.ID.jsonl     what came of each unit, one line each, synced before the next one begins
    lock                 held by who works in the folder

Each line carries a checksum and each file is checked against its name before its use: what was torn on the
way is found, and nothing else has to be sent again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from mimo_compile.errors import InputError, MimoError
from mimo_compile.ir.hardware import Hardware
from mimo_compile.search.device_batch.names import is_file, strange_name
from mimo_compile.search.measure.base import Limits, Timing
from mimo_compile.search.meters.base import Reading
from mimo_compile.search.records import seal, unseal

FORMAT = "mimo-device-batch"
SCHEMA = 1
"""Version of the folder; a reader refuses newer ones."""
MANIFEST = "batch.jsonl"
_AGAIN = "Transfer the folder again: what is whole is not touched"
T = TypeVar("T", bound=msgspec.Struct)


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What holds for all units of a batch."""

    id: str
    number: int
    """Batches in this folder so far, this one included."""
    hardware: Hardware
    """The GPU to measure on."""
    limits: Limits
    timing: Timing
    meter: str
    """What reads joules besides; "": nothing does."""
    version: str
    """Of mimo_compile."""
    undecided: dict[str, int] = {}
    """How often earlier comparisons were run of which no times came back, by `merge.comparison`."""
    format: str = FORMAT
    schema: int = SCHEMA


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One candidate: machine code with its launches, and the arrays that it runs on."""

    slot: str
    """The candidate's key."""
    schedule: str
    schedule_version: int
    config: dict[str, int | float | str | bool]
    code: str
    """File of its machine code."""
    facts: dict[str, Any]
    """What its builder says of it, see `build_worker`."""
    cases: tuple[dict[str, str], ...]
    """Files of inputs, weights and states by the arguments' names; the last case is timed, too."""


class Unit(msgspec.Struct, frozen=True, kw_only=True):
    """What is run in one go and has one line of results."""

    index: int
    workload: str
    phase: str
    """``search``: one candidate; ``confirm``: several, timed against each other."""
    seed: int
    """Of the inputs."""
    jobs: tuple[Job, ...]


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One request to the child that owns the GPU, and how it ended."""

    do: str
    """``load``, ``check``, ``time``, ``again`` (see `measure.slots`), or ``joules``."""
    slots: tuple[str, ...]
    status: str = "ok"
    value: dict[str, Any] = {}
    message: str = ""
    kind: str = ""
    files: dict[str, str] = {}
    """Files of what a kernel wrote, by the arguments' names."""
    reading: Reading | None = None


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one unit."""

    batch: str
    unit: int
    device: str
    """Name of the GPU."""
    meter: str
    """What read joules; "": nothing did."""
    steps: tuple[Step, ...]
    time: float
    """Seconds since 1970."""


class _End(msgspec.Struct, frozen=True):
    """The last line of a batch."""

    units: int


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch as it lies in its folder."""

    header: Header
    units: tuple[Unit, ...]

    def files(self) -> set[str]:
        """Return the names of all files that its units need."""
        return {name for unit in self.units for name in files_of(unit)}


def files_of(unit: Unit) -> set[str]:
    """Return the names of the files that a unit needs."""
    arrays = {name for job in unit.jobs for case in job.cases for name in case.values()}
    return arrays | {job.code for job in unit.jobs}


def files_left(result: Result) -> set[str]:
    """Return the names of the files that kernels of a unit wrote."""
    return {name for step in result.steps for name in step.files.values()}


class Folder:
    """A device batch on disk."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Name the folder."""
        self.path = Path(path)
        self._sound: set[str] = set()
        """Files that were found to be what their names say."""

    @contextlib.contextmanager
    def locked(self, *, create: bool = False) -> Iterator[None]:
        """Hold the folder while working in it.

        Raises:
            InputError: there is no such folder, it cannot be written, or another command works in it.
        """
        try:
            if create:
                (self.path / "files").mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise InputError(
                f"the folder of a device batch cannot be used: {error.strerror}", file=self.path
            ) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            raise InputError(
                "another command works in this folder",
                file=self.path,
                remedy="Wait until it has ended",
            ) from error
        try:
            yield
        finally:
            os.close(handle)

    # -- the batch -----------------------------------------------------------------------------

    def read(self) -> Batch | None:
        """Return the batch; None where none was written yet.

        Raises:
            InputError: it is damaged, was not transferred whole, or is of another version.
        """
        path = self.path / MANIFEST
        try:
            lines = path.read_bytes().splitlines()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InputError(f"cannot read it: {error.strerror}", file=path) from error
        try:
            header = _decoded(lines[0], Header, path)
            if (header.format, header.schema) != (FORMAT, SCHEMA):
                raise InputError(
                    f"a batch of schema {header.schema}, this version reads {SCHEMA}", file=path,
                    remedy="Use the same version of mimo-compile on both sides",
                )  # fmt: skip
            units = tuple(_decoded(line, Unit, path) for line in lines[1:-1])
            whole = _decoded(lines[-1], _End, path).units == len(units)
        except IndexError:
            whole = False
        if not whole:
            raise InputError("this device batch is not whole", file=path, remedy=_AGAIN)
        batch = Batch(header, units)
        try:
            strange = strange_name(batch)
        except msgspec.MsgspecError as error:
            raise InputError(
                f"a unit of this device batch has no arguments: {error}", file=path, remedy=_AGAIN
            ) from error
        if strange is not None:
            raise InputError(
                f"this device batch uses {strange!r} as a name", file=path,
                remedy="Make the batch again with `mimo-compile tune --device-batch`",
            )  # fmt: skip
        return batch

    def write(self, batch: Batch) -> None:
        """Put a batch in the place of the one before, whose files and results go."""
        lines = [_line(batch.header), *map(_line, batch.units), _line(_End(len(batch.units)))]
        self._put(self.path / MANIFEST, "".join(lines).encode())
        wanted = batch.files()
        for path in (self.path / "files").iterdir():
            if path.name not in wanted:
                path.unlink(missing_ok=True)
        for path in self.path.glob("results.*.jsonl"):
            if path != self.results_path(batch.header.id):
                path.unlink(missing_ok=True)

    # -- files ---------------------------------------------------------------------------------

    def keep(self, data: bytes, suffix: str) -> str:
        """Keep a file under the hash of its bytes; return its name."""
        name = f"{hashlib.sha256(data).hexdigest()}.{suffix}"
        if self.problem(name):
            self._put(self.path / "files" / name, data)
            self._sound.add(name)
        return name

    def problem(self, name: str) -> str:
        """Say what is wrong with a file ("": nothing)."""
        if name in self._sound:
            return ""
        try:
            with self.file(name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if found != name.partition(".")[0]:
            return f"{name} is not whole"
        self._sound.add(name)
        return ""

    def file(self, name: str) -> Path:
        """Return where a file is.

        Raises:
            InputError: the name is none of a file here.
        """
        if not is_file(name):
            raise InputError(f"{name!r} names no file of a device batch", file=self.path)
        return self.path / "files" / name

    def _put(self, path: Path, data: bytes) -> None:
        """Write a file so that it is there as a whole or not at all."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise MimoError(
                f"the device batch cannot be written: {error.strerror or error}", where=path,
                remedy="Free some space there",
            ) from error  # fmt: skip

    # -- results -------------------------------------------------------------------------------

    def results_path(self, batch: str) -> Path:
        """Return where the results of a batch are."""
        return self.path / f"results.{batch}.jsonl"

    def results(self, batch: Batch) -> tuple[dict[int, Result], int]:
        """Return results by their units, and how many lines are no results (torn, or of another batch)."""
        found: dict[int, Result] = {}
        bad = 0
        path = self.results_path(batch.header.id)
        try:
            lines = path.read_bytes().splitlines()
        except FileNotFoundError:
            return {}, 0
        except OSError as error:
            raise InputError(f"cannot read it: {error.strerror}", file=path) from error
        for line in lines:
            if not line.strip():
                continue
            try:
                result = _decoded(line, Result, path)
            except InputError:
                bad += 1
                continue
            if result.batch == batch.header.id and 0 <= result.unit < len(batch.units):
                found[result.unit] = result
        return found, bad

    def add(self, result: Result) -> None:
        """Add what came of a unit; it is on disk when this returns.

        Raises:
            MimoError: it cannot be written.
        """
        path = self.results_path(result.batch)
        try:
            with path.open("a+b") as file:
                if file.tell() and not _ends_with_newline(file):
                    file.write(
                        b"\n"
                    )  # what was torn when this was last interrupted stays a line of its own
                file.write(_line(result).encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise MimoError(
                f"a result cannot be written: {error.strerror or error}", where=path,
                remedy="Free some space there and run the batch again: it goes on",
            ) from error  # fmt: skip

    def sync(self) -> None:
        """Make the names of new files durable."""
        for path in (self.path, self.path / "files"):
            with contextlib.suppress(OSError):
                handle = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)


def damage(folder: Folder, names: Iterable[str]) -> list[str]:
    """Return what is wrong with files, one line each."""
    return [text for name in sorted(names) if (text := folder.problem(name))]


def torn(folder: Folder, problems: list[str]) -> InputError:
    """Return the error that says what has to be transferred again."""
    more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
    return InputError(
        f"files of this device batch are missing or damaged: {problems[0]}{more}",
        file=folder.path, remedy=_AGAIN,
    )  # fmt: skip


def plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a builder or a child says as JSON keeps it."""
    out: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(value))
    return out


def _line(value: msgspec.Struct) -> str:
    return seal(msgspec.json.encode(value)) + "\n"


def _decoded(line: bytes, kind: type[T], path: Path) -> T:
    """Read one line.

    Raises:
        InputError: it is damaged, or something else.
    """
    try:
        return msgspec.json.decode(
            unseal(line, what="a line of a device batch", file=path), type=kind
        )
    except msgspec.MsgspecError as error:
        raise InputError(
            f"not the line of a device batch that belongs here: {error}", file=path, remedy=_AGAIN
        ) from error
    except InputError as error:
        error.remedy = _AGAIN
        raise


def _ends_with_newline(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")
