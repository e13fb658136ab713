"""Attention over caches in groups as the compiled kernels are to compute it, for the eager model.

Kernels that multiply codes by integers round queries and weights (`ir.kv_rounding`), by which logits may move
further than their bound allows. So the eager model rounds as well, in those calls whose kernel does. What is
left are sums in another order, and numbers next to the middle between two integers. The kernels themselves
are held to the exact reference, with a bound for what rounding changes.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mimo_compile.errors import UsageError
from mimo_compile.ir.kv_groups import GROUPED, STATES
from mimo_compile.ir.kv_rounding import attend_rounded
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.workload import Workload
from mimo_compile.runtime.program import Choice, Manifest
from mimo_compile.schedules import get_schedule

SHAPE = ("h", "kv", "d", "dv", "cap", "tail", "sink", "c")
"""What tells apart the kernels of different layers."""


class Rounded(TorchDispatchMode):
    """While it is on, `mimo::grouped_attention` rounds where the artifact's kernels do."""

    def __init__(self, manifest: Manifest, together: Collection[int] = ()) -> None:
        """Round as the plan of an artifact says.

        Args:
            manifest: The artifact's.
            together: Positions whose tokens are decoded together with those of other sequences.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._steps = manifest.decoder.steps if manifest.decoder is not None else ()
        self._together = together
        self._rounds: dict[tuple[Any, ...], bool] = {}
        for choice in manifest.plan:
            if choice.workload.startswith("cached_attention:"):
                p = get_op("cached_attention").full(Workload.parse(choice.workload))
                if p["c"] in GROUPED:
                    key = (p["t"], p["b"] > 1, *(p[name] for name in SHAPE))
                    self._rounds[key] = rounds(choice)
        self.calls = 0
        """Those that were rounded."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an op, or what rounds in its place."""
        if func is not torch.ops.mimo.grouped_attention.default or kwargs:
            return func(*args, **(kwargs or {}))
        q, *held, pos, sink, scale, c = args
        if not self._rounding(q, dict(zip(STATES, held, strict=True)), pos, sink, c):
            return func(*args)
        self.calls += 1
        inputs = {"q": q, "pos": pos, **dict(zip(STATES, held, strict=True))}
        if sink is not None:
            inputs["sink"] = sink
        return attend_rounded(inputs, scale, GROUPED[c], None)

    def _rounding(
        self, q: Tensor, held: dict[str, Tensor], pos: Tensor, sink: Tensor | None, c: str
    ) -> bool:
        """Say whether the compiled call rounds: of the shortest step that holds the tokens, or of a batch."""
        tokens, heads, d = q.shape
        if pos.dim() > 1:
            return False
        batch = tokens == 1 and int(pos[0]) in self._together
        step = 1 if batch else min((t for t in self._steps if t >= tokens), default=tokens)
        cap, kv = held["k_cache"].shape[:2]
        tail, _, dv = held["v_tail"].shape
        shape = (heads, kv, d, dv, cap, tail, int(sink is not None), c)
        return self._rounds.get((step, batch, *shape), False)


def rounds(choice: Choice) -> bool:
    """Say whether a kernel of the plan, over a cache in groups, rounds queries and weights."""
    try:
        schedule = get_schedule(choice.schedule)
        return not schedule.exact(schedule.config_from_json(choice.config))
    except UsageError:  # this version has no such schedule, or not with these knobs
        return False
