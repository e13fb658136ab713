"""Several sequences at a time: a token of each in one pass over the weights; prompts wait for a place."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mimo_compile.errors import MimoError, UsageError
from mimo_compile.runtime.arguments import Array, adapter_index, check_ids, decoder_of
from mimo_compile.runtime.generate import Prompt, Stats, encode, new_tokens
from mimo_compile.runtime.pages import taken
from mimo_compile.runtime.sampling import Sampling, sample
from mimo_compile.runtime.session import Session
from mimo_compile.runtime.text import TextStream

if TYPE_CHECKING:
    from mimo_compile.runtime.module import Module


def append_each(module: Module, sessions: Sequence[Session], tokens: Sequence[int]) -> Array:
    """Append one token to each of several sequences of a module, in one pass over its weights.

    Args:
        module: Compiled for as many sequences at a time.
        sessions: Sequences in progress, in slots of their own.
        tokens: The next token of each.

    Returns:
        Their hidden states `[n, D]` float32, a copy.

    Raises:
        UsageError: A sequence has ended, is of another module or has filled its context, two of them are
            the same, an id is not in the vocabulary, or no page is free. No sequence has changed then.
    """
    with module.lock:
        ids = check_ids(tokens, decoder_of(module))
        slots = [session.slot for session in sessions]
        if len(set(slots)) != len(slots) or len(ids) != len(slots):
            raise UsageError(
                f"{len(ids)} tokens are for {len(set(slots))} sequences: give one to each"
            )
        places = [session.place_of_next(module) for session in sessions]
        if len(slots) == 1:  # what computes several rows takes longer for one
            return sessions[0].append(ids, decode=True)
        decoder = decoder_of(module)
        if module.pool is not None:
            module.pool.check([session.wanted(1, decoder.rerun) for session in sessions])
        for session in sessions:
            session.make_exact(decoder.rerun)
        bound = module.bind(f"batch_{module.batch}")
        into, pos, *adapters = bound.inputs.values()
        into[...], pos[...] = 0, 0  # no token of the sequences that rest
        into[slots], pos[slots, 0], pos[slots, 1] = ids, [at for at, _ in places], 1
        for chosen in adapters:
            chosen[...] = -1
            chosen[slots] = [adapter for _, adapter in places]
        with taken(
            module.pool, [(n, at, at + 1) for n, (at, _) in zip(slots, places, strict=True)]
        ):
            bound.run()
        hidden: Array = bound.outputs["hidden"][slots]
        for session, token in zip(sessions, ids.tolist(), strict=True):
            session.took([token], decoded=bool(decoder.decode))
            session.make_exact(decoder.rerun)
        return hidden


def for_each(value: Any, count: int, what: str) -> list[Any]:
    """Return one value for each prompt: the same, or those of a list.

    Raises:
        UsageError: The list has another length.
    """
    if isinstance(value, str) or not _is_list(value):
        return [value] * count
    if len(value) != count:
        raise UsageError(
            f"{count} prompts have {len(value)} of {what}: give one for all, or one for each"
        )
    return list(value)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) or (isinstance(value, np.ndarray) and value.ndim > 0)


@dataclass(frozen=True, slots=True)
class Ask:
    """One text to generate."""

    index: int
    ids: Array
    count: int
    """New tokens at most."""
    sampling: Sampling
    adapter: str | None
    made: int = 0
    """Tokens that were given before its pages went to others: they stand at the end of ``ids``."""


@dataclass(slots=True)
class _Running:
    """A text in progress."""

    ask: Ask
    session: Session
    token: int
    """The newest one, which is not in the states yet."""
    made: int
    """Tokens that were given."""


def asks_of(
    module: Module,
    prompts: Sequence[Prompt],
    max_new_tokens: int | None,
    draw: tuple[float, int, float],
    seed: int | Sequence[int],
    adapter: str | Sequence[str | None] | None,
) -> list[Ask]:
    """Check all arguments of `Module.generate_batch` and return what to generate.

    ``draw`` is temperature, `top_k` and `top_p`.

    Raises:
        UsageError: The prompts are no list, or one of them is wrong or too long; names its index.
    """
    decoder = decoder_of(module)
    if isinstance(prompts, str):
        raise UsageError("the prompts are one text", remedy="Pass a list of them, or use generate.")
    if not _is_list(prompts):
        raise UsageError(
            f"the prompts are of type {type(prompts).__name__}",
            remedy="Pass a list of texts, or of token ids of each.",
        )
    seeds = for_each(seed, len(prompts), "seed")
    adapters = for_each(adapter, len(prompts), "adapter")
    out = []
    for index, prompt in enumerate(prompts):
        try:
            sampling = Sampling(*draw, seeds[index])
            adapter_index(module, adapters[index])
            ids = encode(module, prompt)
            count = new_tokens(decoder, len(ids), max_new_tokens)
        except MimoError as error:
            error.where = error.where or f"prompt {index}"
            raise
        out.append(Ask(index, ids, count, sampling, adapters[index]))
    return out


def generate_ids(
    module: Module, asks: Sequence[Ask], stop_at_eos: bool, stats: Stats | None
) -> Iterator[tuple[int, int]]:
    """Return pairs of index and id; see `Module.generate_batch`."""
    return _generate(module, asks, stop_at_eos, stats or Stats())


def generate_text(
    module: Module, asks: Sequence[Ask], stop_at_eos: bool, stats: Stats | None
) -> Iterator[tuple[int, str]]:
    """Return pairs of index and piece of text; see `Module.generate_batch`."""
    streams = [TextStream(module.tokenizer, ask.ids.tolist()) for ask in asks]
    tokens = _generate(module, asks, stop_at_eos, stats or Stats())
    pieces = ((index, streams[index].add(token)) for index, token in tokens)
    return ((index, piece) for index, piece in pieces if piece)


def _generate(
    module: Module, asks: Sequence[Ask], stop_at_eos: bool, stats: Stats
) -> Iterator[tuple[int, int]]:
    eos = frozenset(decoder_of(module).eos) if stop_at_eos else frozenset()
    stats.begin(sum(len(ask.ids) for ask in asks), sequences=0)
    stats.joules_reason = "several texts share each pass over the weights"
    waiting = deque(ask for ask in asks if ask.count)
    free = deque(range(min(module.batch, len(waiting))))
    for slot in free:
        module.vacate(slot)
    running: list[_Running] = []
    ends, room = set(), _Room(module)
    try:
        while waiting or running:
            if waiting and free and (not running or room.fits(waiting[0], running)):
                running.append(_begin(module, waiting.popleft(), free.popleft(), running, stats))
                turn = running[-1:]
            else:
                for one in _set_aside(module, running):
                    running.remove(one)
                    free.append(one.session.slot)
                    waiting.appendleft(_again(one))
                _advance(module, running, stats)
                turn = list(running)
            for one in turn:
                end = "eos" if one.token in eos else ""
                if not end:
                    one.made += 1
                    stats.new_tokens += 1
                    stats.sequences += one.made == 1
                    yield one.ask.index, one.token
                    end = "length" if one.made == one.ask.count else ""
                if end:
                    ends.add(end)
                    running.remove(one)
                    one.session.end()
                    free.append(one.session.slot)
    finally:  # nobody else knows these sequences
        for one in running:
            one.session.end()
    stats.stopped = "eos" if ends == {"eos"} else "length"


def _like(module: Module, ask: Ask, running: Sequence[_Running]) -> tuple[int, Session | None]:
    """Return how many tokens a text has in common with one in progress, a page at least, and that one."""
    if module.pool is None:
        return 0, None
    mine = _prompt(module, ask)
    found = [(r.session.prefix(mine), r) for r in running if r.ask.adapter == ask.adapter]
    kept, like = max(found, key=lambda pair: pair[0], default=(0, None))
    return (0, None) if like is None or kept < module.pool.page else (kept, like.session)


class _Room:
    """Says whether there are pages for a prompt that waits; it compares texts only where that can matter."""

    def __init__(self, module: Module) -> None:
        self._module = module
        self._seen: tuple[Any, ...] = ()
        self._shared = 0  # pages that it was found to have in common with one of those texts

    def fits(self, ask: Ask, running: Sequence[_Running]) -> bool:
        """Say whether there are pages for a prompt and its first token, and one for each text in progress."""
        pool = self._module.pool
        if pool is None:
            return True
        if pool.free <= len(running):  # a prompt's last token is in no page of another text
            return False
        needed = pool.pages_of(len(ask.ids) + 1) + len(running)
        if needed <= pool.free:
            return True
        seen = (ask.index, ask.made, *(one.session for one in running))
        # rings forget as texts go on: what was found to be shared may have become less
        if seen != self._seen or needed - self._shared <= pool.free:
            self._seen, self._shared = seen, _like(self._module, ask, running)[0] // pool.page
        return needed - self._shared <= pool.free


def _set_aside(module: Module, running: Sequence[_Running]) -> list[_Running]:
    """End the newest texts whose pages the others need for their next tokens, and return them."""
    pool, kept = module.pool, list(running)
    out: list[_Running] = []
    if pool is None:
        return out
    with module.lock:
        rerun = decoder_of(module).rerun
        while len(kept) > 1 and pool.needed([r.session.wanted(1, rerun) for r in kept]) > pool.free:
            out.append(kept.pop())
            out[-1].session.end()
    return out


def _again(one: _Running) -> Ask:
    """Return what goes on with a text from its beginning: its prompt is all that was given."""
    ids = np.array([*one.session.tokens, one.token], np.int32)
    return replace(one.ask, ids=ids, made=one.made)


def _prompt(module: Module, ask: Ask) -> Array:
    """Return what of a text is read as a prompt: what was given; all, where tokens are decoded as it is."""
    made = ask.made if decoder_of(module).decode else 0
    return ask.ids[: len(ask.ids) - made]


def _read(module: Module, session: Session, ask: Ask) -> Array:
    """Append what a sequence does not hold yet of a text; returns the last hidden state.

    Tokens that it made before it was set aside attend as they did then.
    """
    prompt = _prompt(module, ask)
    hidden = session.append(prompt[session.position :])
    rest = ask.ids[len(prompt) :]
    return session.append(rest, decode=True) if len(rest) else hidden


def _begin(
    module: Module, ask: Ask, slot: int, running: Sequence[_Running], stats: Stats
) -> _Running:
    """Read a prompt into a slot, but for what a text in progress has read of it; returns it with a token."""
    begin = time.perf_counter()
    with module.lock:
        kept, like = _like(module, ask, running)
        session = module.session(ask.adapter, slot) if like is None else like.fork(slot)
        try:
            session.rewind(kept)
            (logits,) = session.logits(_read(module, session, ask))
        except BaseException:
            session.end()
            raise
        token = sample(logits[0], ask.sampling, session.position)
    seconds = time.perf_counter() - begin
    if ask.made:  # read again, for a token that is not its first
        stats.decode_seconds += seconds
    else:
        stats.reused_tokens += kept
        stats.prefill_seconds += seconds
    return _Running(ask, session, token, ask.made)


def _advance(module: Module, running: Sequence[_Running], stats: Stats) -> None:
    """Append the newest token of each text and draw the next one."""
    begin = time.perf_counter()
    with module.lock:
        hidden = append_each(module, [r.session for r in running], [r.token for r in running])
        done = 0
        for logits in running[0].session.logits(hidden):
            for row in logits:
                one = running[done]
                one.token = sample(row, one.ask.sampling, one.session.position)
                done += 1
    stats.decode_seconds += time.perf_counter() - begin
