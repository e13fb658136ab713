"""``torch.compile(module, backend="mimo")``: TorchDynamo's graphs through the same pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.traceback import preserve_node_meta

from mimo_compile.errors import UsageError

Outputs = tuple[Any, ...]


class _Frozen(torch.nn.Module):
    """A graph whose weights and numbers, which Dynamo passes as inputs, are held as constants.

    Inputs that it changes are copied first and returned after the graph's own outputs.
    """

    def __init__(
        self, graph: torch.fx.GraphModule, held: dict[int, Any], count: int, changed: Sequence[int]
    ) -> None:
        super().__init__()
        self.graph_module = graph
        self.count, self.changed = count, changed
        self.numbers = {i: v for i, v in held.items() if not isinstance(v, torch.Tensor)}
        self.slots = sorted(held.keys() - self.numbers.keys())
        self.rest: list[tuple[int, Any]] = []
        for index in self.slots:
            self.register_buffer(f"held_{index}", held[index].detach())

    def forward(self, *inputs: torch.Tensor) -> Outputs:
        """Run the graph on the inputs that are not held; what is no tensor goes to `rest`."""
        free = iter(inputs)
        args: list[Any] = []
        for i in range(self.count):
            if i in self.numbers:
                args.append(self.numbers[i])
            elif i in self.slots:
                args.append(getattr(self, f"held_{i}"))
            else:
                args.append(next(free).clone() if i in self.changed else next(free))
        with preserve_node_meta():  # errors name the user's modules and lines
            outputs = torch.fx.Interpreter(self.graph_module).run(*args)
        self.rest = [(i, o) for i, o in enumerate(outputs) if not isinstance(o, torch.Tensor)]
        tensors = [o for o in outputs if isinstance(o, torch.Tensor)]
        return (*tensors, *(args[i] for i in self.changed))


class _Inference(torch.autograd.Function):
    """Marks results as those of differentiable inputs, so that asking for gradients is an error."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Outputs], *args: Any) -> Outputs:
        """Run the compiled graph."""
        outputs = run(*args)
        whole = (o for o in outputs if isinstance(o, torch.Tensor) and not o.is_floating_point())
        ctx.mark_non_differentiable(*whole)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Refuse."""
        raise UsageError(
            "backend mimo compiles for inference: it has no gradients",
            remedy="Train the module as it is, and compile it afterwards",
        )


class _Built:
    """A graph compiled for one combination of shapes and one set of weights."""

    def __init__(
        self, graph: torch.fx.GraphModule, args: Sequence[Any], held: dict[int, Any]
    ) -> None:
        from mimo_compile.api import compile as compile_module
        from mimo_compile.frontend.exported import NothingToCompile

        self.graph = graph
        self.weights = {i: a for i, a in held.items() if isinstance(a, torch.Tensor)}
        self.versions = _versions(self.weights)
        self.changed = [i for i in _changed(graph, args) if i not in held]
        self.free = [i for i in range(len(args)) if i not in held]
        module = _Frozen(graph, held, len(args), self.changed)
        examples = tuple(args[i].detach() for i in self.free)
        self.module: Any = None
        if all(a.numel() for a in examples) and examples:
            with suppress(NothingToCompile):
                self.module = compile_module(module, example_inputs=examples).module()
        self.rest = module.rest

    def __call__(self, args: Sequence[Any]) -> Outputs:
        """Run on all arguments of the graph; what the graph changes is changed in place."""
        if self.module is None:  # nothing to compute, or no elements to compute it on
            return tuple(self.graph(*args))
        given = [args[i].detach().contiguous() for i in self.free]
        found = self.module(*given)
        tensors = [_tensor(o) for o in (found if isinstance(found, tuple) else (found,))]
        count = len(tensors) - len(self.changed)
        for index, new in zip(self.changed, tensors[count:], strict=True):
            args[index].detach().copy_(new)
        outputs = tensors[:count]
        for index, value in self.rest:
            outputs.insert(index, value)
        return tuple(outputs)


def _tensor(array: Any) -> torch.Tensor:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(array)


def _is_weight(example: Any) -> bool:
    return isinstance(example, torch.nn.Parameter) or (
        isinstance(example, torch.Tensor) and hasattr(example, "_dynamo_static_input_type")
    )


def _versions(weights: dict[int, Any]) -> list[int]:
    return [0 if w.is_inference() else w._version for w in weights.values()]


def _changed(graph: torch.fx.GraphModule, args: Sequence[Any]) -> list[int]:
    """Return which arguments the graph writes into, by running it on tensors without data."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.inference_mode(False), torch.no_grad(), mode:  # tensors that count their changes
        fakes = [
            torch.empty_strided(a.shape, a.stride(), dtype=a.dtype)
            if isinstance(a, torch.Tensor)
            else a
            for a in args
        ]
        before = [getattr(f, "_version", 0) for f in fakes]
        graph(*fakes)
        return [i for i, f in enumerate(fakes) if getattr(f, "_version", 0) != before[i]]


def mimo_backend(
    graph: torch.fx.GraphModule, example_inputs: Sequence[Any]
) -> Callable[..., Outputs]:
    """Compile a TorchDynamo graph for this machine's CPU; register name ``mimo``.

    Each combination of input shapes is compiled on its first call, and again when weights were replaced
    or changed in place since. Buffers that the graph itself changes are inputs of the compiled code.
    Gradients are refused when they are asked for.
    """
    weights = [i for i, example in enumerate(example_inputs) if _is_weight(example)]
    built: dict[tuple[Any, ...], _Built] = {}
    constant: list[int] | None = None

    def run(*args: Any) -> Outputs:
        nonlocal constant
        if constant is None:
            written = set(_changed(graph, args)) if weights else set()
            constant = [i for i in weights if i not in written]
        # Extents that Dynamo made symbolic come as numbers: each value gets code of its own.
        held = {i: a for i, a in enumerate(args) if not isinstance(a, torch.Tensor)}
        numbers = tuple(held.items())
        held |= {i: args[i] for i in constant}
        key = (
            *((tuple(a.shape), a.dtype) for i, a in enumerate(args) if i not in held),
            *numbers,
            *(args[i].data_ptr() for i in constant),
        )
        found = built.get(key)
        if found is None or found.versions != _versions(found.weights):
            found = built[key] = _Built(graph, args, held)
        return found(args)

    def call(*args: Any) -> Outputs:
        if torch.is_grad_enabled() and any(getattr(a, "requires_grad", False) for a in args):
            outputs: Outputs = _Inference.apply(run, *args)  # type: ignore[no-untyped-call]
            return outputs
        return run(*args)

    return call
