"""``torch.compile(module, backend="mimo")``: TorchDynamo's graphs through the same pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


class _Frozen(torch.nn.Module):
    """A graph whose parameters and buffers, which Dynamo passes as inputs, are held as constants."""

    def __init__(
        self, graph: torch.fx.GraphModule, held: dict[int, torch.Tensor], count: int
    ) -> None:
        super().__init__()
        self.graph_module = graph
        self.count = count
        self.slots = sorted(held)
        for index, tensor in held.items():
            self.register_buffer(f"held_{index}", tensor.detach())

    def forward(self, *inputs: torch.Tensor) -> Any:
        """Run the graph on the inputs that are not held."""
        free = iter(inputs)
        held = set(self.slots)
        args = [getattr(self, f"held_{i}") if i in held else next(free) for i in range(self.count)]
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
        key = tuple((tuple(a.shape), a.dtype) for a in free)
        if key not in built:
            from mimo_compile.api import compile as compile_module

            held = {
                i: a if isinstance(a, torch.Tensor) else torch.tensor(a)
                for i, a in enumerate(args)
                if i in weights or not isinstance(a, torch.Tensor)
            }
            module = _Frozen(graph, held, len(args))
            with torch._dynamo.disable():
                built[key] = compile_module(module, example_inputs=tuple(free)).module()
        out = built[key](*(a.detach().contiguous() for a in free))
        outputs = out if isinstance(out, tuple) else (out,)
        return tuple(torch.from_numpy(o) for o in outputs)

    return run
