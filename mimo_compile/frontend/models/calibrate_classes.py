"""Classes of layers for `tailorkv`, from how spread their attention is on a text.

As TailorKV describes it: the attention of the last 32 tokens of a sequence, each head's weights of each token
by itself; the mass outside of the best 5 % of the keys, averaged. Here tokens do not see those behind them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mimo_compile.errors import UsageError
from mimo_compile.frontend.models.attend import Attending, Lists, dense
from mimo_compile.frontend.models.calibrate_thresholds import Text, measure, read_text
from mimo_compile.frontend.models.classes import Classes
from mimo_compile.frontend.models.retrieving import Retrieving
from mimo_compile.ir.ops.score_keys import dots
from mimo_compile.ir.policies.tailorkv import TailorKV, mass_outside

if TYPE_CHECKING:
    from mimo_compile.frontend.huggingface import LoadedModel
    from mimo_compile.frontend.models.stages import LayerCore

QUERIES = 32
"""Last tokens of a sequence whose attention is looked at."""


@dataclass
class Watching(Attending):
    """Attends to everything, and notes how much lies outside of the best keys at the end of sequences."""

    length: int
    """Of a sequence: a multiple of `QUERIES`, as steps of prompts are, so that one call has all of them."""
    found: list[float] = field(default_factory=list)
    """Of each sequence."""

    def __call__(
        self, layer: LayerCore, q: Tensor, pos: Tensor, lists: Lists | None
    ) -> tuple[Tensor, Lists | None]:
        """Attend densely; look at the call that ends a sequence."""
        end = int(pos.sum())
        if end == self.length:
            self.found.append(mass_outside(weights(layer, q[-QUERIES:], end).numpy()))
        return dense(layer, q, pos), None


def weights(layer: LayerCore, q: Tensor, end: int) -> Tensor:
    """Return the attention weights float64 ``[H, n, end]`` of the last queries ``[n, H, D]``."""
    keys = layer.k_cache[:end].double()
    logits = dots(q.double(), keys).transpose(0, 1) * layer.spec.d**-0.5
    seen = torch.arange(end) <= torch.arange(end - len(q), end)[:, None]
    logits = logits.masked_fill(~seen, float("-inf"))
    if layer.attention.sink is None:
        return torch.softmax(logits, -1)
    sink = layer.attention.sink.double()[:, None, None].expand(-1, len(q), 1)
    return torch.softmax(torch.cat([logits, sink], -1), -1)[..., :-1]


@torch.no_grad()
def calibrate_classes(
    loaded: LoadedModel, text: Text, log: Callable[[str], None] = lambda line: None
) -> Classes:
    """Find how spread the attention of each layer is, of a model that was loaded under `tailorkv`.

    Args:
        loaded: The model, none of whose layers is quantised.
        text: What to calibrate on.
        log: Told what goes on.

    Raises:
        UsageError: the policy is another one, layers are quantised already, or sequences are too short.
        InputError: there is no tokenizer, or no such text.
    """
    decoder = loaded.decoder
    config, policy = decoder.config, decoder.config.attention
    if not isinstance(policy, TailorKV) or any(role.kind == "quantised" for role in config.roles):
        raise UsageError(
            f"--attention {policy} has no classes to find", remedy="use --attention tailorkv"
        )
    length = min(text.length, config.max_context) // QUERIES * QUERIES
    if length <= QUERIES:
        raise UsageError(
            f"sequences of {length} tokens hold nothing before the last {QUERIES}, which are looked at",
            remedy="take longer sequences (--length, --max-context)",
        )
    ids, record = read_text(loaded, text, length, "classes", log)
    found = measure(decoder, ids, Retrieving, lambda _: Watching(length), log)
    return Classes(config.name, {i: fmean(w.found) for i, w in found.items()}, record)
