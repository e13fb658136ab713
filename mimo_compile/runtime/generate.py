"""Generates tokens and text with a decoder's entry points."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from operator import index
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mimo_compile.errors import UsageError
from mimo_compile.runtime.energy import open_meter
from mimo_compile.runtime.program import Decoder
from mimo_compile.runtime.rollback import Held
from mimo_compile.runtime.sampling import Sampling, sample
from mimo_compile.runtime.text import TextStream

if TYPE_CHECKING:
    from mimo_compile.runtime.module import Module

Array = npt.NDArray[Any]
Prompt = str | Sequence[int] | Array

_PASS_TOKENS = 8
"""A pass over the weights costs about as much as the arithmetic of this many tokens."""


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

    def begin(self, prompt_tokens: int, sequences: int = 1) -> None:
        """Forget what a generation before this one has left."""
        fresh = Stats(prompt_tokens, sequences=sequences)
        for field in fields(fresh):
            setattr(self, field.name, getattr(fresh, field.name))

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
    def _decoded(self) -> int:
        return max(self.new_tokens - self.sequences, 0)


class Session:
    """A sequence of tokens in a decoder's states.

    A module has one at a time, or in each slot one: beginning another one there, or `Module.reset`,
    ends it.
    """

    def __init__(
        self, module: Module, number: int, adapter: str | None = None, slot: int = 0
    ) -> None:
        """Begin an empty sequence; made by `Module.session`."""
        self.slot = slot
        """Which of the module's places for sequences it has."""
        self._module = module
        self._number = number
        self._decoder = decoder_of(module)
        self._adapter = adapter_index(module, adapter)
        self.adapter = adapter
        """Adapter that changes the model for this sequence."""
        self.lock = module.lock
        self._tokens: list[int] = []
        self._held = Held(self._decoder.layers)
        self._exact = 0  # first tokens whose keys are those of a prompt
        self._turn = 0  # raised whenever tokens may have been dropped

    @property
    def position(self) -> int:
        """Tokens in the states so far; the next one goes here."""
        return len(self._tokens)

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens in the states."""
        return tuple(self._tokens)

    @property
    def mark(self) -> tuple[int, int]:
        """Equal to what it was as long as nobody else appended tokens or went back."""
        return self._turn, self.position

    def append(self, ids: Sequence[int] | Array, *, decode: bool = False) -> Array:
        """Append tokens and return the hidden state of the last one, `[1, D]` float32, a copy.

        Args:
            ids: The tokens.
            decode: They were generated, which under some attention policies (`inspect` shows the
                artifact's) makes them attend to less than the tokens of a prompt do.

        Raises:
            UsageError: There are none, they do not fit the context, an id is not in the
                vocabulary, or the session has ended.
        """
        last: Array | None = None
        with self.lock:
            for hidden in self.chunks(ids, decode=decode):
                last = hidden[-1:].copy()
            if last is None:
                raise UsageError("no tokens to append")
            return last

    def chunks(self, ids: Sequence[int] | Array, *, decode: bool = False) -> Iterator[Array]:
        """Append tokens step by step; gives the hidden states `[n, D]` of each step's tokens.

        They are overwritten by whatever the module runs next: where other threads use it too,
        hold the module's ``lock`` until you are done with them.

        Raises:
            UsageError: As `append`, or the sequence changed between two steps.
        """
        decoder = self._decoder
        tokens = check_ids(ids, decoder)
        end = self.position + len(tokens)
        self._check_room(end)
        apart = decode and bool(decoder.decode)
        sizes, kind = (decoder.decode, "decode") if apart else (decoder.steps, "step")
        done, mark = 0, self.mark
        for count in plan_steps(len(tokens), sizes, decoder.max_context - end):
            valid = min(count, len(tokens) - done)
            part = tokens[done : done + valid]
            with self.lock:
                self.check_mark(mark)
                if decoder.rerun:
                    # rings hold one step more than the window: later they have forgotten too much
                    self._make_exact(decoder.rerun if apart else 1)
                exact = self._exact
                hidden = self._step(f"{kind}_{count}", part, self.position)
                self.took(part.tolist())
                if apart:
                    self._exact = exact
                mark = self.mark
            done += valid
            yield hidden
            if apart and decoder.rerun:
                self._make_exact(decoder.rerun)

    def place_of_next(self, module: Module) -> tuple[int, int]:
        """Return what an entry of a module takes for the next token: its position, the adapter's index.

        Raises:
            UsageError: The context is full, or the session has ended or is of another module.
        """
        self._check_alive()
        if self._module is not module:
            raise UsageError("this sequence is of another module")
        self._check_room(self.position + 1)
        return self.position, self._adapter

    def took(self, tokens: Sequence[int]) -> None:
        """Note tokens that an entry has appended to the states."""
        at = self.position
        self._tokens += tokens
        self._held.append(self.position)
        if self._exact == at:
            self._exact = self.position

    def _check_room(self, end: int) -> None:
        if end > self._decoder.max_context:
            raise UsageError(
                f"{end} tokens do not fit the context of {self._decoder.max_context} that the artifact "
                "was compiled for",
                remedy="Shorten the prompt, or compile with a longer context.",
            )

    def _step(self, entry: str, tokens: Array, at: int) -> Array:
        """Run an entry point on some tokens at a position; returns their hidden states."""
        bound = self._entry(entry)
        into, position, *adapters = bound.inputs.values()
        for place in adapters:
            place[...] = self._adapter
        into[: len(tokens)] = tokens
        into[len(tokens) :] = 0
        position[...] = at, len(tokens)
        bound.run()
        hidden: Array = bound.outputs["hidden"][: len(tokens)]
        return hidden

    def _make_exact(self, least: int) -> None:
        """Run generated tokens again as if they had been a prompt, where there are so many."""
        with self.lock:
            end = self.position
            if end - self._exact < least:
                return
            slack = self._decoder.max_context - end
            for count in plan_steps(end - self._exact, self._decoder.steps, slack):
                part = np.array(self._tokens[self._exact : min(self._exact + count, end)])
                self._step(f"step_{count}", part, self._exact)
                self._exact += len(part)

    def check_mark(self, mark: tuple[int, int]) -> None:
        """Check that the sequence is what it was when it had this `mark`.

        Raises:
            UsageError: Tokens were appended or dropped since.
        """
        if self.mark != mark:
            raise UsageError(
                f"this sequence was changed by others: it had {mark[1]} tokens, now it has "
                f"{self.position} that may be different ones",
                remedy="Finish one text before you begin another one on the same session.",
            )

    def belongs_to(self, module: Module, adapter: str | None) -> bool:
        """Whether it is the sequence in progress of a module, with this adapter (None: any)."""
        mine = self._module is module and module.owns(self._number)
        return mine and adapter in (None, self.adapter)

    def rewind(self, position: int) -> None:
        """Drop the tokens from a position on, as if they had never been appended.

        Speculative decoding drops what was drafted in vain so, and a changed prompt its end.

        Args:
            position: How many tokens to keep.

        Raises:
            UsageError: There are not so many, the session has ended, or layers have forgotten what
                they would need: `can_rewind` tells.
        """
        position = whole(position, "position")
        with self.lock:
            self._check_alive()
            if not 0 <= position <= self.position:
                raise UsageError(
                    f"{position} tokens cannot be kept, the sequence has {self.position}"
                )
            if obstacle := self._held.obstacle(position):
                kept = self._held.most(position)
                raise UsageError(
                    f"the states cannot go back from {self.position} tokens to {position}: {obstacle}",
                    remedy=f"Keep {kept} of them, or begin a new session."
                    if kept
                    else "Begin a new session.",
                )
            self._held.rewind(position)
            self._turn += 1
            del self._tokens[position:]
            self._exact = min(self._exact, position)

    def can_rewind(self, position: int) -> bool:
        """Whether the states still hold all that is seen from a position on.

        Layers that see everything always do, and so do descriptors of blocks, which are made anew as
        tokens are appended. A window layer sees `window - 1` positions before this one, which its ring
        must hold. Where positions are quantised in groups, one that is the first of its group is free to
        go back to; else the tail must hold those of its group before it, which is made anew.
        """
        return not self._held.obstacle(position)

    def keep_prefix(self, ids: Sequence[int] | Array) -> int:
        """Keep what the states hold of the beginning of other tokens, and drop the rest.

        At least the last of these tokens is left to be appended, since its hidden state is not kept.
        Tokens that were decoded by an attention policy of their own are not kept: read as a prompt,
        they get other keys.

        Args:
            ids: A prompt.

        Returns:
            How many of its tokens need not be appended; 0 also where the states cannot go back.
        """
        wanted = check_ids(ids, self._decoder)
        with self.lock:
            most = min(self.position, len(wanted) - 1, self._exact)
            held = np.array(self._tokens[: max(most, 0)], np.int32)
            differ = np.flatnonzero(held != wanted[: len(held)])
            same = int(differ[0]) if len(differ) else len(held)
            kept = self._held.most(same)
            self.rewind(kept)
            return kept

    def logits(self, hidden: Array) -> Iterator[Array]:
        """Give the logits `[n, V]` float32 of hidden states `[m, D]`, some rows at a time.

        They are overwritten by whatever the module runs next (see `chunks`); `hidden` must not be
        memory of it.
        """
        done = 0
        for count in plan_steps(len(hidden), self._decoder.heads, self._decoder.heads[-1]):
            valid = min(count, len(hidden) - done)
            with self.lock:
                self._check_alive()
                bound = self._module.bind(f"head_{count}")
                (into,) = bound.inputs.values()
                into[:valid] = hidden[done : done + valid]
                into[valid:] = 0
                bound.run()
            done += valid
            (logits,) = bound.outputs.values()
            yield logits[:valid]

    def _entry(self, name: str) -> Any:
        self._check_alive()
        return self._module.bind(name, self.slot)

    def _check_alive(self) -> None:
        if not self._module.owns(self._number):
            raise UsageError(
                "this sequence has ended: another one began on the same module",
                remedy="Load the artifact twice, or compile it with --batch 2, for two texts at a time."
                if self._module.batch == 1
                else f"Begin each in a slot of its own, of which there are {self._module.batch}; generate "
                "begins in slot 0, generate_batch in as many as it has texts.",
            )


@lru_cache(maxsize=1024)
def plan_steps(count: int, steps: tuple[int, ...], slack: int) -> tuple[int, ...]:
    """Divide tokens among steps of fixed sizes, at the least cost.

    A step of T tokens costs T and the pass over the weights. Only the last step may be longer
    than what is left: it is padded, where that is cheaper.

    Args:
        count: Tokens, 0 or more.
        steps: The sizes there are, ascending from 1.
        slack: How far padding may reach beyond the last token (to the end of the context).

    Returns:
        The sizes of the steps in their order; their sum is `count` or, with padding, more.
    """
    longest = steps[-1]
    whole = max(0, count // longest - 1)
    rest = count - whole * longest
    best: list[tuple[int, int]] = [(0, 0)]  # for so many tokens: cost, first step
    for left in range(1, rest + 1):
        best.append(
            min(
                (_PASS_TOKENS + step + (best[left - step][0] if step <= left else 0), -step)
                for step in steps
                if step - left <= slack
            )
        )
    chosen = [longest] * whole
    while rest > 0:
        step = -best[rest][1]
        chosen.append(step)
        rest -= step
    return tuple(chosen)


def decoder_of(module: Module) -> Decoder:
    """Return how the module generates.

    Raises:
        UsageError: It is no decoder.
    """
    decoder = module.manifest.decoder
    if decoder is None:
        raise UsageError(
            f"{module.manifest.name} is not a decoder: it cannot generate",
            remedy="Call it with its inputs instead.",
        )
    return decoder


def adapter_index(module: Module, name: str | None) -> int:
    """Return the index of an adapter, -1 for None.

    Raises:
        UsageError: the artifact has no adapter of this name.
    """
    if name is None:
        return -1
    known = decoder_of(module).adapters
    if name not in known:
        raise UsageError(
            f"{module.manifest.name} has no adapter {name!r}",
            remedy=f"It has {', '.join(known)}." if known else "It was compiled without adapters.",
        )
    return known.index(name)


def whole(value: Any, what: str) -> int:
    """Return what a caller gave, and calls so, as a whole number.

    Raises:
        UsageError: It is none.
    """
    try:
        return index(value)
    except TypeError as error:
        raise UsageError(f"{what} is {value!r}; it must be a whole number") from error


def check_ids(ids: Sequence[int] | Array, decoder: Decoder) -> npt.NDArray[np.int32]:
    """Return token ids as int32 `[n]`.

    Raises:
        UsageError: They are not a flat sequence of whole numbers within the vocabulary.
    """
    try:
        array = np.asarray(ids)
    except ValueError as error:  # lists of different lengths
        raise UsageError("token ids must be a flat sequence of whole numbers") from error
    if not array.size:
        return np.zeros(0, np.int32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise UsageError(
            f"token ids must be a flat sequence of whole numbers, this is {array.dtype}"
            f"{list(array.shape)}"
        )
    wrong = array[(array < 0) | (array >= decoder.vocab)]
    if wrong.size:
        raise UsageError(f"token id {wrong[0]} is outside of the vocabulary of {decoder.vocab}")
    return array.astype(np.int32)


def generate_ids(
    module: Module,
    prompt: Prompt,
    max_new_tokens: int | None,
    sampling: Sampling,
    stop_at_eos: bool,
    stats: Stats | None,
    adapter: str | None = None,
    session: Session | None = None,
) -> Iterator[int]:
    """Check the arguments at once and return the ids one by one; see `Module.generate`."""
    decoder = decoder_of(module)
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
    return _generate(module, ids, count, sampling, stop_at_eos, stats or Stats(), adapter, session)


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
) -> Iterator[str]:
    """Check the arguments at once and return the text in pieces; see `Module.generate`."""
    ids = encode(module, prompt)
    stream = TextStream(module.tokenizer, ids.tolist())
    tokens = generate_ids(
        module, ids, max_new_tokens, sampling, stop_at_eos, stats, adapter, session
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
) -> Iterator[int]:
    decoder = decoder_of(module)
    eos = frozenset(decoder.eos) if stop_at_eos else frozenset()
    stats.begin(len(ids))
    if not count:
        stats.stopped = "length"
        return
    session = module.session(adapter) if session is None else session
    with session.lock:
        stats.reused_tokens = session.keep_prefix(ids)
        mark = session.mark
    meter = open_meter(module.manifest.target.kind)
    stats.joules_reason = meter.reason or "no token after the first"
    try:
        start = time.perf_counter()
        token, mark = _next(session, ids[stats.reused_tokens :], sampling, mark)
        stats.prefill_seconds = time.perf_counter() - start
        meter.start()
        for made in range(1, count + 1):
            if token in eos:
                stats.stopped = "eos"
                return
            stats.new_tokens = made
            if made == count:
                stats.stopped = "length"
            yield token
            if made < count:
                start = time.perf_counter()
                token, mark = _next(session, [token], sampling, mark, decode=True)
                stats.decode_seconds += time.perf_counter() - start
                meter.keep()
    finally:
        if stats.new_tokens > 1:
            stats.joules_decode = meter.stop()
            stats.joules_source = meter.source if stats.joules_decode is not None else None
            stats.joules_reason = meter.reason


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
