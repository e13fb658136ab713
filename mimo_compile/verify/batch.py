"""Several sequences decoded together beside eager torch, which runs each of them alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mimo_compile.runtime.batch import append_each
from mimo_compile.runtime.module import Module
from mimo_compile.verify.end_to_end import compare_rows, logits_bound, policy_of, with_choices
from mimo_compile.verify.found import EndToEnd

if TYPE_CHECKING:
    from mimo_compile.frontend.models.decoder import Decoder

_SEQUENCES, _DECODED = 4, 8
"""How many sequences are compared at most, and tokens of each that are decoded together."""


def compare_batch(module: Module, eager: Decoder, ids: npt.NDArray[Any]) -> EndToEnd:
    """Compare the logits of tokens that are decoded together, after prompts of different lengths.

    Sequences take the first slot, the last one and others between; each has the tokens in another order,
    and rests in turns of its own. The eager model is led where roundings choose other experts, see `routing`,
    and rounds where kernels do, see `rounding`.

    Args:
        module: Compiled for several sequences.
        eager: The model in torch.
        ids: `[n]` tokens, n at least 2.
    """
    from mimo_compile.verify.rounding import Rounded
    from mimo_compile.verify.routing import Led, watched

    slots = slots_of(module.batch, ids)
    if module.pool is not None:  # all of them together
        ids = ids[: module.pool.pages // len(slots) * module.pool.page]
    count, decoded = len(slots), min(_DECODED, len(ids) - 1)
    prompts = prompts_of(count, len(ids), decoded, period_of(module))
    texts = [
        [int(t) for t in np.roll(ids, 7 * i)[: prompt + decoded]]
        for i, prompt in enumerate(prompts)
    ]
    bound = logits_bound(module.manifest)
    with watched(module, slots) as seen:
        got, together = _compiled(module, texts, slots, decoded)
    rows, leads = [], []
    for text, slot, positions in zip(texts, slots, together, strict=True):
        leads.append(Led(seen, bound.nearly_all, slot))
        with Rounded(module.manifest, positions), leads[-1] if seen else nullcontext():
            rows.append(_eager(eager, text, len(text) - decoded))
    found = compare_rows(got, np.concatenate(rows), bound, decoded=len(got))
    return with_choices(found, leads)


def period_of(module: Module) -> int:
    """Return after how many positions something of a sequence is complete: a group, a page or a block."""
    assert module.manifest.decoder is not None
    group = max((layer.group for layer in module.manifest.decoder.layers), default=0)
    page = module.pool.page if module.pool is not None else 0
    return max(group, page, policy_of(module.manifest).block)


def prompts_of(count: int, tokens: int, decoded: int, period: int) -> list[int]:
    """Return the lengths of prompts.

    Where tokens suffice, each ends such that one of those that are decoded completes a period, a different
    one in each sequence, and a further token reads what that left.

    Args:
        count: Sequences.
        tokens: Of the longest sequence, ``decoded`` among them.
        decoded: Tokens of each that are decoded.
        period: See `period_of`.
    """
    out = []
    for i in range(count):
        prompt = max(1, (tokens - decoded) * (i + 1) // count)
        end = period * min(max(1, round(prompt / period)), (tokens - 1) // period)
        if period > 1 and decoded > 1 and end:
            prompt = max(1, min(end - 1 - i % (decoded - 1), tokens - decoded))
        out.append(prompt)
    return out


def slots_of(batch: int, ids: npt.NDArray[Any]) -> list[int]:
    """Return the slots to compare: the first, the last and, of many between, those that the tokens draw."""
    if batch <= _SEQUENCES:
        return list(range(batch))
    rng = np.random.default_rng(np.abs(ids))
    between = rng.choice(np.arange(1, batch - 1), _SEQUENCES - 2, replace=False)
    return [0, *sorted(between.tolist()), batch - 1]


def turns_of(count: int, decoded: int) -> Iterator[list[int]]:
    """Give the sequences that get a token, turn by turn, until each of them has ``decoded``.

    First all do; then one after the other rests. The first sequence rests from the middle on, until the
    others have ended, and goes on by itself: what is read then are states that batches had to leave alone.
    """
    left = [decoded] * count
    turn = 0
    while any(left):
        resting = {turn % (count + 1) - 1}
        if 2 * left[0] <= decoded and any(left[1:]) and turn:
            resting.add(0)
        going = [i for i in range(count) if left[i] and i not in resting]
        for i in going:
            left[i] -= 1
        turn += 1
        if going:
            yield going


def _compiled(
    module: Module, texts: list[list[int]], slots: list[int], decoded: int
) -> tuple[Any, list[set[int]]]:
    """Return the logits float64 of the last tokens of each text, one text after the other.

    And the positions of those of each text that were decoded together with others.
    """
    sessions = [module.session(slot=slot) for slot in slots]
    for session, text in zip(sessions, texts, strict=True):
        session.append(text[:-decoded])
    rows: list[list[Any]] = [[] for _ in texts]
    together: list[set[int]] = [set() for _ in texts]
    for going in turns_of(len(texts), decoded):
        tokens = [texts[i][len(rows[i]) - decoded] for i in going]
        hidden = append_each(module, [sessions[i] for i in going], tokens)
        found = np.concatenate([part.copy() for part in sessions[0].logits(hidden)])
        for i, row in zip(going, found, strict=True):
            if len(going) > 1:
                together[i].add(len(texts[i]) - decoded + len(rows[i]))
            rows[i].append(row)
    for session in sessions:
        session.end()
    return np.concatenate(rows).astype(np.float64), together


def _eager(eager: Decoder, text: list[int], prompt: int) -> Any:
    """Return the logits float64 of the tokens behind a prompt."""
    eager.prefill(text[:prompt])
    rows = [eager.decode(text[: at + 1], prompt).numpy() for at in range(prompt, len(text))]
    return np.concatenate(rows).astype(np.float64)
