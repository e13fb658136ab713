"""torch.export graph -> Relax, with the `mimo` ops kept whole.

TVM's own importer translates generic ATen nodes. The dialect's ops, and `linear` with a constant weight,
become ``call_dps_packed("mimo:<workload>", ...)``: one node per kernel to be chosen, whose name is the
workload's text. Weights and states stay function parameters, so that no data is copied at import.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mimo_compile import _tvm
from mimo_compile.errors import InputError
from mimo_compile.ir.caches import FORMATS as CACHES
from mimo_compile.ir.formats import parse_weight_format
from mimo_compile.ir.generic_ops import TABLE, generic_linear
from mimo_compile.ir.generic_ops import rms_norm as generic_rms_norm
from mimo_compile.ir.guard import Wide, check_arguments, check_operators, guarded
from mimo_compile.ir.import_attention import ListConverters, in_pages
from mimo_compile.ir.import_pages import PageConverters
from mimo_compile.ir.kv_groups import STATES
from mimo_compile.ir.ops import get_op, load_all
from mimo_compile.ir.workload import Value

if TYPE_CHECKING:
    import torch

PREFIX = "mimo:"
"""Marks a `call_dps_packed` target that is a workload's text."""
MEASURED_KV = 1024
"""KV length that full-attention decode kernels of a model are measured at (or the cache, if shorter)."""


_PLAIN = ("slice.Tensor", "scaled_dot_product_attention.default")
"""Converters here that make generic operators, not workloads."""


@dataclass(frozen=True, slots=True)
class Imported:
    """A Relax module with one function ``main``; its parameters by what they stand for."""

    module: Any
    inputs: tuple[str, ...]
    """User inputs: names of the leading parameters."""
    tensors: dict[str, str]
    """Remaining parameters: name -> fully qualified name of the module's parameter or buffer."""
    effects: int = 0
    """Last results of ``main`` that only keep calls alive which write states and give nothing else."""


def _shape(var: Any) -> list[int]:
    return [int(d) for d in var.ty.shape.values]


def _cache_format(*caches: Any) -> str:
    """Return the name of the format that both caches of a layer have."""
    kinds = {str(c.ty.dtype) for c in caches}
    found = [f.name for f in CACHES.values() if kinds == {f.dtype}]
    if not found:
        raise InputError(
            f"KV caches of type {', '.join(sorted(kinds))} have no kernels", file="exported graph",
            remedy=f"use one of {', '.join(f.dtype for f in CACHES.values())} for both",
        )  # fmt: skip
    return found[0]


def _sequences(cache: Any) -> int:
    """Return how many sequences a batch's caches ``[B, cap, KV, D]`` belong to; without that extent one."""
    shape = _shape(cache)
    return shape[0] if len(shape) == 4 else 1


def _named(more: list[Any]) -> str:
    """Return the format of caches that an op's last argument names; empty: their type says it."""
    return str(more[0]) if more else ""


def _group_shape(
    states: list[Any], table: Any = None, most: int = 0, page: int = 0
) -> dict[str, int]:
    """Return the parameters of ops that a cache in groups (`kv_groups.STATES`), or its pages, decide on."""
    (cap, kv, d), dv, tail = _shape(states[0])[-3:], _shape(states[3])[-1], _shape(states[2])[-3]
    own = {"cap": cap, "b": _sequences(states[0])} | in_pages(table, most, page, cap)
    return {"kv": kv, "d": d, "dv": dv, "tail": tail, **own}


class _Converters:
    """Converters for TVM's importer; each takes an fx node and the importer, returns Relax values."""

    def __init__(self, weights: set[str], wide: Wide, lay: str = "") -> None:
        self.weights = weights
        self.wide = wide
        self.lay = lay
        self.lists = ListConverters(self.call, _cache_format, lay)
        self.table: dict[str, Callable[[Any, Any], Any]] = {
            "linear.default": self.linear,
            "mpgemm.default": self.mpgemm,
            "lora_mpgemm.default": self.lora_mpgemm,
            "lora_linear.default": self.lora_linear,
            "rms_norm.default": self.rms_norm,
            "add_rms_norm.default": self.add_rms_norm,
            "kv_append.default": self.kv_append,
            "cached_attention.default": self.cached_attention,
            "kv_append_groups.default": self.kv_append_groups,
            "grouped_attention.default": self.grouped_attention,
            "route.default": self.route,
            "moe.default": self.moe,
            "rope_table.default": self.rope_table,
            "swiglu.default": self.swiglu,
            "embed.default": self.embed,
            "slice.Tensor": self.slice,
            "scaled_dot_product_attention.default": self.attention,
            **self.lists.table,
            **PageConverters(self.call, _cache_format, self.lists.appended, lay).table,
        }

    def call(
        self, imp: Any, op: str, args: list[Any], outs: list[tuple[list[int], str]], **p: Value
    ) -> Any:
        """Emit one dialect op; returns a value, or a tuple of values."""
        relax = _tvm.compiler().relax
        workload = get_op(op).workload(**p)
        given = [a for a in args if a is not None]
        check_arguments(workload, [_shape(a) for a in given])
        types = [relax.TensorType(shape, dtype) for shape, dtype in outs]
        var = imp.block_builder.emit(
            relax.op.call_dps_packed(
                PREFIX + str(workload),
                given,
                types if len(types) > 1 else types[0],
            )
        )
        if len(types) == 1:
            return var
        return tuple(imp.block_builder.emit(relax.TupleGetItem(var, i)) for i in range(len(types)))

    def reshape(self, imp: Any, x: Any, shape: list[int]) -> Any:
        if _shape(x) == shape:
            return x
        return imp.block_builder.emit(_tvm.compiler().relax.op.reshape(x, shape))

    def _matmul(
        self, imp: Any, x: Any, args: list[Any], n: int, op: str = "mpgemm", **p: Value
    ) -> Any:
        shape = _shape(x)
        rows = 1
        for d in shape[:-1]:
            rows *= d
        flat = self.reshape(imp, x, [rows, shape[-1]])
        y = self.call(
            imp, op, [flat, *args], [([rows, n], "float32")], m=rows, n=n, k=shape[-1], **p
        )
        return self.reshape(imp, y, [*shape[:-1], n])

    def linear(self, node: Any, imp: Any) -> Any:
        args = imp.retrieve_args(node)
        x, weight, bias = args[0], args[1], args[2] if len(args) > 2 else None
        act = args[3] if len(args) > 3 else "a16"  # mimo's own linear layer
        own = node.args[1].name in self.weights and (
            bias is None or node.args[2].name in self.weights
        )
        kind = str(x.ty.dtype)
        fmt = {"float32": "f32", "bfloat16": "bf16"}.get(str(weight.ty.dtype))
        if not own or fmt is None or kind not in ("float32", "bfloat16"):
            return generic_linear(imp, x, weight, bias)
        # sums are float32, whatever the ends are; a bias in 16 bits is no kernel's argument
        inside = bias is None or str(bias.ty.dtype) == "float32"
        y = self._matmul(
            imp, self.wide.widen(x), [weight, bias if inside else None], _shape(weight)[0],
            w=fmt, a=act, bias=int(bias is not None and inside),
        )  # fmt: skip
        if not inside:
            y = imp.block_builder.emit(_tvm.compiler().relax.op.add(y, self.wide.widen(bias)))
        return self.wide.round(y, node.meta["val"])

    def mpgemm(self, node: Any, imp: Any) -> Any:
        x, codes, scale, zero, bias, w, a, *s = imp.retrieve_args(node)
        return self._matmul(
            imp,
            x,
            [codes, scale, zero, bias],
            parse_weight_format(w).rows(_shape(codes)[0]),
            w=w,
            a=a,
            s=s[0] if s else "f16",
            bias=int(bias is not None),
        )

    def lora_mpgemm(self, node: Any, imp: Any) -> Any:
        x, adapter, codes, scale, zero, bias, a, b, gain, w, act, s, parts = imp.retrieve_args(node)
        return self._lora(
            imp, x, [adapter, codes, scale, zero, bias, a, b, gain], parts, bias, w=w, a=act, s=s
        )

    def lora_linear(self, node: Any, imp: Any) -> Any:
        x, adapter, weight, bias, a, b, gain, parts, *act = imp.retrieve_args(node)
        fmt = {"float32": "f32", "bfloat16": "bf16"}[str(weight.ty.dtype)]
        return self._lora(
            imp,
            x,
            [adapter, weight, bias, a, b, gain],
            parts,
            bias,
            w=fmt,
            a=act[0] if act else "a16",
        )

    def _lora(self, imp: Any, x: Any, args: list[Any], parts: str, bias: Any, **p: Value) -> Any:
        b = args[-2]
        count, n, r = _shape(b)
        kind = {"float32": "f32", "bfloat16": "bf16", "uint8": "fp8"}[str(b.ty.dtype)]
        return self._matmul(
            imp, x, args, n, "lora_mpgemm", bias=int(bias is not None), r=r, l=count, d=kind,
            parts=parts, **p,
        )  # fmt: skip

    def rms_norm(self, node: Any, imp: Any) -> Any:
        args = imp.retrieve_args(node)
        x, weight = args[0], args[2] if len(args) > 2 else None
        plain = weight is not None and str(x.ty.dtype) == str(weight.ty.dtype) == "float32"
        if not plain or len(args[1]) > 1 or node.args[2].name not in self.weights:
            return generic_rms_norm(node, imp)
        eps = args[3] if len(args) > 3 and args[3] is not None else 1.1920928955078125e-07
        shape = _shape(x)
        rows = 1
        for d in shape[:-1]:
            rows *= d
        flat = self.reshape(imp, x, [rows, shape[-1]])
        out = [([rows, shape[-1]], "float32")]
        y = self.call(imp, "rms_norm", [flat, weight], out, t=rows, d=shape[-1], eps=float(eps))
        return self.reshape(imp, y, shape)

    def add_rms_norm(self, node: Any, imp: Any) -> Any:
        x, residual, weight, eps = imp.retrieve_args(node)
        t, d = _shape(x)
        out = ([t, d], "float32")
        return self.call(
            imp, "rms_norm", [x, residual, weight], [out, out], t=t, d=d, residual=1, eps=float(eps)
        )

    def kv_append(self, node: Any, imp: Any) -> Any:
        qkv, table, pos, q_norm, k_norm, k_cache, v_cache, heads, eps, v_scale, *more = (
            imp.retrieve_args(node)
        )
        rows, (cap, kv, d), dv = _shape(qkv)[0], _shape(k_cache)[-3:], _shape(v_cache)[-1]
        t = rows // (b := _sequences(k_cache))
        self.lists.appended[k_cache] = t
        norm = {"norm": 1, "eps": float(eps)} if q_norm is not None else {}
        return self.call(
            imp, "kv_append", [qkv, table, pos, q_norm, k_norm, k_cache, v_cache],
            [([rows, heads, d], "float32")], t=t, h=heads, kv=kv, d=d, dv=dv, cap=cap,
            rot=2 * _shape(table)[2], vscale=float(v_scale), lay=self.lay,
            c=_named(more[1:]) or _cache_format(k_cache, v_cache), first=more[0] if more else 0, b=b,
            **norm,
        )  # fmt: skip

    def cached_attention(self, node: Any, imp: Any) -> Any:
        q, k_cache, v_cache, pos, sink, scale, window, *more = imp.retrieve_args(node)
        (rows, h, d), (cap, kv, _), dv = _shape(q), _shape(k_cache)[-3:], _shape(v_cache)[-1]
        t = rows // (b := _sequences(k_cache))
        same = abs(float(scale) * d**0.5 - 1) < 1e-6
        return self.call(
            imp, "cached_attention", [q, pos, sink, k_cache, v_cache], [([rows, h, dv], "float32")],
            t=t, h=h, kv=kv, d=d, dv=dv, cap=cap, window=window, sink=int(sink is not None),
            scale=0.0 if same else float(scale), len=0 if window else min(cap, max(t, MEASURED_KV)),
            c=_named(more) or _cache_format(k_cache, v_cache), lay=self.lay, b=b,
        )  # fmt: skip

    def kv_append_groups(self, node: Any, imp: Any) -> Any:
        qkv, table, pos, q_norm, k_norm, *more = imp.retrieve_args(node)
        states, (heads, eps, gain, c, *where) = more[: len(STATES)], more[len(STATES) :]
        norm = {"norm": 1, "eps": float(eps)} if q_norm is not None else {}
        rows, shape = _shape(qkv)[0], _group_shape(states, *where)
        return self.call(
            imp, "kv_append", [qkv, table, pos, q_norm, k_norm, *where[:1], *states],
            [([rows, heads, shape["d"]], "float32")], t=rows // shape["b"], h=heads, rot=2 * _shape(table)[2],
            vscale=float(gain), c=c, **shape, **norm,
        )  # fmt: skip

    def grouped_attention(self, node: Any, imp: Any) -> Any:
        q, *more = imp.retrieve_args(node)
        states, (pos, sink, scale, c, *where) = more[: len(STATES)], more[len(STATES) :]
        (rows, h, d), shape = _shape(q), _group_shape(states, *where)
        t = rows // shape["b"]
        same, cap = abs(float(scale) * d**0.5 - 1) < 1e-6, shape["cap"]
        return self.call(
            imp, "cached_attention", [q, pos, sink, *where[:1], *states],
            [([rows, h, shape["dv"]], "float32")],
            t=t, h=h, sink=int(sink is not None), scale=0.0 if same else float(scale),
            len=min(cap, max(t, MEASURED_KV)), c=c, **shape,
        )  # fmt: skip

    def route(self, node: Any, imp: Any) -> Any:
        logits, bias, k, scoring, norm, factor, groups, top_groups = imp.retrieve_args(node)
        t, e = _shape(logits)
        return self.call(
            imp, "route", [logits, bias], [([t, k], "int32"), ([t, k], "float32")], t=t, e=e, k=k,
            scoring=scoring, bias=int(bias is not None), norm=int(norm), factor=float(factor),
            groups=groups, topgroups=top_groups,
        )  # fmt: skip

    def moe(self, node: Any, imp: Any) -> Any:
        x, ids, weights, w13, s13, z13, w2, s2, z2, w, a, *s = imp.retrieve_args(node)
        t, d = _shape(x)
        e, _, f = _shape(w2)
        f *= 2 if parse_weight_format(w).family == "complex" else 1
        return self.call(
            imp, "moe", [x, ids, weights, w13, s13, z13, w2, s2, z2], [([t, d], "float32")],
            t=t, e=e, k=_shape(ids)[1], d=d, f=f, w=w, a=a, s=s[0] if s else "f16",
        )  # fmt: skip

    def rope_table(self, node: Any, imp: Any) -> Any:
        pos, inv_freq, t = imp.retrieve_args(node)
        half, b = _shape(inv_freq)[0], _shape(pos)[0] if len(_shape(pos)) == 2 else 1
        out = [([b * t, 2, half], "float32")]
        return self.call(imp, "rope_table", [pos, inv_freq], out, t=t, rot=2 * half, b=b)

    def swiglu(self, node: Any, imp: Any) -> Any:
        (x,) = imp.retrieve_args(node)
        t, width = _shape(x)
        return self.call(imp, "swiglu", [x], [([t, width // 2], "float32")], t=t, f=width // 2)

    def embed(self, node: Any, imp: Any) -> Any:
        ids, table = imp.retrieve_args(node)
        (t,), (v, d) = _shape(ids), _shape(table)
        fmt = "bf16" if str(table.ty.dtype) == "bfloat16" else "f32"
        return self.call(imp, "embed", [ids, table], [([t, d], "float32")], t=t, v=v, d=d, w=fmt)

    def attention(self, node: Any, imp: Any) -> Any:
        """Plain attention ``softmax(q k^T scale + mask) v``; TVM's converter refuses boolean masks."""
        relax, op = _tvm.compiler().relax, _tvm.compiler().relax.op
        q, k, v, *rest = imp.retrieve_args(node)
        given = dict(zip(("attn_mask", "dropout_p", "is_causal"), rest, strict=False))
        given |= {
            name: imp.env.get(a, a) if a is not None else None for name, a in node.kwargs.items()
        }
        if given.get("dropout_p"):
            raise InputError("attention with dropout", file="exported graph", remedy="call eval()")
        if _shape(q)[-3] != _shape(k)[-3]:  # enable_gqa: query heads share key heads
            times = _shape(q)[-3] // _shape(k)[-3]
            k, v = (op.repeat(t, times, len(_shape(q)) - 3) for t in (k, v))
        scale = given.get("scale") or _shape(q)[-1] ** -0.5
        dims = list(range(len(_shape(q))))
        turned = op.permute_dims(k, [*dims[:-2], dims[-1], dims[-2]])
        scores = op.multiply(op.matmul(q, turned), relax.const(float(scale), str(q.ty.dtype)))
        mask = given.get("attn_mask")
        minus = relax.const(float("-inf"), str(q.ty.dtype))
        if given.get("is_causal"):
            rows, columns = _shape(q)[-2], _shape(k)[-2]
            ones = op.full([rows, columns], relax.const(1, "int32"), "int32")
            mask = imp.block_builder.emit(op.astype(op.tril(ones), "bool"))
        if mask is not None and str(mask.ty.dtype) == "bool":
            scores = op.where(mask, scores, minus)
        elif mask is not None:
            scores = op.add(scores, mask)
        return imp.block_builder.emit(op.matmul(op.nn.softmax(scores, -1), v))

    def slice(self, node: Any, imp: Any) -> Any:
        """A slice with a unit step over a known extent (an undecomposed export keeps `slice.Tensor`)."""
        args = list(imp.retrieve_args(node))
        args += [0, None, None, 1][len(args) - 1 :]
        x, dim, begin, end, step = args
        extent = _shape(x)[dim]
        begin = 0 if begin is None else begin
        end = extent if end is None else min(end, extent)
        relax = _tvm.compiler().relax
        return imp.block_builder.emit(relax.op.strided_slice(x, [dim], [begin], [end], [step]))


def import_exported(program: torch.export.ExportedProgram, lay: str = "") -> Imported:
    """Translate an exported program (static shapes) into Relax.

    ``lay``: order of its KV caches, see `caches.CACHE_ORDERS`.

    Raises:
        InputError: the graph uses an operator that cannot be imported.
    """
    relax = _tvm.compiler().relax
    from torch.export.graph_signature import InputKind, OutputKind
    from tvm.relax.frontend.torch.exported_program_translator import (
        ExportedProgramImporter,
    )

    load_all()
    specs = program.graph_signature.input_specs
    tensors = {s.arg.name: str(s.target) for s in specs if s.kind != InputKind.USER_INPUT}
    importer = ExportedProgramImporter()
    wide = Wide(importer)
    converters = _Converters(set(tensors), wide, lay)
    dialect = converters.table
    own = {**TABLE, **dialect}
    importer.update_convert_map(own)
    check_operators(program.graph.nodes, importer.convert_map)
    importer.convert_map = {
        name: guarded(c, wide, widen=name not in dialect or name in _PLAIN, own=name in own)
        for name, c in importer.convert_map.items()
    }
    variables = _variables(program, importer)
    users = [s.arg.name for s in specs if s.arg.name in variables and s.arg.name not in tensors]
    constants = [name for name in tensors if name in variables]
    importer.block_builder = relax.BlockBuilder()
    builder = importer.block_builder
    with builder.function(name="main", params=[variables[n] for n in (*users, *constants)]):
        with builder.dataflow():
            importer._flatten_output_args = tuple  # the output node's values, in its own order
            values = importer._translate_fx_graph(
                program.graph_module, program.graph.nodes, dict(variables)
            )
            outputs = program.graph_signature.output_specs
            kept = [
                v
                for v, s in zip(values, outputs, strict=True)
                if s.kind == OutputKind.USER_OUTPUT and isinstance(v, relax.Expr)
            ]
            if not kept:
                raise InputError("no tensor comes out of it", file="exported graph")
            effects = converters.lists.effects
            result = builder.emit_output(relax.Tuple([*kept, *effects]))
        builder.emit_func_output(result)
    constants_of = {n: tensors[n] for n in constants}
    return Imported(builder.get(), tuple(users), constants_of, len(effects))


def _variables(program: torch.export.ExportedProgram, importer: Any) -> dict[str, Any]:
    """Return a Relax variable for each tensor that the graph takes; numbers and None are part of it.

    Raises:
        InputError: an extent is not fixed.
    """
    import torch

    relax = _tvm.compiler().relax
    out = {}
    for node in program.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            continue
        if not all(isinstance(d, int) for d in value.shape):
            raise InputError(
                f"input {node.name} has dynamic extents {list(value.shape)}", file="exported graph",
                remedy="export with static shapes, once for each shape",
            )  # fmt: skip
        dtype = importer._convert_data_type(value.dtype)
        out[node.name] = relax.Var(node.name, relax.TensorType(list(value.shape), dtype))
    return out
