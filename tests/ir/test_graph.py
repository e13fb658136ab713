"""torch.export -> Relax -> kernel graph, and what the graph knows."""

import pytest
import torch

from mimo_compile.errors import InputError
from mimo_compile.ir.graph import KernelGraph, Value, build_graph, instantiate
from mimo_compile.ir.importer import import_exported
from mimo_compile.ir.ops import load_all
from mimo_compile.ir.passes.lower import lower_generic
from mimo_compile.pipeline.memory import ALIGN, plan_arena

load_all()


class Block(torch.nn.Module):
    """Attention over a cache, then a float linear and a generic tail."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.Parameter(torch.ones(64))
        self.proj = torch.nn.Linear(64, 48)
        self.register_buffer("codes", torch.zeros(128, 64, dtype=torch.uint8))
        self.register_buffer("scale", torch.ones(128, 1))
        self.register_buffer("k_cache", torch.zeros(128, 1, 32, device="meta"))
        self.register_buffer("v_cache", torch.zeros(128, 1, 32, device="meta"))

    def forward(
        self, x: torch.Tensor, delta: torch.Tensor, table: torch.Tensor, pos: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        mimo = torch.ops.mimo
        h, x = mimo.add_rms_norm(delta, x, self.norm, 1e-5)
        qkv = mimo.mpgemm(h, self.codes, self.scale, None, None, "w4grow", "a8")
        q = mimo.kv_append(qkv, table, pos, None, None, self.k_cache, self.v_cache, 2, 1e-5, 1.0)
        o = mimo.cached_attention(q, self.k_cache, self.v_cache, pos, None, 32**-0.5, 0)
        return x, torch.nn.functional.silu(self.proj(o.reshape(4, 64))) + 1


@pytest.fixture(scope="module")
def graph() -> KernelGraph:
    args = (
        torch.zeros(4, 64),
        torch.zeros(4, 64),
        torch.zeros(4, 2, 8),
        torch.tensor([0, 4], dtype=torch.int32),
    )
    program = torch.export.export(Block(), args, strict=False)
    imported = import_exported(program)
    states = {"k_cache": "k_cache", "v_cache": "v_cache"}
    return build_graph(imported, lower_generic(imported.module), states)


def test_dialect_stays_whole_and_the_rest_is_fused(graph: KernelGraph) -> None:
    assert [n.workload.op for n in graph.nodes] == [
        "rms_norm", "mpgemm", "kv_append", "cached_attention", "mpgemm", "tir",
    ]  # fmt: skip
    texts = [str(n.workload) for n in graph.nodes]
    assert texts[1] == "mpgemm:m=4,n=128,k=64,w=w4grow,a=a8"
    assert texts[2] == "kv_append:t=4,h=2,kv=1,d=32,dv=32,cap=128,rot=16"
    assert texts[4] == "mpgemm:m=4,n=48,k=64,bias=1"
    assert texts[5].startswith("tir:hash=h") and texts[5].endswith(",does=map,out=f32.4x48")
    assert "silu" in graph.nodes[5].label
    assert [v.name for v in graph.inputs] == ["x", "delta", "table", "pos"]
    assert [v.shape for v in graph.outputs] == [(4, 64), (4, 48)]
    assert graph.nodes[1].label == "" or "mpgemm" in graph.nodes[1].label
    kinds = {v.source: v.kind for n in graph.nodes for v in n.args if v.source}
    assert kinds["k_cache"] == "state"
    assert kinds["codes"] == "weight"


def test_reshape_is_a_view(graph: KernelGraph) -> None:
    attention = graph.nodes[3].outputs[0]
    (operand, *_) = graph.nodes[4].args
    assert operand.shape == (4, 64)
    assert operand.root is attention


def test_networkx_orders_calls_on_one_state(graph: KernelGraph) -> None:
    import networkx

    dag = graph.networkx()
    assert networkx.is_directed_acyclic_graph(dag)
    assert networkx.has_path(dag, 1, 5)
    assert dag.has_edge(2, 3)
    text = graph.dot()
    assert text.count("->") == dag.number_of_edges()
    assert sum(1 for _ in graph.lines()) == len(graph.nodes)


def test_liveness_keeps_inputs_and_outputs(graph: KernelGraph) -> None:
    spans = {v.name: span for v, span in graph.liveness().items()}
    assert spans["pos"] == (-1, 3)
    assert spans[graph.outputs[1].name][1] == len(graph.nodes)


def test_arena_never_overlaps_live_values(graph: KernelGraph) -> None:
    spans = graph.liveness()
    offsets, total = plan_arena(spans)
    items = list(spans.items())
    for i, (a, (a0, a1)) in enumerate(items):
        assert offsets[a] % ALIGN == 0
        assert offsets[a] + a.nbytes <= total
        for b, (b0, b1) in items[i + 1 :]:
            if a0 <= b1 and b0 <= a1:
                apart = offsets[a] + a.nbytes <= offsets[b] or offsets[b] + b.nbytes <= offsets[a]
                assert apart, (a.name, b.name)
    assert total < sum(v.nbytes + 2 * ALIGN for v in spans)


def test_instantiate_renames_weights_and_states(graph: KernelGraph) -> None:
    inputs = {v.name: Value(f"in_{v.name}", "input", v.shape, v.dtype) for v in graph.inputs}
    copy = instantiate(graph, "layers.7", lambda s: f"layers.7.{s}", inputs)
    sources = {v.source for n in copy.nodes for v in n.args if v.source}
    assert {"layers.7.codes", "layers.7.k_cache", "layers.7.proj.weight"} <= sources
    assert [str(n.workload) for n in copy.nodes] == [str(n.workload) for n in graph.nodes]
    caches = [v for n in copy.nodes for v in n.args if v.source == "layers.7.k_cache"]
    assert len(caches) == 2
    assert caches[0] is caches[1]


def test_unknown_operator_is_named() -> None:
    class Odd(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.matrix_exp(x)

    program = torch.export.export(Odd(), (torch.zeros(3, 3),), strict=False)
    with pytest.raises(InputError, match="matrix_exp"):
        import_exported(program)
