"""What a tuner sees of a farm: a `Measures` whose builds and measurements run on the farm's nodes.

Results come back here, and the tuner alone writes the database: what was acknowledged does not depend on any
worker. A candidate whose worker died twice gets the verdict ``crash``.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from mimo_compile.cost_models.analytic import DeviceModel
from mimo_compile.errors import MimoError
from mimo_compile.ir import functions
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.search.farm.coordinator import Farm, Result
from mimo_compile.search.farm.hosts import BuildOrder, Built, MeasureOrder, reference
from mimo_compile.search.farm.scheduling import Action
from mimo_compile.search.farm_runs import Worker
from mimo_compile.search.measure.base import Limits, Measurement, Timing
from mimo_compile.search.measure.builder import Builder
from mimo_compile.search.measure.cases import Scratch
from mimo_compile.search.measure.twins import Twins
from mimo_compile.search.measure.worker import Reply
from mimo_compile.search.meters import MODELLED
from mimo_compile.search.records import Record, Verdict
from mimo_compile.search.space import Candidate, JointSpace

_KEPT = 1024
"""Most candidates whose object code is kept here, besides those that are wanted now."""
_START_S = 180.0
"""Seconds beyond all limits of its own that a worker may take, for starting its processes."""
_LATER = 0.25
"""Weight of builds of a round to come."""


@dataclass(frozen=True, slots=True)
class _Batch:
    """What `FarmMeasurer.measure` was asked for."""

    space: JointSpace
    seed: int
    energy: bool


class FarmMeasurer:
    """Measures on the nodes of a farm."""

    def __init__(
        self,
        farm: Farm,
        hardware: Hardware,
        *,
        device: DeviceModel | None = None,
        limits: Limits | None = None,
        timing: Timing | None = None,
        meter: str = "",
        overlaps: bool = False,
    ) -> None:
        """Use a farm, which is closed with this.

        Args:
            farm: Whose hosts are `hosts.BuildHost` for ``build`` and `hosts.MeasureHost` for ``measure``.
            hardware: Whose features and thread count kernels are built for.
            device: Rates of the measuring nodes.
            limits: What the hosts were told.
            timing: What the hosts were told.
            meter: Name of the meter that the measuring nodes read; "": none.
            overlaps: See `base.Ahead`; true where builds disturb no clock because they run elsewhere.
        """
        self.farm = farm
        self.hardware = hardware
        self.device = device or DeviceModel.guess(hardware)
        self.limits = limits or Limits()
        self.timing = timing or Timing()
        self.cache = self.timing.cache
        self.meter = meter
        self._overlaps = overlaps
        self.twins = Twins()
        self._known: dict[str, Built] = {}
        """Builds that came back, by the candidate's key."""
        self._wanted: set[str] = set()
        """Keys of what is to be measured or compared next."""
        self._building: dict[int, Candidate] = {}
        self._builds: dict[str, int] = {}
        self._lost: dict[str, Result] = {}
        """Builds whose workers never answered."""
        self._last: dict[str, str] = {}
        """Workload -> node that measured it last."""
        self._local: tuple[Scratch, Builder] | None = None
        self._search = secrets.token_hex(8)
        farm.judge = judged

    @property
    def overlaps(self) -> bool:
        """Whether the next batch's builds may go on while this one is measured: see `base.Ahead`."""
        return self._overlaps or any(
            n.kinds is not None and "measure" not in n.kinds
            for n in self.farm.scheduler.nodes.values()
        )

    def how(self) -> dict[str, Any]:
        """Return the arguments of `tune_workloads` with which it searches here."""
        meter = RemoteMeter(self.meter, self.hardware.kind) if self.meter else MODELLED
        return {"measurer": self, "device": self.device, "meter": meter}

    def recall(self, space: JointSpace, candidate: Candidate, record: Record) -> None:
        """Note what is recorded of a candidate: from then on the same code is not timed again."""
        self.twins.learn(space, candidate, record)

    # -- building --------------------------------------------------------------------------------

    def prepare(self, space: JointSpace, candidates: Sequence[Candidate]) -> None:
        """Queue the builds of candidates that are to be measured later, behind those that are wanted now."""
        for candidate in candidates:
            self._build(space, candidate, _LATER)

    def _build(self, space: JointSpace, candidate: Candidate, weight: float = 1.0) -> None:
        key = candidate.key
        if key in self._known or key in self._builds:
            return
        number = self.farm.number()
        order = BuildOrder(
            str(space.workload), reference(space.schedules[candidate.schedule]), candidate,
            space.hardware, _function(space),
        )  # fmt: skip
        action = Action(
            number, "build", str(space.workload), key, weight=weight,
            timeout_s=self.limits.build_s + _START_S,
        )  # fmt: skip
        self._building[number], self._builds[key] = candidate, number
        self.farm.submit(action, order)

    def _built(self, result: Result) -> Candidate:
        """Keep what came of a build."""
        candidate = self._building.pop(result.action.id)
        self._builds.pop(candidate.key, None)
        if result.status != "done":
            self._lost[candidate.key] = result
        built = result.value or Built(Reply("crash", {}, result.message))
        self._known[candidate.key] = replace(built, worker=result.worker)
        if (more := len(self._known) - _KEPT) > 0:
            for key in [k for k in self._known if k not in self._wanted][:more]:
                del self._known[key]
        return candidate

    # -- measuring -------------------------------------------------------------------------------

    def measure(
        self, space: JointSpace, candidates: Sequence[Candidate], seed: int, *, energy: bool = True
    ) -> Iterator[Measurement]:
        """Build where needed and measure candidates of one workload; each is yielded as it ends.

        Raises:
            DeviceLost: no node is left that could measure; what was found before comes first.
            MimoError: every node that could serve failed.
        """
        batch = _Batch(space, seed, energy)
        wanted = {c.key: c for c in candidates}
        running: dict[int, Candidate] = {}
        self._wanted |= wanted.keys()
        try:
            for candidate in candidates:
                self._build(space, candidate)
            for key in [k for k in wanted if k in self._known]:
                yield from self._next_step(batch, wanted.pop(key), running)
            while wanted or running:
                result = self.farm.next()
                number = result.action.id
                if number in self._building:
                    key = self._built(result).key
                    if key in wanted:
                        yield from self._next_step(batch, wanted.pop(key), running)
                elif number in running:
                    yield self._measured(running.pop(number), result, seed)
        finally:
            self._wanted.difference_update(c.key for c in candidates)
            for number in running:
                self.farm.cancel(number)

    def _next_step(
        self, batch: _Batch, candidate: Candidate, running: dict[int, Candidate]
    ) -> list[Measurement]:
        """Have a built candidate measured, or return at once what its build failed of."""
        from mimo_compile.search.measure.runner import failed

        built = self._known[candidate.key]
        self._wanted.discard(candidate.key)
        if (lost := self._lost.pop(candidate.key, None)) is not None:
            del self._known[candidate.key]
            return [_gave_up(candidate, lost, batch.seed)]
        if built.reply.status != "ok":
            del self._known[candidate.key]
            verdict = failed(candidate, built.reply, batch.seed, "build")
            return [replace(verdict, worker=built.worker)]
        meter = self.meter if batch.energy else ""
        facts = built.reply.value
        if twin := self.twins.find(batch.space, candidate, facts, batch.seed, meter=meter):
            return [replace(twin, worker=built.worker)]
        number = self._order(batch, [candidate], [built])
        running[number] = candidate
        return []

    def _order(
        self,
        batch: _Batch,
        candidates: Sequence[Candidate],
        built: Sequence[Built],
        *,
        compare: bool = False,
    ) -> int:
        space, count = batch.space, len(candidates)
        names = sorted({c.schedule for c in candidates})
        order = MeasureOrder(
            str(space.workload), tuple(reference(space.schedules[n]) for n in names),
            tuple(candidates), tuple(built), batch.seed, batch.energy, compare, _function(space),
        )  # fmt: skip
        limits, timing = self.limits, self.timing
        rounds = timing.confirm_rounds if compare else 1
        each = 4 * limits.run_s + (1 + timing.repeats) * limits.time_s * rounds * count
        each += limits.time_s + 4 * timing.energy_window_s
        content = candidates[0].key if count == 1 else ""
        number = self.farm.number()
        action = Action(
            number, "measure", f"{'compare ' if compare else ''}{space.workload}", content,
            exclusive=True, affinity=self._where(space), timeout_s=count * each + 4 * _START_S,
        )  # fmt: skip
        self.farm.submit(action, order)
        return number

    def _where(self, space: JointSpace) -> str:
        """Return the node that has this workload's inputs and reference already."""
        return self._last.get(str(space.workload), "")

    def _measured(self, candidate: Candidate, result: Result, seed: int) -> Measurement:
        self._last[str(candidate.workload)] = result.node
        if result.status == "done":
            measurement: Measurement
            (measurement,) = result.value
            if measurement.verdict is not Verdict.OK:
                self._known.pop(candidate.key, None)
            return replace(measurement, worker=result.worker)
        self._known.pop(candidate.key, None)
        return _gave_up(candidate, result, seed)

    def confirm(
        self, space: JointSpace, candidates: Sequence[Candidate], seed: int
    ) -> Iterator[Measurement]:
        """Time candidates against each other, all on one node; one that cannot be built again is left out.

        Raises:
            DeviceLost: no node is left that could measure.
            MimoError: every node that could serve failed.
        """
        keys = {c.key for c in candidates}
        self._wanted |= keys
        try:
            for candidate in candidates:
                self._build(space, candidate)
            while not keys.isdisjoint(self._builds):
                self._take(self.farm.next())
            there = [c for c in candidates if not self._gone(c, seed)]
            built = [self._known[c.key] for c in there]
        finally:
            self._wanted -= keys
        if not there:
            return
        number = self._order(_Batch(space, seed, True), there, built, compare=True)
        result = self._wait(number)
        if result.status == "done":
            yield from (replace(m, worker=result.worker) for m in result.value)
        elif result.status == "refused":
            raise MimoError(f"the comparison cannot run: {result.message}")
        else:  # whichever of them it was: single readings stand
            yield from ()

    def _gone(self, candidate: Candidate, seed: int) -> bool:
        """Say whether the workers of a candidate's build never answered; then it is forgotten."""
        lost = self._lost.pop(candidate.key, None)
        if lost is None:
            return False
        del self._known[candidate.key]
        _gave_up(candidate, lost, seed)  # raises where no node could build it
        return True

    def _wait(self, number: int) -> Result:
        try:
            while (result := self.farm.next()).action.id != number:
                self._take(result)
        except BaseException:
            self.farm.cancel(number)
            raise
        return result

    def _take(self, result: Result) -> None:
        if result.action.id in self._building:
            self._built(result)

    # -- the rest --------------------------------------------------------------------------------

    def describe(self, space: JointSpace, candidates: Sequence[Candidate]) -> list[Counts | None]:
        """Return the work each candidate's kernel declares (None where lowering fails); computed here."""
        if self._local is None:
            scratch = Scratch()
            self._local = scratch, Builder(self.limits, scratch, 1)
        return self._local[1].describe(space, candidates)

    def workers(self) -> list[Worker]:
        """Return what each worker of the farm did so far, for this search's target."""
        out = self.farm.workers()
        began = time.time() - max((w.seconds for w in out), default=0.0)
        told = {
            "search": self._search, "hardware": self.hardware.id, "threads": self.hardware.threads,
            "began": began,
        }  # fmt: skip
        return [msgspec.structs.replace(w, **told) for w in out]

    def close(self) -> None:
        """Release everything."""
        self.farm.close()
        if self._local is not None:
            scratch, builder = self._local
            builder.pool.close()
            scratch.close()

    def __enter__(self) -> FarmMeasurer:
        """Return itself."""
        return self

    def __exit__(self, *error: Any) -> None:
        """Close."""
        self.close()


def _function(space: JointSpace) -> str:
    """Return the text of the function that a generic workload names."""
    generic = functions.is_function(space.workload)
    return functions.text_of(space.workload) if generic else ""


def _gave_up(candidate: Candidate, result: Result, seed: int) -> Measurement:
    """Return the verdict on a candidate that its workers never answered about."""
    if result.status == "refused":
        raise MimoError(f"{candidate} cannot be measured: {result.message}")
    verdict = Verdict.TIMEOUT if result.status == "timeout" else Verdict.CRASH
    text = f"farm: {result.message}"[:2000]
    return Measurement(candidate, verdict, text, seed, worker=result.worker)


def judged(action: Action, value: Any) -> tuple[int, int]:
    """Return how many candidates an answer of a host says are right, and how many are not."""
    if action.kind == "build":
        fine = value.reply.status == "ok"
        return int(fine), int(not fine)
    good = sum(m.verdict is Verdict.OK for m in value)
    return good, len(value) - good


class RemoteMeter:
    """Stands for the meter that measuring nodes read: here it has a name and no counter."""

    def __init__(self, name: str, kind: str) -> None:
        """Take the meter's name and the kind of hardware it reads."""
        self.name = name
        self.measures = (kind,)
        self.reads = "the counter of the measuring node"
        self.step_s = 0.0

    def read_mj(self) -> float:
        """Refuse.

        Raises:
            OSError: always.
        """
        raise OSError("the meter is that of another machine")
