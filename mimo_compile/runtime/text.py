"""Turns token ids into text as they come, without ever cutting through a character."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

_CONTEXT = range(8, 12)  # tokens kept to decode the next one in context (leading spaces need it)
_WINDOW = 32
_PATIENCE = 128  # tokens after which even garbage is given out
_BROKEN = "\ufffd"  # what decoders put in the place of bytes that are no UTF-8


class TextStream:
    """Decodes a growing sequence of ids.

    What the decoder makes of a window of ids may only change at its end while ids are added: the
    bytes of an incomplete character show as one U+FFFD or several. So all of a window's text but
    the U+FFFD at its end is final.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        """Begin after the ids `before`, whose text is not given out again."""
        self._tokenizer = tokenizer
        self._ids = list(before)
        self._given = 0
        self._forget(always=True)

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def add(self, token: int) -> str:
        """Add one id and return the text that is final now, often none."""
        self._ids.append(token)
        text = self._decode(self._ids)
        final = len(text) if len(self._ids) > _PATIENCE else len(text.rstrip(_BROKEN))
        piece = text[self._given : final]
        self._given = max(self._given, final)
        if len(self._ids) > _WINDOW and final == len(text):
            self._forget(always=len(self._ids) > _PATIENCE)
        return piece

    def _forget(self, *, always: bool) -> None:
        """Keep only the last ids, cut where no character is; all of their text counts as given."""
        for count in _CONTEXT:
            text = self._decode(self._ids[-count:])
            if _BROKEN not in text:
                self._ids, self._given = self._ids[-count:], len(text)
                return
        if always:
            self._ids, self._given = self._ids[-count:], len(text)

    def pieces(self, tokens: Iterator[int]) -> Iterator[str]:
        """Give out the text of tokens in pieces; an incomplete character at the end is left out."""
        for token in tokens:
            piece = self.add(token)
            if piece:
                yield piece
