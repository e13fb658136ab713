"""The dataflow of kernels: what a Relax function becomes once every operator is a kernel to be chosen.

A `KernelGraph` is a straight sequence of `Node`s over `Value`s; `networkx()` gives the same as a graph for
analyses (liveness, critical path, sharing) and `text()`/`dot()` show it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mimo_compile import _tvm
from mimo_compile.errors import InputError
from mimo_compile.ir.functions import workload_of
from mimo_compile.ir.importer import PREFIX, Imported
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.ir.workload import Workload

if TYPE_CHECKING:
    import networkx

Kind = Literal["input", "weight", "state", "constant", "temp"]


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """One tensor. ``view_of`` shares the bytes of another value under another shape."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    dtype: str
    source: str = ""
    """Global name of a weight or state."""
    data: Any = None
    """numpy array of a constant."""
    view_of: Value | None = None

    @property
    def root(self) -> Value:
        """The value that owns the bytes."""
        value = self
        while value.view_of is not None:
            value = value.view_of
        return value

    @property
    def nbytes(self) -> int:
        """Size of the tensor. Unit: bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * dtype_bytes(self.dtype)


def dtype_bytes(name: str) -> int:
    """Return the bytes of one element (bool: 1, bfloat16: 2)."""
    return {"bool": 1, "bfloat16": 2}.get(name) or np.dtype(name).itemsize


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """One kernel call: a dialect workload, or a generic TIR function."""

    workload: Workload
    args: tuple[Value, ...]
    """Inputs, weights and states in the order of the op's canonical arguments."""
    outputs: tuple[Value, ...]
    func: Any = None
    """The PrimFunc of a generic node (op ``tir``)."""
    label: str = ""


@dataclass(slots=True)
class KernelGraph:
    """Kernel calls in execution order."""

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    nodes: list[Node] = field(default_factory=list)

    def networkx(self) -> networkx.DiGraph:
        """Return the graph: nodes are call indices, an edge carries the value that flows."""
        import networkx

        graph = networkx.DiGraph()
        producer: dict[int, int] = {}
        touched: dict[int, int] = {}
        for index, node in enumerate(self.nodes):
            graph.add_node(index, workload=str(node.workload), label=node.label)
            for arg in node.args:
                if arg.root.kind == "state":  # calls on one state keep their order
                    if (before := touched.get(id(arg.root))) is not None and before != index:
                        graph.add_edge(before, index, value=arg.root.source)
                    touched[id(arg.root)] = index
                elif (source := producer.get(id(arg.root))) is not None:
                    graph.add_edge(source, index, value=arg.root.name)
            for out in node.outputs:
                producer[id(out)] = index
        return graph

    def liveness(self) -> dict[Value, tuple[int, int]]:
        """Return, for each value in the arena, the first and last call that touch it.

        Inputs live from before the first call (-1); outputs live past the last.
        """
        spans: dict[int, tuple[Value, int, int]] = {}

        def touch(value: Value, index: int) -> None:
            root = value.root
            if root.kind in ("temp", "input"):
                _, first, last = spans.get(id(root), (root, index, index))
                spans[id(root)] = (root, min(first, index), max(last, index))

        for value in self.inputs:
            touch(value, -1)
        for index, node in enumerate(self.nodes):
            for value in (*node.args, *node.outputs):
                touch(value, index)
        for value in self.outputs:
            touch(value, len(self.nodes))
        return {root: (first, last) for root, first, last in spans.values()}

    def workloads(self) -> dict[Workload, int]:
        """Return the workloads and how often each is called."""
        counts: dict[Workload, int] = {}
        for node in self.nodes:
            counts[node.workload] = counts.get(node.workload, 0) + 1
        return counts

    def lines(self) -> Iterator[str]:
        """Yield one readable line for each call."""
        for index, node in enumerate(self.nodes):
            outs = ", ".join(f"{v.name}{list(v.shape)}" for v in node.outputs)
            args = ", ".join(v.source or v.name for v in node.args)
            yield f"{index:4d} {outs} = {node.workload} ({args})  # {node.label}"

    def dot(self) -> str:
        """Return the graph in Graphviz's language."""
        graph = self.networkx()
        out = ["digraph kernels {", "  node [shape=box, fontname=monospace];"]
        for index, data in graph.nodes(data=True):
            out.append(f'  n{index} [label="{data["label"]}\\n{data["workload"]}"];')
        for a, b, data in graph.edges(data=True):
            out.append(f'  n{a} -> n{b} [label="{data["value"]}"];')
        return "\n".join([*out, "}"])


def instantiate(
    template: KernelGraph, prefix: str, rename: Callable[[str], str], inputs: Mapping[str, Value]
) -> KernelGraph:
    """Copy a stage's graph for one place of the model.

    Args:
        template: Graph of the stage; weights and states carry the stage's own names.
        prefix: Put before the names of temporaries and labels.
        rename: Stage's weight or state name -> global name.
        inputs: Values that stand for the template's inputs, by name.
    """
    mapping: dict[int, Value] = {id(v): inputs[v.name] for v in template.inputs}

    def image(value: Value) -> Value:
        if id(value) not in mapping:
            base = image(value.view_of) if value.view_of is not None else None
            named = value.source and value.kind != "constant"  # these are named by what they hold
            source = rename(value.source) if named else value.source
            mapping[id(value)] = replace(
                value, name=f"{prefix}.{value.name}", source=source, view_of=base
            )
        return mapping[id(value)]

    nodes = [
        replace(
            node,
            args=tuple(image(v) for v in node.args),
            outputs=tuple(image(v) for v in node.outputs),
            label=f"{prefix}.{node.label}" if node.label else prefix,
        )
        for node in template.nodes
    ]
    return KernelGraph(tuple(inputs.values()), tuple(image(v) for v in template.outputs), nodes)


def build_graph(imported: Imported, module: Any, states: Mapping[str, str]) -> KernelGraph:
    """Read a lowered Relax module as a kernel graph.

    Args:
        imported: What the parameters of ``main`` stand for.
        module: The lowered module (see `passes.lower`).
        states: Names of the tensors that are states -> their name in the graph.
    """
    return _Reader(imported, module, states).read()


class _Reader:
    def __init__(self, imported: Imported, module: Any, states: Mapping[str, str]) -> None:
        self.relax = _tvm.compiler().relax
        self.imported, self.module, self.states = imported, module, states
        self.values: dict[Any, Any] = {}
        self.nodes: list[Node] = []
        self.temps = 0

    def read(self) -> KernelGraph:
        main = self.module["main"]
        inputs = []
        for var in main.params:
            name = str(var.name)
            shape, dtype = self._type(var.ty)
            if name in self.imported.tensors:
                fqn = self.imported.tensors[name]
                kind: Kind = "state" if fqn in self.states else "weight"
                value = Value(name, kind, shape, dtype, self.states.get(fqn, fqn))
            else:
                value = Value(name, "input", shape, dtype)
                inputs.append(value)
            self.values[var] = value
        for block in main.body.blocks:
            for binding in block.bindings:
                self.values[binding.var] = self._bind(binding.var, binding.value)
        result = self._value(main.body.body)
        outputs = result if isinstance(result, tuple) else (result,)
        outputs = outputs[: len(outputs) - self.imported.effects]
        return KernelGraph(tuple(inputs), tuple(outputs), self.nodes)

    @staticmethod
    def _type(ty: Any) -> tuple[tuple[int, ...], str]:
        try:
            return tuple(int(d) for d in ty.shape.values), str(ty.dtype)
        except (TypeError, AttributeError) as error:
            raise InputError(
                f"a tensor has no static shape: {ty}", file="exported graph",
                remedy="export with static shapes",
            ) from error  # fmt: skip

    def _value(self, expr: Any) -> Any:
        relax = self.relax
        if isinstance(expr, _tvm.compiler().ir.GenericConst):
            array = expr.value.numpy()
            name = (
                "const_"
                + hashlib.sha256(array.tobytes() + str(array.shape).encode()).hexdigest()[:12]
            )
            return Value(name, "constant", tuple(array.shape), str(array.dtype), name, array)
        if isinstance(expr, relax.Tuple):
            return tuple(self._value(f) for f in expr.fields)
        if isinstance(expr, relax.TupleGetItem):
            return self._value(expr.tuple_value)[expr.index]
        return self.values[expr]

    def _temp(self, ty: Any) -> Value:
        self.temps += 1
        return Value(f"t{self.temps}", "temp", *self._type(ty))

    def _outputs(self, ty: Any) -> tuple[Value, ...]:
        fields = getattr(ty, "fields", None)
        return tuple(self._temp(t) for t in (fields if fields is not None else [ty]))

    def _bind(self, var: Any, expr: Any) -> Any:
        relax = self.relax
        if not isinstance(expr, relax.Call):
            return self._value(expr)
        op = getattr(expr.op, "name", "")
        if op == "relax.reshape":
            base = self._value(expr.args[0])
            return Value(
                f"{base.name}_view", base.kind, *self._type(expr.ty), base.source, view_of=base
            )
        if op == "relax.call_dps_packed":
            target = str(expr.args[0].global_symbol)
            args = self._value(expr.args[1])
            return self._dialect(target.removeprefix(PREFIX), args, self._outputs(expr.ty))
        if op == "relax.call_tir":
            args = self._value(expr.args[1])
            return self._generic(expr.args[0], args, self._outputs(expr.ty))
        raise InputError(
            f"operator {op or expr.op} cannot be lowered to a kernel", file="exported graph",
            remedy="rewrite the module without it",
        )  # fmt: skip

    def _emit(self, node: Node) -> Any:
        self.nodes.append(node)
        return node.outputs if len(node.outputs) > 1 else node.outputs[0]

    def _dialect(self, text: str, args: Any, outputs: tuple[Value, ...]) -> Any:
        workload = parse_workload(text)
        every = get_op(workload.op).args(workload)
        wanted = [a for a in every if a.role != "output"]
        given = args if isinstance(args, tuple) else (args,)
        for arg, value in zip(wanted, given, strict=True):
            if tuple(value.shape) != arg.shape:
                raise InputError(
                    f"{workload}: argument {arg.name} has shape {list(value.shape)}, "
                    f"not {list(arg.shape)}", file="exported graph",
                )  # fmt: skip
        if len(wanted) == len(every):  # it writes states, and its result only kept it alive
            self.nodes.append(Node(workload, given, (), label=workload.op))
            return outputs[0]
        label = next((v.source.rpartition(".")[0] for v in given if v.kind == "weight"), "")
        return self._emit(Node(workload, given, outputs, label=label or workload.op))

    def _generic(self, var: Any, args: Any, outputs: tuple[Value, ...]) -> Any:
        func = self.module[var]
        given = args if isinstance(args, tuple) else (args,)
        name = str(var.name_hint)  # TVM's own string type cannot be written to an artifact
        workload = workload_of(func)
        return self._emit(Node(workload, given, outputs, func, name))
