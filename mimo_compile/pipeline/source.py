"""What a user hands over -> kernel graphs: a model folder, the built-in model, a module, a ``.pt2`` file."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimo_compile.errors import CheckpointWarning, MissingExtra, UsageError
from mimo_compile.ir.formats import QuantScheme, parse_scheme
from mimo_compile.ir.policies import AttentionPolicy, parse_policy
from mimo_compile.pipeline.batch import check_batch
from mimo_compile.pipeline.graphs import ModelGraphs, decoder_graphs, module_graphs, program_graphs
from mimo_compile.pipeline.pages import check_pages, paging_of

if TYPE_CHECKING:
    import torch

    from mimo_compile.frontend.huggingface import LoadedModel
    from mimo_compile.ir.hardware import Hardware
    from mimo_compile.quantize.calibration import Calibration


@dataclass(frozen=True, slots=True)
class Source:
    """A model ready for planning and building."""

    graphs: ModelGraphs
    scheme: QuantScheme
    config: bytes | None = None
    """``config.json`` as it came."""
    tokenizer: bytes | None = None
    loaded: LoadedModel | None = None
    """The eager model, the oracle of the compiled one (decoders only)."""
    module: torch.nn.Module | None = field(default=None, repr=False)
    attention: str = "model"
    """The policy's text."""


def require_compile_extra() -> None:
    """Check that the packages of the ``[compile]`` extra are there.

    Raises:
        MissingExtra: one is missing; the message has the pip line.
    """
    from importlib.util import find_spec

    for name in ("torch", "xgboost", "scipy", "networkx", "safetensors", "threadpoolctl"):
        if find_spec(name) is None:
            raise MissingExtra("compiling and tuning", extra="compile", missing=name)


def check_compilable(hardware: Hardware) -> Hardware:
    """Return the target of an artifact.

    Raises:
        UsageError: nothing can be compiled into one for it.
    """
    if hardware.kind == "sim":
        raise UsageError(
            f"{hardware.name} is simulated: nothing can be compiled for it or run on it",
            remedy=f"`mimo-compile tune --target {hardware.name}` ranks schedules for it",
        )
    return hardware


def with_caches(scheme: QuantScheme, hardware: Hardware | None) -> QuantScheme:
    """Return a scheme that says how caches are stored: where it does not, those of GPUs are bfloat16."""
    if hardware is None or hardware.kind != "cuda" or scheme.kv:
        return scheme
    return replace(scheme, kv="16")


def open_source(
    source: Any,
    *,
    quant: str = "none",
    attention: str = "model",
    max_context: int | None = None,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    calibration: Calibration | None = None,
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    adapter_format: str = "exact",
    hardware: Hardware | None = None,
    batch: int = 1,
    pages: int | str | None = None,
    gates: str | os.PathLike[str] | None = None,
    shapes_only: bool = False,
    pre_gates: str | os.PathLike[str] | None = None,
) -> Source:
    """Load, quantise, export and lower a model.

    Args:
        source: model folder, ``tiny``, ``.pt2`` file, or `torch.nn.Module` with ``example_inputs``.
        quant: the `--quant` grammar; modules and ``.pt2`` files keep their float weights (``none``).
        attention: the `--attention` grammar; modules and ``.pt2`` files keep theirs (``model``).
        max_context: positions that the KV caches provide for.
        example_inputs: tensors that fix a module's input shapes.
        calibration: how codes are chosen (model folders); None: by rounding to the nearest.
        adapters: name -> folder of low-rank adapters in PEFT's format (model folders).
        adapter_format: how they are stored: ``exact``, ``bf16`` or ``fp8``.
        hardware: the target, whose kernels are asked for before anything is quantised; None: do not ask.
        batch: sequences to decode together (model folders).
        pages: pages that their caches have together, or the memory of these; None: each has its own.
        gates: file of the gates that ``seer`` chooses by; None: the model's own.
        shapes_only: read no weights of a model folder (`frontend.weights.shapes`).
        pre_gates: file of gates that choose the experts of the layer after theirs; None: routers choose.

    Raises:
        UsageError: options that do not fit the source or have no kernels yet.
        InputError: files that are missing, damaged or not supported.
        MissingExtra: the ``[compile]`` packages are not installed.
    """
    require_compile_extra()
    import torch

    scheme = parse_scheme(quant)
    policy = parse_policy(attention)
    decoder = not isinstance(source, torch.nn.Module) and Path(str(source)).suffix != ".pt2"
    if decoder:
        scheme = with_caches(scheme, hardware)
    if adapters and not decoder:
        raise UsageError("adapters are for model folders (--adapter)")
    if batch != 1 and not decoder:
        raise UsageError("batches of sequences are for model folders (--batch)")
    if gates is not None and not decoder:
        raise UsageError("gates are for model folders (--gates)")
    if pre_gates is not None and not decoder:
        raise UsageError("gates that choose experts are for model folders (--pre-gates)")
    if pages is not None and not decoder:
        raise UsageError("pages of caches are for model folders (--pages)")
    if shapes_only:
        _check_shapes_only(decoder, calibration, adapters, gates, pre_gates)
    batch = check_batch(batch, policy)
    pages = check_pages(pages, batch, policy)
    if isinstance(source, torch.nn.Module):
        _plain_only(scheme, quant, calibration, attention)
        graphs = module_graphs(
            source, () if example_inputs is None else example_inputs, type(source).__name__
        )
        return Source(graphs, scheme, module=source)
    if not isinstance(source, (str, Path)):
        raise UsageError(
            f"cannot compile a {type(source).__name__}",
            remedy="pass a model folder, 'tiny', a .pt2 file or a torch.nn.Module",
        )
    if Path(source).suffix == ".pt2":
        from mimo_compile.frontend.exported import load_program

        _plain_only(scheme, quant, calibration, attention)
        program = load_program(Path(source))
        return Source(program_graphs(program, Path(source).stem), scheme)
    return _open_checkpoint(
        source, scheme, max_context, calibration, adapters or {}, adapter_format, hardware, policy,
        gates, batch, pages, shapes_only, pre_gates,
    )  # fmt: skip


def _open_checkpoint(
    source: str | Path,
    scheme: QuantScheme,
    max_context: int | None,
    calibration: Calibration | None,
    adapters: Mapping[str, str | os.PathLike[str]],
    adapter_format: str,
    hardware: Hardware | None,
    attention: AttentionPolicy,
    gates: str | os.PathLike[str] | None,
    batch: int,
    pages: int | str | None,
    shapes_only: bool,
    pre_gates: str | os.PathLike[str] | None,
) -> Source:
    from mimo_compile.frontend.huggingface import load_checkpoint, resolve_source
    from mimo_compile.frontend.models.attend import RETRAINED

    if adapters and calibration is not None and calibration.method == "awq":
        raise UsageError(
            "AWQ changes the activations that adapters were trained on (--calibrate awq)",
            remedy="use --calibrate gptq or rtn",
        )
    loaded = load_checkpoint(
        resolve_source(source), scheme, max_context, calibration, hardware, attention, gates,
        shapes_only, pre_gates,
    )  # fmt: skip
    if attention.name in RETRAINED:
        warnings.warn(
            f"--attention {attention.name} is made for {RETRAINED[attention.name]}: other models write "
            "worse text with it",
            CheckpointWarning,
            stacklevel=2,
        )
    if adapters:
        from mimo_compile.frontend.adapters import attach_adapters

        attach_adapters(loaded, adapters, adapter_format)
    graphs = decoder_graphs(
        loaded.decoder, batch=batch, paging=paging_of(loaded.decoder, pages, batch)
    )
    for name, make in graphs.tensors.items():
        graphs.tensors[name] = partial(_unchanged, loaded, make)
    return Source(
        graphs,
        loaded.scheme,
        config=loaded.config,
        tokenizer=loaded.tokenizer,
        loaded=loaded,
        attention=str(loaded.decoder.config.attention),
    )


def _check_shapes_only(
    decoder: bool, calibration: Any, adapters: Any, gates: Any, pre_gates: Any
) -> None:
    """Refuse what needs weights, or no weights of a model folder, where only shapes are read.

    Raises:
        UsageError: names the option.
    """
    calibrated = calibration is not None and calibration.method != "rtn"
    needs = [
        option
        for option, given in (
            ("--calibrate", calibrated),
            ("--adapter", adapters),
            ("--gates", gates is not None),
            ("--pre-gates", pre_gates is not None),
        )
        if given
    ]
    if not decoder:
        raise UsageError("shapes alone are for model folders (--shapes-only)")
    if needs:
        raise UsageError(
            f"{needs[0]} needs weights, and --shapes-only reads none",
            remedy=f"leave out {needs[0]}",
        )


def _unchanged(loaded: LoadedModel, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Return a weight, after a look at the files: floats are read from them only now."""
    loaded.require_unchanged()
    return make()


def _plain_only(
    scheme: QuantScheme, text: str, calibration: Calibration | None, attention: str
) -> None:
    if attention != "model":
        raise UsageError(
            f"--attention {attention} is for model folders; a module or .pt2 file keeps its own",
            remedy="leave out --attention",
        )
    if calibration is not None and calibration.method != "rtn":
        raise UsageError(
            f"--calibrate {calibration.method} is for model folders",
            remedy="leave out --calibrate",
        )
    if scheme != QuantScheme(None):
        raise UsageError(
            f"--quant {text} is for model folders; a module or .pt2 file keeps its weights",
            remedy="leave out --quant",
        )
