"""A space that was measured as a whole: what a search on it needs, in one file, without any kernel.

The file is xz-compressed text: a line of JSON that describes workload, target, device rates and the knobs of
each schedule; then one tuning record for each legal config. With it come schedules that know their configs
and each one's work, so that a search behaves as it would on the machine and neither compiles nor measures.
"""

from __future__ import annotations

import dataclasses
import lzma
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from mimo_compile.cost_models.analytic import DeviceModel
from mimo_compile.errors import InputError, MimoError
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Kernel, KnobValue, Schedule, Space
from mimo_compile.search.measure.replay import ReplayMeasurer
from mimo_compile.search.records import Record, decode, encode
from mimo_compile.search.space import JointSpace

SCHEMA = 1
FORMAT = "mimo-recorded-space"

Knobs = tuple[tuple[str, KnobValue], ...]
"""A config as sorted pairs."""


class RecordedSchedule(Schedule):
    """A schedule as it was when its space was recorded: configs and their work, but no code."""

    config = tuple

    def __init__(
        self,
        name: str,
        version: int,
        workload: Workload,
        knobs: Mapping[str, tuple[KnobValue, ...]],
        default: Knobs,
        works: Mapping[Knobs, Counts],
    ) -> None:
        """Take what was recorded; the configs in ``works`` are the legal ones."""
        self.name = name  # type: ignore[misc]
        self.op = workload.op  # type: ignore[misc]
        self.version = version  # type: ignore[misc]
        self.workload = workload
        self.knobs = dict(knobs)
        self.default = default
        self.works = works
        self._fixed = {k: v for c in list(works)[:1] for k, v in c if k not in knobs}
        """What configs have besides knobs."""

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """The recorded workload alone."""
        return workload == self.workload

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """The recorded knobs; legal is what was recorded."""
        return Space(self._make, self.knobs, self.default, self.works.__contains__)

    def _make(self, **knobs: KnobValue) -> Knobs:
        return self.config_of(**self._fixed, **knobs)

    @staticmethod
    def config_of(**knobs: KnobValue) -> Knobs:
        """Return the config of knobs by name."""
        return tuple(sorted(knobs.items()))

    def config_from_json(self, values: Mapping[str, Any]) -> Knobs:
        """Rebuild a config."""
        return self.config_of(**values)

    @staticmethod
    def config_to_json(config: Knobs) -> dict[str, Any]:
        """Return the knobs by name."""
        return dict(config)

    def lower(self, workload: Workload, config: Knobs, hardware: Hardware) -> Kernel:
        """Refuse: a recording has no code.

        Raises:
            MimoError: always.
        """
        raise MimoError(f"{self.name}: a recorded space generates no code")

    def work(self, workload: Workload, config: Knobs, hardware: Hardware) -> Counts:
        """Return the recorded work."""
        return self.works[config]


class RecordingMeasurer(ReplayMeasurer):
    """Replays a recording; a candidate's work is what its schedule says, traits included."""

    def describe(self, space: JointSpace, candidates: Any) -> list[Counts | None]:
        """Return the recorded work of each candidate."""
        return [
            space.schedules[c.schedule].work(c.workload, space.config(c), space.hardware)
            for c in candidates
        ]


@dataclass(frozen=True)
class Recording:
    """All legal candidates of one workload on one target, each with what came of it."""

    workload: Workload
    hardware: Hardware
    device: DeviceModel
    timing: Mapping[str, Any]
    """How time was taken: passes, batches, seconds."""
    knobs: Mapping[str, Mapping[str, tuple[KnobValue, ...]]]
    """Values of each schedule's knobs, in order; schedules in order of preference."""
    defaults: Mapping[str, Knobs]
    records: tuple[Record, ...]
    traits: tuple[Mapping[str, float], ...]
    """Of each record's kernel, see `ir.counts`; records themselves keep none."""

    @property
    def cache(self) -> str:
        """``hot`` or ``cold``."""
        return self.records[0].cache

    def schedules(self) -> list[Schedule]:
        """Return the schedules to search among."""
        works: dict[str, dict[Knobs, Counts]] = {name: {} for name in self.knobs}
        versions = dict.fromkeys(self.knobs, 1)
        for r, traits in zip(self.records, self.traits, strict=True):
            config = RecordedSchedule.config_of(**r.config)
            works[r.schedule][config] = Counts(r.ops, r.bytes, traits)
            versions[r.schedule] = r.schedule_version
        return [
            RecordedSchedule(
                name, versions[name], self.workload, knobs, self.defaults[name], works[name]
            )
            for name, knobs in self.knobs.items()
        ]

    def space(self) -> JointSpace:
        """Return the joint space of all schedules."""
        return JointSpace(self.workload, self.hardware, self.schedules())

    def measurer(self) -> RecordingMeasurer:
        """Return what answers from the records."""
        return RecordingMeasurer(self.records, cache=self.cache)

    @property
    def best_us(self) -> float:
        """The least time of all candidates."""
        return min((r.latency_us or math.inf for r in self.records if r.ok), default=math.inf)

    def share_within(self, factor: float) -> float:
        """Return the part of all candidates that take at most ``factor`` times the least time."""
        limit = factor * self.best_us
        good = sum(1 for r in self.records if r.ok and (r.latency_us or math.inf) <= limit)
        return good / len(self.records)

    def save(self, path: Path) -> int:
        """Write the file; return its size in bytes."""
        header = {
            "format": FORMAT,
            "schema": SCHEMA,
            "workload": str(self.workload),
            "hardware": {
                **dataclasses.asdict(self.hardware),
                "features": sorted(self.hardware.features),
            },
            "device": {
                **dataclasses.asdict(self.device),
                "measured": sorted(self.device.measured),
            },
            "timing": dict(self.timing),
            "schedules": [
                {"name": n, "knobs": list(k.items()), "default": dict(self.defaults[n])}
                for n, k in self.knobs.items()
            ],
            "traits": self.traits,
        }
        lines = [msgspec.json.encode(header).decode(), *map(encode, self.records)]
        data = lzma.compress("\n".join(lines).encode() + b"\n", preset=9 | lzma.PRESET_EXTREME)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return len(data)

    @classmethod
    def load(cls, path: Path) -> Recording:
        """Read a file.

        Raises:
            InputError: missing, damaged, or of a newer schema.
        """
        try:
            first, *rest = lzma.decompress(path.read_bytes()).decode().splitlines()
            header = msgspec.json.decode(first)
            if header["format"] != FORMAT or header["schema"] > SCHEMA:
                raise InputError("not a recorded space, or one of a newer version", file=path)
            hardware = Hardware(
                **{**header["hardware"], "features": frozenset(header["hardware"]["features"])}
            )
            records = tuple(decode(line, file=path) for line in rest)
            schedules, traits = header["schedules"], tuple(header["traits"])
            if not records or len(traits) != len(records):
                raise InputError(
                    f"a recorded space with {len(records)} records and the traits of {len(traits)}",
                    file=path,
                    remedy="Record or download it again",
                )
            if strange := {r.schedule for r in records} - {s["name"] for s in schedules}:
                raise InputError(
                    f"a recorded space without the knobs of {', '.join(sorted(strange))}", file=path
                )
            return cls(
                Workload.parse(header["workload"]),
                hardware,
                _device(header["device"]),
                header["timing"],
                {s["name"]: {k: tuple(v) for k, v in s["knobs"]} for s in schedules},
                {s["name"]: RecordedSchedule.config_of(**s["default"]) for s in schedules},
                records,
                traits,
            )
        except OSError as error:
            raise InputError(f"cannot read it: {error.strerror}", file=path) from error
        except (lzma.LZMAError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"this is not a recorded space: {error}", file=path) from error


def _device(values: Mapping[str, Any]) -> DeviceModel:
    known = {f.name for f in dataclasses.fields(DeviceModel)}
    kept = {k: v for k, v in values.items() if k in known}
    levels = {k: tuple(v) for k, v in kept["bytes_per_s"].items()}
    return DeviceModel(**{**kept, "bytes_per_s": levels, "measured": frozenset(kept["measured"])})
