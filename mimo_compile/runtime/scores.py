"""Scores given text: the log-probability of each token, from which perplexity follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mimo_compile.errors import UsageError
from mimo_compile.runtime.arguments import check_ids, decoder_of

if TYPE_CHECKING:
    from mimo_compile.runtime.module import Module


def token_logprobs(
    module: Module, ids: Sequence[int] | npt.NDArray[Any], adapter: str | None = None
) -> npt.NDArray[np.float64]:
    """Return the log-probabilities of all tokens but the first; see `Module.token_logprobs`."""
    tokens = check_ids(ids, decoder_of(module))
    if len(tokens) < 2:
        raise UsageError(f"{len(tokens)} tokens are too few to score: the first has no score")
    found: list[npt.NDArray[np.float64]] = []
    at = 1
    with module.lock:
        session = module.session(adapter)
        try:
            # nothing is asked of the last token's logits, but its step belongs to the sequence
            for hidden in session.chunks(tokens):
                for logits in session.logits(hidden.copy()):
                    targets = tokens[at : at + len(logits)]
                    found.append(log_softmax_at(logits[: len(targets)], targets))
                    at += len(logits)
        finally:
            session.end()
    return np.concatenate(found)


def log_softmax_at(
    logits: npt.NDArray[Any], targets: npt.NDArray[np.int32]
) -> npt.NDArray[np.float64]:
    """Return `log_softmax(logits)[i, targets[i]]` in float64.

    Args:
        logits: `[n, V]`.
        targets: `[n]`.
    """
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    chosen = wide[np.arange(len(targets)), targets]
    return np.asarray(chosen - np.log(np.exp(wide).sum(axis=1)))
