"""What callers give a decoder: token ids, adapters and numbers, checked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from operator import index
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mimo_compile.errors import UsageError
from mimo_compile.runtime.program import Decoder, Entry

if TYPE_CHECKING:
    from mimo_compile.runtime.module import Module

Array = npt.NDArray[Any]


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


def check_direct(module: Module, name: str, program: Entry, inputs: Sequence[Array]) -> None:
    """Check what an entry of a decoder is called with directly, without a session.

    Raises:
        UsageError: It writes into pages, which only sessions take, or positions are outside of the context.
    """
    decoder = module.manifest.decoder
    if decoder is None:
        return
    used = {buffer.source for buffer in program.buffers if buffer.kind == "state"}
    if decoder.pool is not None and used.intersection((decoder.pool.table, *decoder.pool.states)):
        raise UsageError(
            f"{name} of {module.manifest.name} works on pages, which only sessions take and give back",
            remedy="Begin a session and append to it.",
        )
    found = re.fullmatch(r"(?:step|decode|batch|mtp[0-9]+)_([0-9]+)", name)
    if found is None:
        return
    most = 1 if name.startswith("batch") else int(found[1])
    places = inputs[2 if name.startswith("mtp") else 1].reshape(-1, 2).astype(np.int64)
    for start, valid in places.tolist():
        if not 0 <= valid <= most or not 0 <= start <= decoder.max_context - valid:
            raise UsageError(
                f"pos of {name} says {valid} tokens from position {start} on: it takes 0 to {most}, within "
                f"the context of {decoder.max_context}"
            )
