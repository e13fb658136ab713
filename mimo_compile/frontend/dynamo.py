"""``torch.compile(module, backend="mimo")``: TorchDynamo's graphs through the same pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


class _Frozen(torch.nn.Module):
    """A graph whose parameters and buffers, which Dynamo passes as inputs, are held as constants."""

    def __init__(self, graph: torch.fx.GraphModule, held: dict[int, Any], count: int) -> None:
        super().__init__()
        self.graph_module = graph
        self.count = count
        self.numbers = {i: v for i, v in held.items() if not isinstance(v, torch.Tensor)}
        self.slots = sorted(held.keys() - self.numbers.keys())
        for index in self.slots:
            self.register_buffer(f"held_{index}", held[index].detach())

    def forward(self, *inputs: torch.Tensor) -> Any:
        """Run the graph on the inputs that are not held."""
        free = iter(inputs)
        args: list[Any] = []
        for i in range(self.count):
            if i in self.numbers:
                args.append(self.numbers[i])
            else:
                args.append(getattr(self, f"held_{i}") if i in self.slots else next(free))
        return self.graph_module(*args)


def _is_weight(example: Any) -> bool:
    return isinstance(example, torch.nn.Parameter) or (
        isinstance(example, torch.Tensor) and hasattr(example, "_dynamo_static_input_type")
    )


def mimo_backend(
    graph: torch.fx.GraphModule, example_inputs: Sequence[Any]
) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Compile a TorchDynamo graph for this machine's CPU; register name ``mimo``.

    Each combination of input shapes is compiled on its first call. Weights are packed then: later changes
    to them need a new ``torch.compile``.
    """
    weights = [i for i, example in enumerate(example_inputs) if _is_weight(example)]
    built: dict[tuple[Any, ...], Any] = {}

    def run(*args: Any) -> tuple[torch.Tensor, ...]:
        free = [a for i, a in enumerate(args) if i not in weights and isinstance(a, torch.Tensor)]
        # Extents that Dynamo made symbolic come as numbers: each value gets code of its own.
        numbers = {i: a for i, a in enumerate(args) if not isinstance(a, torch.Tensor)}
        key = (*((tuple(a.shape), a.dtype) for a in free), *numbers.items())
        if key not in built:
            from mimo_compile.api import compile as compile_module

            held = {**{i: args[i] for i in weights}, **numbers}
            module = _Frozen(graph, held, len(args))
            built[key] = compile_module(module, example_inputs=tuple(free)).module()
        out = built[key](*(a.detach().contiguous() for a in free))
        outputs = out if isinstance(out, tuple) else (out,)
        return tuple(torch.from_numpy(o) for o in outputs)

    return run
