"""Inputs, expected results and packed files of the workloads under test, computed once and shared."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mimo_compile.errors import MimoError
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.base import Arg, Array
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Schedule
from mimo_compile.search.measure.strays import kill_marked

_PREFIX = "mimo-measure-"


class Scratch:
    """A folder for files between processes, in memory where possible; gone afterwards whatever happens.

    A killed process leaves its folder; the next start removes folders whose lock nobody holds.
    """

    def __init__(self, parent: Path | None = None) -> None:
        """Create the folder and sweep stale ones."""
        base = parent if parent is not None else _roomiest()
        sweep(base)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=base))
            lock = self.path / "lock"
            self._lock = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            if lock.exists():
                break
            os.close(self._lock)  # another process swept it away before it was locked

    def folder(self, name: str) -> Path:
        """Return a new or emptied folder."""
        path = self.path / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        return path

    def close(self) -> None:
        """Remove everything."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def _roomiest() -> Path:
    shm = Path("/dev/shm")
    with contextlib.suppress(OSError):
        if os.access(shm, os.W_OK) and shutil.disk_usage(shm).free > 2 << 30:
            return shm
    return Path(tempfile.gettempdir())


def sweep(base: Path) -> int:
    """Remove folders of processes that are gone, and what those left running; return how many."""
    count = 0
    for folder in base.glob(_PREFIX + "*"):
        with contextlib.suppress(OSError):
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                kill_marked(f"{folder}#")
                shutil.rmtree(folder, ignore_errors=True)
                count += 1
            finally:
                os.close(lock)
    return count


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """Fresh inputs of one workload with the result that every kernel must reach."""

    workload: Workload
    seed: int
    args: tuple[Arg, ...]
    inputs: dict[str, Array]
    expected: dict[str, Array]
    bound: dict[str, Array]
    further: bool = False
    """Drawn to verify with, not to time, see `batches.further`."""

    @property
    def nbytes(self) -> int:
        """Memory that the case holds."""
        groups: tuple[Mapping[str, Array], ...] = (self.inputs, self.expected, self.bound)
        return sum(a.nbytes for g in groups for a in g.values())


def make_case(workload: Workload, seed: int) -> Case:
    """Draw inputs and compute the reference (imports torch)."""
    return _case(
        workload, seed, get_op(workload.op).make_inputs(workload, _drawing(workload, seed))
    )


def make_further(case: Case) -> Case | None:
    """Return what is verified besides what is timed, see `batches.further`; None: there is no more."""
    from mimo_compile.ir.ops import (
        batches,
    )  # imports torch, which the child that runs kernels has not

    op, rng = get_op(case.workload.op), _drawing(case.workload, case.seed)
    given = batches.further(op, case.workload, case.inputs, rng)
    return None if given is None else _case(case.workload, case.seed, given, further=True)


def _drawing(workload: Workload, seed: int) -> np.random.Generator:
    """Return where the numbers of a workload's inputs come from."""
    text = hashlib.sha256(f"{workload}|{seed}".encode()).digest()
    return np.random.default_rng(np.frombuffer(text, np.uint32))


def _case(workload: Workload, seed: int, inputs: dict[str, Array], further: bool = False) -> Case:
    """Compute the reference of inputs (imports torch)."""
    import torch

    op = get_op(workload.op)
    threads = torch.get_num_threads()
    if (
        op.counts(workload).flops < 1e9
    ):  # barriers of many small operations cost more than they save
        torch.set_num_threads(1)
    try:
        expected = op.reference(workload, inputs)
        bound = op.bound(workload, inputs, expected)
    finally:
        torch.set_num_threads(threads)
    return Case(workload, seed, op.args(workload), inputs, expected, bound, further)


class CaseStore:
    """Keeps recent cases and their packed files, within limits of memory."""

    def __init__(self, scratch: Scratch, limit_bytes: int = 2 << 30) -> None:
        """Use a scratch folder for the files."""
        self._scratch = scratch
        self._limit = limit_bytes
        self._cases: OrderedDict[tuple[Workload, int], Case] = OrderedDict()
        self._files: dict[tuple[Workload, int], dict[str, dict[str, Path]]] = {}
        self._exact: dict[tuple[Workload, int, bool], dict[str, Array]] = {}
        self._further: dict[tuple[Workload, int], Case | None] = {}
        self._serial = 0

    def case(self, workload: Workload, seed: int) -> Case:
        """Return the case of a workload and seed, computing it when it is new."""
        key = (workload, seed)
        if key not in self._cases:
            self._cases[key] = make_case(workload, seed)
            self._shrink()
        self._cases.move_to_end(key)
        return self._cases[key]

    def further(self, case: Case) -> Case | None:
        """Return what is verified besides a case, see `make_further`; large ones are not kept."""
        key = (case.workload, case.seed)
        if key in self._further:
            return self._further[key]
        made = make_further(case)
        if key in self._cases and (made is None or 4 * made.nbytes <= self._limit):
            self._further[key] = made
            self._shrink()
        return made

    def all_of(self, workload: Workload, seed: int) -> list[Case]:
        """Return what a kernel is run on, in order: what is verified besides, and the case that is timed."""
        case = self.case(workload, seed)
        return [c for c in (self.further(case), case) if c is not None]

    def bound(self, case: Case, exact: bool) -> dict[str, Array]:
        """Return the bound of a case, or that of kernels that round nothing beyond float32."""
        if not exact:
            return case.bound
        key = case.workload, case.seed, case.further
        if key not in self._exact:
            op = get_op(case.workload.op)
            self._exact[key] = op.exact_bound(case.workload, case.inputs, case.expected)
        return self._exact[key]

    def keep_only(self, workload: Workload, seed: int) -> None:
        """Forget the other seeds of a workload."""
        for key in [k for k in self._cases if k[0] == workload and k[1] != seed]:
            self._forget(key)

    def _shrink(self) -> None:
        """Forget the oldest cases while all are beyond the limit, but not the newest one."""
        while len(self._cases) > 1 and self._held > self._limit:
            self._forget(next(iter(self._cases)))

    @property
    def _held(self) -> int:
        """Memory of all cases and what is verified besides them."""
        kept = (*self._cases.values(), *self._further.values())
        return sum(case.nbytes for case in kept if case is not None)

    def _forget(self, key: tuple[Workload, int]) -> None:
        self._cases.pop(key, None)
        self._further.pop(key, None)
        for further in (False, True):
            self._exact.pop((*key, further), None)
        for files in self._files.pop(key, {}).values():
            for path in files.values():
                path.unlink(missing_ok=True)

    def files(self, case: Case, schedule: Schedule, config: Any) -> dict[str, Path]:
        """Return the ``.npy`` file of each array a kernel may ask for: inputs, packed weights and states."""
        per_case = self._files.setdefault((case.workload, case.seed), {})
        inputs = "further" if case.further else ""
        common = per_case.get(inputs)
        if common is None:
            plain = {a.name: case.inputs[a.name] for a in case.args if a.role == "input"}
            common = per_case[inputs] = self._save(plain)
        layout = json.dumps(
            [inputs, schedule.name, sorted(schedule.layouts(case.workload, config).items())]
        )
        packed = per_case.get(layout)
        if packed is None:
            arrays = {
                a.name: case.inputs[a.name] for a in case.args if a.role in ("weight", "state")
            }
            packed = per_case[layout] = self._save(schedule.pack(case.workload, config, arrays))
        return {**common, **packed}

    def _save(self, arrays: Mapping[str, Array]) -> dict[str, Path]:
        self._serial += 1
        out = {}
        for name, array in arrays.items():
            path = self._scratch.path / f"{self._serial}.{name}.npy"
            try:
                np.save(path, np.ascontiguousarray(array), allow_pickle=False)
            except OSError as error:
                path.unlink(missing_ok=True)
                raise MimoError(
                    f"measuring needs space for {name}: {error.strerror or error}",
                    where=path.parent,
                    remedy="Free some space there",
                ) from error
            out[name] = path
        return out
