"""Thresholds of `sale` for each layer and query head, from what they would leave out on a text.

As SALE describes it: a head's threshold starts at ``tau`` and is halved as long as the L1 error of its
output, summed over its channels and averaged over tokens, is ``theta`` or more; from 1e-4 on the head stays
dense.
Every layer is judged on dense attention before it, and all thresholds in one pass over the text.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from mimo_compile.errors import InputError, UsageError
from mimo_compile.frontend.models.attend import Attending, Lists, dense
from mimo_compile.frontend.models.decoder import STEP_TOKENS, Decoder
from mimo_compile.frontend.models.estimate import Estimating, scores
from mimo_compile.frontend.models.thresholds import Thresholds
from mimo_compile.ir.ops.block_lists import blocks_of
from mimo_compile.ir.ops.select_blocks import frame
from mimo_compile.ir.policies.sale import Sale
from mimo_compile.quantize.calibration import Calibration, describe, fingerprint, token_sequences

if TYPE_CHECKING:
    from mimo_compile.frontend.huggingface import LoadedModel
    from mimo_compile.frontend.models.stages import LayerCore

M = TypeVar("M", bound=Attending)

DENSE = 1e-4
"""Thresholds at or below it are 0: the head stays dense."""
SEQUENCES, LENGTH = 4, 4096
"""How much text is used unless said otherwise; a sequence is at most the context."""


@dataclass(frozen=True, slots=True)
class Text:
    """What to calibrate on."""

    file: Path | None = None
    """None: sources of the standard library that the built-in model was not judged on."""
    sequences: int = SEQUENCES
    length: int = LENGTH
    """Tokens of a sequence, at most the context."""
    seed: int = 0
    """Decides which parts of the text are taken."""


def ladder(tau: float) -> tuple[float, ...]:
    """Return the thresholds that are tried: ``tau`` and its halves above `DENSE`, the largest first."""
    out = []
    while tau > DENSE:
        out.append(tau)
        tau /= 2
    return tuple(out)


@dataclass
class Measuring(Attending):
    """Attends to everything, and adds up what each threshold would change."""

    policy: Sale
    taus: tuple[float, ...]
    error: Tensor = field(default_factory=lambda: torch.zeros(0))
    """float64 ``[H, thresholds]``: L1 errors, summed over channels and tokens."""
    kept: Tensor = field(default_factory=lambda: torch.zeros(0))
    """Likewise: blocks that were chosen."""
    tokens: int = 0
    blocks: int = 0
    """Tokens that were judged, causal blocks of their tiles."""

    def __call__(
        self, layer: LayerCore, q: Tensor, pos: Tensor, lists: Lists | None
    ) -> tuple[Tensor, Lists | None]:
        """Attend densely, and measure calls in which the policy would choose."""
        start, valid = pos.tolist()
        if valid == q.shape[0] >= self.policy.rows and start + valid > self.policy.least:
            self._measure(layer, q, pos)
        return dense(layer, q, pos), None

    def _measure(self, layer: LayerCore, q: Tensor, pos: Tensor) -> None:
        p, spec = self.policy, layer.spec
        (start, count), end = pos.tolist(), int(pos.sum())
        score = scores(p, q, layer.k_cache, pos, spec.d**-0.5)[..., : blocks_of(end, p.bk)]
        rule, tiles = p.select, score.shape[0]
        causal, forced = frame(pos, tiles, p.bq, score.shape[2], p.bk, rule.first, rule.last)
        if not len(self.error):
            self.error = torch.zeros(spec.heads, len(self.taus), dtype=torch.float64)
            self.kept = torch.zeros_like(self.error)
        self.tokens += count
        self.blocks += int(causal.sum())
        seen = torch.arange(end) <= torch.arange(start, end)[:, None]
        for head in range(spec.heads):
            own = head * spec.kv_heads // spec.heads
            keys = layer.k_cache[:end, own].to(torch.float32)
            values = layer.v_cache[:end, own].to(torch.float32)
            logits = (q[:, head] @ keys.T * spec.d**-0.5).masked_fill(~seen, float("-inf"))
            top = logits.amax(-1, keepdim=True)
            extra = torch.zeros_like(top)
            if layer.attention.sink is not None:
                sink = layer.attention.sink[head]
                top = torch.maximum(top, sink)
                extra = torch.exp(sink - top)
            weights = torch.exp(logits - top)
            whole = weights @ values / (weights.sum(-1, keepdim=True) + extra)
            for at, tau in enumerate(self.taus):
                chosen = (forced | (score[:, head] >= tau)) & causal
                self.kept[head, at] += int(chosen.sum())
                rows = chosen.repeat_interleave(p.bk, 1)[:, :end]
                part = weights * rows.repeat_interleave(p.bq, 0)[:count]
                out = part @ values / (part.sum(-1, keepdim=True) + extra)
                self.error[head, at] += float((whole - out).abs().sum(dtype=torch.float64))

    def choose(self, theta: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return each head's threshold, and the share of the causal blocks that it keeps."""
        taus, shares = [], []
        for errors, kept in zip(self.error / self.tokens, self.kept / self.blocks, strict=True):
            fits = [at for at, error in enumerate(errors.tolist()) if error < theta]
            taus.append(self.taus[fits[0]] if fits else 0.0)
            shares.append(float(kept[fits[0]]) if fits else 1.0)
        return tuple(taus), tuple(shares)


@torch.no_grad()
def calibrate_thresholds(
    loaded: LoadedModel, theta: float, text: Text, log: Callable[[str], None] = lambda line: None
) -> Thresholds:
    """Find the thresholds of a model that was loaded under `sale`.

    Args:
        loaded: The model.
        theta: L1 error of a head's output that is allowed for each token.
        text: What to calibrate on.
        log: Told what goes on.

    Raises:
        UsageError: the policy is another one, or attends to all of sequences so short.
        InputError: there is no tokenizer, or no such text.
    """
    decoder = loaded.decoder
    config, policy = decoder.config, decoder.config.attention
    if not isinstance(policy, Sale):
        raise UsageError(
            f"--attention {policy} has no thresholds to calibrate", remedy="use --attention sale"
        )
    length = min(text.length, config.max_context) // policy.bq * policy.bq
    if length <= policy.sees_all:
        raise UsageError(
            f"nothing is left out of {length} tokens: {policy} attends to all of {policy.sees_all}",
            remedy="take longer sequences (--length, --max-context), or a smaller least=",
        )
    ids, record = read_text(loaded, text, length, "thresholds", log)
    found = measure(decoder, ids, Estimating, lambda _: Measuring(policy, ladder(policy.tau)), log)
    layers, share = {}, {}
    for number, measured in found.items():
        layers[number], share[number] = measured.choose(theta)
    return Thresholds(config.name, str(policy.estimate), theta, layers, share, record)


def read_text(
    loaded: LoadedModel, text: Text, length: int, what: str, log: Callable[[str], None]
) -> tuple[Tensor, dict[str, Any]]:
    """Return the tokens int32 ``[S, length]`` of a text, and what files say of it.

    Raises:
        InputError: there is no tokenizer, or no such text.
    """
    if loaded.tokenizer is None:
        raise InputError(
            f"calibrating {what} needs a tokenizer, and the model has none",
            file="tokenizer.json", remedy="Put tokenizer.json beside the weights",
        )  # fmt: skip
    config = loaded.decoder.config
    how = Calibration(
        "gptq", text=text.file, sequences=text.sequences, length=length, seed=text.seed
    )
    ids = token_sequences(how, loaded.tokenizer, config.vocab, config.hidden, length)
    log(f"{what} on {len(ids)} x {length} tokens: {describe(how)}")
    return ids, {
        "file": "" if text.file is None else text.file.name, "sequences": len(ids),
        "length": length, "seed": text.seed, "sha256": fingerprint(ids),
    }  # fmt: skip


def measure(
    decoder: Decoder, ids: Tensor, kind: type[Attending], make: Callable[[int], M],
    log: Callable[[str], None],
) -> dict[int, M]:  # fmt: skip
    """Read every sequence as a prompt; what ``make`` gives stands in for the attention of layers of a kind.

    Returns:
        What stood in, by the number of its layer.
    """
    begin = time.perf_counter()
    found: dict[int, M] = {}
    for stage in decoder.stages():
        if isinstance(getattr(stage.module, "attend", None), kind):
            number = int(stage.name.partition(".")[2])
            found[number] = stage.module.attend = make(number)  # type: ignore[assignment]
    for number, sequence in enumerate(ids):
        decoder.reset()
        for at in range(0, len(sequence), STEP_TOKENS):
            decoder.forward_step(sequence[at : at + STEP_TOKENS], at)
        log(f"sequence {number + 1} of {len(ids)}")
    log(f"calibration took {time.perf_counter() - begin:.1f} s")
    return found


__all__ = [
    "LENGTH", "SEQUENCES", "Measuring", "Text", "calibrate_thresholds", "ladder", "measure",
    "read_text",
]  # fmt: skip
