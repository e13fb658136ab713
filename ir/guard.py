"""Import of one operator, guarded: 16-bit floats are widened, results checked, failures plain errors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mimo_compile import _tvm
from mimo_compile.errors import InputError, MimoError
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.workload import Workload

Converter = Callable[..., Any]


def place(node: Any) -> str:
    """Return where a node of an exported graph comes from: path and class of the module, or its line."""
    stack = [entry for entry in (node.meta.get("nn_module_stack") or {}).values() if entry[0]]
    if stack:
        path, kind = stack[-1]
        name = kind if isinstance(kind, str) else kind.__name__
        path = re.sub(r"^L\['\w+'\]\.", "", path)  # TorchDynamo's name of the root
        return f"in {path}: {name.rpartition('.')[2]}"
    lines = [s for s in (node.meta.get("stack_trace") or "").splitlines() if "File " in s]
    return f"in {lines[-1].strip()}" if lines else "in the module itself"


def check_operators(nodes: Iterable[Any], known: Iterable[str]) -> None:
    """Check that every operator has a converter.

    Raises:
        InputError: some have none; the message names each with the module that calls it.
    """
    names = set(known)
    unknown: dict[str, str] = {}
    for node in nodes:
        if node.op == "call_function" and node.target.__name__ not in names:
            unknown.setdefault(str(node.target), place(node))
    if unknown:
        listed = ", ".join(f"{op} {where}" for op, where in sorted(unknown.items()))
        raise InputError(
            f"the module uses operators that cannot be imported: {listed}",
            file="exported graph",
            remedy="Rewrite the module without them, or compile the parts around them",
        )


def check_arguments(workload: Workload, shapes: Sequence[Sequence[int]]) -> None:
    """Check that the arguments of an operator are those of the workload that stands for it.

    What a converter reads off one argument the others must fit: kernels know extents from the workload alone.

    Args:
        workload: What a kernel is to compute.
        shapes: Of the arguments, in the order of the workload's own; results are left out.

    Raises:
        InputError: one of them has other extents, or there are more or fewer.
    """
    wanted = [a for a in get_op(workload.op).args(workload) if a.role != "output"]
    for arg, shape in zip(wanted, shapes, strict=False):
        if tuple(shape) != arg.shape:
            raise InputError(
                f"{arg.name} of {workload} has the extents {list(shape)}, not {list(arg.shape)}",
                file="exported graph",
                remedy="Give the operator arguments that fit each other",
            )
    if len(wanted) != len(shapes):
        raise InputError(
            f"{workload} has {len(wanted)} arguments, not {len(shapes)}",
            file="exported graph",
            remedy="Give the operator the arguments that its other ones ask for",
        )


class Wide:
    """Computes 16-bit floats as float32: what lies between two operators is not rounded."""

    def __init__(self, importer: Any) -> None:
        """Serve one import."""
        self.importer = importer
        self.exact: dict[Any, Any] = {}
        """Rounded value -> what it was before."""

    def widen(self, value: Any) -> Any:
        """Return a value as float32, if it is a 16-bit float."""
        if str(getattr(getattr(value, "ty", None), "dtype", "")) not in ("float16", "bfloat16"):
            return value
        if value not in self.exact:
            op = _tvm.compiler().relax.op
            self.exact[value] = self.importer.block_builder.emit(op.astype(value, "float32"))
        return self.exact[value]

    def inputs(self, node: Any) -> dict[Any, Any]:
        """Put float32 in the place of 16-bit floats that a node reads; returns what stood there."""
        env = self.importer.env
        narrow = {
            n: env[n] for n in node.all_input_nodes if self.widen(env.get(n)) is not env.get(n)
        }
        env.update({n: self.widen(value) for n, value in narrow.items()})
        return narrow

    def round(self, value: Any, expected: Any) -> Any:
        """Bring results that were computed as float32 to the types that torch derived."""
        import torch

        emit = self.importer.block_builder.emit
        if isinstance(expected, (tuple, list)):
            if not isinstance(value, (tuple, list)):
                value = [emit(value[i]) for i in range(len(getattr(value.ty, "fields", ())))]
            return tuple(self.round(v, e) for v, e in zip(value, expected, strict=False))
        if not isinstance(expected, torch.Tensor) or not hasattr(value, "ty"):
            return value
        dtype = self.importer._convert_data_type(expected.dtype)
        if str(value.ty.dtype) == dtype:
            return value
        rounded = emit(_tvm.compiler().relax.op.astype(value, dtype))
        if str(value.ty.dtype) == "float32":
            self.exact[rounded] = value
        return rounded


def guarded(convert: Converter, wide: Wide, *, widen: bool, own: bool) -> Converter:
    """Wrap a converter so that its result has the type that torch derived, or an error says why not.

    Args:
        convert: The converter, TVM's or our own.
        wide: How 16-bit floats are computed.
        widen: Compute 16-bit floats as float32.
        own: The converter takes the importer as its second argument.

    Returns:
        A converter; it raises `InputError` with the operator and its place.
    """

    def run(node: Any, *rest: Any) -> Any:
        narrow = wide.inputs(node) if widen else {}
        try:
            value = convert(node, wide.importer) if own else convert(node)
            if narrow:
                value = wide.round(value, node.meta.get("val"))
            wrong = _mismatch(value, node.meta.get("val"))
        except MimoError:
            raise
        except Exception as error:
            raise _refused(node, str(error).strip() or type(error).__name__) from error
        finally:
            wide.importer.env.update(narrow)
        if wrong:
            raise _refused(node, wrong)
        return value

    return run


def _refused(node: Any, reason: str) -> InputError:
    return InputError(
        f"operator {node.target} cannot be imported with these arguments: {reason.splitlines()[0]}",
        file=place(node),
        remedy="Rewrite this part of the module, or compile the parts around it",
    )


def _mismatch(value: Any, expected: Any) -> str:
    """Say how a translated value differs in shape or dtype from the one torch derived; "" if not."""
    import torch

    if isinstance(expected, (tuple, list)):
        if not isinstance(value, (tuple, list)) or len(value) != len(expected):
            return ""  # a Relax tuple, or only the first part of it: checked where a part is taken
        return next((w for w in map(_mismatch, value, expected) if w), "")
    found: Any = getattr(value, "ty", None)
    if not isinstance(expected, torch.Tensor) or not hasattr(found, "shape"):
        return ""
    has = f"{found.dtype}{[int(d) for d in found.shape.values]}"
    wanted = f"{str(expected.dtype).removeprefix('torch.')}{list(expected.shape)}"
    return "" if has == wanted else f"it became {has}, not {wanted}"
