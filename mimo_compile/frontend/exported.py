"""Any `torch.nn.Module` or saved export (``.pt2``): to an exported program that the importer reads."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._decomp import get_decompositions
from torch.export.graph_signature import OutputKind, TensorArgument
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_unflatten

from mimo_compile.errors import InputError, UsageError
from mimo_compile.frontend.encoder import ENCODER
from mimo_compile.ir.generic_ops import training_batch_norm
from mimo_compile.ir.ops import load_all

_WHOLE = ("linear", "scaled_dot_product_attention", "rms_norm", "layer_norm", "silu", "gelu")
"""ATen operators that are imported whole; all else may be decomposed into core operators."""
_BROKEN = [
    torch.ops.aten.celu,
    torch.ops.aten.elu,
    torch.ops.aten.selu,
    torch.ops.aten.logsumexp,
]
"""Core operators that torch's own rules break down, since TVM's converters lack a case of theirs."""


class NothingToCompile(InputError):
    """A graph without a single kernel: every output is an input or a constant."""


def export_program(
    module: torch.nn.Module, example_inputs: tuple[Any, ...] | Mapping[str, Any]
) -> torch.export.ExportedProgram:
    """Export a module with the static shapes of its example inputs, ready for import.

    Args:
        module: Exported as in `eval()`; it is left as it was.
        example_inputs: Its arguments in their order, or by name.

    Raises:
        UsageError: no example inputs, or one without elements.
        InputError: torch cannot export the module (its own reason is passed on).
    """
    by_name = isinstance(example_inputs, Mapping)
    if not by_name and not isinstance(example_inputs, (tuple, list)):
        raise UsageError(
            f"example_inputs is a {type(example_inputs).__name__}",
            remedy="pass a tuple, or a dict for arguments by name",
        )
    if not example_inputs:
        raise UsageError(
            "a module needs example inputs", remedy="pass example_inputs=(tensor, ...)"
        )
    for leaf in tree_leaves(example_inputs):
        if isinstance(leaf, torch.Tensor) and not leaf.numel():
            raise UsageError(
                f"an example input has no elements: {list(leaf.shape)}",
                remedy="give each input at least one element",
            )
    load_all()
    training = {part: part.training for part in module.modules()}
    given: tuple[Any, Any] = ((), dict(example_inputs)) if by_name else (tuple(example_inputs), {})
    try:
        with torch.no_grad(), _quiet():
            program = torch.export.export(module.eval(), *given, strict=False)
    except Exception as error:
        first = str(error).strip().splitlines()
        raise InputError(
            f"torch.export failed: {first[0] if first else type(error).__name__}",
            file=type(module).__name__,
            remedy="make the module exportable (see torch.export) or compile a part of it",
        ) from error
    finally:
        for part, mode in training.items():
            part.training = mode
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
    """Break composite operators into core ones, apart from those that have kernels or rules here.

    Raises:
        InputError: the program changes its inputs or buffers, which a compiled module does not.
    """
    table = torch.export.default_decompositions()
    table.update(get_decompositions(_BROKEN))
    table.update(ENCODER)
    for op in list(table):
        if str(op).startswith("aten.") and str(op).split(".")[1] in _WHOLE:
            del table[op]
    with torch.no_grad(), _quiet():
        whole: torch.export.ExportedProgram = program.run_decompositions(table)
    for node in whole.graph.find_nodes(
        op="call_function", target=torch.ops.aten._native_batch_norm_legit_functional.default
    ):
        training_batch_norm(node, None)
    signature = whole.graph_signature
    changed = [
        *(f"buffer {name}" for name in signature.buffers_to_mutate.values()),
        *(f"input {name}" for name in signature.user_inputs_to_mutate.values()),
    ]
    if changed:
        raise InputError(
            f"the module changes its {', '.join(changed)} while it runs",
            file="exported graph",
            remedy="Return the new value instead, or use torch.compile(module, backend='mimo')",
        )
    return whole


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's notes about its own internals to itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
        yield


def tensors_of(program: torch.export.ExportedProgram) -> dict[str, torch.Tensor]:
    """Return parameters, buffers and lifted constants by the names the importer gives them."""
    return {
        **dict(program.named_parameters()),
        **dict(program.named_buffers()),
        **{k: v for k, v in program.constants.items() if isinstance(v, torch.Tensor)},
    }


def output_names(program: torch.export.ExportedProgram) -> tuple[str, ...]:
    """Return a name for each tensor that comes out: keys and fields as the module has them.

    ``{"y": a, "pair": (b, c)}`` gives ``y``, ``pair_0``, ``pair_1``; a plain tuple ``output_0``, ….
    """
    outputs = program.graph_signature.user_outputs
    spec = program.call_spec.out_spec
    fallback = tuple(f"output_{i}" for i in range(len(outputs)))
    paths: Any = [()] * len(outputs)
    if spec is not None and spec.num_leaves == len(outputs):
        pairs, _ = tree_flatten_with_path(tree_unflatten(list(range(len(outputs))), spec))
        paths = [path for path, _ in pairs]
    names = []
    tensors = _tensor_outputs(program)
    for path, plain, held in zip(paths, fallback, tensors, strict=True):
        if held:
            parts = [
                str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", "")))) for k in path
            ]
            named = parts and not parts[0].isdigit()
            names.append("_".join(parts) if named else plain)
    return tuple(names) if len(set(names)) == len(names) else fallback[: len(names)]


def _tensor_outputs(program: torch.export.ExportedProgram) -> list[bool]:
    specs = [s for s in program.graph_signature.output_specs if s.kind == OutputKind.USER_OUTPUT]
    return [isinstance(s.arg, TensorArgument) for s in specs]
