"""One exportable piece of a model, with the names of what it takes and returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

LISTS = ("idx", "cnt")
"""Keywords of the lists that a layer follows."""
ROUTES = ("expert_ids", "expert_weights")
"""Keywords of the experts, and their weights, that the layer before has chosen."""


@dataclass(frozen=True)
class Stage:
    """One exportable piece of a model."""

    name: str
    """``embed``, ``rope.0``, ``layers.3``, ``final_norm``, ``head``, ``mtp.0``."""
    kind: str
    """Stages of equal kind have equal graphs and differ only in weights and states."""
    module: nn.Module
    states: Mapping[str, str] = field(default_factory=dict)
    """Buffer of the module that is a KV cache -> global name of that state: ``NAME.BUFFER``, or that of the
    layer whose cache it is."""
    inputs: tuple[str, ...] = ()
    """Values that ``forward`` takes, in order: ``ids pos x delta hidden normed adapter`` or a rope stage's
    name."""
    outputs: tuple[str, ...] = ()
    """Values that ``forward`` returns, in order."""
    follows: tuple[str, ...] = ()
    """Lists that ``forward`` takes besides, as ``idx`` and ``cnt``, where layers choose."""
    lends: tuple[str, ...] = ()
    """Lists that it returns besides, where layers choose."""
    routed: tuple[str, ...] = ()
    """Values that ``forward`` takes as ``expert_ids`` and ``expert_weights``; none: its experts, if it has
    any, are chosen by its own router."""
    routes: tuple[str, ...] = ()
    """Values that it returns besides, last: what its pre-gate chose for the next layer."""

    def named(self, chooses: bool) -> dict[str, str]:
        """Return the values that ``forward`` takes by keyword, in order: keyword -> value."""
        lists = dict(zip(LISTS, self.follows, strict=False)) if chooses else {}
        return lists | dict(zip(ROUTES, self.routed, strict=False))

    def takes(self, chooses: bool) -> tuple[str, ...]:
        """Return all values that ``forward`` takes, those by keyword last."""
        return self.inputs + tuple(self.named(chooses).values())

    def gives(self, chooses: bool) -> tuple[str, ...]:
        """Return all values that ``forward`` returns."""
        return self.outputs + (self.lends if chooses else ()) + self.routes

    @property
    def may_choose(self) -> bool:
        """True when the module's graph depends on whether layers choose."""
        return bool(getattr(getattr(self.module, "attend", None), "kind", ""))

    def prepare(self, tokens: int, chooses: bool) -> None:
        """Tell the module what it cannot see from its inputs."""
        if hasattr(self.module, "tokens"):
            self.module.tokens = tokens  # type: ignore[assignment]
        if hasattr(self.module, "chooses"):
            self.module.chooses = chooses  # type: ignore[assignment]


def lists_of(stage: str) -> tuple[str, ...]:
    """Return the names of the lists that a layer lends, by the name of its stage; empty: it lends none."""
    return tuple(f"{stage}.{part}" for part in LISTS) if stage else ()


def routes_of(stage: str) -> tuple[str, ...]:
    """Return the names of what is chosen for a layer, by the name of its stage; empty: nothing is."""
    return tuple(f"{stage}.{part}" for part in ROUTES) if stage else ()
