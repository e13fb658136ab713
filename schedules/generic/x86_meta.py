"""Generic functions by MetaSchedule's own design spaces: sketches of its rules, each opening some knobs.

A config is the sketch and a decision for each of its openings (`sketches`). Factors that do not divide
are taken down to ones that do; places that do not exist are adapted by TVM, in a way that depends on
nothing else. The sketches are the same for any number of threads.
"""

from __future__ import annotations

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.base import Kernel, KnobValue, Space, kernel_name
from mimo_compile.schedules.generic.block_work import joined, part
from mimo_compile.schedules.generic.decisions import Decisions, DecisionSchedule, supported
from mimo_compile.schedules.generic.intrinsics import widen_inside
from mimo_compile.schedules.generic.outline import bounded, outline_of
from mimo_compile.schedules.generic.sketches import adapted, named, replayed, sampled, sketches_of
from mimo_compile.schedules.generic.x86_tir import REFUSED, pass_error, reason_of


class X86Meta(DecisionSchedule):
    """Any generic function, in MetaSchedule's design space."""

    name = "tir.x86_meta"
    version = 2

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Functions that MetaSchedule's rules make a sketch of."""
        if not supported(workload, hardware):
            return False
        try:
            return any(sketches_of(workload).openings)
        except ValueError:
            return False

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """The sketch, and a knob for each part of a decision: ``t0.2`` is a factor of the first tiling."""
        sketches = sketches_of(workload)
        values: dict[str, set[int]] = {}
        for sketch in sketches.openings:
            for name, offered in named(sketch).items():
                values.setdefault(name, set()).update(offered)
        knobs: dict[str, tuple[KnobValue, ...]] = {
            "sketch": tuple(range(len(sketches.traces))),
            "parallel": (True, False) if hardware.threads > 1 else (False,),
            **{n: tuple(sorted(v)) for n, v in values.items()},
        }

        usual = {**{n: v[0] for n, v in knobs.items()}, **sampled(sketches.openings[0])}
        knobs = bounded(knobs, usual)

        def make(**given: KnobValue) -> Decisions:
            out = {n: given.get(n, v[0]) for n, v in knobs.items()}
            kept = adapted(sketches.openings[int(out["sketch"])], out, knobs)
            out |= {n: kept.get(n, v[0]) for n, v in knobs.items() if n in values}
            return Decisions(tuple(sorted(out.items())))

        def legal(config: Decisions) -> bool:
            made = dict(config.made)
            return made.keys() == knobs.keys() and make(**made) == config

        return Space(make, knobs, make(**usual), legal)

    def lower(self, workload: Workload, config: Decisions, hardware: Hardware) -> Kernel:
        """Replay the sketch with the decisions, and let MetaSchedule finish it.

        Raises:
            ValueError: TVM refuses the result.
        """
        sketches = sketches_of(workload)
        name = kernel_name(self, workload, config, hardware)
        try:
            scheduled = replayed(sketches, config)
        except REFUSED as error:
            raise ValueError(f"TVM refuses the decisions: {reason_of(error)}") from error
        func = widen_inside(scheduled).with_attr("global_symbol", name)
        if refused := pass_error(func, hardware):
            raise ValueError(f"passes refuse the decisions: {refused}")
        args = get_op(self.op).args(workload)
        return Kernel(name, func, args, self.work(workload, config, hardware), compact=True)

    def work(self, workload: Workload, config: Decisions, hardware: Hardware) -> Counts:
        """Return the work that the rules leave, before any tiling: the knobs say the rest."""
        outline = outline_of(workload)
        arranged = outline.arranged(outline.rule)
        assert arranged is not None
        wide = bool(config.of("parallel")) and hardware.threads > 1
        parts = [
            part(f, ops, {"rule": "outer"}, wide, hardware, i)
            for i, (f, ops) in enumerate(zip(arranged.facts, arranged.operations, strict=True))
            if f is not None
        ]
        return joined(parts)
