"""What loading experts ahead of need saves: a model's own routing, with waits in place of kernels and reads.

    python benchmarks/expert_timeline.py t.mimo

Held-out text is appended to the artifact token by token, and what its routers choose and foresee is noted.
Then the experts of each layer are acquired in that order by the runtime's own slots and thread, where running
a layer and reading an expert are waits. So the figures are those of slots, policy and foresight, whoever else
uses the machine; a balance of 1 reads what is missing on demand in the time that a token computes. `perfect`
foresees what comes.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from expert_memory import text

from mimo_compile.runtime import ExpertMemory, load
from mimo_compile.runtime.expert_calls import Foresight
from mimo_compile.runtime.expert_file import Throttle
from mimo_compile.runtime.expert_memory import share_banks
from mimo_compile.runtime.residency import Bank, Key, Residency, Traffic
from mimo_compile.runtime.routing import RoutingLog, recording

WARM = 40
"""Tokens that are not timed."""
COMPUTE = 0.008
"""Seconds that a layer takes."""
Plan = list[list[list[Key]]]
"""What is foreseen: of each token, at each layer."""


def noted(path: Path, count: int, ahead: int) -> tuple[RoutingLog, Plan]:
    """Return what the routers choose for tokens of held-out text, and what they foresee."""
    module = load(path, threads=1, expert_memory=ExpertMemory(1 << 50, ahead=ahead))
    own, said = Foresight.__call__, []

    def note(self: Foresight) -> list[Key]:
        said.append(own(self))
        return said[-1]

    Foresight.__call__ = note  # type: ignore[method-assign]
    try:
        with recording(module) as recorder:
            session = module.session()
            for token in text(module, count):
                session.append([token])
    finally:
        Foresight.__call__ = own  # type: ignore[method-assign]
    log, out, at = recorder.log(), [], iter(said)
    layers = len(log.layers)
    for _ in range(count):
        out.append(
            [
                [k for _ in range(min(ahead, layers - 1 - i)) for k in next(at)]
                for i in range(layers)
            ]
        )
    return log, out


def perfect(log: RoutingLog, ahead: int) -> Plan:
    """Return what a foresight that is always right would say."""
    layers = len(log.layers)
    return [
        [
            [(n, int(e)) for n in range(i + 1, min(i + 1 + ahead, layers)) for e in row[n]]
            for i in range(layers)
        ]
        for row in log.ids
    ]


def played(log: RoutingLog, plan: Plan | None, slots: int, read: float) -> tuple[float, Traffic]:
    """Return the seconds of a token where reading an expert takes so long, and the traffic of all."""
    link, (_, layers, chosen) = Throttle(1e6), log.ids.shape

    def load_one(key: Key, slot: int) -> int:
        link.wait(round(1e6 * read), time.monotonic())
        return 1

    sizes = share_banks(layers, log.experts, slots, chosen)
    banks = [
        Bank(size, "load", len(range(i, layers, len(sizes))), chosen)
        for i, size in enumerate(sizes)
    ]
    residency = Residency(banks, [i % len(sizes) for i in range(layers)], load_one)
    begin = 0.0
    for token, row in enumerate(log.ids):
        if token == WARM:
            residency.traffic, begin = Traffic(), time.perf_counter()
        for layer in range(layers):
            residency.acquire(layer, {int(e): 1 for e in row[layer]})
            if plan is not None:
                residency.foresee(plan[token][layer])
            time.sleep(COMPUTE)
    return (time.perf_counter() - begin) / (len(log.ids) - WARM), residency.traffic


def main() -> None:
    """Note, play, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--tokens", type=int, default=60, help="timed ones")
    parser.add_argument("--slots", type=int, nargs="*", default=[10, 20])
    parser.add_argument("--balance", type=float, nargs="*", default=[0.5, 1, 2])
    args = parser.parse_args()
    count = WARM + args.tokens
    notes = {f"{ahead} ahead": noted(args.artifact, count, ahead) for ahead in (1, 2)}
    log = notes["1 ahead"][0]
    plans = {"on demand": None} | {name: plan for name, (_, plan) in notes.items()}
    plans["1 ahead, perfect"] = perfect(log, 1)
    print("| slots | balance | experts | ms | times on demand | hits | late | misses | read |")
    print("|---|---|---|---|---|---|---|---|---|")
    for slots in args.slots:
        missing = played(log, None, slots, 0.0)[1].misses / args.tokens
        for balance in args.balance:
            read = balance * COMPUTE * len(log.layers) / missing
            found = {name: played(log, plan, slots, read) for name, plan in plans.items()}
            for name, (seconds, traffic) in found.items():
                parts = (n / traffic.needs for n in (traffic.hits, traffic.late, traffic.misses))
                shares = " | ".join(f"{part:.1%}" for part in parts)
                gain = found["on demand"][0] / seconds
                print(
                    f"| {slots} | {balance:g} | {name} | {1e3 * seconds:.1f} | {gain:.2f} | {shares} "
                    f"| {traffic.bytes_read / args.tokens:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
