"""Each workload of each family's models has a kernel for GPUs; those that share a tensor agree on it."""

from __future__ import annotations

import pytest

from mimo_compile.ir import functions
from mimo_compile.ir.hardware import CUDA
from mimo_compile.pipeline.choose import choose, shared_tensors
from mimo_compile.pipeline.source import open_source
from mimo_compile.schedules import get_schedule
from mimo_compile.search.database import Database

H200 = CUDA["cuda:sm_90a"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "attention", "batch", "op"),
    [
        ("qwen3_moe", "model", 1, "route"),
        ("mimo_v2_flash-groups", "model", 1, "moe"),
        ("glm4_moe", "model", 1, functions.OP),
        ("llama", "quest:budget=64,dense=1", 1, "select_blocks"),
        ("llama", "quest:budget=64,dense=1", 2, "sparse_attention"),
        ("llama", "full+int8", 1, "cached_attention"),
        ("llama", "sale:least=64", 1, "score_lowbit"),
    ],
)
def test_a_model_has_kernels_for_a_gpu(case, attention, batch, op, saved, tmp_path) -> None:
    source = open_source(
        saved(case)[1],
        quant="abf16",
        attention=attention,
        max_context=512,
        hardware=H200,
        batch=batch,
    )
    workloads = source.graphs.workloads()
    assert op in {w.op for w in workloads}
    with Database(tmp_path / "r.db") as db:
        chosen = choose(source.graphs, H200, "latency", db).choices
    assert set(chosen) == set(workloads)
    assert all(".cuda" in c.schedule for c in chosen.values())

    def layout(workload, tensor):
        schedule = get_schedule(chosen[workload].schedule)
        config = schedule.config_from_json(chosen[workload].config)
        return schedule.layouts(workload, config).get(tensor)

    for group in shared_tensors(source.graphs):
        assert len({layout(*user) for user in group}) == 1, group
