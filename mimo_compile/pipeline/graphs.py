"""A model's entry points as kernel graphs: export each kind of stage once per token count, then repeat it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from mimo_compile.ir.graph import KernelGraph, Value, build_graph, instantiate
from mimo_compile.ir.importer import import_exported
from mimo_compile.ir.ops.pages import TABLE
from mimo_compile.ir.passes.lower import lower_generic
from mimo_compile.ir.workload import BUCKETS, Workload
from mimo_compile.pipeline.batch import check_layers

if TYPE_CHECKING:
    import torch

    from mimo_compile.frontend.models.decoder import Decoder
    from mimo_compile.frontend.models.kv import Paging
    from mimo_compile.frontend.models.stage import Stage

HEADS = (1, 4, 64)
"""Token counts that logits are computed for at once (the next token, verification, scoring)."""
DECODE_STEPS = (1,)
"""Token counts of ``decode_T``, where generated tokens attend in another way than those of a prompt."""
DRAFT_STEPS = (1, 4, 64)
"""Token counts of draft heads."""


@dataclass(slots=True)
class ModelGraphs:
    """Everything a compilation needs of a model: entry points, and where tensors come from."""

    name: str
    entries: dict[str, KernelGraph]
    input_names: dict[str, tuple[str, ...]]
    output_names: dict[str, tuple[str, ...]]
    tensors: dict[str, Callable[[], torch.Tensor]] = field(default_factory=dict)
    """Global weight name -> the canonical tensor."""
    decoder: Decoder | None = None
    paging: Paging | None = None
    """Pages that sequences take; None: each has caches of its own."""

    def workloads(self) -> dict[Workload, dict[str, int]]:
        """Return each workload with its number of calls by entry."""
        out: dict[Workload, dict[str, int]] = {}
        for entry, graph in self.entries.items():
            for workload, count in graph.workloads().items():
                out.setdefault(workload, {})[entry] = count
        return out

    def functions(self) -> dict[Workload, Any]:
        """Return the PrimFuncs of generic workloads."""
        return {
            node.workload: node.func
            for graph in self.entries.values()
            for node in graph.nodes
            if node.func is not None
        }


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def export_graph(
    module: torch.nn.Module,
    example: tuple[Any, ...],
    states: Mapping[str, str],
    named: Mapping[str, Any] | None = None,
) -> KernelGraph:
    """Export one module with static shapes and lower it to a kernel graph; ``named``: keyword inputs."""
    import torch

    with torch.no_grad():
        program = torch.export.export(module, example, dict(named or {}), strict=False)
    lay = getattr(getattr(module, "attend", None), "lay", "")
    imported = import_exported(program, lay)
    return build_graph(imported, lower_generic(imported.module), {k: k for k in states})


class _StageGraphs:
    """Graphs of a decoder's stages, exported once for each kind and token count."""

    def __init__(self, decoder: Decoder, paging: Paging | None = None) -> None:
        self.decoder, self.paging = decoder, paging
        self.templates: dict[tuple[str, int, bool, int], KernelGraph] = {}
        self.names: dict[str, str] = {}
        self.tensors: dict[str, Callable[[], torch.Tensor]] = {}
        first: dict[Any, str] = {}
        for stage in decoder.stages():
            if paging is not None and may_page(stage):
                self.names[f"{stage.name}.{TABLE}"] = TABLE
            for name, tensor in [*stage.module.named_parameters(), *stage.module.named_buffers()]:
                own = f"{stage.name}.{name}"
                if name in stage.states:
                    self.names[own] = stage.states[name]
                    continue
                # Stages may hold one tensor together (the embedding table): it is stored once.
                key = (tensor.data_ptr(), tuple(tensor.shape), tensor.dtype)
                self.names[own] = first.setdefault(key, own) if tensor.numel() else own
                if self.names[own] == own:
                    self.tensors[own] = partial(_same, tensor)

    def _example(self, stage: Stage, tokens: int, batch: int) -> tuple[Any, ...]:
        import torch

        hidden = self.decoder.config.hidden
        out = []
        for name in stage.inputs:
            if name == "ids":
                out.append(torch.zeros(tokens, dtype=torch.int32))
            elif name == "pos":
                pos = torch.tensor([0, tokens // batch], dtype=torch.int32)
                out.append(pos if batch == 1 else pos.repeat(batch, 1))
            elif name == "adapter":
                out.append(torch.zeros(tokens, dtype=torch.int32))
            elif name.startswith("rope."):
                half = self.decoder.stage(name).module.get_buffer("inv_freq").shape[0]
                out.append(torch.zeros(tokens, 2, half))
            else:
                out.append(torch.zeros(tokens, hidden))
        return tuple(out)

    def _global(self, stage: str, name: str) -> str:
        return self.names[f"{stage}.{name}"]

    def template(
        self, stage: Stage, tokens: int, chooses: bool, named: Mapping[str, Value], batch: int = 1
    ) -> KernelGraph:
        key = (stage.kind, tokens, chooses and stage.may_choose, batch)
        if key not in self.templates:
            import torch

            stage.prepare(tokens // batch, chooses)
            given = {
                key: torch.zeros(v.shape, dtype=getattr(torch, v.dtype)) for key, v in named.items()
            }
            paging = self.paging if may_page(stage) else None
            with caches_of(stage, batch, paging):
                self.templates[key] = export_graph(
                    stage.module, self._example(stage, tokens, batch),
                    {**stage.states, TABLE: TABLE} if paging else stage.states,
                    given,
                )  # fmt: skip
        return self.templates[key]

    def chain(
        self,
        stages: Iterable[Stage],
        tokens: int,
        inputs: tuple[str, ...],
        outputs: tuple[str, ...],
        chooses: bool = False,
        batch: int = 1,
    ) -> KernelGraph:
        """Join stages into one graph; values meet by name.

        ``chooses``: layers choose what they attend to, where their policy lets them. ``batch``: the tokens
        are those of so many sequences, as many of each.
        """
        values: dict[str, Value] = {}
        graph_inputs: list[Value] = []
        nodes = []
        for stage in stages:
            named = {key: values[name] for key, name in stage.named(chooses).items()}
            template = self.template(stage, tokens, chooses, named, batch)
            given: dict[str, Value] = {}
            for slot, name in zip(template.inputs, stage.takes(chooses), strict=True):
                if name not in values:
                    values[name] = Value(name, "input", slot.shape, slot.dtype)
                    graph_inputs.append(values[name])
                given[slot.name] = values[name]
            graph = instantiate(template, stage.name, partial(self._global, stage.name), given)
            nodes += graph.nodes
            values.update(zip(stage.gives(chooses), graph.outputs, strict=True))
        order = {name: i for i, name in enumerate(inputs)}
        graph_inputs.sort(key=lambda v: order[v.name])
        return KernelGraph(tuple(graph_inputs), tuple(values[name] for name in outputs), nodes)


def may_page(stage: Stage) -> bool:
    """Say whether a stage's caches can be pages; drafts are ahead of what sequences hold pages for."""
    from mimo_compile.frontend.models import kv
    from mimo_compile.frontend.models.stages import LayerCore

    layer = stage.module
    return isinstance(layer, LayerCore) and stage.name.startswith("layers.") and kv.may_page(layer)


@contextmanager
def caches_of(stage: Stage, batch: int, paging: Paging | None = None) -> Iterator[None]:
    """Let a stage's module have the caches of so many sequences on meta: ``[B, ...]``, or pages."""
    import torch

    module = stage.module
    if paging is not None:
        from mimo_compile.frontend.models.kv import paged

        with paged(module, paging, batch):  # type: ignore[arg-type]
            yield
        return
    own = {name: module.get_buffer(name) for name in stage.states} if batch > 1 else {}
    try:
        for name, cache in own.items():
            made = torch.empty((batch, *cache.shape), dtype=cache.dtype, device="meta")
            setattr(module, name, made)
        yield
    finally:
        for name, cache in own.items():
            setattr(module, name, cache)


def within_context(steps: tuple[int, ...], max_context: int) -> tuple[int, ...]:
    """Return the token counts that a model of so many positions can ever be given, 1 among them."""
    return tuple(t for t in steps if t == 1 or t <= max_context)


def decoder_graphs(
    decoder: Decoder, steps: tuple[int, ...] = BUCKETS, batch: int = 1, paging: Paging | None = None
) -> ModelGraphs:
    """Return the entry points of a decoder: ``step_T``, ``decode_T``, ``batch_B``, ``head_T``, ``mtp{s}_T``.

    Args:
        decoder: The model with its (quantised) weights.
        steps: Token counts of ``step_T``; those beyond the model's context are left out, of drafts too.
        batch: Sequences that are decoded together; 1: there is no ``batch_B``.
        paging: Pages that they take instead of caches of their own, in layers that allow it; None: none.

    Raises:
        UsageError: layers of the model cannot decode several sequences together.
    """
    config = decoder.config
    check_layers(decoder, batch, pages=paging is not None)
    steps = within_context(steps, config.max_context)
    graphs = _StageGraphs(decoder, paging)
    stages = decoder.stages()
    ropes = [s for s in stages if s.name.startswith("rope.")]
    drafts = [s for s in stages if s.name.startswith("mtp.")]
    used = {name for s in stages if s not in drafts for name in s.inputs}
    body = [
        s
        for s in stages
        if s not in drafts and s.name != "head" and (s not in ropes or s.name in used)
    ]
    head = decoder.stage("head")
    model = ModelGraphs(config.name, {}, {}, {}, graphs.tensors, decoder, paging)

    def add(
        name: str, parts: list[Stage], tokens: int, ins: tuple[str, ...], outs: dict[str, str],
        chooses: bool = False, batch: int = 1,
    ) -> None:  # fmt: skip
        model.entries[name] = graphs.chain(parts, tokens, ins, tuple(outs.values()), chooses, batch)
        model.input_names[name] = tuple(
            {"normed": "hidden", "hidden": "prenorm"}.get(n, n) for n in ins
        )
        model.output_names[name] = tuple(outs)

    outs = {"hidden": "normed"} | ({"prenorm": "hidden"} if drafts else {})
    inputs = ("ids", "pos", "adapter") if decoder.adapters else ("ids", "pos")
    for t in steps:
        add(f"step_{t}", body, t, inputs, outs, config.chooses(decode=False))
    for t in DECODE_STEPS if config.decodes_apart else ():
        add(f"decode_{t}", body, t, inputs, outs, config.chooses(decode=True))
    if batch > 1:
        add(f"batch_{batch}", body, batch, inputs, outs, config.chooses(decode=True), batch)
    for t in HEADS:
        add(f"head_{t}", [head], t, ("normed",), {"logits": "logits"})
    for index, draft in enumerate(drafts):
        needed = [s for s in ropes if s.name in draft.inputs]
        for t in within_context(DRAFT_STEPS, config.max_context):
            add(
                f"mtp{index}_{t}",
                [*needed, draft],
                t,
                ("hidden", "ids", "pos"),
                {"hidden": "normed"},
            )
    return model


def module_graphs(
    module: torch.nn.Module,
    example_inputs: tuple[Any, ...] | Mapping[str, Any],
    name: str = "module",
) -> ModelGraphs:
    """Return a module's single entry point ``main`` (static shapes of the example inputs)."""
    from mimo_compile.frontend.exported import export_program

    return program_graphs(export_program(module, example_inputs), name)


def program_graphs(program: torch.export.ExportedProgram, name: str) -> ModelGraphs:
    """Return the single entry point ``main`` of an exported program."""
    from mimo_compile.frontend.exported import NothingToCompile, output_names, tensors_of

    imported = import_exported(program)
    graph = build_graph(imported, lower_generic(imported.module), {})
    if not graph.nodes:
        raise NothingToCompile("every output is an input or a constant", file=name)
    tensors: dict[str, Callable[[], torch.Tensor]] = {
        k: partial(_same, t) for k, t in tensors_of(program).items()
    }
    return ModelGraphs(
        name,
        {"main": graph},
        {"main": tuple(v.name for v in graph.inputs)},
        {"main": output_names(program)},
        tensors,
    )
