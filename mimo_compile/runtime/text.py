"""Turns token ids into text as they come, without ever cutting through a character."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

_CONTEXT = 8  # tokens kept to decode the next one in context (leading spaces depend on it)
_WINDOW = 32
_BROKEN = "\ufffd"  # what decoders put in the place of bytes that are no UTF-8


class TextStream:
    """Decodes a growing sequence of ids.

    What the decoder makes of a window of ids may only change at its end while ids are added: a
    last character that is incomplete shows as U+FFFD. So all of a window's text but a U+FFFD at
    its end is final.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        """Begin after the ids `before`, whose text is not given out again."""
        self._tokenizer = tokenizer
        self._ids = list(before[-_CONTEXT:])
        self._given = len(self._decode())

    def _decode(self) -> str:
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return text

    def add(self, token: int) -> str:
        """Add one id and return the text that is final now, often none."""
        self._ids.append(token)
        text = self._decode()
        final = len(text) - text.endswith(_BROKEN)
        piece = text[self._given : final]
        self._given = max(self._given, final)
        if len(self._ids) > _WINDOW and final == len(text):
            self._ids = self._ids[-_CONTEXT:]
            self._given = len(self._decode())
        return piece

    def pieces(self, tokens: Iterator[int]) -> Iterator[str]:
        """Give out the text of all tokens in pieces; an incomplete character at the end is left out."""
        for token in tokens:
            piece = self.add(token)
            if piece:
                yield piece
