"""A sequence of tokens in a decoder's states: it grows, goes back, and tells what comes next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mimo_compile.errors import UsageError
from mimo_compile.runtime.arguments import Array, adapter_index, check_ids, decoder_of, whole
from mimo_compile.runtime.drafting import Drafts
from mimo_compile.runtime.pages import Want, taken
from mimo_compile.runtime.rollback import Held
from mimo_compile.runtime.steps import plan_steps

if TYPE_CHECKING:
    from mimo_compile.runtime.module import Module


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
        self.drafts: Drafts | None = None
        """What draft heads hold of it, once it drafts (`draft`)."""

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
        hold the module's ``lock`` until you are done with them, also where others may take the pages that
        later steps need.

        Raises:
            UsageError: As `append`; or between two steps the sequence changed or others took pages, then it
                holds the tokens of the steps before.
        """
        decoder = self._decoder
        tokens = check_ids(ids, decoder)
        end = self.position + len(tokens)
        self._check_room(end)
        apart = decode and bool(decoder.decode)
        # rings hold one step more than the window: later they have forgotten too much
        least = decoder.rerun if apart else 1
        if self._module.pool is not None:
            self._check_alive()
            self._module.pool.check([self.wanted(len(tokens), least)])
        sizes, kind = (decoder.decode, "decode") if apart else (decoder.steps, "step")
        done, mark = 0, self.mark
        for count in plan_steps(len(tokens), sizes, decoder.max_context - end):
            valid = min(count, len(tokens) - done)
            part = tokens[done : done + valid]
            with self.lock:
                self.check_mark(mark)
                self.make_exact(least)
                if self.drafts is not None:
                    self.drafts.prepare(self._tokens, valid)
                hidden = self._step(f"{kind}_{count}", part, self.position)
                self.took(part.tolist(), decoded=apart)
                if self.drafts is not None:
                    states = self._entry(f"{kind}_{count}").outputs["prenorm"]
                    self.drafts.read(states[:valid], self._tokens)
                mark = self.mark
            done += valid
            yield hidden
            if apart:
                self.make_exact(decoder.rerun)

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

    def wanted(self, count: int, least: int) -> Want:
        """Return what is written while so many tokens are appended.

        Those that `make_exact` runs again before or after one of them are among it.
        """
        end = self.position + count
        again = self._decoder.rerun and end - self._exact >= least
        return self.slot, self._exact if again else self.position, end

    def took(self, tokens: Sequence[int], *, decoded: bool = False) -> None:
        """Note tokens that an entry has appended to the states.

        ``decoded``: by an entry in which they attend to less than those of a prompt.
        """
        at = self.position
        self._tokens += tokens
        self._held.append(self.position)
        if self._exact == at and not decoded:
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
        with taken(self._module.pool, [(self.slot, at, at + len(tokens))]):
            bound.run()
        hidden: Array = bound.outputs["hidden"][: len(tokens)]
        return hidden

    def make_exact(self, least: int) -> None:
        """Run generated tokens again as if they had been a prompt, where there are so many.

        Only under a policy that says so (the artifact's ``rerun``).
        """
        with self.lock:
            end = self.position
            if not self._decoder.rerun or end - self._exact < least:
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
            if self._module.pool is not None:
                self._module.pool.cut(self.slot, position)
            self._turn += 1
            del self._tokens[position:]
            self._exact = min(self._exact, position)
            if self.drafts is not None:
                self.drafts.drop(position)

    def reject(self, position: int) -> None:
        """Drop drafts from a position on: `rewind`, of which those who take notes are told."""
        with self.lock:
            self.rewind(position)
            for told in self._module.rejected:
                told(self.slot, position)

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
        with self.lock:
            kept = self.prefix(ids)
            self.rewind(kept)
            return kept if self.drafts is None else self._with_drafts(kept, self.drafts)

    def prefix(self, ids: Sequence[int] | Array) -> int:
        """Return how many tokens `keep_prefix` would keep."""
        wanted = check_ids(ids, self._decoder)
        with self.lock:
            most = min(self.position, len(wanted) - 1, self._exact)
            held = np.array(self._tokens[: max(most, 0)], np.int32)
            differ = np.flatnonzero(held != wanted[: len(held)])
            return self._held.most(int(differ[0]) if len(differ) else len(held))

    def fork(self, slot: int) -> Session:
        """Begin another sequence with the same tokens in another slot; it ends the one there.

        Both have their pages together until one of them changes what is in one; what layers keep besides,
        such as rings of windows, is copied. So an equal beginning of texts is computed and kept once.

        Args:
            slot: One of the other places for sequences of the module.

        Raises:
            UsageError: The artifact has no pages (`--pages`), there is no such slot or it is this one, or the
                session has ended.
        """
        with self.lock:
            self._check_alive()
            pool = self._module.pool
            if pool is None:
                raise UsageError(
                    "sequences of this artifact share nothing: it has no pages",
                    remedy="Compile it with --pages.",
                )
            if slot == self.slot:
                raise UsageError(f"slot {slot} is that of the sequence itself")
            made = self._module.session(self.adapter, slot)
            pool.share(self.slot, made.slot, self.position)
            made._tokens, made._exact = list(self._tokens), self._exact
            made._held = self._held.copy()
            if self.drafts is not None:
                made.drafts = self.drafts.copy(made._entry)
            return made

    def end(self) -> None:
        """End the sequence, whose pages are free then, if it has not ended already."""
        with self.lock:
            if self._module.owns(self._number):
                self._module.vacate(self.slot)

    def _with_drafts(self, kept: int, drafts: Drafts) -> int:
        """Go back as far as draft heads need tokens to come again; returns how many are kept."""
        needed = drafts.needed(kept)
        if needed < kept:
            rows = drafts.rows  # what is dropped now comes again
            kept = self._held.most(needed)
            self.rewind(kept)
            drafts.trust(rows)
        return kept

    def propose(
        self, token: int, depth: int, pick: Callable[[Array, int], int | None]
    ) -> tuple[list[int], list[float]]:
        """Return up to ``depth`` drafts of what follows a token that is about to be appended.

        The sequence must draft (`draft`), and hold what it read as a prompt since. See `Drafts.propose`.
        """
        assert self.drafts is not None
        with self.lock:
            self._check_alive()
            return self.drafts.propose(self._tokens, token, depth, pick)

    def draft(self) -> None:
        """Begin to keep what draft heads need; `keep_prefix` makes up for tokens that are there already."""
        if self.drafts is None:
            self.drafts = Drafts(self._decoder, self._entry)

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
                "this sequence has ended: it was ended, or another one began on the same module",
                remedy="Load the artifact twice, or compile it with --batch 2, for two texts at a time."
                if self._module.batch == 1
                else f"Begin each in a slot of its own, of which there are {self._module.batch}; generate "
                "begins in slot 0, generate_batch in as many as it has texts.",
            )
