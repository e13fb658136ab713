"""Generates tokens and text with a decoder's entry points."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mimo_compile.errors import UsageError
from mimo_compile.runtime.arguments import Array, adapter_index, check_ids, decoder_of, whole
from mimo_compile.runtime.energy import open_meter
from mimo_compile.runtime.program import Decoder
from mimo_compile.runtime.sampling import Sampling, sample
from mimo_compile.runtime.session import Session
from mimo_compile.runtime.speculate import Passes, Speculation, speculation_of
from mimo_compile.runtime.text import TextStream

if TYPE_CHECKING:
    from mimo_compile.runtime.module import Module

Prompt = str | Sequence[int] | Array


@dataclass(slots=True)
class Stats:
    """Counts, times and energy of one generation, kept up to date while it runs.

    Times hold only the work, not what the consumer does between tokens; energy is that of the
    whole machine from the first to the last token.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    """Prompt tokens that the session held already."""
    sequences: int = 1
    """Texts that have begun, of a batch."""
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    """Until the first token is known."""
    decode_seconds: float = 0.0
    """For the tokens after the first."""
    joules_decode: float | None = None
    """Measured; from the first token to the last."""
    joules_source: str | None = None
    joules_reason: str = ""
    """Why there is no measured energy."""
    stopped: str = ""
    """`eos`, `length`, or empty while (or if) more could come."""
    passes: int = 0
    """Passes of the decoder over drafts and the token before them, of speculative decoding."""
    drafted: list[int] = field(default_factory=list)
    """Drafts of each head."""
    judged: list[int] = field(default_factory=list)
    """Of them, those before which no other was rejected."""
    accepted: list[int] = field(default_factory=list)
    """Of them, those that were kept."""

    def begin(self, prompt_tokens: int, sequences: int = 1) -> None:
        """Forget what a generation before this one has left."""
        fresh = Stats(prompt_tokens, sequences=sequences)
        for each in fields(fresh):
            setattr(self, each.name, getattr(fresh, each.name))

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """Prompt tokens per second, those that were held already left out."""
        fresh = self.prompt_tokens - self.reused_tokens
        return fresh / self.prefill_seconds if self.prefill_seconds else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens after the first per second."""
        return self._decoded / self.decode_seconds if self.decode_seconds else None

    @property
    def joules_per_token(self) -> float | None:
        """Measured joules for each token after the first, None where no meter can be read."""
        known = self.joules_decode is not None and self._decoded > 0
        return self.joules_decode / self._decoded if known and self.joules_decode else None

    @property
    def acceptance(self) -> dict[str, Any] | None:
        """What became of drafts: counts, and the share that each head's were accepted of, given those before.

        None without speculative decoding. ``tokens_per_pass`` counts the drafts that were kept, and one.
        """
        if not self.passes:
            return None
        heads = zip(self.drafted, self.judged, self.accepted, strict=True)
        return {
            "passes": self.passes, "tokens_per_pass": 1 + sum(self.accepted) / self.passes,
            "heads": [
                {"drafted": d, "judged": j, "accepted": a, "rate": a / j if j else None}
                for d, j, a in heads
            ],
        }  # fmt: skip

    @property
    def _decoded(self) -> int:
        return max(self.new_tokens - self.sequences, 0)


def generate_ids(
    module: Module,
    prompt: Prompt,
    max_new_tokens: int | None,
    sampling: Sampling,
    stop_at_eos: bool,
    stats: Stats | None,
    adapter: str | None = None,
    session: Session | None = None,
    speculative: bool | Speculation = False,
) -> Iterator[int]:
    """Check the arguments at once and return the ids one by one; see `Module.generate`."""
    decoder = decoder_of(module)
    drafting = speculation_of(module, decoder, speculative)
    ids = encode(module, prompt)
    count = new_tokens(decoder, len(ids), max_new_tokens)
    adapter_index(module, adapter)
    if session is not None and not isinstance(session, Session):
        raise UsageError(
            f"session is {session!r}, which is none",
            remedy="Begin one with Module.session, or leave it out.",
        )
    if session is not None and not session.belongs_to(module, adapter):
        raise UsageError(
            "this session is of another module or adapter, or has ended",
            remedy="Begin one with Module.session, with the same adapter.",
        )
    stats = stats or Stats()
    return _generate(module, ids, count, sampling, stop_at_eos, stats, adapter, session, drafting)


def new_tokens(decoder: Decoder, prompt: int, most: int | None) -> int:
    """Return how many tokens may follow a prompt of so many: ``most``, or (None) as many as fit.

    Raises:
        UsageError: they do not fit the context.
    """
    # the last token that is generated needs no place in the states
    room = decoder.max_context - prompt + 1
    count = room if most is None else whole(most, "max_new_tokens")
    if count < 0 and most is not None:
        raise UsageError(f"max_new_tokens is {count}; it must be 0 or more")
    if count > room or prompt > decoder.max_context:
        raise UsageError(
            f"{prompt} prompt tokens and {max(count, 0)} new ones do not fit the context of "
            f"{decoder.max_context} that the artifact was compiled for",
            remedy="Shorten the prompt, ask for fewer, or compile with a longer context.",
        )
    return count


def generate_text(
    module: Module,
    prompt: Prompt,
    max_new_tokens: int | None,
    sampling: Sampling,
    stop_at_eos: bool,
    stats: Stats | None,
    adapter: str | None = None,
    session: Session | None = None,
    speculative: bool | Speculation = False,
) -> Iterator[str]:
    """Check the arguments at once and return the text in pieces; see `Module.generate`."""
    ids = encode(module, prompt)
    stream = TextStream(module.tokenizer, ids.tolist())
    tokens = generate_ids(
        module, ids, max_new_tokens, sampling, stop_at_eos, stats, adapter, session, speculative
    )
    return stream.pieces(tokens)


def encode(module: Module, prompt: Prompt) -> npt.NDArray[np.int32]:
    """Return a prompt as token ids `[n]`, n above 0.

    Text is encoded as the tokenizer does it for a model, which decides on a first token of its
    own; empty text becomes the decoder's first token if it has one.

    Raises:
        UsageError: It is empty, no text, or holds ids outside of the vocabulary.
    """
    decoder = decoder_of(module)
    if isinstance(prompt, str):
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError("the prompt is no text: it holds halves of characters") from error
        found: list[int] = module.tokenizer.encode(prompt).ids
        if not found and decoder.bos is not None:
            found = [decoder.bos]
        ids = check_ids(found, decoder)
    else:
        ids = check_ids(prompt, decoder)
    if not len(ids):
        raise UsageError("the prompt is empty", remedy="Give at least one token.")
    return ids


def _generate(
    module: Module,
    ids: npt.NDArray[np.int32],
    count: int,
    sampling: Sampling,
    stop_at_eos: bool,
    stats: Stats,
    adapter: str | None,
    session: Session | None,
    drafting: Speculation | None,
) -> Iterator[int]:
    decoder = decoder_of(module)
    eos = frozenset(decoder.eos) if stop_at_eos else frozenset()
    stats.begin(len(ids))
    if not count:
        stats.stopped = "length"
        return
    own = session is None and module.pool is not None  # nobody could give its pages back
    session = module.session(adapter) if session is None else session
    passes: Callable[[int, int], list[int]] | None = None
    if drafting is not None:
        session.draft()
        passes = Passes(session, decoder, sampling, drafting, stats, eos)
    with session.lock:
        stats.reused_tokens = session.keep_prefix(ids)
        mark = session.mark
    meter = open_meter(module.manifest.target.kind)
    stats.joules_reason = meter.reason or "no token after the first"
    made, ended = 0, 0
    try:
        start = time.perf_counter()
        token, mark = _next(session, ids[stats.reused_tokens :], sampling, mark)
        stats.prefill_seconds = time.perf_counter() - start
        meter.start()
        tokens = [token]
        while made < count:
            for token in tokens:
                if token in eos:
                    stats.stopped, ended = "eos", 1
                    return
                made += 1
                stats.new_tokens = made
                if made == count:
                    stats.stopped = "length"
                yield token
            if made < count:
                start = time.perf_counter()
                if passes is None:
                    token, mark = _next(session, [token], sampling, mark, decode=True)
                    tokens = [token]
                else:
                    with session.lock:
                        session.check_mark(mark)
                        tokens, mark = passes(token, count - made), session.mark
                stats.decode_seconds += time.perf_counter() - start
                meter.keep()
    finally:
        if own:
            session.end()
        elif session.belongs_to(module, None):
            _leave(session, mark, len(ids) + made - 1 + ended)
        if stats.new_tokens > 1:
            stats.joules_decode = meter.stop()
            stats.joules_source = meter.source if stats.joules_decode is not None else None
            stats.joules_reason = meter.reason


def _leave(session: Session, mark: tuple[int, int], tokens: int) -> None:
    """Let a sequence hold no more tokens than a text that came one by one would have left in it."""
    with session.lock:
        if session.mark == mark and session.position > tokens and session.can_rewind(tokens):
            session.rewind(tokens)


def _next(
    session: Session,
    ids: Sequence[int] | Array,
    sampling: Sampling,
    mark: tuple[int, int],
    *,
    decode: bool = False,
) -> tuple[int, tuple[int, int]]:
    """Append tokens to what the session held at a mark; returns the next token and the new mark."""
    with session.lock:  # the logits are memory of the module
        session.check_mark(mark)
        (logits,) = session.logits(session.append(ids, decode=decode))
        return sample(logits[0], sampling, session.position), session.mark
