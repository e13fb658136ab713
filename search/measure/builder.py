"""Candidates -> object code, by child processes that hold the compiler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mimo_compile.ir import functions
from mimo_compile.ir.counts import Counts
from mimo_compile.schedules.base import Schedule
from mimo_compile.search.measure.base import Limits
from mimo_compile.search.measure.cases import Scratch
from mimo_compile.search.measure.worker import Pool, Reply, default_memory
from mimo_compile.search.space import Candidate, JointSpace

_KEPT = 1024
"""Most object files kept at a time."""


def code_path(scratch: Scratch, candidate: Candidate) -> Path:
    """Return where a candidate's object code is put."""
    return scratch.path / f"{candidate.key}.o"


class Builder:
    """Builds candidates and keeps the code of good ones."""

    def __init__(self, limits: Limits, scratch: Scratch, count: int) -> None:
        """Prepare ``count`` compiler processes; they start with the first request."""
        self._limits = limits
        self._scratch = scratch
        self._built: dict[str, Reply] = {}
        """Candidates whose object code is kept."""
        env = {"TMPDIR": str(scratch.path), "OMP_NUM_THREADS": "1", "TVM_NUM_THREADS": "1"}
        memory = limits.memory_bytes or default_memory()
        self.pool = Pool("build", count, memory=memory, env=env)

    def _request(self, space: JointSpace, candidate: Candidate, do: str) -> dict[str, Any]:
        kind = type(space.schedules[candidate.schedule])
        hardware = {**asdict(space.hardware), "features": sorted(space.hardware.features)}
        request = {
            "do": do, "schedule": f"{kind.__module__}:{kind.__qualname__}",
            "workload": str(candidate.workload),
            "config": candidate.config, "hardware": hardware,
            "out": str(code_path(self._scratch, candidate)),
        }  # fmt: skip
        if functions.is_function(candidate.workload):
            request["function"] = functions.text_of(candidate.workload)
        return request

    def build(self, space: JointSpace, candidates: Sequence[Candidate]) -> list[Reply]:
        """Build candidates not built before; the object code is in the file that `code_path` names."""
        new = [c for c in candidates if c.key not in self._built]
        requests = [self._request(space, c, "build") for c in new]
        replies = {c.key: self._built[c.key] for c in candidates if c.key in self._built}
        replies |= dict(
            zip((c.key for c in new), self._all(requests, self._limits.build_s), strict=True)
        )
        return [replies[c.key] for c in candidates]

    def describe(self, space: JointSpace, candidates: Sequence[Candidate]) -> list[Counts | None]:
        """Return the work each candidate's kernel declares (None where lowering fails)."""
        out: dict[str, Counts | None] = {}
        costly = []
        for c in candidates:
            schedule = space.schedules[c.schedule]
            if type(schedule).work is Schedule.work:  # must generate code to tell
                costly.append(c)
            else:
                out[c.key] = schedule.told(c.workload, space.config(c), space.hardware)
        requests = [self._request(space, c, "describe") for c in costly]
        for c, r in zip(costly, self._all(requests, self._limits.build_s), strict=True):
            out[c.key] = Counts(r.value["ops"], r.value["bytes"]) if r.status == "ok" else None
        return [out[c.key] for c in candidates]

    def _all(self, requests: Sequence[dict[str, Any]], limit_s: float) -> list[Reply]:
        out: list[Reply | None] = [None] * len(requests)
        for index, reply in self.pool.run(requests, limit_s):
            out[index] = reply
        return [r for r in out if r is not None]

    def keep(self, candidate: Candidate, built: Reply) -> None:
        """Keep the code of a good candidate for `confirm`, within a limit."""
        self._built[candidate.key] = built
        while len(self._built) > _KEPT:
            self.forget(next(iter(self._built)))

    def adopt(self, candidate: Candidate, built: Reply, code: bytes) -> None:
        """Take code that was built elsewhere, as if it had been built here.

        Raises:
            OSError: it cannot be written.
        """
        code_path(self._scratch, candidate).write_bytes(code)
        self.keep(candidate, built)

    def keeps(self, candidate: Candidate) -> bool:
        """Say whether a candidate's code is kept."""
        return candidate.key in self._built

    def forget(self, *keys: str) -> None:
        """Remove the code of candidates, named by their keys."""
        for key in keys:
            self._built.pop(key, None)
            (self._scratch.path / f"{key}.o").unlink(missing_ok=True)
