"""Kernel Tuner's strategies on a recorded space, through its own simulation mode.

Its parameters are the algorithm and the union of all knobs; knobs that an algorithm does not have stay at
their first value. Words become their positions, since some of its strategies compute with values. The legal
configs are its restriction, so that it proposes no others, and its cache file holds the recorded times.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path

STRATEGIES = (
    "random_sample", "genetic_algorithm", "diff_evo", "pso", "firefly_algorithm",
    "simulated_annealing", "dual_annealing", "basinhopping", "mls", "greedy_mls", "ordered_greedy_mls",
    "greedy_ils", "hybrid_vndx", "adaptive_tabu_greywolf", "bayes_opt",
)  # fmt: skip

_SPACES: dict[int, Space] = {}


class Space:
    """One recording as Kernel Tuner wants it."""

    def __init__(self, recording) -> None:
        values: dict[str, list] = {"schedule": list(recording.knobs)}
        for knobs in recording.knobs.values():
            for name, offered in knobs.items():
                known = values.setdefault(name, [])
                known += [v for v in offered if v not in known]
        self.values = {n: sorted(v) if _numeric(v) else v for n, v in values.items()}
        self.params = {
            n: list(v) if _numeric(v) else list(range(len(v))) for n, v in self.values.items()
        }
        self.configs: dict[tuple, tuple[str, dict]] = {}
        self.cache: dict[str, dict] = {}
        for r in recording.records:
            key = self.encoded(r.schedule, r.config)
            self.configs[key] = r.schedule, dict(r.config)
            entry = dict(zip(self.params, key, strict=True))
            time_ms = r.latency_us / 1000 if r.ok else math.nan
            if r.ok:
                entry["time"] = time_ms
            else:
                entry |= {"time": "RuntimeFailedConfig", "__error__": "RuntimeFailedConfig"}
            entry |= dict.fromkeys(
                ("compile_time", "verification_time", "benchmark_time", "strategy_time",
                 "framework_time"), 0.0,
            )  # fmt: skip
            self.cache[",".join(map(str, key))] = entry
        self._folder = tempfile.TemporaryDirectory()  # goes with the space, or with the process
        self.file = Path(self._folder.name) / "cache.json"
        self.file.write_text(
            json.dumps(
                {
                    "device_name": "recorded", "kernel_name": "kernel", "problem_size": [1, 1, 1],
                    "tune_params_keys": list(self.params), "tune_params": self.params,
                    "objective": "time", "cache": self.cache,
                }
            )
        )  # fmt: skip
        self.searchspace = None

    def encoded(self, schedule: str, config: dict) -> tuple:
        given = {"schedule": schedule, **config}
        return tuple(
            given.get(n, known[0]) if _numeric(known) else known.index(given.get(n, known[0]))
            for n, known in self.values.items()
        )

    def legal(self, params: dict) -> bool:
        return tuple(params[n] for n in self.params) in self.configs


def _numeric(values) -> bool:
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def search(lookup, seed: int, strategy: str) -> None:
    """Run one search; the lookup counts, and ends it."""
    from kernel_tuner import interface
    from kernel_tuner.runners import simulation

    space = _SPACES.setdefault(id(lookup.recording), None) or Space(lookup.recording)
    _SPACES[id(lookup.recording)] = space
    plain, build = simulation.SimulationRunner.run, interface.Searchspace

    def run(self, parameter_space, tuning_options):
        for element in parameter_space:
            lookup(*space.configs[tuple(element)])
        return plain(self, parameter_space, tuning_options)

    def build_once(*args, **more):
        if space.searchspace is None:
            space.searchspace = build(*args, **more)
        return space.searchspace

    simulation.SimulationRunner.run, interface.Searchspace = run, build_once
    old = os.getcwd()
    os.chdir(space.file.parent)
    try:
        options = {"max_fevals": min(lookup.limit, len(space.configs))}
        interface.tune_kernel(
            "kernel", "void kernel() {}", (1, 1, 1), [], space.params,
            restrictions=[space.legal], lang="C", quiet=True, strategy=strategy,
            strategy_options=options, cache=str(space.file), simulation_mode=True, seed=seed,
            objective="time",
        )  # fmt: skip
    finally:
        simulation.SimulationRunner.run, interface.Searchspace = plain, build
        os.chdir(old)
