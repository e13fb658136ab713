"""Several sequences decoded together beside eager torch, which runs each of them alone."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mimo_compile.runtime.batch import append_each
from mimo_compile.runtime.module import Module
from mimo_compile.verify.end_to_end import compare_rows, logits_bound
from mimo_compile.verify.found import EndToEnd

if TYPE_CHECKING:
    from mimo_compile.frontend.models.decoder import Decoder

_SEQUENCES, _DECODED = 4, 8
"""How many sequences are compared at most, and tokens of each that are decoded together."""


def compare_batch(module: Module, eager: Decoder, ids: npt.NDArray[Any]) -> EndToEnd:
    """Compare the logits of tokens that are decoded together, after prompts of different lengths.

    Sequences take the first and the last slots; each has the tokens in another order. The eager model is led
    where roundings choose other experts, see `routing`.
    """
    from mimo_compile.verify.routing import Led, watched

    count, decoded = min(module.batch, _SEQUENCES), min(_DECODED, len(ids) - 1)
    slots = [*range(count // 2), *range(module.batch - (count - count // 2), module.batch)]
    prompts = [max(1, (len(ids) - decoded) * (i + 1) // count) for i in range(count)]
    texts = [
        [int(t) for t in np.roll(ids, 7 * i)[: prompt + decoded]]
        for i, prompt in enumerate(prompts)
    ]
    bound = logits_bound(module.manifest)
    with watched(module) as seen:
        got = _compiled(module, texts, slots, decoded)
    rows, leads = [], []
    for text, slot in zip(texts, slots, strict=True):
        leads.append(Led(seen, bound.nearly_all, slot))
        with leads[-1] if seen else nullcontext():
            rows.append(_eager(eager, text, len(text) - decoded))
    found = compare_rows(got, np.concatenate(rows), bound, decoded=len(got))
    return replace(
        found, choices=sum(led.choices for led in leads), followed=sum(led.followed for led in leads),
        strayed=sum(led.strayed for led in leads),
    )  # fmt: skip


def _compiled(module: Module, texts: list[list[int]], slots: list[int], decoded: int) -> Any:
    """Return the logits float64 of the last tokens of each text, one text after the other."""
    sessions = [module.session(slot=slot) for slot in slots]
    for session, text in zip(sessions, texts, strict=True):
        session.append(text[:-decoded])
    turns = []
    for turn in range(decoded):
        hidden = append_each(module, sessions, [text[turn - decoded] for text in texts])
        turns.append(np.concatenate([rows.copy() for rows in sessions[0].logits(hidden)]))
    return np.stack(turns, axis=1).reshape(len(texts) * decoded, -1).astype(np.float64)


def _eager(eager: Decoder, text: list[int], prompt: int) -> Any:
    """Return the logits float64 of the tokens behind a prompt."""
    eager.prefill(text[:prompt])
    rows = [eager.decode(text[: at + 1], prompt).numpy() for at in range(prompt, len(text))]
    return np.concatenate(rows).astype(np.float64)
