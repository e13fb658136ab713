"""Machines on paper for `energy_search.py`: laws that give any candidate its time and its joules."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from mimo_compile.cost_models.analytic import DeviceModel
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import PRESETS, Hardware
from mimo_compile.ir.ops import parse_workload
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Kernel, Schedule, Space
from mimo_compile.search.measure.recording import Recording
from mimo_compile.search.measure.replay import ReplayMeasurer
from mimo_compile.search.records import Record, Verdict, versions
from mimo_compile.search.space import Candidate

HW = PRESETS["x86-64-v3"].with_threads(2)
DEVICE = DeviceModel.guess(HW)
WORKLOAD = parse_workload("swiglu:t=64,f=8192")
POWERS = (1, 2, 4, 8, 16, 32, 64, 128)
ORDERED: dict[str, tuple[int, ...]] = {
    "rows": POWERS, "cols": POWERS, "unroll": POWERS[:6], "prefetch": (0, 1, 2, 4, 8, 16),
    "split": POWERS[:6],
}  # fmt: skip
CHOICES: dict[str, tuple[str, ...]] = {
    "order": ("ab", "ba", "aab"), "layout": ("p", "q", "r", "s"), "store": ("plain", "stream"),
}  # fmt: skip
GAP = 0.2
"""Part of the energy that the planted value saves; it changes no time."""


@dataclass(frozen=True)
class Law:
    """What kind of machine: strengths of what time and energy depend on."""

    time_pairs: float = 0.0
    """Largest effect of two knobs together on time, as a logarithm."""
    energy_knobs: float = 0.06
    """Largest effect of each knob's value on energy."""
    energy_pairs: float = 0.0
    time_noise: float = 0.003
    energy_noise: float = 0.01
    planted: bool = False
    """One layout saves `GAP` of the energy; nothing else than time matters to it."""
    slope: float = 0.0
    """Energy falls by this power of the time that ``split`` costs: what is frugal is slow."""
    metered: bool = True


LAWS: dict[str, Law] = {
    "smooth": Law(),
    "twins": Law(energy_knobs=0.0, energy_noise=0.002, planted=True),
    "trade": Law(slope=3.0),
    "rugged": Law(time_pairs=0.04, energy_pairs=0.03, energy_noise=0.02),
    "loud": Law(energy_knobs=0.03, energy_noise=0.04),
    "modelled": Law(metered=False),
}


def number(*what: object) -> float:
    """Return a number in [-1, 1] that belongs to these words."""
    digest = hashlib.sha256("|".join(map(str, what)).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**47 - 1


def make(**knobs: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(knobs.items()))


class Paper(Schedule):
    """Some 3.3e5 configs; what they declare says part of what they cost."""

    name = "swiglu.paper"
    op = "swiglu"
    config = tuple

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        return True

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        knobs: dict[str, Any] = {**ORDERED, **CHOICES}
        return Space(make, knobs, make(**{k: v[0] for k, v in knobs.items()}))

    def config_from_json(self, values: Any) -> Any:
        return make(**values)

    @staticmethod
    def config_to_json(config: Any) -> dict[str, Any]:
        return dict(config)

    def lower(self, workload: Workload, config: Any, hardware: Hardware) -> Kernel:
        raise AssertionError("nothing is built")

    def work(self, workload: Workload, config: Any, hardware: Hardware) -> Counts:
        c, n = dict(config), float(workload.integer("t") * workload.integer("f"))
        return Counts(
            {"fma_f32": 2 * n, "int_op": n * (1 / c["unroll"] + c["split"] / 32)},
            {
                "dram": 12 * n * (1 + 0.3 * c["split"] / 32),
                "l2": 12 * n * (1 + 4 / c["rows"]),
                "l1": 12 * n * (1 + 8 / c["cols"]),
            },
            {
                "tasks": 64.0, "share": 0.5, "useful": 1.0, "lanes": 8.0, "sums": 8.0, "loads": 1.0,
                "tile_bytes": 64.0 * c["rows"] * c["cols"],
            },
        )  # fmt: skip


class Machine(ReplayMeasurer):
    """Measures any candidate by a law; ``seed`` draws its coefficients."""

    def __init__(self, law: Law, seed: int) -> None:
        super().__init__([])
        self.law, self.seed = law, seed
        self.watts = 9.0 + 6.0 * (1 + self._at("watts"))
        self.picojoules = {
            level: base * 2 ** self._at("level", level)
            for level, base in (("l1", 20.0), ("l2", 60.0), ("dram", 160.0))
        }
        self.frugal = CHOICES["layout"][int(2 * (1 + self._at("frugal"))) % 4]

    def _at(self, *what: object) -> float:
        return number(self.seed, *what)

    def latency_us(self, c: Candidate) -> float:
        """Flat around an optimum of its own for each knob; some values of choices cost a little."""
        config, log = c.config, 0.0
        for knob, values in ORDERED.items():
            best = (len(values) - 1) * (0.5 + 0.3 * self._at("best", knob))
            far = max(0.0, abs(values.index(config[knob]) - best) - 0.7)
            log += 0.03 * (1.2 + self._at("steep", knob)) * far**2
        for knob in CHOICES:
            if self.law.planted and knob == "layout":
                continue
            log += 0.03 * max(0.0, self._at("choice", knob, config[knob]))
        log += self.law.time_pairs * self._pairs(config, "time")
        return 100.0 * math.exp(log) * (1 + self.law.time_noise * self._at("noise", c.key))

    def _pairs(self, config: Any, what: str) -> float:
        names = sorted(config)
        pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
        chosen = [p for p in pairs if self._at("pair", what, *p) > 0.6]
        return sum(self._at(what, a, config[a], b, config[b]) for a, b in chosen)

    def energy_mj(self, c: Candidate, latency_us: float) -> float:
        """Return millijoules by coefficients that no model here is told of."""
        config, law = c.config, self.law
        mj = self.watts * latency_us * 1e-3
        if law.planted:
            mj *= 1 - GAP * (config["layout"] == self.frugal)
        else:
            work = Paper().work(WORKLOAD, c.knobs, HW)
            mj += sum(v * self.picojoules[k] for k, v in work.bytes.items()) * 1e-9
        log = sum(law.energy_knobs * self._at("joules", k, config[k]) for k in config)
        log += law.energy_pairs * self._pairs(config, "energy")
        if law.slope:
            values = ORDERED["split"]
            best = (len(values) - 1) * (0.5 + 0.3 * self._at("best", "split"))
            log -= law.slope * 0.02 * abs(values.index(config["split"]) - best)
        return mj * math.exp(log) * (1 + law.energy_noise * self._at("read", c.key))

    def _find(self, candidate: Candidate) -> Record:
        us = self.latency_us(candidate)
        work = Paper().work(WORKLOAD, candidate.knobs, HW)
        mj = self.energy_mj(candidate, us) if self.law.metered else None
        return Record(
            key="", workload=str(WORKLOAD), schedule=Paper.name, schedule_version=1,
            config=candidate.config, hardware=HW.id, features=(), threads=2, cache="cold",
            versions=versions(), verdict=Verdict.OK, latency_us=us, ops=dict(work.ops),
            bytes=dict(work.bytes), modelled_mj=DEVICE.energy_mj(work, us), energy_mj=mj,
            energy_source="replay" if mj is not None else "", energy_window_s=1.0,
        )  # fmt: skip

    def describe(self, space: Any, candidates: Sequence[Candidate]) -> list[Counts | None]:
        return [Paper().work(WORKLOAD, c.knobs, HW) for c in candidates]


def with_joules(recording: Recording, seed: int) -> ReplayMeasurer:
    """Return a recorded space's measurer with joules by a hidden law over its times and its work."""
    measurer = recording.measurer()
    rates = {lv: 2 ** number(seed, lv) for lv in ("l1", "l2", "l3", "dram")}
    watts = 15.0 * 2 ** number(seed, "watts")

    def joules(r: Record) -> float | None:
        if r.latency_us is None:
            return None
        mj = watts * r.latency_us * 1e-3
        mj += sum(60.0 * rates.get(lv, 1.0) * n for lv, n in r.bytes.items()) * 1e-9
        log = sum(0.06 * number(seed, r.schedule, k, v) for k, v in r.config.items())
        noise = 0.01 * number(seed, "read", r.schedule, sorted(r.config.items()))
        return mj * math.exp(log) * (1 + noise)

    measurer._known = {
        key: msgspec.structs.replace(
            r, energy_mj=joules(r), energy_source="replay", energy_window_s=1.0
        )
        for key, r in measurer._known.items()
    }
    return measurer
