"""Generic ATen operators where TVM's own converters are wrong, unsafe or too narrow."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mimo_compile import _tvm
from mimo_compile.errors import InputError
from mimo_compile.ir.guard import Converter, place


def dropout(node: Any, imp: Any) -> Any:
    """Pass through; random dropout has no place in a compiled model."""
    x, p, train = (*node.args, 0.5, True)[:3] if len(node.args) < 3 else node.args[:3]
    if train and p:
        raise InputError(
            "dropout in training mode", file=place(node), remedy="Call module.eval() first"
        )
    value = imp.env[x]
    return (value,) if "native" in node.target.__name__ else value


def training_batch_norm(node: Any, imp: Any) -> Any:
    """Refuse: statistics of the batch belong to training."""
    raise InputError(
        "batch normalisation in training mode", file=place(node), remedy="Call module.eval() first"
    )


def embedding(node: Any, imp: Any) -> Any:
    """``weight[ids]``; an id outside of the table gives a row of NaN, never memory that is not its own."""
    op = _tvm.compiler().relax.op
    weight, ids = imp.retrieve_args(node)[:2]
    shape = [int(d) for d in ids.ty.shape.values]
    rows = imp.block_builder.emit(op.reshape(ids, [-1])) if len(shape) != 1 else ids
    mode = "nan" if str(weight.ty.dtype).startswith(("float", "bfloat")) else "clip"
    taken = imp.block_builder.emit(op.take(weight, rows, axis=0, mode=mode))
    if len(shape) == 1:
        return taken
    return imp.block_builder.emit(op.reshape(taken, [*shape, int(weight.ty.shape.values[-1])]))


def select(node: Any, imp: Any) -> Any:
    """``x[..., index, ...]``; a negative index counts from the end."""
    relax = _tvm.compiler().relax
    x, dim, index = imp.retrieve_args(node)
    extent = int(x.ty.shape.values[dim])
    at = relax.const(index + extent if index < 0 else index, "int64")
    return imp.block_builder.emit(relax.op.take(x, at, dim % len(x.ty.shape.values), "clip"))


def index(node: Any, imp: Any) -> Any:
    """``x[i, :, j]`` as numpy has it: tensors of indices broadcast and are used together.

    Negative indices count from the end; those beyond are brought to the nearest row.
    """
    relax, emit = _tvm.compiler().relax, imp.block_builder.emit
    op = relax.op
    x, indices = imp.retrieve_args(node)
    shape = [int(d) for d in x.ty.shape.values]
    dims = [d for d, i in enumerate(indices) if i is not None]
    if any(str(indices[d].ty.dtype) == "bool" for d in dims):
        raise InputError(
            "the extent of x[mask] depends on the data", file=place(node),
            remedy="Use torch.where, or keep the mask beside the tensor",
        )  # fmt: skip
    rest = [d for d in range(len(shape)) if d not in dims]
    flat: Any = None
    for d in dims:
        at = emit(op.astype(indices[d], "int64"))
        zero, extent = relax.const(0, "int64"), relax.const(shape[d], "int64")
        at = emit(op.where(op.less(at, zero), op.add(at, extent), at))
        at = emit(op.minimum(op.maximum(at, zero), relax.const(shape[d] - 1, "int64")))
        flat = at if flat is None else emit(op.add(op.multiply(flat, extent), at))
    count = math.prod(shape[d] for d in dims)
    table = emit(op.reshape(op.permute_dims(x, [*dims, *rest]), [count, *(shape[d] for d in rest)]))
    lead = [int(d) for d in flat.ty.shape.values]
    rows = emit(op.take(table, op.reshape(flat, [math.prod(lead)]), axis=0, mode="clip"))
    out = emit(op.reshape(rows, [*lead, *(shape[d] for d in rest)]))
    if dims != list(range(dims[0], dims[-1] + 1)) or dims[0] == 0:
        return out
    # neighbouring indices: their extents stand where the first of them stood
    before = list(range(len(lead), len(lead) + dims[0]))
    after = list(range(len(lead) + dims[0], len(lead) + len(rest)))
    return emit(op.permute_dims(out, [*before, *range(len(lead)), *after]))


def _reduce(op: str) -> Converter:
    """Return the converter of a reduction over one axis, some, or all."""

    def convert(node: Any, imp: Any) -> Any:
        relax = _tvm.compiler().relax
        x, *rest = imp.retrieve_args(node)
        axes, keep = ([*rest, None, False] if len(rest) < 2 else rest)[:2]
        kind = imp._convert_data_type(node.meta["val"].dtype)
        x = x if str(x.ty.dtype) == kind else imp.block_builder.emit(relax.op.astype(x, kind))
        return imp.block_builder.emit(getattr(relax.op, op)(x, axes or None, bool(keep)))

    return convert


def _extreme(op: str) -> Converter:
    """Return the converter of ``max(dim)`` or ``min(dim)``: values, and indices of the first of them."""

    def convert(node: Any, imp: Any) -> Any:
        op_of = _tvm.compiler().relax.op
        x, dim, *rest = imp.retrieve_args(node)
        keep = bool(rest and rest[0])
        values = imp.block_builder.emit(getattr(op_of, op)(x, dim, keep))
        where = imp.block_builder.emit(getattr(op_of, f"arg{op}")(x, dim, keep))
        if str(where.ty.dtype) != "int64":
            where = imp.block_builder.emit(op_of.astype(where, "int64"))
        return values, where

    return convert


def _cumulative(op: str, start: int) -> Converter:
    """Return the converter of ``cumsum`` or ``cumprod``: each result reduces what lies before it."""

    def convert(node: Any, imp: Any) -> Any:
        relax, emit = _tvm.compiler().relax, imp.block_builder.emit
        x, dim = imp.retrieve_args(node)[:2]
        kind = imp._convert_data_type(node.meta["val"].dtype)
        shape = [int(d) for d in x.ty.shape.values]
        dim %= len(shape)
        last = [*(d for d in range(len(shape)) if d != dim), dim]
        x = emit(relax.op.permute_dims(relax.op.astype(x, kind), last))
        seen = emit(
            relax.op.tril(relax.op.full([shape[dim]] * 2, relax.const(1, "int32"), "int32"))
        )
        held = relax.op.where(
            relax.op.astype(seen, "bool"), relax.op.expand_dims(x, -2), relax.const(start, kind)
        )
        out = emit(getattr(relax.op, op)(emit(held), -1))
        back = [last.index(d) for d in range(len(shape))]
        return emit(relax.op.permute_dims(out, back))

    return convert


def generic_linear(imp: Any, x: Any, weight: Any, bias: Any) -> Any:
    """``x @ weight.T + bias`` with a computed weight; sums of 16-bit floats are float32."""
    op = _tvm.compiler().relax.op
    kind = str(x.ty.dtype)
    wide = kind if kind in ("float32", "float64") else "float32"
    x, weight, bias = (v if v is None else op.astype(v, wide) for v in (x, weight, bias))
    y = op.matmul(x, op.permute_dims(imp.block_builder.emit(weight)))
    y = y if bias is None else op.add(y, bias)
    return imp.block_builder.emit(op.astype(y, kind))


def layer_norm(node: Any, imp: Any) -> Any:
    """``layer_norm`` with or without weight and bias."""
    relax = _tvm.compiler().relax
    x, normalized, *rest = imp.retrieve_args(node)
    weight, bias, eps = (*rest, *(None, None, 1e-5)[len(rest) :])[:3]
    kind, extents = str(x.ty.dtype), [int(d) for d in normalized]
    ones, zeros = (np.full(extents, v, np.float32) for v in (1, 0))
    weight, bias = (
        imp.block_builder.emit(relax.op.astype(relax.const(default), kind)) if v is None else v
        for v, default in ((weight, ones), (bias, zeros))
    )
    axes = list(range(-len(extents), 0))
    return imp.block_builder.emit(relax.op.nn.layer_norm(x, weight, bias, axes, float(eps)))


def group_norm(node: Any, imp: Any) -> Any:
    """``native_group_norm``: each group of channels by itself; only the first result."""
    relax, emit = _tvm.compiler().relax, imp.block_builder.emit
    op = relax.op
    x, weight, bias, n, c, _, groups, eps = imp.retrieve_args(node)
    shape, kind = [int(d) for d in x.ty.shape.values], str(x.ty.dtype)
    flat = emit(op.reshape(x, [n, groups, math.prod(shape[1:]) // groups]))
    centred = emit(op.subtract(flat, emit(op.mean(flat, [2], True))))
    power = emit(op.mean(op.multiply(centred, centred), [2], True))
    y = op.multiply(centred, op.rsqrt(op.add(power, relax.const(float(eps), kind))))
    y = emit(op.reshape(emit(y), shape))
    channels = [1, c] + [1] * (len(shape) - 2)
    if weight is not None:
        y = emit(op.multiply(y, emit(op.reshape(weight, channels))))
    if bias is not None:
        y = emit(op.add(y, emit(op.reshape(bias, channels))))
    return (y,)


def rms_norm(node: Any, imp: Any) -> Any:
    """``x / sqrt(mean(x^2) + eps) * weight``, any shape, the weight computed or missing."""
    import torch

    relax, emit = _tvm.compiler().relax, imp.block_builder.emit
    op = relax.op
    x, normalized, *rest = imp.retrieve_args(node)
    weight, eps = (*rest, *(None, None)[len(rest) :])[:2]
    kind = str(x.ty.dtype)
    eps = torch.finfo(node.meta["val"].dtype).eps if eps is None else eps
    wide = kind if kind in ("float32", "float64") else "float32"
    x = emit(op.astype(x, wide))
    mean = emit(op.mean(op.multiply(x, x), list(range(-len(normalized), 0)), True))
    out = emit(op.multiply(x, op.rsqrt(op.add(mean, relax.const(float(eps), wide)))))
    if weight is not None:
        out = emit(op.multiply(out, op.astype(weight, wide)))
    return emit(op.astype(out, kind))


def divide_rounded(node: Any, imp: Any) -> Any:
    """``div(x, y, rounding_mode)``: to the lower number, or towards zero."""
    relax = _tvm.compiler().relax
    mode = node.kwargs.get("rounding_mode", "floor")
    whole = not node.meta["val"].is_floating_point()
    if mode == "floor":
        return _binary("floor_divide")(node, imp)
    quotient = _binary("divide", floating=not whole)(node, imp)
    if mode is None or whole:
        return quotient
    return imp.block_builder.emit(relax.op.trunc(quotient))


def nothing(node: Any, imp: Any) -> Any:
    """Leave out an assertion about the inputs."""
    return None


def unsupported(node: Any, imp: Any) -> Any:
    """Refuse an operator that TVM imports but has no kernel for."""
    raise InputError(
        f"the module uses an operator that has no kernel: {node.target}", file=place(node),
        remedy="Rewrite the module without it, or compile the parts around it",
    )  # fmt: skip


def _binary(op: str, *, swap: bool = False, floating: bool = False) -> Converter:
    """Return the converter of an elementwise operator of two: torch's type promotion, and ``alpha``."""

    def convert(node: Any, imp: Any) -> Any:
        import torch

        relax = _tvm.compiler().relax
        values = [a.meta["val"] if hasattr(a, "meta") else a for a in node.args[:2]]
        kind = torch.result_type(*values)
        if floating and not kind.is_floating_point:
            kind = torch.get_default_dtype()
        dtype = imp._convert_data_type(kind)

        def cast(arg: Any) -> Any:
            value = imp.retrieve_args(node)[arg]
            if not isinstance(value, relax.Expr):
                return relax.const(value, dtype)
            if str(value.ty.dtype) == dtype:
                return value
            return imp.block_builder.emit(relax.op.astype(value, dtype))

        left, right = cast(0), cast(1)
        alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
        if alpha != 1:
            right = imp.block_builder.emit(relax.op.multiply(right, relax.const(alpha, dtype)))
        pair = (right, left) if swap else (left, right)
        return imp.block_builder.emit(getattr(relax.op, op)(*pair))

    return convert


_BINARY = {
    "add": "add", "sub": "subtract", "mul": "multiply", "eq": "equal", "ne": "not_equal",
    "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal",
}  # fmt: skip

TABLE: dict[str, Converter] = {
    **{f"{a}.{kind}": _binary(op) for a, op in _BINARY.items() for kind in ("Tensor", "Scalar")},
    "rsub.Scalar": _binary("subtract", swap=True),
    "rsub.Tensor": _binary("subtract", swap=True),
    "div.Tensor": _binary("divide", floating=True),
    "div.Scalar": _binary("divide", floating=True),
    "maximum.default": _binary("maximum"),
    "minimum.default": _binary("minimum"),
    "dropout.default": dropout,
    "dropout_.default": dropout,
    "native_dropout.default": dropout,
    "_native_batch_norm_legit_functional.default": training_batch_norm,
    "_native_batch_norm_legit.default": training_batch_norm,
    "embedding.default": embedding,
    "select.int": select,
    "index.Tensor": index,
    "amax.default": _reduce("max"),
    "amin.default": _reduce("min"),
    "max.default": _reduce("max"),
    "min.default": _reduce("min"),
    "prod.default": _reduce("prod"),
    "prod.dim_int": _reduce("prod"),
    "max.dim": _extreme("max"),
    "min.dim": _extreme("min"),
    "cumsum.default": _cumulative("sum", 0),
    "cumprod.default": _cumulative("prod", 1),
    "layer_norm.default": layer_norm,
    "native_group_norm.default": group_norm,
    "div.Tensor_mode": divide_rounded,
    "div.Scalar_mode": divide_rounded,
    "floor_divide.default": divide_rounded,
    "_assert_async.msg": nothing,
    "_assert_scalar.default": nothing,
    "_assert_tensor_metadata.default": nothing,
    **dict.fromkeys(
        ("topk.default", "sort.default", "sort.stable", "argsort.default", "masked_select.default"),
        unsupported,
    ),
}
"""Converters by operator; each takes the node and TVM's importer."""
