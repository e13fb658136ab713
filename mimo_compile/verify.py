"""Is an artifact right? Its bytes, each of its kernels against the op's reference, the whole against torch.

Kernels are those of the artifact, linked from its own object code; only their argument layouts are
generated again. The eager model is loaded from the source with the same quantisation, so differences
come from the order of float32 sums alone. With int8 activations such a difference can flip a rounding,
which moves one code by one step; its bound is therefore wider and holds for nearly all rows, not for each.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mimo_compile import _tvm
from mimo_compile.errors import ArtifactError, InputError, UsageError, VerificationError
from mimo_compile.ir.formats import parse_act_format, parse_scheme
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import OPS, get_op
from mimo_compile.ir.policies import AttentionPolicy, parse_policy
from mimo_compile.ir.workload import Workload
from mimo_compile.runtime.container import Parts, open_artifact
from mimo_compile.runtime.module import Module
from mimo_compile.runtime.program import Choice, Manifest
from mimo_compile.schedules import get_schedule

if TYPE_CHECKING:
    from mimo_compile.frontend.models.decoder import Decoder
    from mimo_compile.quantize.calibration import Calibration

PERPLEXITY_BOUND = 1e-3
"""Largest relative difference between compiled and eager perplexity."""
_WINDOW = 512
_TOKENS, _DECODED = 96, 8
"""Rows of logits that are compared unless asked otherwise; how many of them are decoded at least."""
_MOST_TOKENS = 4096
"""Tokens that are run at most without being asked, to reach where a policy leaves something out."""


@dataclass(frozen=True, slots=True)
class KernelCheck:
    """One kernel of the plan on fresh inputs."""

    workload: str
    schedule: str
    kernel: str
    error_ratio: float | None
    """Largest error as a multiple of its bound; None when not checked."""
    message: str = ""
    """What is wrong, or why it was not checked."""
    skipped: bool = False

    @property
    def ok(self) -> bool:
        """True unless something is wrong."""
        return self.skipped or not self.message


@dataclass(frozen=True, slots=True)
class LogitsBound:
    """What the rows of logits may differ by, relative to the row's largest magnitude."""

    nearly_all: float
    """For 95 of 100 rows."""
    each: float
    """For every row; infinite when a flipped rounding may change a routed expert."""


@dataclass(frozen=True, slots=True)
class EndToEnd:
    """Compiled outputs against eager torch, relative to the largest magnitude of each row."""

    rows: int
    median_error: float
    p95_error: float
    max_error: float
    bound_p95: float
    bound_max: float
    same_choice: float
    """Share of rows whose largest logit is that of the same token."""
    decoded: int = 0
    """How many of the rows are tokens that were decoded one by one, the last ones."""
    decoded_median: float = 0.0
    """Their median error: few among many rows, they may all be wrong within the other bounds."""

    @property
    def ok(self) -> bool:
        """True within all bounds."""
        most = max(self.p95_error, self.decoded_median)
        return most <= self.bound_p95 and self.max_error <= self.bound_max


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Per token of the same text, compiled and eager with the same quantisation."""

    tokens: int
    compiled: float
    eager: float
    noise: float = 0.0
    """Standard error of the difference's logarithm: 8-bit activations next to a tie round either way, which
    moves each token a little, this way or that."""

    @property
    def bound(self) -> float:
        """Largest relative difference; `noise` says how much of it few tokens make by chance."""
        return PERPLEXITY_BOUND

    @property
    def difference(self) -> float:
        """Relative difference."""
        return self.compiled / self.eager - 1

    @property
    def ok(self) -> bool:
        """True within the bound."""
        return abs(self.difference) <= self.bound


@dataclass(slots=True)
class Verification:
    """Everything `verify_artifact` found."""

    path: str
    kernels: list[KernelCheck] = field(default_factory=list)
    end_to_end: EndToEnd | None = None
    perplexity: Perplexity | None = None
    notes: list[str] = field(default_factory=list)
    """What was not checked and why."""

    @property
    def ok(self) -> bool:
        """True when nothing that was checked is wrong."""
        parts = [p.ok for p in (self.end_to_end, self.perplexity) if p is not None]
        return all(k.ok for k in self.kernels) and all(parts)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for ``--json``."""
        checked = [k.error_ratio for k in self.kernels if k.error_ratio is not None]
        out: dict[str, Any] = {
            "ok": self.ok, "path": self.path, "notes": self.notes,
            "worst_error_ratio": max(checked, default=None),
            "kernels": [{**asdict(k), "ok": k.ok} for k in self.kernels],
        }  # fmt: skip
        if self.end_to_end is not None:
            out["end_to_end"] = {**asdict(self.end_to_end), "ok": self.end_to_end.ok}
        if self.perplexity is not None:
            p = self.perplexity
            out["perplexity"] = {
                **asdict(p),
                "bound": p.bound,
                "difference": p.difference,
                "ok": p.ok,
            }
        return out


def verify_artifact(
    path: str | os.PathLike[str],
    *,
    source: str | Path | None = None,
    threads: int | None = None,
    seed: int = 0,
    tokens: int | None = None,
    text: str | None = None,
    perplexity_tokens: int = 0,
    calibration: Calibration | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> Verification:
    """Check an artifact in every way that is possible here.

    Args:
        path: The artifact; all its bytes are compared with their hashes first.
        source: What it was compiled from, for the comparison with eager torch; found by itself for the
            built-in model.
        threads: Threads that kernels run with.
        seed: Of fresh inputs.
        tokens: Length of the sequence whose logits are compared; at most the context is. None: the last
            96 of as many as it takes for an attention policy to leave something out.
        text: Text that perplexity is taken on; None: modules of the standard library that the built-in model
            was not trained on.
        perplexity_tokens: How many tokens of it; 0 leaves perplexity out.
        calibration: How the codes of the eager model are chosen; None: as the artifact's were, which finds
            the calibration text by itself unless that was a file.
        log: Told what goes on.

    Raises:
        UsageError: the artifact's codes were chosen in another way than ``calibration`` says.
        ArtifactError: it is damaged or does not fit this machine.
        InputError: the source cannot be read, or is another model.
    """
    from mimo_compile.quantize.calibration import repeat_calibration

    parts = open_artifact(path, verify="full")
    found = Verification(os.fspath(path))
    origin = source if source is not None else builtin_source(parts)
    if origin is not None:  # refused before the work of checking kernels
        repeat_calibration(parts.manifest.calibrated, calibration, log)
    log(f"all bytes of {found.path} match their hashes")
    module = Module(parts, threads=threads)
    for check in check_kernels(parts, module.threads, seed):
        found.kernels.append(check)
        state = "skipped" if check.skipped else "ok" if check.ok else "WRONG"
        log(
            f"{state:>7} {_ratio(check.error_ratio)}  {check.workload}  {check.schedule}  {check.message}"
        )
    if parts.manifest.decoder is None:
        if origin is None:
            found.notes.append(
                "not compared with eager torch: give the exported program by --source"
            )
        else:
            found.end_to_end = compare_program(module, Path(origin), seed)
        return found
    if origin is None:
        found.notes.append("not compared with eager torch: give the checkpoint folder by --source")
        return found
    eager = eager_decoder(parts.manifest, origin, calibration, log)
    rows, tokens = tokens, compared_tokens(parts.manifest, tokens, found.notes)
    reference_threads(2.0 * tokens * parts.manifest.decoder.hidden * parts.manifest.decoder.vocab)
    ids = np.random.default_rng(seed).integers(0, parts.manifest.decoder.vocab, tokens)
    if text is not None or "tokenizer.json" in parts.texts:
        ids = text_ids(module, text, tokens, seed)
    found.end_to_end = compare_logits(module, eager, ids[:tokens], rows or _TOKENS)
    log(f"logits of {tokens} tokens: p95 error {found.end_to_end.p95_error:.2e} of the largest")
    if perplexity_tokens:
        found.perplexity = compare_perplexity(
            module, eager, text_ids(module, text, perplexity_tokens, None)
        )
    eager.release()
    return found


def _ratio(value: float | None) -> str:
    return "     -" if value is None else f"{value:6.3f}"


def check_kernels(parts: Parts, threads: int, seed: int) -> Iterable[KernelCheck]:
    """Run each kernel of the plan on fresh inputs and compare with the op's float64 reference."""
    from mimo_compile.bench.runnable import Runnable, hardware_of

    hardware = hardware_of(parts.manifest)
    code = _tvm.load_object(parts.code)
    _tvm.set_threads(threads)
    for choice in parts.manifest.plan:
        workload = Workload.parse(choice.workload)
        if workload.op not in OPS:
            yield _unchecked(choice, "generic kernel: covered by the comparison end to end")
            continue
        try:
            schedule = get_schedule(choice.schedule)
        except UsageError:
            yield _unchecked(choice, "this version has no such schedule")
            continue
        if choice.schedule_version not in (None, schedule.version):
            both = f"{choice.schedule_version} made it, {schedule.version} is installed"
            yield _unchecked(choice, f"its schedule has changed: version {both}")
            continue
        digest = hashlib.sha256(f"{workload}|{seed}".encode()).digest()
        rng = np.random.default_rng(np.frombuffer(digest, np.uint32))
        op = get_op(workload.op)
        inputs = op.make_inputs(workload, rng)
        reference_threads(op.counts(workload).flops)
        try:
            runnable = Runnable(
                workload, schedule, choice.config, hardware, inputs, code, choice.kernel
            )
            ratio, message = runnable.check(), ""
        except VerificationError as error:
            ratio, message = None, str(error)
        yield KernelCheck(choice.workload, choice.schedule, choice.kernel, ratio, message)


def reference_threads(flops: float) -> None:
    """Give torch one thread for small work: waking others takes longer, much longer on a busy machine."""
    import torch

    torch.set_num_threads(1 if flops < 1e9 else local_cpu().cores)


def _unchecked(choice: Choice, why: str) -> KernelCheck:
    return KernelCheck(choice.workload, choice.schedule, choice.kernel, None, why, skipped=True)


def builtin_source(parts: Parts) -> Path | None:
    """Return the built-in model's folder when the artifact was compiled from it."""
    from mimo_compile.frontend.huggingface import resolve_source

    try:
        folder = resolve_source("tiny")
        same = (folder / "config.json").read_bytes() == parts.texts.get("config.json")
    except (InputError, OSError):
        return None
    return folder if same else None


def eager_decoder(
    manifest: Manifest,
    source: str | Path,
    calibration: Calibration | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> Decoder:
    """Load the model that an artifact was compiled from, quantised in the same way.

    Args:
        manifest: The artifact's.
        source: Where the model is.
        calibration: As for `verify_artifact`.
        log: Told what the calibration does.

    Raises:
        UsageError: ``calibration`` is not the artifact's, or is missing for one that used a file.
        InputError: the source has another shape than the artifact, or the calibration text is another.
    """
    from mimo_compile.frontend.huggingface import load_checkpoint, resolve_source
    from mimo_compile.quantize.calibration import repeat_calibration

    decoder = manifest.decoder
    assert decoder is not None
    folder = resolve_source(source)
    again = repeat_calibration(manifest.calibrated, calibration, log)
    policy = _policy(manifest)
    loaded = load_checkpoint(
        folder, parse_scheme(manifest.quant), decoder.max_context, again, attention=policy
    )
    eager, found = loaded.decoder, loaded.calibrated
    record = manifest.calibrated
    if found is not None and record is not None and found.sha256 != record.sha256:
        raise InputError(
            "the calibration text differs from the one that the artifact was compiled with",
            file=(calibration.text if calibration else None) or "the standard library",
            remedy="Verify with the same file and the same version of Python",
        )
    if (eager.config.vocab, eager.config.hidden) != (decoder.vocab, decoder.hidden):
        raise InputError("this is not the model that the artifact was compiled from", file=folder)
    return eager


def _policy(manifest: Manifest) -> AttentionPolicy:
    """Return the policy that an artifact's layers follow.

    Raises:
        ArtifactError: this version has none of that name.
    """
    try:
        return parse_policy(manifest.attention)
    except UsageError as error:
        raise ArtifactError(
            f"{manifest.name} follows the attention policy {manifest.attention!r}, which this version "
            "does not know",
            remedy="Verify it with the version that compiled it, or compile it again.",
        ) from error


def text_ids(module: Module, text: str | None, count: int, seed: int | None) -> Any:
    """Return ``count`` token ids of a text, or of held-out modules of the standard library.

    Args:
        module: Whose tokenizer is used.
        text: The text; None: held-out modules.
        count: How many tokens.
        seed: Where to begin in the held-out modules (None: at the beginning).

    Raises:
        UsageError: the text has fewer than two tokens.
    """
    if text is not None:
        ids = np.array(module.tokenizer.encode(text).ids, np.int32)
    else:
        from mimo_compile.tiny import corpus

        ids = corpus.encode(module.tokenizer, corpus.collect().held_out).astype(np.int32)
    start = (
        0 if seed is None else int(np.random.default_rng(seed).integers(max(1, len(ids) - count)))
    )
    ids = ids[start : start + count]
    if len(ids) < 2:
        raise UsageError("the text is too short: it has fewer than two tokens")
    return ids


def logits_bound(manifest: Manifest) -> LogitsBound:
    """Return what logits may differ by.

    Float activations: sums of float32 in another order, 1e-3 of the largest logit. 16-bit ones: a sum that
    is off by one rounding may be rounded the other way, by 2**-8 (bfloat16) or 2**-11 (float16) of it; so may
    a key or value of a bfloat16 cache, whose kernels may round queries and weights too, as those over codes
    do. Int8 activations: a sum that is off by one rounding may fall on the other side of a code's boundary; a
    step is 1/127 of the row's largest value, and a flip that changes the choice of an expert changes the row
    altogether. Of a cache of 2 bits a code that falls on the other side moves by a third of its range.

    Layers that choose what they attend to may choose otherwise among blocks whose scores nearly tie: then
    single rows differ by more. Int8 arithmetic of attention rounds as int8 activations do, but averages it.
    """
    scheme = parse_scheme(manifest.quant)
    act = parse_act_format(f"a{scheme.act}")
    if act.is_int8:
        return LogitsBound(1e-1 if scheme.kv == "2" else 5e-2, math.inf)
    if scheme.kv or act.kind == "bf16":
        return LogitsBound(1e-2, math.inf)
    policy = _policy(manifest)
    if policy.arithmetic != "float":
        return LogitsBound(1e-2, math.inf)
    each = math.inf if policy.select is not None else 1e-3
    return LogitsBound(2e-3, math.inf) if act.rounded else LogitsBound(1e-3, each)


def compared_tokens(manifest: Manifest, tokens: int | None, notes: list[str]) -> int:
    """Return how many tokens are run; notes where the policy attends to all of them."""
    decoder, policy = manifest.decoder, _policy(manifest)
    assert decoder is not None
    enough = policy.sees_all + max(_DECODED, decoder.rerun + 2)
    chosen = max(_TOKENS, enough) if policy.sees_all and enough <= _MOST_TOKENS else _TOKENS
    count = min(decoder.max_context, chosen if tokens is None else tokens)
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

    At least eight are decoded, and more than it takes until the policy makes its caches exact again.
    """
    import torch

    from mimo_compile.frontend.models.decoder import STEP_TOKENS

    assert module.manifest.decoder is not None
    decoded = max(_DECODED, module.manifest.decoder.rerun + 2)
    first = 0 if most is None else max(0, len(ids) - max(most, decoded))
    split = max(1, len(ids) - decoded)
    rows = []
    eager.reset()
    for at in range(0, split, STEP_TOKENS):
        given = torch.tensor([int(i) for i in ids[at : min(at + STEP_TOKENS, split)]])
        wanted = eager.forward_step(given, at)[1].numpy()
        rows.append(wanted[max(0, first - at) :])
    for at in range(split, len(ids)):
        rows.append(eager.decode([int(i) for i in ids[: at + 1]], split).numpy())
    reference = np.concatenate(rows).astype(np.float64)
    session = module.session()
    parts = [(ids[:split], False), *((ids[at : at + 1], True) for at in range(split, len(ids)))]
    got = []
    for part, decode in parts:
        for hidden in session.chunks(part, decode=decode):
            begin = session.position - len(hidden)
            kept = hidden[max(0, first - begin) :].copy()
            got += [logits.copy() for logits in session.logits(kept)]
    bound = logits_bound(module.manifest)
    found = np.concatenate(got).astype(np.float64)
    return _compare(found, reference, bound, decoded=len(ids) - split)


def _compare(got: Any, reference: Any, bound: LogitsBound, decoded: int = 0) -> EndToEnd:
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
        _compare(
            np.asarray(g, np.float64).reshape(1, -1), w.numpy().astype(np.float64).reshape(1, -1),
            LogitsBound(1e-3, 1e-3),
        )
        for g, w in zip(results, wanted, strict=True)
    ]  # fmt: skip
    return max(worst, key=lambda e: e.max_error)


def compare_perplexity(module: Module, eager: Decoder, ids: Any) -> Perplexity:
    """Take the perplexity of a text in windows of 512 tokens, compiled and eager."""
    from mimo_compile.runtime.scores import log_softmax_at

    decoder = module.manifest.decoder
    assert decoder is not None
    size = min(_WINDOW, decoder.max_context)
    windows = [ids[at : at + size] for at in range(0, len(ids), size)]
    windows = [w for w in windows if len(w) > 1]
    ours: list[Any] = []
    theirs: list[Any] = []
    for window in windows:
        ours.append(module.token_logprobs(window))
        logits = eager.prefill([int(i) for i in window])[1].numpy()
        theirs.append(log_softmax_at(logits[:-1], np.asarray(window[1:], np.int32)))
    mine, other = (np.concatenate(parts).astype(np.float64) for parts in (ours, theirs))
    noise = float((mine - other).std() / math.sqrt(mine.size))
    compiled, uncompiled = (math.exp(-float(parts.mean())) for parts in (mine, other))
    return Perplexity(int(mine.size), compiled, uncompiled, noise)


__all__ = [
    "EndToEnd", "KernelCheck", "LogitsBound", "Perplexity", "Verification", "verify_artifact",
]  # fmt: skip
