"""Occupancy and rooflines of GPUs, beside examples worked out by hand and figures of data sheets."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from mimo_compile.cost_models.analytic import DeviceModel
from mimo_compile.cost_models.features import ANALYTIC, Extractor, without
from mimo_compile.cost_models.gpu import RATES, LaunchShape, occupancy, predict, roofline_s
from mimo_compile.cost_models.learned import LatencyModel, Sample
from mimo_compile.ir.counts import OP_KINDS, Counts, in_turn
from mimo_compile.ir.hardware import CUDA, PRESETS, gpu_of
from mimo_compile.ir.ops import parse_workload
from mimo_compile.schedules import get_schedule

A100, H200 = CUDA["cuda:sm_80"], CUDA["cuda:sm_90a"]


@pytest.mark.parametrize(
    ("shape", "blocks", "limit", "share", "waves"),
    [
        # 128 * 32 = 4096 registers a warp: 4 warps in a quarter of 16384, 16 in all, in blocks of 8
        (LaunchShape(264, 256, 128, 0), 2, "registers", 16 / 64, 1.0),
        # 88 * 32 = 2816: 5 warps in a quarter, 20 in all (23 would fit into undivided registers), of 3 each
        (LaunchShape(132, 96, 88, 0), 6, "registers", 18 / 64, 1 / 6),
        # all that a block may have, and the driver's 1024: the whole of an SM
        (LaunchShape(1320, 128, 168, 232448), 1, "shared memory", 4 / 64, 10.0),
        # 40000 + 1024 are 41088 in steps of 128: 5 times in 233472
        (LaunchShape(66, 64, 32, 40000), 5, "shared memory", 10 / 64, 0.1),
        (LaunchShape(1, 1024, 32, 0), 2, "threads", 1.0, 1 / 264),
        (LaunchShape(4224, 32, 16, 0), 32, "blocks", 32 / 64, 1.0),
        # 32 warps of 4096 registers are twice what there is
        (LaunchShape(1, 1024, 128, 0), 0, "registers", 0.0, 0.0),
    ],
)
def test_blocks_that_an_sm_holds(shape, blocks, limit, share, waves) -> None:
    found = occupancy(shape, H200)
    assert (found.blocks, found.limit) == (blocks, limit)
    assert found.share == pytest.approx(share) and found.waves == pytest.approx(waves)


def test_a_smaller_gpu_holds_less() -> None:
    shape = LaunchShape(108, 128, 64, 80000)  # 81024 + 128: twice in 228 KiB as in 164 KiB
    assert occupancy(shape, A100).blocks == occupancy(shape, H200).blocks == 2
    wide = LaunchShape(108, 128, 64, 100000)
    assert (occupancy(wide, A100).blocks, occupancy(wide, H200).blocks) == (1, 2)


def test_peaks_are_those_of_the_data_sheets() -> None:
    def tera(hardware, kind):
        return (
            2e-12 * RATES[gpu_of(hardware).arch][kind] * hardware.cores * gpu_of(hardware).clock_hz
        )

    assert tera(A100, "tile_bf16") == pytest.approx(312, rel=0.01)
    assert tera(A100, "tile_i8") == pytest.approx(624, rel=0.01)
    assert tera(A100, "fma_f32") == pytest.approx(19.5, rel=0.01)
    assert tera(H200, "tile_bf16") == pytest.approx(989, rel=0.01)
    assert tera(H200, "tile_i8") == pytest.approx(1979, rel=0.01)
    assert tera(H200, "fma_f32") == pytest.approx(67 * 1.83 / 1.98, rel=0.01)
    assert all(set(rates) == set(OP_KINDS) for rates in RATES.values())


def test_time_is_what_the_busiest_sm_takes() -> None:
    work = Counts({"tile_bf16": 1024 * 1.41e9 * 108 * 10e-6}, {"dram": 2.039e12 * 5e-6})
    for blocks, us in ((108, 10.0), (216, 10.0), (54, 20.0), (109, 10 * 108 * 2 / 109)):
        found = predict(work, [LaunchShape(blocks, 128, 64, 0)], A100)
        assert found.limit == "tile_bf16"
        assert 1e6 * found.parts["tile_bf16"] == pytest.approx(us)
        assert 1e6 * found.parts["dram"] == pytest.approx(5.0)
        assert 1e6 * found.seconds == pytest.approx(us + 2.0)
    # a schedule that knows of uneven work says so
    uneven = Counts(work.ops, work.bytes, {"share": 3 / 108})
    found = predict(uneven, [LaunchShape(108, 128, 64, 0)], A100)
    assert 1e6 * found.parts["tile_bf16"] == pytest.approx(30.0)


def test_one_sm_cannot_take_all_of_the_bandwidth() -> None:
    moved = Counts({}, {"dram": 64 * 1.41e9 * 1e-6, "l2": 64 * 1.41e9 * 3e-6})
    alone = predict(moved, [LaunchShape(1, 128, 64, 0)], A100)
    assert alone.limit == "l2" and 1e6 * alone.parts["l2"] == pytest.approx(3.0)
    many = predict(moved, [LaunchShape(1080, 128, 64, 0)], A100)
    # 5120 bytes in a cycle beat 108 ports of 64
    assert 1e6 * many.parts["l2"] == pytest.approx(3 * 64 / 5120)
    assert many.limit == "launch"


def test_shared_memory_counts_where_it_is_named() -> None:
    moved = Counts({}, {"dram": 1.0, "l1": 108 * 128 * 1.41e9 * 1e-6})
    full = predict(moved, [LaunchShape(108, 128, 32, 0)], A100)
    assert full.limit == "launch" and 1e6 * full.parts["l1"] == pytest.approx(1.0)
    half = predict(moved, [LaunchShape(54, 128, 32, 0)], A100)
    assert 1e6 * half.parts["l1"] == pytest.approx(2.0)
    assert "l1" not in predict(Counts({}, {"dram": 1.0}), [LaunchShape(1, 32, 0, 0)], A100).parts


def test_launches_add_up() -> None:
    ops, moved = {"fma_f32": 128 * 1.83e9 * 132 * 4e-6}, {"dram": 4.8e12 * 3e-6}
    first, then = Counts(ops, {}).named("attend"), Counts({}, moved).named("merge")
    total = first + then
    whole = Counts(total.ops, total.bytes, parts=(first, then))
    shapes = [LaunchShape(132, 256, 64, 0), LaunchShape(264, 64, 32, 0)]
    assert 1e6 * predict(whole, shapes, H200).seconds == pytest.approx(4 + 3 + 2 * 2.0)
    # each at its own launch's share, whichever is the largest
    few = [LaunchShape(133, 256, 64, 0), LaunchShape(5000, 256, 32, 0)]
    assert 1e6 * predict(whole, few, H200).parts["fma_f32"] == pytest.approx(4 * 132 * 2 / 133)
    for counts, launches in ((total, shapes), (whole, [*shapes, shapes[0]]), (total, [])):
        with pytest.raises(ValueError, match="launches, and counts with parts for"):
            predict(counts, launches, H200)


def test_what_cannot_be_launched_has_no_time() -> None:
    with pytest.raises(ValueError, match=r"no SM of cuda:sm_80 can hold"):
        predict(Counts(), [LaunchShape(1, 128, 64, 200000)], A100)
    with pytest.raises(ValueError, match="x86-64-v3 is no GPU"):
        occupancy(LaunchShape(1, 128, 64, 0), PRESETS["x86-64-v3"])


def test_the_roofline_of_necessary_work() -> None:
    for hardware in CUDA.values():
        gpu = gpu_of(hardware)
        bytes_ = {"dram": gpu.memory_bytes_per_s * 1e-3}
        assert roofline_s(Counts({}, bytes_), hardware) == pytest.approx(1e-3 + 2e-6)
        # whatever an op calls its multiply-adds, tensor cores may do them, while others are done elsewhere
        rate = RATES[gpu.arch]["tile_i8"] * hardware.cores * gpu.clock_hz
        for kind, times in (("dot_i8", 1), ("tile_i8", 1), ("fma_f32", 2), ("dot_bf16", 2)):
            work = Counts({kind: rate * 1e-3, "add_f32": 1e6})
            assert roofline_s(work, hardware) == pytest.approx(times * 1e-3 + 2e-6)
        both = Counts({"fma_f32": rate * 1e-3, "tile_bf16": rate * 1e-3})
        assert roofline_s(both, hardware) == pytest.approx(4e-3 + 2e-6)


def test_searches_rank_by_the_same_rates() -> None:
    for hardware in CUDA.values():
        model, even = DeviceModel.guess(hardware), LaunchShape(hardware.cores, 256, 32, 0)
        works = [
            Counts({}, {"dram": 1e9}), Counts({"tile_bf16": 1e12}), Counts({}, {"l2": 1e9, "dram": 1e3}),
            Counts({"dot_i8": 1e11}, {"dram": 1e5}),
        ]  # fmt: skip
        for work in [*works, in_turn(*works)]:
            shapes = [even] * max(1, len(work.parts))
            seconds = predict(work, shapes, hardware).seconds
            assert model.latency_us(work, hardware) == pytest.approx(1e6 * seconds)
        assert model.floor_us(works[0], hardware) is None
        assert model.energy_mj(works[0], 1e3) > model.energy_mj(works[2], 1e3) > 0


def test_features_of_candidates_for_gpus() -> None:
    workload = parse_workload("mpgemm:m=1,n=4096,k=4096,w=w4g128")
    schedule = get_schedule("mpgemm.cuda_gemv")
    config = schedule.space(workload, H200).default
    counts = schedule.work(workload, config, H200)
    extract = Extractor(workload, H200, DeviceModel.guess(H200))
    row = extract(counts, schedule.name, schedule.config_to_json(config))
    assert math.exp(row[ANALYTIC]) == pytest.approx(
        DeviceModel.guess(H200).latency_us(counts, H200)
    )
    assert any(name.startswith("knobs.mpgemm.cuda_gemv.") for name in row)


def law_us(counts: Counts, rng: np.random.Generator) -> float:
    """A GPU on paper: waves are whole, and few warps on an SM hide little of what memory takes."""
    total = 0.0
    for part in counts.parts or (counts,):
        shape = LaunchShape(*(int(part.traits[name]) for name in ("blocks", "threads")), 64,
                            int(part.traits["shared_bytes"]))  # fmt: skip
        held = occupancy(shape, H200)
        whole = math.ceil(held.waves) / held.waves if held.waves > 1 else 1.0
        alone = predict(replace(part, traits={}), [shape], H200).seconds
        total += 1e6 * alone * whole**0.5 * (1.0 + 0.2 / held.share)
    return total * math.exp(rng.normal(0.0, 0.01))


def simulated(extract: Extractor, schedule, space: list, rng: np.random.Generator) -> list[Sample]:
    out = []
    for config in space:
        counts = schedule.told(extract.workload, config, H200)
        rows = extract.blocks(counts, schedule.name, schedule.config_to_json(config))
        out.append(Sample(rows, law_us(counts, rng), str(extract.workload)))
    return out


def test_launches_are_learned_from() -> None:
    """Times by a law of waves and occupancy: what launches tell is finite, used, and makes others known."""
    pytest.importorskip("xgboost")
    schedule, rng = get_schedule("mpgemm.cuda_mma_codes"), np.random.default_rng(0)
    samples: list[list[Sample]] = []
    for n, k in ((4096, 4096), (11008, 4096), (4096, 11008), (6144, 4096)):
        workload = parse_workload(f"mpgemm:m=64,n={n},k={k},w=w4g128,a=abf16")
        configs = list(schedule.space(workload, H200))
        chosen = [configs[i] for i in rng.permutation(len(configs))[:48]]
        extract = Extractor(workload, H200, DeviceModel.guess(H200))
        samples.append(simulated(extract, schedule, chosen, rng))
    *known, asked = samples
    for sample in (s for each in samples for s in each):
        for row in sample.blocks:
            told = {name for name in row if name.startswith("sm.")}
            assert {"sm.threads", "sm.shared", "sm.held", "sm.waves", "sm.registers"} <= told
            assert all(math.isfinite(row[name]) for name in told)
    errors = {}
    for groups in ((), ("sm",)):
        given = [
            replace(s, blocks=tuple(without(row, groups) for row in s.blocks))
            for each in known for s in each
        ]  # fmt: skip
        model = LatencyModel(seed=0)
        model.fit(given)
        assert any(c.startswith("sm.") for c in model.columns) == (not groups)
        rows = [tuple(without(row, groups) for row in s.blocks) for s in asked]
        logs = np.log(model.predict(rows).value / [s.value for s in asked])
        errors[groups] = float(np.abs(logs - np.median(logs)).mean())
        used = {name for b in model._boosters for name in b.get_score()}
        names = {model.columns[int(name.removeprefix("f"))] for name in used}
        assert any(name.startswith("sm.") for name in names) == (not groups)
    assert errors[()] < errors["sm",]


def test_each_part_tells_how_many_launches_there_are() -> None:
    one = Counts(ops={OP_KINDS[0]: 1e6}, bytes={"dram": 1e6})
    parts = tuple(replace(one, name=name) for name in ("a", "b", "c", "d"))
    workload = parse_workload("mpgemm:m=1,n=256,k=256,w=w4g64,a=a8")
    extract = Extractor(workload, H200, DeviceModel.guess(H200))
    rows = extract.blocks(replace(one, parts=parts), "any", {})
    assert [row["sm.launches"] for row in rows] == [2.0] * 4
    assert extract.blocks(one, "any", {})[0]["sm.launches"] == 0.0


def test_kernels_of_generic_functions_and_cpus_tell_of_no_launches() -> None:
    workload = parse_workload("mpgemm:m=1,n=256,k=256,w=w4g64,a=a8")
    schedule, cpu = get_schedule("mpgemm.x86_portable"), PRESETS["x86-64-v3"]
    config = schedule.space(workload, cpu).default
    counts = schedule.told(workload, config, cpu)
    assert counts == schedule.work(workload, config, cpu)
    row = Extractor(workload, cpu, DeviceModel.guess(cpu))(counts, schedule.name, {})
    assert not any(name.startswith("sm.") for name in row)
