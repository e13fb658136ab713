"""The calls of a decoder's entry points that choose experts, with what they read and write.

A program is a flat list of kernel calls, and what a router gives lies in the arena until the experts have
read it. So whoever wants to see or change choices puts a function behind these calls while it is needed;
the program is as it was before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mimo_compile.errors import ArtifactError

if TYPE_CHECKING:
    from mimo_compile.runtime.entry import Array
    from mimo_compile.runtime.machine import Bound
    from mimo_compile.runtime.module import Module
    from mimo_compile.runtime.program import Manifest

Rows = npt.NDArray[np.intp]
PRE_GATE = ".pre_gate."
"""In the label of the call that computes the logits of a gate that chooses for the next layer."""


@dataclass(frozen=True, slots=True)
class Rule:
    """How a router chooses, as its workload says (op `route`)."""

    t: int
    """Rows of one call."""
    e: int
    """Experts."""
    k: int
    """Experts of each row."""
    scoring: str = "softmax"
    norm: bool = True
    factor: float = 1.0

    @classmethod
    def parse(cls, workload: str) -> Rule:
        """Read ``route:t=1,e=8,k=2,...``; parameters that are left out have the op's defaults."""
        given = dict(item.split("=", 1) for item in workload.partition(":")[2].split(","))
        return cls(
            int(given["t"]), int(given["e"]), int(given["k"]), given.get("scoring", "softmax"),
            bool(int(given.get("norm", 1))), float(given.get("factor", 1.0)),
        )  # fmt: skip

    def weights(self, logits: Array, ids: Array) -> Array:
        """Return the weights float32 ``[k]`` that experts ``ids [k]`` have by a row's logits ``[e]``.

        Computed in float64: the score of each, over their sum with ``norm``, times ``factor``.
        """
        wide = logits.astype(np.float64)
        with np.errstate(over="ignore"):  # of very negative logits: their score is 0
            if self.scoring == "sigmoid":
                scores = 1.0 / (1.0 + np.exp(-wide))
            else:
                scores = np.exp(wide - wide.max())
                scores /= scores.sum()
        chosen = scores[ids]
        if self.norm:
            chosen = chosen / (chosen.sum() + 1e-20)
        return np.asarray(chosen * self.factor, np.float32)


@dataclass(frozen=True, slots=True)
class Router:
    """One call of a router, of a bound entry point."""

    number: int
    """Among the routers of a step, in running order."""
    layer: str
    """Whose experts it chooses: ``layers.3``; the call's label where the artifact does not name layers."""
    rule: Rule
    logits: Array
    """``[t, e]`` float32 on the arena."""
    ids: Array
    """``[t, k]`` int32 on the arena: what it chose, best first."""
    weights: Array
    """``[t, k]`` float32 on the arena."""
    pos: Array
    """Start and number of the tokens that count; of a batch those of each slot."""
    slot: int
    """Whose tokens they are, or (of a batch) the first slot."""

    def rows(self) -> tuple[Rows, Rows, Rows]:
        """Return slot, row and position of each token of the call in progress that counts."""
        if self.pos.ndim == 2:  # of a batch: each slot has a row, or rests
            places = np.flatnonzero(self.pos[:, 1])
            return places + self.slot, places, self.pos[places, 0].astype(np.intp)
        start, valid = (int(n) for n in self.pos)
        rows = np.arange(valid)
        return np.full(valid, self.slot), rows, start + rows


def rules_of(manifest: Manifest) -> dict[str, Rule]:
    """Return the rule of each kernel of a plan that is a router."""
    return {
        choice.kernel: Rule.parse(choice.workload)
        for choice in manifest.plan
        if choice.workload.startswith("route:")
    }


@contextmanager
def tapped(
    module: Module, slots: Sequence[int], after: Callable[[Router], None]
) -> Iterator[tuple[Router, ...]]:
    """Call a function after each router of all tokens that the module runs meanwhile.

    Args:
        module: A decoder; of draft heads nothing is told.
        slots: Of the sequences that have steps of their own.
        after: Called as soon as a router has chosen; what it writes to ``ids`` and ``weights`` is what
            the experts get. Where taps are nested, the outer one is called first.

    Yields:
        The routers of one step, in running order; none where the model has no experts.

    Raises:
        ArtifactError: A program's router has not the arguments of one.
    """
    rules, decoder = rules_of(module.manifest), module.manifest.decoder
    layers = [layer.name for layer in decoder.layers] if decoder is not None else []
    names = [n for n in module.entries if n.startswith(("step_", "decode_")) and rules]
    places = [(name, slot) for name in names for slot in slots]
    places += [(n, 0) for n in module.entries if n.startswith("batch_") and rules]
    bound = [(module.bind(*place), place[1]) for place in places]
    before = [list(entry.calls) for entry, _ in bound]
    found: tuple[Router, ...] = ()
    try:
        for entry, slot in bound:
            routers = routers_of(entry, slot, rules, layers)
            for at, router in routers.items():
                function, arguments = entry.calls[at]
                entry.calls[at] = partial(_then, function, after, router), arguments
            found = found or tuple(routers.values())
        yield found
    finally:
        for (entry, _), calls in zip(bound, before, strict=True):
            entry.calls[:] = calls


def _then(
    function: Callable[..., Any], after: Callable[[Router], None], router: Router, *arguments: Any
) -> None:
    function(*arguments)
    after(router)


def routers_of(
    bound: Bound, slot: int, rules: dict[str, Rule], layers: Sequence[str] = ()
) -> dict[int, Router]:
    """Return the routers of an entry point by the index of their call.

    Raises:
        ArtifactError: One of them has not the arguments of a router.
    """
    out: dict[int, Router] = {}
    for at, call in enumerate(bound.program.calls):
        if call.kernel not in rules:
            continue
        rule = rules[call.kernel]
        arena = [i for i in call.args if bound.program.buffers[i].kind == "arena"]
        kinds = [(bound.program.buffers[i].shape, bound.program.buffers[i].dtype) for i in arena]
        wanted = (
            ((rule.t, rule.e), "float32"), ((rule.t, rule.k), "int32"), ((rule.t, rule.k), "float32"),
        )  # fmt: skip
        # in the op's order, which tells logits from weights where every expert is chosen
        if any(kind not in kinds for kind in wanted):
            raise ArtifactError(
                f"{call.kernel} chooses experts, but is given no logits {list(wanted[0][0])} and places "
                f"for ids and weights {list(wanted[1][0])}",
                where=f"call {at} of entry {bound.name}",
                remedy="Compile it again.",
            )
        logits, ids = (bound.array(arena[kinds.index(kind)]) for kind in wanted[:2])
        weights = bound.array(arena[len(kinds) - 1 - kinds[::-1].index(wanted[2])])
        pos = bound.inputs["pos"]
        layer = _chosen_for(bound, at, arena[kinds.index(wanted[0])], layers)
        out[at] = Router(len(out), layer, rule, logits, ids, weights, pos, slot)
    return out


def _chosen_for(bound: Bound, at: int, logits: int, layers: Sequence[str]) -> str:
    """Return the layer whose experts a router's call chooses: its own, or of a pre-gate the next one."""
    calls = bound.program.calls
    number = next(
        (n for n, name in enumerate(layers) if calls[at].label.startswith(f"{name}.")), -1
    )
    if number < 0:
        return calls[at].label
    score = next((call for call in reversed(calls[:at]) if call.args[-1] == logits), calls[at])
    return layers[number + (PRE_GATE in score.label)]
