"""Whole models side by side: tokens/s, load time and memory of an artifact and of peers.

Each runs in a process of its own (see `models.worker`). All get the same prompt and the same number of new
tokens, feed the most probable token back, and take turns.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mimo_compile.bench.models.entrant import Entrant, ModelAsk
from mimo_compile.bench.models.worker import Worker
from mimo_compile.bench.peers import LeftOut, get_peer
from mimo_compile.errors import MimoError

_LOADS = ("load_s", "open_s", "check_s")
_MEMORY = ("rss_bytes", "anonymous_bytes", "mapped_bytes", "peak_bytes")


@dataclass(slots=True)
class ModelRow:
    """What one implementation did: rates of every round, and what loading took."""

    impl: str
    threads: int
    peer: str = ""
    """Name of the peer; empty: ours."""
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    joules: list[float] = field(default_factory=list)
    joules_source: str = ""
    weight_bytes: float = 0.0
    """Bytes of weights that one decoded token reads; 0 when unknown."""
    roof_gb_per_s: list[float] = field(default_factory=list)
    """What a kernel that only reads as many bytes reached in each round."""
    file_bytes: int = 0
    load: dict[str, float] = field(default_factory=dict)
    """``load_s``, and for ours ``open_s`` and ``check_s``."""
    memory: dict[str, int] = field(default_factory=dict)
    """See `models.worker.memory`: after the last round, and ``base_bytes`` resident before loading."""

    def add(self, figures: dict[str, Any]) -> None:
        """Keep the figures of one round."""
        self.prefill.append(figures["prefill"])
        if figures["decode"] is not None:
            self.decode.append(figures["decode"])
        if figures.get("joules") is not None:
            self.joules.append(figures["joules"])
            self.joules_source = figures["joules_source"]

    def json(self) -> dict[str, Any]:
        """Return the row as `bench model --json` prints it."""
        rate = _median(self.decode)
        moved = rate * self.weight_bytes / 1e9 if rate and self.weight_bytes else None
        roof = _median(self.roof_gb_per_s)
        return {
            "op": "model", "impl": self.impl, "peer": self.peer or None, "threads": self.threads,
            "prefill_tokens_per_s": _median(self.prefill), "prefill_spread": _spread(self.prefill),
            "decode_tokens_per_s": rate, "decode_spread": _spread(self.decode),
            "decode_gb_per_s": moved, "roof_gb_per_s": roof,
            "decode_roof_share": moved / roof if moved and roof else None,
            "joules": _median(self.joules), "joules_source": self.joules_source or None,
            "file_bytes": self.file_bytes,
            **{name: self.load.get(name) for name in _LOADS},
            **{name: self.memory.get(name) for name in ("base_bytes", *_MEMORY)},
        }  # fmt: skip


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _spread(values: Sequence[float]) -> list[float] | None:
    return [min(values), max(values)] if values else None


@dataclass(slots=True)
class Comparison:
    """Rows of those who took part, ours first; and who did not, with why."""

    rows: list[ModelRow] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)


def find_entrants(names: Sequence[str], ask: ModelAsk) -> tuple[list[Entrant], list[LeftOut]]:
    """Return whom the peers of these names offer, and what cannot take part.

    Peers whose package is absent are skipped: `runner.missing_peers` names them.
    """
    field: list[Entrant] = []
    out: list[LeftOut] = []
    for name in names:
        peer = get_peer(name)
        if peer.missing() is not None:
            continue
        for offer in _models(peer, name, ask):
            if isinstance(offer, LeftOut):
                out.append(offer)
            else:
                field.append(offer)
    return field, out


def _models(peer: Any, name: str, ask: ModelAsk) -> Iterator[Entrant | LeftOut]:
    if hasattr(peer, "models"):
        yield from peer.models(ask)
    else:  # a plug-in's, of kernels alone
        yield LeftOut(name, "runs single kernels, no whole models")


def compare_models(
    ours: tuple[ModelRow, Entrant],
    peers: Sequence[Entrant],
    prompt: npt.NDArray[Any],
    new: int,
    rounds: int,
    log: Callable[[str], None],
    roof: Entrant | None = None,
) -> Comparison:
    """Let ours, peers and the read roof of ours take turns; a first round only warms up.

    Args:
        ours: The row to fill, and what runs it.
        peers: Whom to compare with; one that fails is left out with the reason.
        prompt: [n] token ids.
        new: Tokens to generate.
        rounds: Turns of each that count.
        log: Called with progress.
        roof: What reads as many bytes as decoding ours does, if known.

    Raises:
        MimoError: ours fails.
    """
    found = Comparison()
    row, entrant = ours
    ids = [int(i) for i in prompt]
    with ExitStack() as stack:
        runs: list[tuple[ModelRow, Worker]] = [(row, stack.enter_context(_load(row, entrant)))]
        log(f"{row.impl} loaded")
        for entrant in peers:
            other = ModelRow(entrant.impl, row.threads, entrant.peer)
            try:
                runs.append((other, stack.enter_context(_load(other, entrant))))
                log(f"{other.impl} loaded")
            except MimoError as error:
                found.left_out.append(LeftOut(entrant.impl, f"fails to load: {error}"))
        reader = None
        if roof is not None:
            reader = stack.enter_context(Worker(roof))
            reader.ask("load")
        for number in range(rounds + 1):
            for each, worker in list(runs):
                try:
                    figures = worker.ask("run", ids, new)
                except MimoError as error:
                    if each is row:
                        raise
                    found.left_out.append(LeftOut(each.impl, f"fails: {error}"))
                    runs.remove((each, worker))
                    continue
                if number:
                    each.add(figures)
            if reader is not None:
                rate = reader.ask("run")["gb_per_s"]
                if number:
                    row.roof_gb_per_s.append(rate)
            log(f"round {number} of {rounds}")
        for each, worker in runs:
            with contextlib.suppress(MimoError):  # what it ran stays measured
                each.memory |= worker.ask("memory")
    found.rows = [each for each, _ in runs]
    return found


def _load(row: ModelRow, entrant: Entrant) -> Worker:
    worker = Worker(entrant)
    try:
        row.file_bytes = entrant.file_bytes
        if base := worker.ask("memory"):
            row.memory["base_bytes"] = base["rss_bytes"]
        row.load = worker.ask("load")
    except BaseException:
        worker.close()
        raise
    return worker


def random_prompt(vocab: int, tokens: int, seed: int) -> npt.NDArray[np.int32]:
    """Return token ids drawn uniformly."""
    return np.random.default_rng(seed).integers(0, vocab, tokens).astype(np.int32)
