"""Generates tokens and text with a decoder's entry points."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mimo_compile.errors import UsageError
from mimo_compile.runtime.energy import open_meter
from mimo_compile.runtime.program import Decoder
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

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else None

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
        return max(self.new_tokens - 1, 0)


class Session:
    """A sequence of tokens in a decoder's states.

    A module has one at a time: beginning another one, or `Module.reset`, ends it.
    """

    def __init__(self, module: Module, number: int, adapter: str | None = None) -> None:
        """Begin an empty sequence; made by `Module.session`."""
        self._module = module
        self._number = number
        self._decoder = decoder_of(module)
        self._adapter = adapter_index(module, adapter)
        self.lock = module.lock
        self.position = 0
        """Tokens in the states so far; the next one goes here."""

    def append(self, ids: Sequence[int] | Array) -> Array:
        """Append tokens and return the hidden state of the last one, `[1, D]` float32, a copy.

        Raises:
            UsageError: There are none, they do not fit the context, an id is not in the
                vocabulary, or the session has ended.
        """
        last: Array | None = None
        with self.lock:  # until the copy is made
            for hidden in self.chunks(ids):
                last = hidden[-1:]
            if last is None:
                raise UsageError("no tokens to append")
            return last.copy()

    def chunks(self, ids: Sequence[int] | Array) -> Iterator[Array]:
        """Append tokens step by step; gives the hidden states `[n, D]` of each step's tokens.

        They are overwritten by whatever the module runs next: where other threads use it too,
        hold the module's ``lock`` until you are done with them.
        """
        decoder = self._decoder
        tokens = check_ids(ids, decoder)
        end = self.position + len(tokens)
        if end > decoder.max_context:
            raise UsageError(
                f"{end} tokens do not fit the context of {decoder.max_context} that the artifact "
                "was compiled for",
                remedy="Shorten the prompt, or compile with a longer context.",
            )
        done = 0
        for count in plan_steps(len(tokens), decoder.steps, decoder.max_context - end):
            valid = min(count, len(tokens) - done)
            with self.lock:
                bound = self._entry(f"step_{count}")
                into, position, *adapters = bound.inputs.values()
                for place in adapters:
                    place[...] = self._adapter
                into[:valid] = tokens[done : done + valid]
                into[valid:] = 0
                position[...] = self.position, valid
                bound.run()
                self.position += valid
            done += valid
            hidden = bound.outputs["hidden"]
            yield hidden[:valid]

    def logits(self, hidden: Array) -> Iterator[Array]:
        """Give the logits `[n, V]` float32 of hidden states `[m, D]`, some rows at a time.

        They are overwritten by whatever the module runs next (see `chunks`); `hidden` must not be
        memory of it.
        """
        done = 0
        for count in plan_steps(len(hidden), self._decoder.heads, self._decoder.heads[-1]):
            valid = min(count, len(hidden) - done)
            with self.lock:
                bound = self._entry(f"head_{count}")
                (into,) = bound.inputs.values()
                into[:valid] = hidden[done : done + valid]
                into[valid:] = 0
                bound.run()
            done += valid
            (logits,) = bound.outputs.values()
            yield logits[:valid]

    def _entry(self, name: str) -> Any:
        if not self._module.owns(self._number):
            raise UsageError(
                "this sequence has ended: another one began on the same module",
                remedy="Load the artifact twice to generate two texts at a time.",
            )
        return self._module.bind(name)


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


def check_ids(ids: Sequence[int] | Array, decoder: Decoder) -> npt.NDArray[np.int32]:
    """Return token ids as int32 `[n]`.

    Raises:
        UsageError: They are not a flat sequence of whole numbers within the vocabulary.
    """
    array = np.asarray(ids)
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
) -> Iterator[int]:
    """Check the arguments at once and return the ids one by one; see `Module.generate`."""
    decoder = decoder_of(module)
    ids = encode(module, prompt)
    # the last token that is generated needs no place in the states
    room = decoder.max_context - len(ids) + 1
    count = room if max_new_tokens is None else max_new_tokens
    if count < 0:
        raise UsageError(f"max_new_tokens is {count}; it must be 0 or more")
    if len(ids) > decoder.max_context or count > room:
        raise UsageError(
            f"{len(ids)} prompt tokens and {max(count, 0)} new ones do not fit the context of "
            f"{decoder.max_context} that the artifact was compiled for",
            remedy="Shorten the prompt, ask for fewer, or compile with a longer context.",
        )
    adapter_index(module, adapter)
    return _generate(module, ids, count, sampling, stop_at_eos, stats or Stats(), adapter)


def generate_text(
    module: Module,
    prompt: Prompt,
    max_new_tokens: int | None,
    sampling: Sampling,
    stop_at_eos: bool,
    stats: Stats | None,
    adapter: str | None = None,
) -> Iterator[str]:
    """Check the arguments at once and return the text in pieces; see `Module.generate`."""
    ids = encode(module, prompt)
    stream = TextStream(module.tokenizer, ids.tolist())
    tokens = generate_ids(module, ids, max_new_tokens, sampling, stop_at_eos, stats, adapter)
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
) -> Iterator[int]:
    decoder = decoder_of(module)
    eos = frozenset(decoder.eos) if stop_at_eos else frozenset()
    stats.prompt_tokens, stats.stopped = len(ids), "" if count else "length"
    if not count:
        return
    session = module.session(adapter)
    meter = open_meter(module.manifest.target.kind)
    stats.joules_reason = meter.reason or "no token after the first"
    try:
        start = time.perf_counter()
        token = _next(session, ids, sampling)
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
                token = _next(session, [token], sampling)
                stats.decode_seconds += time.perf_counter() - start
                meter.keep()
    finally:
        if stats.new_tokens > 1:
            stats.joules_decode = meter.stop()
            stats.joules_source = meter.source if stats.joules_decode is not None else None
            stats.joules_reason = meter.reason


def _next(session: Session, ids: Sequence[int] | Array, sampling: Sampling) -> int:
    with session.lock:  # the logits are memory of the module
        (logits,) = session.logits(session.append(ids))
        return sample(logits[0], sampling, session.position)
