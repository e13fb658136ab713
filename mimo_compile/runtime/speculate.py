"""Passes of a decoder that verify drafts: several tokens for one pass over its weights."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mimo_compile.errors import UsageError
from mimo_compile.runtime import accept
from mimo_compile.runtime.arguments import Array, whole
from mimo_compile.runtime.depth import Depth
from mimo_compile.runtime.program import Decoder
from mimo_compile.runtime.sampling import Distribution, Sampling

if TYPE_CHECKING:
    from mimo_compile.runtime.generate import Stats
    from mimo_compile.runtime.module import Module
    from mimo_compile.runtime.session import Session


@dataclass(frozen=True, slots=True)
class Speculation:
    """How drafts are made."""

    depth: int | None = None
    """Drafts of a pass; None: as many as pay, by what is accepted and what passes take."""
    draw: bool = False
    """At a temperature above 0, draw drafts from the heads' distributions and keep each with a probability
    that leaves the text distributed as it is without them. Otherwise drafts are the heads' most probable
    tokens, fewer of which are kept, and the text is the one that the seed gives without them."""


def speculation_of(
    module: Module, decoder: Decoder, asked: bool | Speculation
) -> Speculation | None:
    """Check what a caller asks for; returns None if it is nothing.

    Raises:
        UsageError: The artifact cannot draft or verify, or has not so many heads.
    """
    if not isinstance(asked, bool | Speculation):
        raise UsageError(
            f"speculative is {asked!r}, which says nothing of drafts",
            remedy="Pass True, False, or a Speculation, whose depth is the number of drafts.",
        )
    if not asked:
        return None
    how = asked if isinstance(asked, Speculation) else Speculation()
    name = module.manifest.name
    if not decoder.mtp or not decoder.mtp_steps:
        raise UsageError(
            f"{name} has no draft heads, so it cannot speculate",
            remedy="Compile a checkpoint with MTP layers, or generate without.",
        )
    if decoder.decode:
        raise UsageError(
            f"{name} cannot verify drafts: under --attention {module.manifest.attention} generated tokens "
            "are read one at a time",
            remedy="Compile it with another --attention, or generate without drafts.",
        )
    if not decoder.layers:
        raise UsageError(
            f"{name} was compiled by a version that does not say what its layers keep: rejected drafts "
            "could not be dropped",
            remedy="Compile it again.",
        )
    if how.depth is not None and not 1 <= whole(how.depth, "depth") <= decoder.mtp:
        raise UsageError(
            f"{how.depth} drafts cannot be made: {name} has {decoder.mtp} draft heads",
            remedy=f"Take 1 to {decoder.mtp}, or none to let the module choose.",
        )
    return how


def doubt(decoder: Decoder) -> str:
    """Say why tokens may differ from those without drafts; empty if kernels leave no doubt.

    They add up what a token is made of in one order, whether it comes alone or with drafts.
    """
    verify = next((t for t in decoder.steps if t > decoder.mtp), decoder.steps[-1])
    used = {t for t in decoder.steps if t <= verify}
    if used <= {1} | set(decoder.alike):
        return ""
    if decoder.unlike:
        return f"{decoder.unlike[0]} adds up in an order that nothing promises"
    return "the kernels of one token and of several may add up in different orders"


class Passes:
    """Makes the passes of one text."""

    def __init__(
        self, session: Session, decoder: Decoder, sampling: Sampling, how: Speculation, stats: Stats,
        eos: frozenset[int] = frozenset(),
    ) -> None:  # fmt: skip
        """Begin; ``stats`` take note of each pass, up to a token of ``eos``."""
        self._eos = eos
        self._session, self._decoder, self._sampling, self._stats = (
            session,
            decoder,
            sampling,
            stats,
        )
        self._draws = sampling if how.draw and sampling.temperature > 0 else None
        self._drawn: list[Distribution] = []
        self._depth = Depth(decoder.mtp, how.depth)
        stats.drafted, stats.judged, stats.accepted = ([0] * decoder.mtp for _ in range(3))

    def __call__(self, token: int, room: int) -> list[int]:
        """Append a token and what is kept of drafts behind it; returns these, and one token more.

        Args:
            token: The next token of the sequence.
            room: How many tokens may be returned.
        """
        session = self._session
        at = session.position
        free = self._decoder.max_context - at - 1
        depth = self._depth.choose(min(room - 1, free))
        drafts: list[int] = []
        heads: list[float] = []
        self._drawn = []
        if depth:
            drafts, heads = session.propose(token, depth, self._pick)
        start = time.perf_counter()
        parts = session.chunks([token, *drafts], decode=True)
        hidden = np.concatenate([part.copy() for part in parts])
        logits = (row for block in session.logits(hidden) for row in block)
        if self._draws is None:
            tokens = accept.emitted(logits, drafts, self._sampling, at + 1)
        else:
            tokens = accept.emitted_from(logits, drafts, self._drawn, self._sampling, at + 1)
        kept = len(tokens) - 1
        if kept < len(drafts):
            session.reject(at + 1 + kept)
        self._note(tokens, len(drafts))
        self._depth.learn(len(drafts), kept, time.perf_counter() - start, heads)
        return tokens

    def _pick(self, logits: Array, position: int) -> int | None:
        found: Any = accept.draft(logits, self._draws, position)
        if found is None:
            return None
        token, drawn = found
        self._drawn.append(drawn)
        return int(token)

    def _note(self, tokens: Sequence[int], drafted: int) -> None:
        kept = len(tokens) - 1
        judged = min(kept + 1, drafted)
        end = next((i for i, token in enumerate(tokens[:-1]) if token in self._eos), None)
        if end is not None:  # what is behind it is in no text
            kept = judged = end
        stats = self._stats
        stats.passes += 1
        for head in range(drafted):
            stats.drafted[head] += 1
            stats.judged[head] += head < judged
            stats.accepted[head] += head < kept
