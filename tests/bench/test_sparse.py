"""The suite of sparse attention: its cells, what their parts compute, and that wrong kernels stop it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from mimo_compile.bench import oracle as oracles
from mimo_compile.bench import sparse
from mimo_compile.bench.oracle import Oracle
from mimo_compile.bench.sparse import Cell, all_cells, bench_cell, cells, kept_blocks, parts
from mimo_compile.cli import main
from mimo_compile.errors import UsageError
from mimo_compile.frontend.models.decoder import LayerSpec
from mimo_compile.frontend.models.gated import Gated
from mimo_compile.frontend.models.indexed import Indexed
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.ir.ops.block_lists import check_lists
from mimo_compile.ir.policies import parse_policy

HEADS = (("h", 4), ("kv", 2), ("d", 16), ("dv", 16))
SMALL = [
    Cell("quest:budget=64,page=16,dense=0", 1, 640, HEADS),
    Cell("lessismore:budget=64", 1, 640, HEADS),
    Cell("sale:least=64,every=4", 64, 640, HEADS),
]


def test_cells_cover_blocks_tokens_and_chunks_of_prompts() -> None:
    found = all_cells()
    assert len({str(c) for c in found}) == len(found)
    decode = [c.params for c in found if c.t == 1]
    assert {p["cap"] for p in decode} == {"65536", "131072"}
    assert {p["block"] for p in decode} >= {"1", "16", "64"}
    prompts = [c.params for c in found if c.t > 1]
    assert {p["cap"] for p in prompts} == {"16384", "32768", "65536"}
    assert {p["policy"] for p in prompts} == {"sale", "moba"}


def test_parts_are_workloads_with_a_tenth_of_the_keys() -> None:
    for cell in all_cells():
        found = parts(cell)
        assert list(found)[-3:] == ["select", "attend", "dense"] and "score" in found
        assert all(parse_workload(str(w)) == w for w in found.values())
        keys = kept_blocks(found["attend"]) * found["attend"]["block"]
        assert 0.08 * cell.cap <= keys <= 0.101 * cell.cap, str(cell)
        assert found["dense"]["c"] == found["attend"]["c"] == "bf16"


def test_keys_of_indexers_are_what_a_model_keeps() -> None:
    (cell,) = cells("sparse:policy=dsa,cap=65536")
    g, policy = cell.geometry, parse_policy(cell.policy)
    layer = LayerSpec(g.h, g.kv, g.d, g.dv, rotary_dim=g.d)
    indexed = Indexed(policy, policy.role_alone(0), False)
    assert (parts(cell)["describe"],) == indexed.describing(layer, g.cap, g.t, g.c)


def test_parts_of_gates_are_what_a_model_runs() -> None:
    (cell,) = cells("sparse:policy=seer,block=64,cap=65536")
    g, policy = cell.geometry, parse_policy(cell.policy)
    layer = LayerSpec(g.h, g.kv, g.d, g.dv, rotary_dim=g.d)
    gated = Gated(policy, policy.role_alone(0), False)
    found = parts(cell)
    assert (found["describe"], found["queries"]) == gated.describing(layer, g.cap, g.t, g.c)
    assert found["score"] == policy.workloads(g).score


def test_entries_are_floats_unless_they_are_keys_or_bounds_of_keys() -> None:
    for cell in all_cells():
        score = get_op((w := parts(cell)["score"]).op).full(w)
        if w.op == "score_blocks":
            as_keys = score["kind"] in ("quest", "indexer")
            assert score["e"] == ("bf16" if as_keys else "f32"), str(cell)


def test_conditions_keep_a_part() -> None:
    assert [c.policy for c in cells("sparse:policy=sale,cap=65536")] == ["sale", "sale:every=4"]
    assert cells("sparse") == all_cells()
    with pytest.raises(UsageError, match=r"policy=best.*use policy=quest\+resa"):
        cells("sparse:policy=best")
    with pytest.raises(UsageError, match="conditions are on policy, block, t"):
        cells("sparse:colour=red")


@pytest.mark.parametrize(
    "cell", [SMALL[0], *(pytest.param(c, marks=pytest.mark.slow) for c in SMALL[1:])], ids=str
)
def test_a_cell_is_measured_part_by_part(cell: Cell) -> None:
    found = bench_cell(cell, local_cpu().with_threads(1), None, 2)
    names = [m.part for m in found]
    assert names[0] == "all" and names[-1] == "dense" and {"score", "select", "attend"} < set(names)
    dense = found[-1]
    assert dense.time[0] == dense.bytes == dense.work == 1
    assert found[0].bytes == pytest.approx(sum(m.bytes for m in found[1:-1]))
    row = found[0].json()
    assert row["speed_up"] == pytest.approx(1 / row["time_ratio"])
    assert row["share"] == pytest.approx(row["speed_up"] * row["byte_ratio"])
    assert json.dumps(row)


def test_lists_that_are_drawn_are_lists() -> None:
    workload = parts(SMALL[2])["attend"]
    p = get_op("sparse_attention").full(workload)
    draws = list(sparse._draws(workload, np.random.default_rng(0)))
    assert len({d["idx"].tobytes() for d in draws}) == sparse.DRAWS
    import torch

    for draw in draws:
        check_lists(*(torch.from_numpy(draw[n]) for n in ("idx", "cnt")), p["cap"] // p["block"])
        assert (draw["cnt"] == kept_blocks(workload)).all()


@pytest.mark.parametrize(("lists", "named"), [(4, 4), (2, 2), (1, 2)])
def test_what_lists_name_is_read_once_by_the_heads_that_share_it(lists: int, named: int) -> None:
    workload = parse_workload(
        f"sparse_attention:t=1,h=4,kv=2,d=16,dv=16,cap=160,hs={lists},block=16,kmax=2,c=bf16"
    )
    idx = np.zeros((1, lists, 2), np.int32)
    idx[0] = [[0, 3], [4, 7], [1, 2], [5, 6]][:lists]
    draw = {"idx": idx, "cnt": np.full((1, lists), 2, np.int32)}
    assert sparse.named_blocks(workload, [draw, draw]) == named
    draw["cnt"][0, 0] = 1
    assert sparse.named_blocks(workload, [draw]) <= named
    moved, work = sparse.necessary(workload, [{**draw, "cnt": np.full((1, lists), 2, np.int32)}])
    counts = get_op(workload.op).counts(workload.replace(kmax=named))
    assert moved == counts.bytes["dram"]
    assert work == get_op(workload.op).counts(workload).flops


@pytest.mark.parametrize(
    "text",
    [
        "sparse_attention:t=40,h=4,kv=2,d=16,dv=24,cap=300,hs=4,block=8,kmax=20,rows=16,sink=1",
        "sparse_attention:t=70,h=4,kv=2,d=16,dv=24,cap=300,hs=4,block=8,kmax=20,rows=32",
        "sparse_attention:t=9,h=4,kv=2,d=16,dv=24,cap=300,hs=2,block=1,kmax=50,window=9,c=bf16",
        "score_lowbit:t=40,h=4,kv=2,d=16,cap=300,block=8,rows=16,first=1,last=2,every=2",
    ],
)
def test_parts_say_what_the_whole_says(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    workload = parse_workload(text)
    inputs = get_op(workload.op).make_inputs(workload, np.random.default_rng(0))
    (whole,) = Oracle(workload, inputs).parts
    monkeypatch.setattr(oracles, "WHOLE_BYTES", 0)
    parted = Oracle(workload, inputs)
    assert len(parted.parts) > 1
    got = {n: np.array(a, np.float64) for n, a in whole.expected.items()}
    assert parted.judge(got) == (pytest.approx(0, abs=1e-3), "")
    name = "out" if "out" in got else "score"
    places = [tuple(np.argwhere(np.isfinite(got[name][:, :1]))[0])]
    if name == "out":  # both ends of the first, the middle and the last list
        rows = get_op(workload.op).full(workload)["rows"]
        last = -(-len(got["out"]) // rows) - 1
        ends = {e for r in (0, last // 2, last) for e in (r * rows, (r + 1) * rows - 1)}
        places = [(min(end, len(got["out"]) - 1), 0) for end in ends]
    for place in places:
        wrong = got | {name: got[name].copy()}
        wrong[name][place] += 20.0
        assert "within tokens and heads" in parted.judge(wrong)[1], place


def test_what_does_not_fit_is_left_out_by_name(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sparse, "SPARE_BYTES", 1 << 60)
    line = ["bench", "attention", "--suite", "sparse:policy=quest,cap=65536,block=16", "--json"]
    assert main(line) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["rows"] == [] and "GB are free" in body["left_out"][0]["reason"]


def test_the_command_prints_a_cell(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sparse, "all_cells", lambda: [replace(SMALL[0], t=1)])
    monkeypatch.setattr(sparse, "SPARE_BYTES", 0)  # other programs may need all memory meanwhile
    assert main(["bench", "attention", "--suite", "sparse", "--rounds", "1", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "as fast as dense" in out and "fewer bytes" in out and "attend" in out, out
