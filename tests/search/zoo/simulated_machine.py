"""A machine on paper with a hidden energy: a large space to search by joules, without a clock."""

from __future__ import annotations

import hashlib
import math

from recordings import DEVICE, HW
from toy_schedules import Tiled

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import parse_workload
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Space
from mimo_compile.search.measure.replay import ReplayMeasurer
from mimo_compile.search.records import Record, Verdict, versions
from mimo_compile.search.space import Candidate

WORKLOAD = parse_workload("swiglu:t=64,f=8192")
POWERS = (1, 2, 4, 8, 16, 32, 64, 128)


def make(**knobs):
    return tuple(sorted(knobs.items()))


class Wide(Tiled):
    """About 1.2e5 configs; tiles decide traffic, the rest overheads."""

    name = "swiglu.wide"
    config = tuple

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        knobs = {
            "rows": POWERS, "cols": POWERS, "unroll": POWERS[:6], "prefetch": (0, 1, 2, 4, 8, 16),
            "order": ("ab", "ba", "aab"), "stream": (0, 1), "lanes": (4, 8, 16), "split": POWERS[:6],
        }  # fmt: skip
        return Space(make, knobs, make(**{k: v[0] for k, v in knobs.items()}))

    def config_from_json(self, values):
        return make(**values)

    @staticmethod
    def config_to_json(config):
        return dict(config)

    def work(self, workload: Workload, config, hardware: Hardware) -> Counts:
        c, n = dict(config), float(workload.integer("t") * workload.integer("f"))
        return Counts(
            {"fma_f32": 2 * n, "int_op": n * (1 / c["unroll"] + c["split"] / 32)},
            {
                "dram": 12 * n * (1 + 0.3 * c["split"] / 32),
                "l2": 12 * n * (1 + 4 / c["rows"]),
                "l1": 12 * n * (1 + 8 / c["cols"]),
            },
            {
                "tasks": 64.0, "share": 0.5, "useful": 1.0, "lanes": float(c["lanes"]), "sums": 8.0,
                "loads": 1.0, "tile_bytes": 64.0 * c["rows"] * c["cols"],
            },
        )  # fmt: skip

    def layouts(self, workload: Workload, config) -> dict[str, str]:
        return {}


def noise(candidate: Candidate, what: str) -> float:
    """A number in [-1, 1] that belongs to the candidate."""
    digest = hashlib.sha256(f"{what}{candidate}".encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**31 - 1


def latency_us(candidate: Candidate) -> float:
    """Flat near the optimum: rows 16 to 64, columns 16 to 64, unrolled by 8, prefetched by 4."""
    c = candidate.config
    log = {k: math.log2(c[k] + (k == "prefetch")) for k in ("rows", "cols", "unroll", "prefetch")}
    far = max(0.0, abs(log["rows"] - 5) - 1) ** 2 + max(0.0, abs(log["cols"] - 5) - 1) ** 2
    t = 100 * (
        1 + 0.15 * far + 0.02 * (log["unroll"] - 3) ** 2 + 0.01 * (log["prefetch"] - 2.3) ** 2
    )
    t *= {4: 1.6, 8: 1.1, 16: 1.0}[c["lanes"]] * (1.03 if c["order"] == "ba" else 1.0)
    return t * (1 + 0.004 * math.log2(c["split"])) * (1 + 0.003 * noise(candidate, "time"))


def energy_mj(candidate: Candidate) -> float:
    """Hidden coefficients, unlike the modelled ones: streaming saves, orders differ, large tiles cost."""
    c, work = candidate.config, Wide().work(WORKLOAD, candidate.knobs, HW)
    mj = 14.0 * latency_us(candidate) * 1e-3
    mj += sum(v * {"l1": 20.0, "l2": 60.0, "dram": 160.0}[k] for k, v in work.bytes.items()) * 1e-9
    mj *= (0.93 if c["stream"] else 1.0) * {"ab": 1.0, "ba": 0.9, "aab": 1.06}[c["order"]]
    mj *= 1 + 0.02 * max(0.0, math.log2(c["rows"] * c["cols"]) - 9)
    return mj * (1 + 0.01 * noise(candidate, "energy"))


class Machine(ReplayMeasurer):
    """Measures any candidate by the formulas above."""

    def __init__(self) -> None:
        super().__init__([])

    def _find(self, candidate: Candidate) -> Record:
        us, schedule = latency_us(candidate), Wide()
        work = schedule.work(WORKLOAD, candidate.knobs, HW)
        return Record(
            key="", workload=str(WORKLOAD), schedule=schedule.name, schedule_version=1,
            config=candidate.config, hardware=HW.id, features=(), threads=2, cache="cold",
            versions=versions(), verdict=Verdict.OK, latency_us=us, ops=dict(work.ops),
            bytes=dict(work.bytes), modelled_mj=DEVICE.energy_mj(work, us),
            energy_mj=energy_mj(candidate), energy_source="replay", energy_window_s=1.0,
        )  # fmt: skip

    def describe(self, space, candidates):
        return [space.schedules[c.schedule].work(WORKLOAD, c.knobs, HW) for c in candidates]
