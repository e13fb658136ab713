"""Matmuls with adapters on the simulated ROMA: the op's reference, rows without one, swaps."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from mimo_compile.ir.hardware import SIMULATED
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.ir.simulated import RomaConfig
from mimo_compile.schedules import get_schedule, schedules_for
from mimo_compile.search.database import Database
from mimo_compile.search.measure.simulated import witness
from mimo_compile.search.tune import tune_workloads

pytestmark = pytest.mark.compile

ROMA = SIMULATED["sim:roma"]
TEXT = "lora_mpgemm:m=5,n=300,k=192,w=w2g64,a=a8,r=16,l=3,d=fp8"


def case(text: str, seed: int = 0):
    """Return a workload with inputs, reference and bound."""
    workload = parse_workload(text)
    op = get_op(workload.op)
    inputs = op.make_inputs(workload, np.random.default_rng(seed))
    expected = op.reference(workload, inputs)
    return workload, inputs, expected["y"], op.bound(workload, inputs, expected)["y"]


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        "lora_mpgemm:m=1,n=70,k=128,w=w4g32,a=a8,r=17,d=fp8",
        "lora_mpgemm:m=4,n=128,k=100,w=w1.58,a=a8,bias=1,r=3,l=2,d=fp8,parts=64+32+32",
    ],
)
def test_every_program_computes_the_op(text: str) -> None:
    workload, inputs, expected, bound = case(text)
    (schedule,) = schedules_for(workload, ROMA)
    assert schedule.name == "lora_mpgemm.sim_roma"
    for config in schedule.space(workload, ROMA):
        got = schedule.simulate(workload, config, inputs)["y"]
        assert np.all(np.abs(got - expected) <= bound), config


@pytest.mark.parametrize("fusion", [1, 2, 3])
def test_rows_without_an_adapter_are_the_base_to_the_bit(fusion: int) -> None:
    workload, inputs, _, _ = case(TEXT)
    schedule, base = get_schedule("lora_mpgemm.sim_roma"), get_schedule("mpgemm.sim_roma")
    plain = parse_workload("mpgemm:m=5,n=300,k=192,w=w2g64,a=a8")
    alone = base.simulate(plain, RomaConfig(), inputs)["y"]
    config = RomaConfig(fusion)
    none = inputs | {"adapter": np.full(5, -1, np.int32)}
    assert np.array_equal(schedule.simulate(workload, config, none)["y"], alone)
    idle = inputs | {"lora_b": np.zeros_like(inputs["lora_b"])}  # as training starts
    assert np.array_equal(schedule.simulate(workload, config, idle)["y"], alone)
    assert not np.array_equal(schedule.simulate(workload, config, inputs)["y"], alone)


def test_swapping_adapters_changes_no_rom_and_comes_back() -> None:
    workload, inputs, _, _ = case(TEXT)
    schedule = get_schedule("lora_mpgemm.sim_roma")
    before = hashlib.sha256(inputs["codes"].tobytes()).hexdigest()
    runs = [
        schedule.simulate(workload, RomaConfig(), inputs | {"adapter": np.full(5, i, np.int32)})[
            "y"
        ]
        for i in (0, 1, 0)
    ]
    assert np.array_equal(runs[0], runs[2]) and not np.array_equal(runs[0], runs[1])
    assert hashlib.sha256(inputs["codes"].tobytes()).hexdigest() == before


def test_only_fp8_adapters_and_only_on_roma() -> None:
    for stored in ("f32", "bf16"):
        other = parse_workload(f"lora_mpgemm:m=1,n=64,k=64,w=w2g64,a=a8,r=4,d={stored}")
        assert not schedules_for(other, ROMA)
    workload = parse_workload(TEXT)
    assert not schedules_for(workload, SIMULATED["sim:lut-tensor-core"])


def test_search_ranks_fusions(tmp_path) -> None:
    workload = parse_workload("lora_mpgemm:m=1,n=4096,k=4096,w=w2gtensor,a=a8,r=16,d=fp8")
    with Database(tmp_path / "records.db") as db:
        (found,) = tune_workloads({workload: 1.0}, ROMA, trials=24, db=db).workloads
    assert found.verdicts == {"ok": found.trials} and found.best is not None
    assert found.best.record.config["fusion"] == 3  # A x hidden in the producer


def test_a_witness_keeps_every_part() -> None:
    text = "lora_mpgemm:m=9,n=640,k=64,w=w2g64,a=a8,r=4,d=fp8,parts=512+64+64"
    part = witness(parse_workload(text))
    assert (part["m"], part["n"], part["parts"]) == (8, 194, "66+64+64")
