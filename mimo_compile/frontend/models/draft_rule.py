"""How the draft layers of a family are stored, and what they join."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DraftRule:
    """What differs between families whose draft layers read a hidden state of the model and a token."""

    prefix: str = "model.mtp.layers."
    """How the names of their tensors begin, before the layer's number."""
    hidden_first: bool = False
    """The hidden state stands before the token's embedding where they are joined; else behind it."""
    normed: bool = False
    """The hidden state is the one after the model's final norm; else before."""
    blank_first: bool = False
    """The embedding that position 0 reads is zero."""

    @property
    def norms(self) -> tuple[str, str]:
        """Keys of the norms of both halves of what is joined, in the order of its columns."""
        return ("hnorm", "enorm") if self.hidden_first else ("enorm", "hnorm")
