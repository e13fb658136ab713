"""Any `torch.nn.Module` or saved export (``.pt2``): to an exported program that the importer reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mimo_compile.errors import InputError, UsageError
from mimo_compile.ir.ops import load_all

_WHOLE = ("linear", "scaled_dot_product_attention", "rms_norm", "layer_norm", "silu", "gelu")
"""ATen operators that are imported whole; all else may be decomposed into core operators."""


def export_program(
    module: torch.nn.Module, example_inputs: tuple[Any, ...]
) -> torch.export.ExportedProgram:
    """Export a module with the static shapes of its example inputs, ready for import.

    Raises:
        UsageError: no example inputs.
        InputError: torch cannot export the module (its own reason is passed on).
    """
    if not example_inputs:
        raise UsageError(
            "a module needs example inputs", remedy="pass example_inputs=(tensor, ...)"
        )
    load_all()
    training = module.training
    try:
        with torch.no_grad():
            program = torch.export.export(module.eval(), example_inputs, strict=False)
    except Exception as error:
        first = str(error).strip().splitlines()
        raise InputError(
            f"torch.export failed: {first[0] if first else type(error).__name__}",
            file=type(module).__name__,
            remedy="make the module exportable (see torch.export) or compile a part of it",
        ) from error
    finally:
        module.train(training)
    return decompose(program)


def load_program(path: Path) -> torch.export.ExportedProgram:
    """Load a ``.pt2`` file written by `torch.export.save`.

    Raises:
        InputError: the file is missing or is no exported program.
    """
    if not path.is_file():
        raise InputError("no such file", file=path, remedy="save one with torch.export.save")
    load_all()
    try:
        program = torch.export.load(path)
    except Exception as error:
        raise InputError(
            "not a program saved by torch.export.save", file=path, remedy="export it again"
        ) from error
    return decompose(program)


def decompose(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Break composite operators into core ones, apart from those that have kernels or rules here."""
    table = torch.export.default_decompositions()
    for op in list(table):
        if str(op).startswith("aten.") and str(op).split(".")[1] in _WHOLE:
            del table[op]
    whole: torch.export.ExportedProgram = program.run_decompositions(table)
    return whole


def tensors_of(program: torch.export.ExportedProgram) -> dict[str, torch.Tensor]:
    """Return parameters, buffers and lifted constants by the names the importer gives them."""
    return {
        **dict(program.named_parameters()),
        **dict(program.named_buffers()),
        **{k: v for k, v in program.constants.items() if isinstance(v, torch.Tensor)},
    }
