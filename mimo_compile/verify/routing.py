"""The experts that a compiled model chose, for the eager one to follow.

Roundings move a router's logits. Where two experts nearly tie, another one may be chosen for that, and from
there on the row is another row: no bound on logits could tell it from a wrong one. So the eager model is led:
wherever the logits of the compiled router are within the bound of its own, and its own nearly tie, it takes
the experts that the compiled router's logits give, and weighs them by its own. They nearly tie where moving
them by half the bound, up those of the other choice and down all else, makes it theirs: of plain scores,
where no two experts change places that are further apart than the bound. All that comes behind is compared as
ever, and what was followed is counted. A router that is further off is not followed, nor a wrong choice by
right logits: such rows show it.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mimo_compile.ir.ops.base import Array
from mimo_compile.ir.ops.route import scores_of, weights_of
from mimo_compile.runtime.module import Module
from mimo_compile.runtime.routers import Router, tapped

Seen = Mapping[tuple[int, int, int], "deque[Array]"]
"""Router logits ``[E]`` by slot of the sequence, number of the router in a step and position, one for each
time it was run."""


@contextmanager
def watched(module: Module, slots: Sequence[int] = (0,)) -> Iterator[Seen]:
    """Note the router logits of all tokens that the module runs meanwhile.

    ``slots`` are those of the sequences that have steps of their own.
    """
    seen: dict[tuple[int, int, int], deque[Array]] = defaultdict(deque)

    def note(router: Router) -> None:
        for slot, row, position in zip(*(part.tolist() for part in router.rows()), strict=True):
            seen[slot, router.number, position].append(router.logits[row].copy())

    with tapped(module, slots, note):
        yield seen


class Led(TorchDispatchMode):
    """While it is on, `mimo::route` takes the experts of a compiled model where that is right."""

    def __init__(self, seen: Seen, slack: float, slot: int = 0) -> None:
        """Follow logits of the sequence in a slot that differ by at most ``slack`` of a row's largest.

        Experts change places where own logits differ by no more than that, too.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen, self._slack, self._slot = seen, slack, slot
        self._number = self._start = 0
        self.choices = 0
        """Rows of routers whose compiled logits were seen."""
        self.unseen = 0
        """Those whose were not: there was nothing to compare a choice with."""
        self.followed = 0
        """Those whose experts are other ones by the compiled router's logits, which were followed."""
        self.strayed = 0
        """Those whose experts are other ones by logits that are further off, or apart, which were not."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an op; routers get their experts replaced."""
        out = func(*args, **(kwargs or {}))
        if func.namespace != "mimo":
            return out
        if func is torch.ops.mimo.embed.default:  # a step begins
            self._number = 0
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.name == "pos":
                self._start = int(value[0])
        if func is torch.ops.mimo.route.default:
            out = self._lead(out, *args)
            self._number += 1
        return out

    def _lead(
        self, own: tuple[Tensor, Tensor], logits: Tensor, bias: Tensor | None, k: int, scoring: str,
        norm: bool, factor: float, groups: int, top_groups: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        rows = [self._next(self._number, self._start + i) for i in range(len(logits))]
        there = torch.tensor([row is not None for row in rows])
        theirs = torch.stack(
            [
                mine if row is None else torch.from_numpy(row)
                for row, mine in zip(rows, logits, strict=True)
            ]
        )
        rule = (k, scoring, norm, factor, groups, top_groups)
        ids, _ = torch.ops.mimo.route(theirs, bias, *rule)
        other = (ids.sort(-1).values != own[0].sort(-1).values).any(-1)
        slack = self._slack * logits.abs().amax(-1)
        near = there & ((theirs - logits).abs().amax(-1) <= slack)  # false for NaN, too
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, ids.long(), True)
        moved = logits + torch.where(chosen, 0.5, -0.5) * slack[:, None]
        again, _ = torch.ops.mimo.route(moved, bias, *rule)
        near &= (again.sort(-1).values == ids.sort(-1).values).all(-1)
        follow = (other & near)[:, None]
        self.choices += int(there.sum())
        self.unseen += int((~there).sum())
        self.followed += int(follow.sum())
        self.strayed += int((other & ~near).sum())
        weights = weights_of(scores_of(logits.float(), scoring), ids, norm, factor)
        return torch.where(follow, ids, own[0]), torch.where(follow, weights, own[1])

    def _next(self, number: int, position: int) -> Array | None:
        """Return the next logits that were noted there; None where the compiled model ran no such row."""
        waiting = self._seen.get((self._slot, number, position))
        return waiting.popleft() if waiting else None
