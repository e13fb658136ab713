"""Kernel graphs with a plan -> flat programs, packed weights and states, ready to be written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from mimo_compile.artifact import Deferred
from mimo_compile.errors import MimoError
from mimo_compile.ir.graph import KernelGraph, Node, Value
from mimo_compile.ir.ops import get_op, pages
from mimo_compile.ir.ops.base import Arg, Array
from mimo_compile.ir.workload import Workload
from mimo_compile.pipeline.memory import plan_arena
from mimo_compile.runtime.program import Buffer, Call, Entry, State
from mimo_compile.schedules import Kernel, Schedule


@dataclass(frozen=True, slots=True)
class Lowered:
    """The kernel of one workload, and the schedule that packs its constants.

    None: a function that no schedule supports.
    """

    kernel: Kernel
    schedule: Schedule | None = None
    config: Any = None
    stands_in: bool = False
    """The rules' kernel of a generic function, in place of a choice that the compiler refuses."""


def to_numpy(tensor: Any) -> Array:
    """Return a torch tensor as numpy; bfloat16 as its bits (uint16)."""
    import torch

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        bits: Array = tensor.view(torch.int16).numpy().view(np.uint16)
        return bits
    out: Array = tensor.numpy()
    return out


@dataclass(slots=True)
class Emitter:
    """Collects what all entry points of one artifact share: packed weights and states."""

    lowered: Mapping[Workload, Lowered]
    tensors: Mapping[str, Callable[[], Any]]
    """Global weight name -> canonical torch tensor."""
    weights: dict[str, Deferred] = field(default_factory=dict)
    states: dict[str, State] = field(default_factory=dict)
    pooled: set[str] = field(default_factory=set)
    """States that sequences have together: pages of a pool."""
    _packed: dict[tuple[Any, ...], dict[str, str]] = field(default_factory=dict)
    _cache: dict[tuple[Any, ...], dict[str, Array]] = field(default_factory=dict)

    def entry(self, graph: KernelGraph, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> Entry:
        """Lay out one entry point: arena, buffers and calls."""
        return _EntryBuilder(self, graph).build(inputs, outputs)

    def canonical(self, value: Value) -> Array:
        """Return the data of a weight or constant in the value's own shape."""
        root = value.root
        data = root.data if root.kind == "constant" else to_numpy(self.tensors[root.source]())
        out: Array = np.ascontiguousarray(data).reshape(value.shape)
        return out

    def plain(self, value: Value) -> str:
        """Return the artifact's name of a weight that is used as it is."""
        name = value.root.source
        if name not in self.weights:
            shape, dtype = value.root.shape, _stored_dtype(value.dtype)
            self.weights[name] = Deferred(dtype, shape, lambda: self.canonical(value.root))
        return name

    def packed(self, node: Node, low: Lowered, weights: Mapping[str, Value]) -> dict[str, str]:
        """Return, for each packed argument of a kernel, the artifact's tensor that holds it."""
        schedule = low.schedule
        assert schedule is not None
        layouts = tuple(sorted(schedule.layouts(node.workload, low.config).items()))
        sources = tuple((name, v.root.source) for name, v in weights.items())
        key = (schedule.op, sources, layouts)
        if key in self._packed:
            return self._packed[key]
        wanted = [a for a in low.kernel.args if a.role == "weight"]
        base = _common_prefix([v.root.source for v in weights.values()])
        names: dict[str, str] = {}
        for arg in wanted:
            name = base if base.endswith(f".{arg.name}") else f"{base}.{arg.name}"
            while name in self.weights:
                name += "'"
            names[arg.name] = name
            self.weights[name] = Deferred(
                arg.dtype, arg.shape, partial(self._pack, key, node, low, weights, arg)
            )
        self._packed[key] = names
        return names

    def _pack(
        self, key: tuple[Any, ...], node: Node, low: Lowered, weights: Mapping[str, Value], arg: Arg
    ) -> Array:
        # Packing gives all arguments at once; the rest waits until its turn to be written.
        waiting = self._cache.get(key)
        if waiting is None or arg.name not in waiting:
            assert low.schedule is not None
            arrays = {name: self.canonical(v) for name, v in weights.items()}
            waiting = dict(low.schedule.pack(node.workload, low.config, arrays))
            self._cache[key] = waiting
        out = waiting.pop(arg.name)
        if not waiting:
            del self._cache[key]
        if out.shape != arg.shape or str(out.dtype) != arg.dtype:
            raise MimoError(
                f"{low.schedule and low.schedule.name} packs {arg.name} as {out.dtype}{list(out.shape)}, "
                f"its kernel reads {arg.dtype}{list(arg.shape)}", where=node.label,
            )  # fmt: skip
        return out

    def state(self, arg: Arg, value: Value, sequences: int) -> str:
        """Register a state in the layout that a kernel reads; every kernel must agree.

        It is that of one sequence: a kernel of a batch reads those of so many, one after the other.
        """
        shape = (arg.shape[0] // sequences, *arg.shape[1:])
        name, state = value.root.source, State(shape, arg.dtype)
        if self.states.setdefault(name, state) != state:
            raise MimoError(f"kernels disagree on the layout of {name}", where=str(state))
        return name


def _stored_dtype(dtype: str) -> str:
    return "uint16" if dtype == "bfloat16" else dtype


def _common_prefix(names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    parts = [PurePosixPath(n.replace(".", "/")).parts for n in names]
    common = []
    for column in zip(*parts, strict=False):
        if len(set(column)) != 1:
            break
        common.append(column[0])
    return ".".join(common) or names[0]


class _EntryBuilder:
    def __init__(self, emitter: Emitter, graph: KernelGraph) -> None:
        self.emitter, self.graph = emitter, graph
        self.offsets, self.arena_bytes = plan_arena(graph.liveness())
        self.buffers: list[Buffer] = []
        self.index: dict[Buffer, int] = {}

    def build(self, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> Entry:
        calls = tuple(self._call(node) for node in self.graph.nodes)
        ins = {n: self._value(v) for n, v in zip(inputs, self.graph.inputs, strict=True)}
        outs = {n: self._value(v) for n, v in zip(outputs, self.graph.outputs, strict=True)}
        return Entry(self.arena_bytes, tuple(self.buffers), calls, ins, outs)

    def _add(self, buffer: Buffer) -> int:
        if buffer not in self.index:
            self.index[buffer] = len(self.buffers)
            self.buffers.append(buffer)
        return self.index[buffer]

    def _value(self, value: Value, arg: Arg | None = None) -> int:
        """Return the buffer of an arena value, or of a weight that is used as it is."""
        shape, dtype = (arg.shape, arg.dtype) if arg else (value.shape, value.dtype)
        if value.root.kind in ("weight", "constant"):
            return self._add(Buffer("weight", shape, dtype, source=self.emitter.plain(value)))
        return self._add(Buffer("arena", shape, dtype, offset=self.offsets[value.root]))

    def _call(self, node: Node) -> Call:
        low = self.emitter.lowered[node.workload]
        if node.func is not None:
            values = [*node.args, *node.outputs]
            args = [self._value(v, a) for v, a in zip(values, low.kernel.args, strict=True)]
            return Call(low.kernel.name, tuple(args), node.label)
        op = get_op(node.workload.op)
        op_args, p = op.args(node.workload), op.full(node.workload)
        given = dict(zip([a.name for a in op_args if a.role != "output"], node.args, strict=True))
        given |= zip([a.name for a in op_args if a.role == "output"], node.outputs, strict=True)
        weights = {a.name: given[a.name] for a in op_args if a.role == "weight"}
        packed = self.emitter.packed(node, low, weights) if weights else {}
        args = []
        for arg in low.kernel.args:
            if arg.role == "weight":
                buffer = Buffer("weight", arg.shape, arg.dtype, source=packed[arg.name])
                args.append(self._add(buffer))
            elif arg.role == "state":
                pooled = pages.in_pool(p, arg.name)
                sequences = 1 if pooled else p.get("b", 1)
                source = self.emitter.state(arg, given[arg.name], sequences)
                if pooled:
                    self.emitter.pooled.add(source)
                args.append(self._add(Buffer("state", arg.shape, arg.dtype, source=source)))
            else:
                args.append(self._value(given[arg.name], arg))
        return Call(low.kernel.name, tuple(args), node.label)
