"""Load a model (a Hugging Face folder, a file, the built-in one) as a decoder, quantised on the way."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from mimo_compile.errors import CheckpointWarning, InputError, UsageError
from mimo_compile.frontend.gates import TENSOR as GATE
from mimo_compile.frontend.indexers import TENSOR as INDEXER
from mimo_compile.frontend.indexers import find_trained
from mimo_compile.frontend.models import get_family
from mimo_compile.frontend.models.attend import with_attention
from mimo_compile.frontend.models.build import EMBED, HEAD, Builder, expected_tensors
from mimo_compile.frontend.models.decoder import Decoder, DecoderConfig
from mimo_compile.frontend.models.family import Family, Fields
from mimo_compile.frontend.models.kernels import (
    require_attention,
    require_kernels,
    with_rounded_activations,
    without_groups,
)
from mimo_compile.frontend.models.shaped import ShapedBuilder
from mimo_compile.frontend.pre_gates import find_pre_gates
from mimo_compile.frontend.weights import detect_format, open_checkpoint
from mimo_compile.frontend.weights.checkpoint import Checkpoint
from mimo_compile.frontend.weights.shapes import Shapes
from mimo_compile.ir.caches import scheme_cache_format
from mimo_compile.ir.formats import QuantScheme, parse_act_format, parse_weight_format
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.policies import AttentionPolicy
from mimo_compile.quantize import check_scheme
from mimo_compile.quantize.calibration import Calibration, fingerprint, token_sequences
from mimo_compile.runtime.program import Calibrated, GateFile

DEFAULT_MAX_CONTEXT = 4096
"""Positions that are provided for unless asked otherwise; a model's own maximum may be less."""

_DERIVED = re.compile(r".*rotary_emb\.inv_freq|.*\.self_attn\.bias|.*\.masked_bias")
"""Tensors of old checkpoints that are computed from the configuration."""


@dataclass(frozen=True)
class LoadReport:
    """What was found in the checkpoint."""

    tensors: int
    """Tensors read."""
    parameters: int
    """Numbers in them."""
    dtypes: dict[str, int]
    """Stored type -> numbers."""
    unused: tuple[str, ...]
    """Tensors that are not read with the model's own: derived from the configuration, a tied copy, gates,
    indexers, draft layers that are left out."""
    notes: tuple[str, ...] = ()
    """What is odd about the values, one sentence each."""


@dataclass(frozen=True)
class LoadedModel:
    """A decoder with what generation needs beside it."""

    decoder: Decoder
    scheme: QuantScheme
    source: Path
    """The folder or file."""
    config: bytes
    """``config.json``, or what a file of another kind says in that form."""
    tokenizer: bytes | None
    """``tokenizer.json``, if there is one."""
    generation: dict[str, Any]
    """Defaults of ``generation_config.json``: ``do_sample temperature top_k top_p``, those it names."""
    report: LoadReport
    calibrated: Calibrated | None = None
    """How codes were chosen, unless by rounding to the nearest."""
    gates: GateFile | None = None
    """File that gates came from, if they did not come with the model."""
    pre_gates: GateFile | None = None
    """File of gates that choose experts one layer earlier, if there is one."""
    require_unchanged: Callable[[], None] = lambda: None
    """`Checkpoint.require_unchanged`, for who reads the decoder's floats later: they are mapped."""


def resolve_source(source: str | Path) -> Path:
    """Return where a model is: its folder or file, or that of the built-in model for ``tiny``.

    Raises:
        InputError: there is no such folder, or a file that holds no whole model.
    """
    if str(source) == "tiny" and not Path(source).is_dir():
        return _builtin()
    folder = Path(source)
    if folder.is_dir() or (folder.is_file() and detect_format(folder, {})):
        return folder
    what = "is a file, not a model folder" if folder.exists() else "does not exist"
    raise InputError(
        f"{source} {what}",
        file=folder,
        remedy="Give a folder with config.json and safetensors, a .gguf file, or: tiny",
    )


def _builtin() -> Path:
    """Return the folder that holds the built-in model's ``config.json``."""
    package = Path(str(files("mimo_compile").joinpath("tiny")))
    found = sorted(package.glob("config.json")) + sorted(package.glob("*/config.json"))
    if not found:
        raise InputError("the built-in model is not installed", file=package)
    return found[0].parent


def load_checkpoint(
    folder: str | Path,
    quant: QuantScheme,
    max_context: int | None = None,
    calibration: Calibration | None = None,
    hardware: Hardware | None = None,
    attention: AttentionPolicy | None = None,
    gate_file: str | os.PathLike[str] | None = None,
    shapes_only: bool = False,
    pre_gate_file: str | os.PathLike[str] | None = None,
) -> LoadedModel:
    """Load a model folder and quantise its matrices.

    Args:
        folder: folder with ``config.json``, weights in any format of `frontend.weights`, and optionally
            ``tokenizer.json`` and ``generation_config.json``; or a file that holds all of them.
        quant: what to store matrices as. Those that are quantised already stay as they are: it must then be
            ``none``, ``a8`` (8-bit activations) or name their format.
        max_context: positions to provide for; None: the model's own maximum, at most `DEFAULT_MAX_CONTEXT`.
        calibration: how codes are chosen; None: by rounding to the nearest.
        hardware: what the model is for: a scheme that has no kernels there is refused before anything is
            quantised; None: do not look.
        attention: what layers attend to; None: what the checkpoint says.
        gate_file: gates that `seer` chooses by, or indexers of `dsa`; None: the checkpoint's own.
        shapes_only: read no weights: all are zeros that take no memory, of the types that they would have.
        pre_gate_file: gates that choose the experts of the layer after theirs; None: routers choose.

    Returns:
        The decoder and what generation needs.

    Raises:
        InputError: something in the folder is missing, damaged or not supported; names the file.
        UsageError: the scheme has no quantiser or no kernels, does not fit the stored one or the
            calibration, or ``max_context``, the attention policy or its gates do not fit the model.
        EnvironmentMismatch: a plug-in that reads weights is broken.

    Warns:
        CheckpointWarning: values that are odd, a tokenizer that cannot be used, bits of caches without use.
    """
    check_scheme(quant)
    source = Path(folder)
    checkpoint = Shapes.open(source) if shapes_only else open_checkpoint(source)
    fields = Fields(checkpoint.config, checkpoint.config_file)
    family = get_family(fields.get("model_type"), fields.file)
    config = _configured(family, fields, checkpoint, max_context)
    gates = find_trained(attention, checkpoint, None if gate_file is None else os.fspath(gate_file))
    if attention is not None:
        config = with_attention(config, attention if gates is None else gates.policy)
    generation = checkpoint.generation()
    if "eos_token_id" in generation:
        file = checkpoint.source / "generation_config.json"
        config = replace(config, eos=Fields(generation, file).eos(config.vocab))
    expected = expected_tensors(config, family, checkpoint)
    if isinstance(checkpoint, Shapes):
        checkpoint.expect(expected)
    unused = _unused(checkpoint, expected, config)
    checkpoint.require(expected)
    if gates is not None:
        gates.check(config)
    pre_gates = find_pre_gates(None if pre_gate_file is None else Path(pre_gate_file))
    if pre_gates is not None:
        pre_gates.check(config)
    quant = _check_stored_formats(checkpoint, expected, quant)
    if hardware is not None and hardware.kind == "cuda":
        quant = with_rounded_activations(quant)
    if hardware is not None and hardware.kind != "sim":
        require_kernels(config, quant, hardware)
        require_attention(config, scheme_cache_format(quant.kv).name, hardware)
    if checkpoint.entries[EMBED].dtype == "BF16":
        config = replace(config, dtype="bf16")
    make: type[Builder] = ShapedBuilder if shapes_only else Builder
    builder = make(config, family, checkpoint, quant, gates=gates, pre_gates=pre_gates)
    calibrated = None
    if calibration is not None and calibration.method != "rtn":
        builder, calibrated = _calibrated(builder, calibration, expected)
    decoder = builder.build()
    checkpoint.require_unchanged()
    dtypes: Counter[str] = Counter()
    for name, shape in expected.items():
        dtypes[checkpoint.entries[name].dtype] += math.prod(shape)
    kept = ("do_sample", "temperature", "top_k", "top_p")
    tokenizer = checkpoint.tokenizer_json()
    for note in filter(None, (*checkpoint.notes, without_groups(config, quant))):
        warnings.warn(note, CheckpointWarning, stacklevel=2)
    return LoadedModel(
        decoder,
        quant,
        checkpoint.source,
        checkpoint.config_json(),
        tokenizer,
        {name: generation[name] for name in kept if generation.get(name) is not None},
        LoadReport(
            len(expected), sum(dtypes.values()), dict(dtypes), unused, tuple(checkpoint.notes)
        ),
        calibrated,
        None if gates is None else gates.record,
        None if pre_gates is None else pre_gates.record,
        checkpoint.require_unchanged,
    )


def _calibrated(
    plain: Builder, calibration: Calibration, expected: dict[str, tuple[int, ...]]
) -> tuple[Builder, Calibrated]:
    """Return the builder that calibrates, and the record of what it does."""
    from mimo_compile.frontend.models.calibrated import CalibratedBuilder

    checkpoint, config = plain.checkpoint, plain.config
    if any(checkpoint.entries[name].fmt is not None for name in expected):
        raise UsageError(
            f"--calibrate {calibration.method}: the checkpoint's matrices are already quantised",
            remedy="Leave --calibrate out",
        )
    if any(spec.gate for spec in config.layers):
        raise UsageError(
            f"--calibrate {calibration.method}: layers of a {config.name} model read the caches of others, "
            "and calibration runs layers one by one",
            remedy="Leave --calibrate out",
        )
    if plain.pre_gates is not None:
        raise UsageError(
            f"--calibrate {calibration.method}: with --pre-gates a layer's experts are chosen by the layer "
            "before, and calibration runs layers one by one",
            remedy="Leave --calibrate out",
        )
    ids = token_sequences(
        calibration, checkpoint.tokenizer_json(), config.vocab, config.hidden, config.max_context
    )
    builder = CalibratedBuilder(
        config, plain.family, checkpoint, plain.scheme, calibration, ids, plain.gates
    )
    record = Calibrated(
        calibration.method, "" if calibration.text is None else calibration.text.name,
        len(ids), ids.shape[1], calibration.seed, fingerprint(ids),
    )  # fmt: skip
    return builder, record


def _check_stored_formats(
    checkpoint: Checkpoint, expected: dict[str, tuple[int, ...]], quant: QuantScheme
) -> QuantScheme:
    """Refuse to quantise matrices once more that are quantised already; returns the scheme to use.

    A checkpoint whose model was trained with 8-bit activations gets them unless the scheme names a format.
    """
    stored = sorted({e.fmt.name for n in expected if (e := checkpoint.entries[n]).fmt is not None})
    act = parse_act_format(f"a{quant.act}")
    if act.group > 0 and any(parse_weight_format(name).family == "complex" for name in stored):
        raise UsageError(
            f"--quant {quant}: the checkpoint's complex matrices have no groups of activations",
            remedy="Use a8",
        )
    int8 = act.is_int8
    plain = quant.weight is None or quant.weight.is_float
    if plain and int8 and not stored:
        raise UsageError(
            f"--quant {quant} keeps weights floats, and int8 activations need integer ones",
            remedy="Name a weight format, for example w8a8",
        )
    if stored and quant.weight is not None and stored != [quant.weight.name]:
        also = f"{stored[0]}a8" if len(stored) == 1 else "a8"
        raise UsageError(
            f"--quant {quant}: the checkpoint's matrices are already quantised, as {', '.join(stored)}",
            remedy=f"Use --quant none, which keeps them, or {also} for 8-bit activations",
        )
    if stored and replace(quant, kv="") == QuantScheme(None) and checkpoint.activations == 8:
        return replace(quant, act="8")
    return quant


def _configured(
    family: Family, fields: Fields, checkpoint: Checkpoint, max_context: int | None
) -> DecoderConfig:
    """Return the shape that ``config.json`` describes; fields that its family does not know become a note."""
    config = family.configure(fields, checkpoint)
    if unknown := fields.unknown():
        checkpoint.notes.append(
            f"config.json has {', '.join(unknown)}, which no {config.name} model is known to have: "
            "the model is computed as without"
        )
    if max_context is None:
        return config.with_context(min(config.max_context, DEFAULT_MAX_CONTEXT))
    if not 0 < max_context <= config.max_context:
        raise UsageError(
            f"max_context={max_context} is not between 1 and the model's {config.max_context}"
        )
    return config.with_context(max_context)


def _unused(
    checkpoint: Checkpoint, expected: dict[str, tuple[int, ...]], config: DecoderConfig
) -> tuple[str, ...]:
    """Return tensors that may be left out; anything else that is not expected is an error."""
    extra = sorted(set(checkpoint.entries) - set(expected))
    strange = [
        name
        for name in extra
        if not _DERIVED.fullmatch(name)
        and not GATE.fullmatch(name)
        and not INDEXER.fullmatch(name)
        and not (config.tied and name == HEAD)
        and not checkpoint.ignorable(name)
        and not name.startswith(config.left_out)
    ]
    if strange and not set(expected) - set(checkpoint.entries):
        shown = ", ".join(strange[:3]) + (
            f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        )
        raise InputError(
            f"tensors that a {config.name} model of this config.json does not have: {shown}",
            file=checkpoint.entries[strange[0]].file,
            remedy="Check that config.json belongs to these weights",
        )
    return tuple(extra)
