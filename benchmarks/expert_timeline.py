"""What loading experts ahead of need saves: a model's own routing, with waits in place of kernels and reads.

    python benchmarks/expert_timeline.py t.mimo --gates gates.safetensors

Held-out text is appended to the artifact token by token, and what its layers need and foresee is noted.
Then the same is played to the runtime's own slots and thread, where running a layer and reading an expert
are waits: all ways wait side by side. So the figures are those of slots, policy and foresight, and hardly of
who else uses the machine. With a balance of 1, what is missing on demand takes as long to read as a token
takes to compute. `perfect` foresees what comes, that of the next token included. An artifact whose experts
are chosen one layer earlier (`compile --pre-gates`) is played beside its own loading on demand
(`--pre-gated`), and with gates that foresee in that model the layer behind the chosen one, and the first
layers of the next token (`--foreseeing`).

Reading on demand, a token takes C + L, computing and reading. Whoever reads the same beside computing takes
the longer of the two at least, so that no foresight is faster than (C + L) / max(C, L) times: 1.5 with a
balance of 0.5 or 2, 2 with a balance of 1, 1.25 with 0.25 or 4. That is the column `at most`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from expert_memory import put, text

from mimo_compile.runtime import ExpertMemory, load
from mimo_compile.runtime.expert_bank import Bank, Key
from mimo_compile.runtime.expert_calls import ExpertCall
from mimo_compile.runtime.expert_file import Throttle
from mimo_compile.runtime.expert_memory import share_banks
from mimo_compile.runtime.residency import Residency, Traffic

WARM = 40
"""Tokens that are not timed."""
COMPUTE = 0.04
"""Seconds that a layer takes."""
PIECES = 8
"""Of an expert."""
Event = tuple[str, Any]
"""``need``: a layer and its experts; ``foresee``: keys; ``run``: nothing."""


def noted(path: Path, count: int, how: ExpertMemory) -> tuple[list[Event], tuple[int, int, int]]:
    """Return what happens to so many tokens of held-out text, and layers, experts and experts of a token."""
    module = load(path, threads=1, expert_memory=how)
    assert module.experts is not None
    events: list[Event] = []
    residency, stacks = module.experts.residency, module.experts.stacks
    own = residency.acquire

    def acquire(layer: int, tokens: dict[int, int], met: Sequence[int] = ()) -> list[int]:
        if layer == 0:
            events.append(("run", None))  # of the first layer of all, which has no experts
        events.append(("need", (layer, list(tokens))))
        return own(layer, tokens, met)

    residency.acquire = acquire  # type: ignore[method-assign, assignment]
    residency.foresee = lambda keys: events.append(("foresee", keys))  # type: ignore[method-assign]
    for made, _ in module.bind("step_1").calls:
        if isinstance(made, ExpertCall):
            made._function = told(made._function, events)
    session = module.session()
    for token in text(module, count):
        session.append([token])
    return events, (len(stacks), stacks[0].shape.experts, stacks[0].chosen)


def told(kernel: Any, events: list[Event]) -> Any:
    """Make a kernel note that it runs."""

    def run(*arguments: Any) -> None:
        events.append(("run", None))
        kernel(*arguments)

    return run


def perfect(events: Sequence[Event], ahead: int) -> list[Event]:
    """Return the same needs, each with a foresight of so many that come next."""
    needs = [what for kind, what in events if kind == "need"]
    out: list[Event] = []
    for at, need in enumerate(needs):
        keys: list[Key] = [(n, e) for n, experts in needs[at + 1 : at + 1 + ahead] for e in experts]
        out += [("run", None)] * (need[0] == 0) + [("need", need), ("foresee", keys), ("run", None)]
    return out


def played(
    events: Sequence[Event], sizes: tuple[int, int, int], slots: int, read: float, compute: float
) -> tuple[float, Traffic]:
    """Return seconds of a token and its traffic, where an expert takes so long to read and a layer to run."""
    link, (layers, experts, chosen) = Throttle(1.0), sizes

    def load_one(key: Key, slot: int) -> Any:
        end = time.monotonic()
        for _ in range(PIECES):
            end = link.wait(read / PIECES, end)
            yield 1

    shares = share_banks(layers, experts, slots, chosen)
    banks = [
        Bank(size, "load", len(range(i, layers, len(shares))), chosen)
        for i, size in enumerate(shares)
    ]
    residency = Residency(banks, [i % len(shares) for i in range(layers)], load_one)
    begin, token = 0.0, -1
    for kind, what in events:
        if kind == "need":
            layer, needed = what
            token += layer == 0
            if token == WARM and layer == 0:
                residency.traffic, begin = Traffic(), time.perf_counter()
            residency.acquire(layer, dict.fromkeys(needed, 1))
        elif kind == "foresee":
            residency.foresee(what)
        else:
            time.sleep(compute)
    seconds = (time.perf_counter() - begin) / (token + 1 - WARM)
    residency.forget()
    return seconds, residency.traffic


def table(
    plans: dict[str, list[Event]],
    sizes: tuple[int, int, int],
    slots: int,
    balance: float,
    tokens: int,
) -> list[str]:
    """Play the plans of a model, of which the first is on demand; returns a line in Markdown for each."""
    base = next(iter(plans))
    missing = played(plans[base], sizes, slots, 0.0, 0.0)[1].misses / tokens
    read = balance * COMPUTE * (sizes[0] + 1) / missing
    most = 1 + min(balance, 1 / balance)
    with ThreadPoolExecutor(len(plans)) as side_by_side:  # they do nothing but wait
        play = partial(played, sizes=sizes, slots=slots, read=read, compute=COMPUTE)
        found = dict(zip(plans, side_by_side.map(play, plans.values()), strict=True))
    lines = []
    for name, (seconds, traffic) in found.items():
        cells = [
            str(slots), f"{balance:g}", f"{most:g}", name, f"{1e3 * seconds:.1f}",
            f"{found[base][0] / seconds:.2f}", f"{traffic.hits / traffic.needs:.1%}",
            f"{traffic.late / traffic.needs:.1%}", f"{traffic.misses / traffic.needs:.1%}",
            f"{traffic.bytes_read / PIECES / tokens:.2f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Note, play, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--gates", type=Path, help="trained ones, of expert_gates.py")
    parser.add_argument(
        "--pre-gated", type=Path, help="artifact of a model that chooses experts one layer earlier"
    )
    parser.add_argument(
        "--foreseeing", type=Path, help="gates that were trained for that model, of expert_gates.py"
    )
    parser.add_argument("--tokens", type=int, default=60, help="timed ones")
    parser.add_argument("--slots", type=int, nargs="*", default=[10, 20])
    parser.add_argument("--balance", type=float, nargs="*", default=[0.5, 1, 2])
    parser.add_argument("--write", type=Path, help="put the table between the marks of this page")
    args = parser.parse_args()
    count = WARM + args.tokens
    plans: dict[str, list[Event]] = {}
    plans["on demand"], sizes = noted(args.artifact, count, ExpertMemory(1 << 50, ahead=0))
    for name, file in (("routers", None), ("gates", args.gates)):
        for ahead in (1, 2):
            if name == "routers" or file is not None:
                how = ExpertMemory(1 << 50, ahead=ahead, pre_gates=file)
                plans[f"{name}, {ahead} ahead"] = noted(args.artifact, count, how)[0]
    plans |= {f"perfect, {n} ahead": perfect(plans["on demand"], n) for n in (1, 2)}
    models = [plans]
    if args.pre_gated is not None:
        asked: dict[str, dict[str, Any]] = {
            "on demand": {"ahead": 0},
            "what is chosen": {"ahead": 1},
        }
        if args.foreseeing is not None:
            asked["chosen, gates 2 ahead"] = {"ahead": 2, "pre_gates": args.foreseeing}
        models.append(
            {
                f"pre-gated, {name}": noted(args.pre_gated, count, ExpertMemory(1 << 50, **how))[0]
                for name, how in asked.items()
            }
        )
    lines = [
        "| slots | balance | at most | experts | ms | times on demand | hits | late | misses | read |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for slots in args.slots:
        for balance in args.balance:
            for each in models:
                for line in table(each, sizes, slots, balance, args.tokens):
                    lines.append(line)
                    print(line, flush=True)
    if args.write:
        put(args.write, "expert timeline", "\n".join(lines))


if __name__ == "__main__":
    main()
