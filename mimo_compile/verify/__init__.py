"""Is an artifact right? Its bytes, each of its kernels against the op's reference, the whole against torch.

Kernels are those of the artifact, linked from its own object code; only their argument layouts are
generated again. The eager model is loaded from the source with the same quantisation, so differences
come from the order of float32 sums alone. With int8 activations such a difference can flip a rounding,
which moves one code by one step; its bound is therefore wider and holds for nearly all rows, not for each.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mimo_compile import _tvm
from mimo_compile.errors import InputError, UsageError, VerificationError
from mimo_compile.ir.formats import parse_scheme
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import OPS, batches, get_op
from mimo_compile.ir.workload import Workload
from mimo_compile.runtime.container import Parts, open_artifact
from mimo_compile.runtime.module import Module
from mimo_compile.runtime.program import Choice, GateFile, Manifest
from mimo_compile.runtime.routers import rules_of
from mimo_compile.schedules import get_schedule
from mimo_compile.verify.batch import compare_batch
from mimo_compile.verify.end_to_end import (
    ROWS,
    compare_logits,
    compare_perplexity,
    compare_program,
    compared_tokens,
    policy_of,
)
from mimo_compile.verify.found import (
    EndToEnd,
    KernelCheck,
    LogitsBound,
    Perplexity,
    Verification,
)

if TYPE_CHECKING:
    from mimo_compile.frontend.models.decoder import Decoder
    from mimo_compile.quantize.calibration import Calibration


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
    gates: str | os.PathLike[str] | None = None,
    pre_gates: str | os.PathLike[str] | None = None,
) -> Verification:
    """Check an artifact in every way that is possible here.

    Args:
        path: The artifact; all its bytes are compared with their hashes first.
        source: What it was compiled from, for the comparison with eager torch; found by itself for the
            built-in model.
        threads: Threads that kernels run with.
        seed: Of fresh inputs.
        tokens: Length of the sequence whose logits are compared; at most the context is. None: the last
            96 of as many as it takes for an attention policy to leave something out, and for rows to see two
            groups of a cache in groups.
        text: Text that perplexity is taken on; None: modules of the standard library that the built-in model
            was not trained on.
        perplexity_tokens: How many tokens of it; 0 leaves perplexity out.
        calibration: How the codes of the eager model are chosen; None: as the artifact's were, which finds
            the calibration text by itself unless that was a file.
        log: Told what goes on.
        gates: The file of gates that it was compiled with, if there was one.
        pre_gates: Likewise of gates that choose experts one layer earlier.

    Raises:
        UsageError: the artifact's codes were chosen in another way than ``calibration`` says, or its gates
            came from a file that is not given.
        ArtifactError: it is damaged or does not fit this machine.
        InputError: the source cannot be read, or is another model.
    """
    from mimo_compile.quantize.calibration import repeat_calibration

    parts = open_artifact(path, verify="full")
    found = Verification(os.fspath(path))
    origin = source if source is not None else builtin_source(parts)
    if parts.manifest.shapes_only:
        origin = None
    if origin is not None:  # refused before the work of checking kernels
        repeat_calibration(parts.manifest.calibrated, calibration, log)
    if origin is not None or gates is not None or pre_gates is not None:
        check_gates(parts.manifest, gates, pre_gates)
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
        blank = parts.manifest.shapes_only
        why = "its weights are zeros" if blank else "give the checkpoint folder by --source"
        found.notes.append(f"not compared with eager torch: {why}")
        return found
    if parts.manifest.target.kind == "cuda" and rules_of(parts.manifest):
        # where experts nearly tie the eager model would choose others, and all behind them would differ
        found.notes.append(
            "not compared with eager torch: which experts tokens get is not looked at on a GPU"
        )
        return found
    eager = eager_decoder(parts.manifest, origin, calibration, log, gates, pre_gates)
    rows, tokens = tokens, compared_tokens(parts.manifest, tokens, found.notes)
    reference_threads(2.0 * tokens * parts.manifest.decoder.hidden * parts.manifest.decoder.vocab)
    ids = np.random.default_rng(seed).integers(0, parts.manifest.decoder.vocab, tokens)
    if text is not None or "tokenizer.json" in parts.texts:
        ids = text_ids(module, text, tokens, seed)
    found.end_to_end = compare_logits(module, eager, ids[:tokens], rows or ROWS)
    log(f"logits of {tokens} tokens: p95 error {found.end_to_end.p95_error:.2e} of the largest")
    if module.batch > 1 and tokens < 2:
        found.notes.append("sequences together are not compared: it takes 2 tokens or more of each")
    elif module.batch > 1:
        found.batch = compare_batch(module, eager, ids[:tokens])
        log(
            f"{module.batch} sequences together: p95 error {found.batch.p95_error:.2e} of the largest"
        )
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

    if parts.manifest.target.kind == "cuda":
        for choice in parts.manifest.plan:
            yield _unchecked(
                choice, "kernels of GPUs: `pytest -m gpu` compares each with its reference"
            )
        return
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
        further = batches.further(op, workload, inputs, rng)
        ratio: float | None = None
        try:
            for given in (inputs,) if further is None else (inputs, further):
                runnable = Runnable(
                    workload, schedule, choice.config, hardware, given, code, choice.kernel
                )
                ratio = max(ratio or 0.0, runnable.check())
            message = ""
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
    gates: str | os.PathLike[str] | None = None,
    pre_gates: str | os.PathLike[str] | None = None,
) -> Decoder:
    """Load the model that an artifact was compiled from, quantised in the same way.

    Args:
        manifest: The artifact's.
        source: Where the model is.
        calibration: As for `verify_artifact`.
        log: Told what the calibration does.
        gates: The file of its gates, if there was one.
        pre_gates: Likewise of gates that choose experts one layer earlier.

    Raises:
        UsageError: ``calibration`` is not the artifact's, or is missing for one that used a file; likewise
            ``gates``.
        InputError: the source has another shape than the artifact, or the calibration text, or the gates,
            are others.
    """
    from mimo_compile.frontend.huggingface import load_checkpoint, resolve_source
    from mimo_compile.quantize.calibration import repeat_calibration

    decoder = manifest.decoder
    assert decoder is not None
    folder = resolve_source(source)
    again = repeat_calibration(manifest.calibrated, calibration, log)
    policy = policy_of(manifest)
    check_gates(manifest, gates, pre_gates)
    loaded = load_checkpoint(
        folder, parse_scheme(manifest.quant), decoder.max_context, again, attention=policy,
        gate_file=gates, pre_gate_file=pre_gates,
    )  # fmt: skip
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


def check_gates(
    manifest: Manifest,
    gates: str | os.PathLike[str] | None,
    pre_gates: str | os.PathLike[str] | None = None,
) -> None:
    """Check that files of gates are given where the artifact's came from some, by any name, and only there.

    Raises:
        UsageError: one is not, or there was none.
        InputError: a file cannot be read, or holds others.
    """
    _check_file(manifest.gates, gates, "gates", "--gates")
    _check_file(manifest.pre_gates, pre_gates, "pre-gates", "--pre-gates")


def _check_file(
    record: GateFile | None, given: str | os.PathLike[str] | None, what: str, option: str
) -> None:
    from mimo_compile.frontend.trained import gate_record

    if record is not None and given is None:
        raise UsageError(
            f"the artifact was compiled with the {what} of {record.file}, which are needed again",
            remedy=f"give {option} path/to/{record.file}",
        )
    if record is None and given is not None:
        raise UsageError(
            f"the artifact was not compiled with a file of {what}", remedy=f"leave out {option}"
        )
    if record is not None and given is not None:
        file = Path(given)
        if gate_record(file).sha256 != record.sha256:
            raise InputError(
                f"these are not the {what} that the artifact was compiled with", file=file,
                remedy="Verify with the same file",
            )  # fmt: skip


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


__all__ = [
    "EndToEnd", "KernelCheck", "LogitsBound", "Perplexity", "Verification", "compare_perplexity",
    "verify_artifact",
]  # fmt: skip
