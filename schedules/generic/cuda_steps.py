"""Launches of generic functions: the text around what `cuda_print` makes of one element."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mimo_compile.schedules.cuda.code import Launch
from mimo_compile.schedules.generic.cuda_print import Place, Printer, least, most
from mimo_compile.schedules.generic.cuda_stages import Loop, Stage

_JOINS = {"Add": "added", "Max": "larger", "Min": "smaller"}
_MOST_INT = 2**31


@dataclass(frozen=True, slots=True)
class Step:
    """One launch."""

    symbol: str
    stages: tuple[Stage, ...]
    common: int
    """First loops whose iterations are blocks that do all stages in turn; 0: threads of all blocks share the
    iterations of one stage."""
    threads: int
    team: int
    """Threads that share a reduction, if it has as many terms."""


def team_of(stage: Stage, team: int) -> int:
    """Return how many threads share each reduction of a stage: no more than have a term."""
    if stage.joined is None or not stage.alongside:
        return 1
    while team > 1 and team // 2 >= stage.terms:
        team //= 2
    return team


def launch_text(step: Step, places: Mapping[int, Place]) -> tuple[str, Launch]:
    """Return the text of a kernel, and its launch.

    Args:
        step: What it does.
        places: All arrays of the function, by their buffers' identities.

    Raises:
        ValueError: a block has something that there is no text for.
    """
    used = {hash(b) for s in step.stages for b in (*s.written, *(x.source for x in s.read))}
    written = {hash(b) for s in step.stages for b in s.written}
    parameters = [
        f"{'' if key in written else 'const '}{place.stored}* __restrict__ {place.name}"
        for key, place in places.items()
        if key in used
    ]
    parts = [_stage_text(step, stage, places) for stage in step.stages]
    teams = [team_of(stage, step.team) for stage in step.stages]
    wide = max(
        [stage_bytes(s, places) for s, t in zip(step.stages, teams, strict=True) if t > 1],
        default=0,
    )
    lines = [
        f'extern "C" __global__ void __launch_bounds__({step.threads})',
        f"    {step.symbol}({', '.join(parameters)}) {{",
        *(["  MIMO_SHARED(smem);"] if wide else []),
    ]
    for index, part in enumerate(parts):
        lines += ["  block_sync();"] if index else []
        lines += ["  " + line for line in part]
    if step.common:
        blocks = math.prod(loop.extent for loop in step.stages[0].spatial[: step.common])
    else:
        blocks = -(-step.stages[0].results * teams[0] // step.threads)
    operands = tuple(place.name for key, place in places.items() if key in used)
    return (
        "\n".join([*lines, "}", ""]),
        Launch(step.symbol, (blocks, 1, 1), step.threads, operands, wide * step.threads),
    )


def stage_bytes(stage: Stage, places: Mapping[int, Place]) -> int:
    """Return the size of one result as it is computed."""
    return 8 if places[hash(stage.written[0])].dtype.endswith("64") else 4


def _stage_text(step: Step, stage: Stage, places: Mapping[int, Place]) -> list[str]:
    """Return the lines of one stage: a loop over what a block of threads has of it, or a test for the end."""
    names = {
        loop.var: (f"{letter}{i}" if loop.extent > 1 else "0", loop.extent)
        for letter, loops in (("s", stage.spatial), ("r", stage.reduced))
        for i, loop in enumerate(loops)
    }
    printer = Printer(places, names, stage.values)
    team = team_of(stage, step.team)
    own = stage.spatial[step.common :]
    results = math.prod(loop.extent for loop in own)
    count = "int" if results * team + step.threads < _MOST_INT else "int64_t"
    begin = "0" if step.common else f"{count}(blockIdx.x) * {step.threads // team}"
    indices = _divided("blockIdx.x", stage.spatial[: step.common], names)
    indices += _divided("at", own, names)
    if team > 1:
        return _team_lines(step, stage, printer, team, (count, begin, results), indices)
    lines = _one_lines(stage, printer)
    if step.common:
        head = f"for ({count} at = threadIdx.x; at < {results}; at += {step.threads}) {{"
    else:
        head = f"if (const {count} at = {begin} + threadIdx.x; at < {results}) {{"
    return [head, *("  " + line for line in [*indices, *lines]), "}"]


def _divided(at: str, loops: Sequence[Loop], names: Mapping[int, tuple[str, int]]) -> list[str]:
    """Return the definitions of loops' variables from the number of an iteration, the last loop fastest."""
    lines, stride = [], 1
    for loop in reversed(loops):
        if loop.extent > 1:
            value = at if stride == 1 else f"{at} / {stride}"
            first = stride * loop.extent == math.prod(x.extent for x in loops)
            lines.append(
                f"const int {names[loop.var][0]} = int({value}{'' if first else f' % {loop.extent}'});"
            )
        stride *= loop.extent
    return lines


def _one_lines(stage: Stage, printer: Printer) -> list[str]:
    """Return what one thread does for one result."""
    if not stage.reduced:
        return [printer.statement(s) for s in stage.body]
    lines: list[str] = []
    held: dict[int, tuple[str, Sequence[Any]]] = {}
    for stmt in stage.start:
        if not hasattr(stmt, "buffer"):
            lines.append(printer.statement(stmt))
            continue
        name, place = f"sum{len(held)}", printer.place(stmt.buffer)
        lines.append(f"{place.computed} {name} = {printer.text(stmt.value)};")
        held[hash(stmt.buffer)] = name, stmt.indices
    printer.held = held
    depth = ""
    for loop in stage.reduced:
        if (name := printer.loops[loop.var][0]) != "0":
            lines.append(f"{depth}for (int {name} = 0; {name} < {loop.extent}; ++{name}) {{")
            depth += "  "
    lines += [depth + printer.statement(s) for s in stage.body]
    while depth:
        depth = depth[2:]
        lines.append(depth + "}")
    printer.held = {}
    starts = [s for s in stage.start if hasattr(s, "buffer")]
    return lines + [printer.store(s.buffer, s.indices, held[hash(s.buffer)][0]) for s in starts]


def _team_lines(
    step: Step,
    stage: Stage,
    printer: Printer,
    team: int,
    span: tuple[str, str, int],
    indices: list[str],
) -> list[str]:
    """Return what a block does where threads share reductions; ``span``: type, begin, end of its results."""
    assert stage.joined is not None
    (count, begin, results), (how, term) = span, stage.joined
    (start,) = (s for s in stage.start if hasattr(s, "buffer"))
    place = printer.place(start.buffer)
    kind, join = place.computed, f"{_JOINS[how]}<{place.computed}>"
    nothing = {"Add": f"{kind}(0)", "Max": least(place.dtype), "Min": most(place.dtype)}[how]
    each = step.threads // team
    summed = [
        f"for (int term = threadIdx.x % {team}; term < {stage.terms}; term += {team}) {{",
        *("  " + line for line in _divided("term", stage.reduced, printer.loops)),
        f"  sum = {join}(sum, {printer.text(term)});",
        "}",
    ]
    first = [printer.statement(s) for s in stage.start if not hasattr(s, "buffer")]
    value = f"{join}({printer.text(start.value)}, sum)"
    stored = [*first, printer.store(start.buffer, start.indices, value)]
    last = results if step.common else f"{begin} + {each}"
    return [
        f"for ({count} first = {begin}; first < {last}; first += {each}) {{",
        f"  const {count} at = first + threadIdx.x / {team};",
        f"  {kind} sum = {nothing};",
        f"  if (at < {results}) {{",
        *("    " + line for line in [*indices, *summed]),
        "  }",
        f"  sum = joined<{team}>(sum, reinterpret_cast<{kind}*>(smem), []({kind} a, {kind} b) "
        f"{{ return {join}(a, b); }});",
        f"  if (threadIdx.x % {team} == 0 && at < {results}) {{",
        *("    " + line for line in [*indices, *stored]),
        "  }",
        "}",
    ]
