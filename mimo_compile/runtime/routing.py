"""Which experts a decoder chose: noted while it runs, kept in a file, and forced on another run.

A row of a log is one token of one pass through the decoder. Tokens that went through it twice have two
rows; padding and drafts that were rejected have none.
"""

from __future__ import annotations

import os
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mimo_compile.errors import InputError, UsageError
from mimo_compile.runtime import tensor_file
from mimo_compile.runtime.routers import Router, Rows, tapped

if TYPE_CHECKING:
    from mimo_compile.runtime.module import Module

MOST_ROWS = 1 << 16
"""Rows that a recorder keeps unless asked otherwise; of 47 layers with 8 of 256 experts 49 MB."""
MOST_EXPERTS = int(np.iinfo(np.int16).max)
"""Of a layer, by the type of `RoutingLog.ids`."""
FORMAT = "mimo-compile routing 1"


@dataclass(frozen=True)
class RoutingLog:
    """What routers chose: N tokens, L layers with experts, k of E experts each."""

    ids: npt.NDArray[np.int16]
    """``[N, L, k]``: experts, best first."""
    sequence: npt.NDArray[np.int32]
    """``[N]``: which text, numbered as they began; a step at position 0 begins one."""
    position: npt.NDArray[np.int32]
    """``[N]``: of the token in its text."""
    step: npt.NDArray[np.int32]
    """``[N]``: in which call of the decoder, ascending; a prompt's call has many tokens."""
    layers: tuple[str, ...]
    """Where the routers stand, in running order."""
    experts: int
    model: str = ""
    dropped: int = 0
    """Later tokens that were not kept."""
    source: str = field(default="", compare=False)
    """File that it was read from."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as safetensors: tensors as they are named here, the rest as text of its metadata.

        Raises:
            OSError: The file cannot be written; what was there before is as it was.
        """
        tensor_file.write(
            path,
            {name: getattr(self, name) for name in ("ids", "position", "sequence", "step")},
            {
                "format": FORMAT, "model": self.model, "layers": ",".join(self.layers),
                "experts": str(self.experts), "dropped": str(self.dropped),
            },
        )  # fmt: skip

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RoutingLog:
        """Read a file that `save` wrote.

        Raises:
            InputError: It cannot be read, is damaged, or is no routing log.
        """
        tensors, facts = tensor_file.read(path)

        def wrong(what: str) -> InputError:
            return InputError(
                f"this is no routing log: {what}", file=path, remedy="`run --route-log` writes one"
            )

        if facts.get("format") != FORMAT:
            raise wrong(f"its format is {facts.get('format', 'not said')!r}, not {FORMAT!r}")
        kinds = {
            "ids": ("int16", 3),
            **dict.fromkeys(("position", "sequence", "step"), ("int32", 1)),
        }
        for name, kind in kinds.items():
            if name not in tensors or (tensors[name].dtype.name, tensors[name].ndim) != kind:
                raise wrong(f"{name} is not a tensor of {kind[0]} with {kind[1]} dimensions")
        layers = tuple(facts.get("layers", "").split(","))
        numbers = [facts.get(name, "") for name in ("experts", "dropped")]
        if not all(n.isdecimal() and len(n) < 10 for n in numbers):
            raise wrong("experts and dropped are not whole numbers")
        experts, dropped = map(int, numbers)
        if not 1 <= experts <= MOST_EXPERTS:
            raise wrong(f"it has {experts} experts, not 1 to {MOST_EXPERTS}")
        if len(set(layers)) < len(layers):
            raise wrong("two of its layers have one name")
        ids = tensors["ids"]
        if ids.shape[1] != len(layers) or any(
            len(tensors[name]) != len(ids) for name in ("position", "sequence", "step")
        ):
            raise wrong("its tensors are not of the same tokens and layers")
        if ids.size and not 0 <= ids.min() <= ids.max() < experts:
            raise wrong(f"experts are from 0 to {experts - 1}, it has {ids.min()} to {ids.max()}")
        if not ids.shape[2] or (np.diff(np.sort(ids, -1), axis=-1) == 0).any():
            raise wrong("a token has no expert, or one of them twice")
        if (np.diff(tensors["step"]) < 0).any():
            raise wrong("its steps do not ascend")
        parts: dict[str, Any] = {name: tensors[name] for name in kinds}
        return cls(
            **parts, layers=layers, experts=experts, model=facts.get("model", ""), dropped=dropped,
            source=os.fspath(path),
        )  # fmt: skip


class _Texts:
    """Numbers texts as they begin, slot by slot."""

    def __init__(self) -> None:
        self._of: dict[int, int] = {}
        self._begun = 0

    def current(self, slot: int) -> int:
        """Return the number of the text in a slot, -1 before the first."""
        return self._of.get(slot, -1)

    def of(self, slots: Rows, positions: Rows) -> list[int]:
        """Return the number of each token's text; one at position 0 begins another."""
        out = []
        for slot, position in zip(slots.tolist(), positions.tolist(), strict=True):
            if position == 0 or slot not in self._of:
                self._of[slot] = self._begun
                self._begun += 1
            out.append(self._of[slot])
        return out


class Recorder:
    """Notes the choices of all tokens that a module runs; made by `recording`."""

    def __init__(self, model: str, most: int | None) -> None:
        """Keep at most so many tokens; None: all."""
        self._model, self._most = model, most
        self.routers: tuple[Router, ...] = ()
        """Those of one step; known before the first choice."""
        self._texts = _Texts()
        self._parts: dict[str, list[Any]] = defaultdict(list)
        self._open: npt.NDArray[np.int16] | None = None
        self._step = 0
        self.rows = 0
        """Tokens that were noted."""
        self.dropped = 0
        """Tokens that came after them."""

    def __call__(self, router: Router) -> None:
        """Note what a router chose."""
        slots, rows, positions = router.rows()
        if router.number == 0:
            self._begin(slots, positions)
        if self._open is not None:
            self._open[:, router.number] = router.ids[rows]

    def _begin(self, slots: Rows, positions: Rows) -> None:
        texts = self._texts.of(slots, positions)
        if self._most is not None and (self.dropped or self.rows + len(slots) > self._most):
            self.dropped += len(slots)
            self._open = None
            return
        k = self.routers[0].rule.k
        self._open = np.full((len(slots), len(self.routers), k), -1, np.int16)
        self._parts["ids"].append(self._open)
        self._parts["sequence"].append(np.array(texts, np.int32))
        self._parts["position"].append(positions.astype(np.int32))
        self._parts["step"].append(np.full(len(slots), self._step, np.int32))
        self._step += 1
        self.rows += len(slots)

    def forget(self, slot: int, position: int) -> None:
        """Drop what was noted of a slot's text from a position on: drafts that were rejected."""
        text = self._texts.current(slot)
        notes = (self._parts[name] for name in ("ids", "sequence", "position"))
        for ids, sequence, positions in zip(*(reversed(n) for n in notes), strict=True):
            mine = sequence == text
            late = mine & (positions >= position)
            if mine.any() and not late.any():
                break
            self.rows -= int((late & (ids >= 0).all((1, 2))).sum())
            ids[late] = -1

    def log(self) -> RoutingLog:
        """Return what was noted so far, without tokens whose pass was broken off."""
        none = np.zeros((0, len(self.routers), self.routers[0].rule.k), np.int16)
        ids = np.concatenate([none, *self._parts["ids"]])
        done = (ids >= 0).all((1, 2))
        sequence, position, step = (
            np.concatenate([np.zeros(0, np.int32), *self._parts[name]])[done]
            for name in ("sequence", "position", "step")
        )
        return RoutingLog(
            ids[done], sequence, position, step, tuple(router.layer for router in self.routers),
            self.routers[0].rule.e, self._model, self.dropped,
        )  # fmt: skip


class Replay:
    """Makes routers choose what a log says; made by `replaying`."""

    def __init__(self, log: RoutingLog) -> None:
        """Take the choices; each token takes those of its text and position, in their order.

        One that is run more often than the log has it (in place of a draft that was rejected) takes the
        last ones again.
        """
        self._log = log
        self._texts = _Texts()
        self._step: list[int] = []
        waiting: dict[tuple[int, int], deque[int]] = defaultdict(deque)
        for at, key in enumerate(zip(log.sequence.tolist(), log.position.tolist(), strict=True)):
            waiting[key].append(at)
        self._waiting = dict(waiting)
        self.forced = 0
        """Choices (of a token by a router) that the log had."""
        self.changed = 0
        """Those of them that would have been others."""
        self.own = 0
        """Choices that were left to the router, since the log had none."""

    def __call__(self, router: Router) -> None:
        """Replace what a router chose; the weights become those of the logged experts by its logits."""
        slots, rows, positions = router.rows()
        if router.number == 0:
            texts = self._texts.of(slots, positions)
            self._step = [self._next(*key) for key in zip(texts, positions.tolist(), strict=True)]
        for row, at in zip(rows.tolist(), self._step, strict=True):
            if at < 0:
                self.own += 1
                continue
            self.forced += 1
            wanted = self._log.ids[at, router.number]
            if (router.ids[row] != wanted).any():
                self.changed += 1
                router.ids[row] = wanted
                router.weights[row] = router.rule.weights(router.logits[row], wanted)

    def _next(self, text: int, position: int) -> int:
        """Return the log's next row of a text and position, -1 if it has none."""
        waiting = self._waiting.get((text, position))
        if not waiting:
            return -1
        return waiting.popleft() if len(waiting) > 1 else waiting[0]


@contextmanager
def recording(
    module: Module, slots: Sequence[int] = (0,), most: int | None = MOST_ROWS
) -> Iterator[Recorder]:
    """Note the choices of all tokens that a module runs meanwhile, draft heads left out.

    Args:
        module: A decoder with experts.
        slots: Of the sequences whose prompts are read.
        most: Tokens to keep; None: all.

    Raises:
        UsageError: The model has no experts, or layers have different numbers of them; or texts of several
            slots may share pages.
    """
    _check_apart(module, slots)
    recorder = Recorder(module.manifest.name, most)
    with tapped(module, slots, recorder) as routers:
        _check_alike(module, routers)
        recorder.routers = routers
        module.rejected.append(recorder.forget)
        try:
            yield recorder
        finally:
            module.rejected.remove(recorder.forget)


@contextmanager
def replaying(module: Module, log: RoutingLog, slots: Sequence[int] = (0,)) -> Iterator[Replay]:
    """Make a module's routers choose what a log says for all tokens that it runs meanwhile.

    Tokens that the log has not keep the model's own choices. Where choices are recorded too, this goes
    outside of it.

    Args:
        module: A decoder of the same layers, experts and experts for each token as the log's.
        log: From another run, of this or another artifact of the model.
        slots: Of the sequences whose prompts are read.

    Raises:
        UsageError: The model has no experts, or texts of several slots may share pages.
        InputError: The log is of another model.
    """
    _check_apart(module, slots)
    replay = Replay(log)
    with tapped(module, slots, replay) as routers:
        _check_alike(module, routers)
        rule, labels = routers[0].rule, tuple(router.layer for router in routers)
        found = (log.layers, log.experts, log.ids.shape[2])
        if found != (labels, rule.e, rule.k):
            raise InputError(
                f"the routing log is of {_spell(*found)}; {module.manifest.name} has "
                f"{_spell(labels, rule.e, rule.k)}",
                file=log.source or "routing log", remedy="record one with an artifact of this model",
            )  # fmt: skip
        yield replay


def _spell(layers: tuple[str, ...], experts: int, k: int) -> str:
    return f"{len(layers)} layers ({layers[0]} to {layers[-1]}) with {k} of {experts} experts"


def _check_apart(module: Module, slots: Sequence[int]) -> None:
    """Refuse texts that slots and positions do not tell apart: with pages one may begin inside another."""
    if module.pool is not None and len(slots) > 1:
        raise UsageError(
            f"several texts of {module.manifest.name} may share pages, and a routing log does not tell such "
            "texts apart",
            remedy="Give one prompt at a time, or compile it without --pages.",
        )


def _check_alike(module: Module, routers: tuple[Router, ...]) -> None:
    name = module.manifest.name
    if not routers:
        raise UsageError(
            f"{name} has no experts, whose choice could be recorded or replayed",
            remedy="Leave --route-log and --route-replay out.",
        )
    kinds = sorted({(router.rule.k, router.rule.e) for router in routers})
    if len(kinds) > 1 or kinds[0][1] > MOST_EXPERTS:
        texts = ", ".join(f"{k} of {e}" for k, e in kinds)
        raise UsageError(
            f"a routing log needs one number of experts in all layers of {name}: {texts}"
        )
