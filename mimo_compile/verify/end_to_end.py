"""The whole model, compiled beside eager torch: logits, a program's outputs, perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mimo_compile.errors import ArtifactError, InputError, UsageError, VerificationError
from mimo_compile.ir.formats import parse_act_format, parse_scheme
from mimo_compile.ir.kv_groups import GROUPED
from mimo_compile.ir.policies import AttentionPolicy, parse_policy
from mimo_compile.ir.policies.sale import Sale
from mimo_compile.ir.policies.tailorkv import TailorKV
from mimo_compile.runtime.module import Module
from mimo_compile.runtime.program import Manifest
from mimo_compile.verify.found import EndToEnd, LogitsBound, Perplexity

if TYPE_CHECKING:
    from mimo_compile.frontend.models.decoder import Decoder
    from mimo_compile.verify.routing import Led

ROWS = 96
"""Rows of logits that are compared unless asked otherwise."""
_WINDOW = 512
_DECODED = 8
"""How many rows are decoded at least."""
_MOST_TOKENS = 4096
"""Tokens that are run at most without being asked, to reach where a policy leaves something out."""


def policy_of(manifest: Manifest) -> AttentionPolicy:
    """Return the policy that an artifact's layers follow.

    Raises:
        ArtifactError: this version has none of that name.
    """
    try:
        policy = parse_policy(manifest.attention)
    except UsageError as error:
        raise ArtifactError(
            f"{manifest.name} follows the attention policy {manifest.attention!r}, which this version "
            "does not know",
            remedy="Verify it with the version that compiled it, or compile it again.",
        ) from error
    found = manifest.decoder.layers if manifest.decoder is not None else ()
    layers = [layer for layer in found if layer.name.startswith("layers.")]
    if isinstance(policy, Sale) and policy.thresholds and layers:
        return replace(policy, table=tuple(layer.thresholds for layer in layers))
    if isinstance(policy, TailorKV) and policy.classes and layers:
        return replace(policy, outside=tuple(layer.outside for layer in layers))
    return policy


def logits_bound(manifest: Manifest) -> LogitsBound:
    """Return what logits may differ by.

    Float activations: sums of float32 in another order, 1e-3 of the largest logit. 16-bit ones: a sum that
    is off by one rounding may be rounded the other way, by 2**-8 (bfloat16) or 2**-11 (float16) of it; so may
    a key or value of a bfloat16 cache, whose kernels may round queries and weights too. Where those over
    codes round, the eager model does as well (see `rounding`), but numbers next to a tie may go the other
    way. Int8 activations: a sum that is off by one rounding may fall on the other side of a code's boundary;
    a step is 1/127 of the row's largest value. In a cache of 2 bits that is a third of a code's range, in one
    of 1 bit twice the mean distance from the mean: of normal numbers both are 1.6 standard deviations. What
    16-bit activations put on the other side of such a boundary moves as far: twice as much is allowed there.

    Experts are those of the compiled model where its routers are within the bound (`routing`); a row whose
    router is not may get others, and then differs altogether. Layers that choose what they attend to may
    choose otherwise among blocks whose scores nearly tie: then single rows differ by more. Int8 arithmetic of
    attention rounds as int8 activations do, but averages it.
    """
    scheme = parse_scheme(manifest.quant)
    act = parse_act_format(f"a{scheme.act}")
    layers = manifest.decoder.layers if manifest.decoder is not None else ()
    coarse = scheme.kv in ("1", "2") or any(layer.format in ("i1", "i2") for layer in layers)
    if act.is_int8:
        return LogitsBound(1e-1 if coarse else 5e-2, math.inf)
    codes = any(layer.format in GROUPED for layer in layers)
    if scheme.kv or codes or act.kind == "bf16":
        return LogitsBound(2e-2 if coarse and act.kind == "bf16" else 1e-2, math.inf)
    policy = policy_of(manifest)
    if policy.arithmetic != "float":
        return LogitsBound(1e-2, math.inf)
    each = math.inf if policy.select is not None else 1e-3
    return LogitsBound(2e-3, math.inf) if act.rounded else LogitsBound(1e-3, each)


def compared_tokens(manifest: Manifest, tokens: int | None, notes: list[str]) -> int:
    """Return how many tokens are run; notes where the policy attends to all of them.

    Where positions are quantised in groups, the third group ends among the tokens that are decoded. Where
    estimates go by the magnitudes of spans of keys, two spans are complete before them.
    """
    decoder, policy = manifest.decoder, policy_of(manifest)
    assert decoder is not None
    decoded = max(_DECODED, decoder.rerun + 2)
    span = int(dict(policy.score.options).get("span", 0)) if policy.score is not None else 0
    enough = policy.sees_all + decoded
    if "decode" not in policy.phases:  # the tokens that are decoded leave nothing out
        enough += decoder.steps[-1]
    enough = max(enough if policy.sees_all else 0, 2 * span + decoded + 1 if span else 0)
    groups = 3 * max((layer.group for layer in decoder.layers), default=0) + _DECODED // 2
    chosen = max(ROWS, groups, enough if enough <= _MOST_TOKENS else 0)
    count = min(decoder.max_context, chosen if tokens is None else tokens)
    if span and span >= count:
        notes.append(
            f"no estimate went by the magnitudes of keys: {policy} takes those of whole spans of {span} "
            f"positions, {count} tokens were compared"
        )
    if policy.sees_all >= count:
        notes.append(
            f"nothing was left out of attention: {policy} does so from {policy.sees_all + 1} tokens on, "
            f"{count} were compared"
        )
    return count


def compare_logits(
    module: Module, eager: Decoder, ids: npt.NDArray[Any], most: int | None = None
) -> EndToEnd:
    """Compare logits of the last ``most`` tokens (None: all): most as a prompt, the others one by one.

    At least eight are decoded, and more than it takes until the policy makes its caches exact again. The
    eager model is led where roundings choose other experts, see `routing`, and rounds where kernels do, see
    `rounding`.
    """
    from mimo_compile.verify.rounding import Rounded
    from mimo_compile.verify.routing import Led, watched

    assert module.manifest.decoder is not None
    decoded = max(_DECODED, module.manifest.decoder.rerun + 2)
    first = 0 if most is None else max(0, len(ids) - max(most, decoded))
    split = max(1, len(ids) - decoded)
    bound = logits_bound(module.manifest)
    with watched(module) as seen:
        got = _compiled_logits(module, ids, split, first)
    led = Led(seen, bound.nearly_all)
    with Rounded(module.manifest), led if seen else nullcontext():
        reference = _eager_logits(eager, ids, split, first)
    found = compare_rows(got, reference, bound, decoded=len(ids) - split)
    return with_choices(found, [led])


def with_choices(found: EndToEnd, leads: Sequence[Led]) -> EndToEnd:
    """Add up how the choices of experts fell."""
    return replace(
        found,
        choices=sum(led.choices for led in leads),
        followed=sum(led.followed for led in leads),
        strayed=sum(led.strayed for led in leads),
        unseen=sum(led.unseen for led in leads),
    )


def _compiled_logits(module: Module, ids: npt.NDArray[Any], split: int, first: int) -> Any:
    """Return the compiled logits float64 of tokens from ``first`` on, those from ``split`` on decoded."""
    session = module.session()
    parts = [(ids[:split], False), *((ids[at : at + 1], True) for at in range(split, len(ids)))]
    got = []
    for part, decode in parts:
        for hidden in session.chunks(part, decode=decode):
            begin = session.position - len(hidden)
            kept = hidden[max(0, first - begin) :].copy()
            got += [logits.copy() for logits in session.logits(kept)]
    return np.concatenate(got).astype(np.float64)


def _eager_logits(eager: Decoder, ids: npt.NDArray[Any], split: int, first: int) -> Any:
    """Return the eager logits float64 of the same tokens."""
    import torch

    rows = []
    eager.reset()
    for at, count in eager.pieces(split):
        given = torch.tensor([int(i) for i in ids[at : at + count]])
        wanted = eager.forward_step(given, at)[1].numpy()
        rows.append(wanted[max(0, first - at) :])
    for at in range(split, len(ids)):
        rows.append(eager.decode([int(i) for i in ids[: at + 1]], split).numpy())
    return np.concatenate(rows).astype(np.float64)


def compare_rows(got: Any, reference: Any, bound: LogitsBound, decoded: int = 0) -> EndToEnd:
    """Compare rows of logits ``[n, V]`` float64, the last ``decoded`` of which were decoded.

    Raises:
        VerificationError: they have different shapes.
    """
    if got.shape != reference.shape:
        raise VerificationError(f"outputs have shape {got.shape}, the reference {reference.shape}")
    largest = np.maximum(np.abs(reference).max(-1), 1e-30)
    error = np.abs(got - reference).max(-1) / largest
    error = np.where(np.isnan(error), np.inf, error)
    return EndToEnd(
        rows=len(error),
        median_error=float(np.median(error)),
        p95_error=float(np.quantile(error, 0.95, method="higher")),
        max_error=float(error.max()),
        bound_p95=bound.nearly_all,
        bound_max=bound.each,
        same_choice=float((got.argmax(-1) == reference.argmax(-1)).mean()),
        decoded=decoded,
        decoded_median=float(np.median(error[-decoded:])) if decoded else 0.0,
    )


def compare_program(module: Module, source: Path, seed: int) -> EndToEnd:
    """Compare an exported program's outputs on random inputs."""
    import torch

    from mimo_compile.frontend.exported import load_program

    program = load_program(source)
    entry = module.manifest.entries[0]
    rng = np.random.default_rng(seed)
    given = program.example_inputs
    if given is None:
        raise InputError("the exported program holds no example inputs", file=source)
    inputs = []
    for example in given[0]:
        kind = example.numpy()
        fresh = (
            rng.standard_normal(kind.shape).astype(kind.dtype) if kind.dtype.kind == "f" else kind
        )
        inputs.append(fresh)
    with torch.no_grad():
        out = program.module()(*(torch.from_numpy(i) for i in inputs))
    wanted = list(out) if isinstance(out, (tuple, list)) else [out]
    result = module.call(entry, *inputs)
    results = list(result) if isinstance(result, tuple) else [result]
    worst = [
        compare_rows(
            np.asarray(g, np.float64).reshape(1, -1), w.numpy().astype(np.float64).reshape(1, -1),
            LogitsBound(1e-3, 1e-3),
        )
        for g, w in zip(results, wanted, strict=True)
    ]  # fmt: skip
    return max(worst, key=lambda e: e.max_error)


def compare_perplexity(module: Module, eager: Decoder, ids: Any) -> Perplexity:
    """Take the perplexity of a text in windows of 512 tokens, compiled and eager."""
    from mimo_compile.runtime.scores import log_softmax_at
    from mimo_compile.verify.rounding import Rounded

    decoder = module.manifest.decoder
    assert decoder is not None
    size = min(_WINDOW, decoder.max_context)
    windows = [ids[at : at + size] for at in range(0, len(ids), size)]
    windows = [w for w in windows if len(w) > 1]
    ours: list[Any] = []
    theirs: list[Any] = []
    for window in windows:
        ours.append(module.token_logprobs(window))
        with Rounded(module.manifest):
            logits = eager.prefill([int(i) for i in window])[1].numpy()
        theirs.append(log_softmax_at(logits[:-1], np.asarray(window[1:], np.int32)))
    mine, other = (np.concatenate(parts).astype(np.float64) for parts in (ours, theirs))
    noise = float((mine - other).std() / math.sqrt(mine.size))
    compiled, uncompiled = (math.exp(-float(parts.mean())) for parts in (mine, other))
    return Perplexity(int(mine.size), compiled, uncompiled, noise)
