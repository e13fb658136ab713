"""The zoo of wrong kernels must be rejected with the right verdict; honest kernels must pass."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest

from mimo_compile.cost_models.analytic import DeviceModel
from mimo_compile.ir.hardware import Hardware, local_cpu
from mimo_compile.ir.ops import parse_workload
from mimo_compile.search.measure import Limits, Measurement, Measurer, Timing
from mimo_compile.search.measure.cases import Scratch, sweep
from mimo_compile.search.measure.verify import worst_ratio
from mimo_compile.search.records import Verdict
from mimo_compile.search.space import Candidate, JointSpace

pytestmark = pytest.mark.compile
WORKLOAD = "embed:t=4,v=24,d=32"
QUICK = Timing(warm_up_s=0.001, batches=3, batch_s=0.001, budget_s=0.05)


def space_of(*faults: str) -> tuple[JointSpace, list[Candidate]]:
    from zoo_schedules import Zoo, ZooConfig

    space = JointSpace(parse_workload(WORKLOAD), local_cpu(), [Zoo()])
    return space, [space.candidate("embed.zoo", ZooConfig(f)) for f in faults]


def run(measurer: Measurer, *faults: str, seed: int = 3) -> dict[str, Measurement]:
    space, candidates = space_of(*faults)
    return {str(m.candidate.config["fault"]): m for m in measurer.measure(space, candidates, seed)}


def test_honest_kernels_pass_and_are_timed(measurer: Measurer) -> None:
    from zoo_schedules import CORRECT

    for m in run(measurer, *CORRECT).values():
        assert m.verdict is Verdict.OK, m
        assert m.error_ratio == 0 and m.latency_us is not None and m.modelled_mj is not None
        assert m.p10_us <= m.latency_us <= m.p90_us and m.calls > 0 and len(m.code_hash) == 64
    assert run(measurer, "slow")["slow"].latency_us > 3000


@pytest.mark.fault
def test_wrong_results_are_rejected(measurer: Measurer) -> None:
    from zoo_schedules import WRONG

    found = run(measurer, *WRONG)
    assert {f: m.verdict for f, m in found.items()} == dict.fromkeys(WRONG, Verdict.WRONG)
    assert all(m.latency_us is None for m in found.values())
    assert "beyond y" in found["past_end"].message and "beyond y" in found["before_start"].message
    assert "table was changed" in found["changes_weight"].message
    assert "ids was changed" in found["changes_input"].message
    assert "differ" in found["only_first_time"].message
    assert "nan" in found["not_a_number"].message
    assert "process" in found["forks"].message


@pytest.mark.fault
def test_crashes_and_hangs_leave_the_parent_alone(measurer: Measurer) -> None:
    from zoo_schedules import CRASH, HANG

    found = run(measurer, *CRASH, "honest", *HANG, "honest_parallel")
    for fault in CRASH:
        assert found[fault].verdict is Verdict.CRASH, found[fault]
    assert "SIGSEGV" in found["wild_write"].message or "SIGBUS" in found["wild_write"].message
    assert "SIGABRT" in found["aborts"].message and "SIGFPE" in found["divides_by_zero"].message
    assert "exit code 0" in found["exits"].message
    assert found["hangs"].verdict is Verdict.TIMEOUT
    assert found["honest"].verdict is found["honest_parallel"].verdict is Verdict.OK


@pytest.mark.fault
def test_builds_that_fail(measurer: Measurer) -> None:
    from zoo_schedules import BUILD, MEMORY

    found = run(measurer, *BUILD, *MEMORY, "honest")
    verdicts = {f: found[f].verdict for f in (*BUILD, *MEMORY, "honest")}
    expected = dict.fromkeys(BUILD, Verdict.BUILD_FAILED)
    # The code compiles; what it wants is not what it is given.
    expected |= {"bad_arguments": Verdict.CRASH, "bad_packing": Verdict.CRASH}
    expected |= dict.fromkeys(MEMORY, Verdict.OOM) | {"honest": Verdict.OK}
    if "amx-tile" in local_cpu().features:
        del expected["llvm_abort"], verdicts["llvm_abort"]
    assert verdicts == expected
    assert "no kernel" in found["lower_raises"].message
    assert "wants float32[24, 32], packing gave float32[32, 24]" in found["bad_packing"].message


@pytest.mark.fault
@pytest.mark.slow
def test_a_build_that_hangs_is_killed(tmp_path: Path) -> None:
    limits = Limits(build_s=8)
    with Measurer(local_cpu(), limits=limits, timing=QUICK, builders=2, scratch=tmp_path) as m:
        found = run(m, "lower_hangs", "honest")
        pids = [w.pid for w in (*m.builder.pool.workers, *m.runner.pool.workers) if w.pid]
    assert found["lower_hangs"].verdict is Verdict.TIMEOUT and found["honest"].verdict is Verdict.OK
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    assert not list(tmp_path.iterdir())


def test_confirm_times_candidates_against_each_other(measurer: Measurer) -> None:
    space, candidates = space_of("slow", "honest", "honest_parallel")
    found = {str(m.candidate.config["fault"]): m for m in measurer.confirm(space, candidates, 5)}
    assert all(m.verdict is Verdict.OK for m in found.values())
    assert found["slow"].latency_us > 3000 > found["honest"].latency_us
    space, candidates = space_of("honest", "half")
    verdicts = [m.verdict for m in measurer.confirm(space, candidates, 5)]
    assert Verdict.WRONG in verdicts


def test_states_are_restored_and_compared_canonically(measurer: Measurer) -> None:
    space = JointSpace(
        parse_workload("kv_append:t=2,h=4,kv=2,d=32,dv=32,cap=8,rot=16"), local_cpu()
    )
    found = list(measurer.measure(space, space.defaults()[:1], 11))
    assert [m.verdict for m in found] == [Verdict.OK], found


@pytest.mark.fault
def test_kernels_of_batches_are_run_with_a_sequence_that_rests(measurer: Measurer) -> None:
    """What is timed has none: there a kernel that reads for sequences without a token is right."""
    from restless import Restless

    workload = parse_workload("cached_attention:t=1,h=2,kv=1,d=16,dv=16,cap=64,b=2")
    verdicts = []
    for schedules in (None, [Restless()]):
        space = JointSpace(workload, local_cpu(), schedules)
        verdicts += measurer.measure(space, space.defaults()[:1], 5)
    assert [m.verdict for m in verdicts] == [Verdict.OK, Verdict.WRONG], verdicts
    assert re.match(r"at KV length .*[0-9] and no token.*: out", verdicts[1].message), verdicts[1]


@pytest.mark.fault
@pytest.mark.parametrize("more", [",page=16,pool=4", pytest.param("", marks=pytest.mark.slow)])
def test_kernels_are_run_on_blocks_that_are_filled_in_part(measurer: Measurer, more: str) -> None:
    """What is timed has none: there a kernel that masks nothing in the last block is right."""
    from blockwise import Blockwise

    workload = parse_workload(f"cached_attention:t=1,h=2,kv=1,d=16,dv=16,cap=64,len=48{more}")
    verdicts = []
    for schedules in (None, [Blockwise()]):
        space = JointSpace(workload, local_cpu(), schedules)
        verdicts += measurer.measure(space, space.defaults()[:1], 5)
    assert [m.verdict for m in verdicts] == [Verdict.OK, Verdict.WRONG], verdicts
    assert re.match(r"at KV length [0-9]+: out", verdicts[1].message), verdicts[1]


def test_too_fast_is_suspicious(tmp_path: Path) -> None:
    slow = DeviceModel.guess(local_cpu())

    class Impossible(DeviceModel):
        def floor_us(self, necessary: object, hardware: Hardware) -> float | None:
            return 1e6

    device = Impossible(slow.ops_per_s, slow.bytes_per_s)
    with Measurer(local_cpu(), device=device, timing=QUICK, builders=1, scratch=tmp_path) as m:
        found = run(m, "honest")["honest"]
        (again,) = m.confirm(*space_of("honest"), 5)
    for one in (found, again):
        assert one.verdict is Verdict.SUSPICIOUS and "physical floor" in one.message


def test_the_runner_has_no_torch_and_no_compiler(measurer: Measurer) -> None:
    run(measurer, "honest")
    measurer.runner.drop()
    maps = Path(f"/proc/{measurer.runner.pool.workers[0].pid}/maps").read_text()
    assert "libtvm_runtime" in maps
    assert "libtvm_compiler" not in maps and "libtorch" not in maps


def test_folders_of_dead_processes_are_swept(tmp_path: Path) -> None:
    left = Scratch(tmp_path)
    alive = left.path
    stale = tmp_path / "mimo-measure-1-gone"
    stale.mkdir()
    (stale / "lock").touch()
    (stale / "x.npy").touch()
    assert sweep(tmp_path) == 1
    assert alive.exists() and not stale.exists()
    left.close()
    assert not alive.exists()


def test_ratio_of_error_to_bound() -> None:
    one = np.ones(3)
    assert worst_ratio(one, one, 0 * one) == (0.0, 0)
    assert worst_ratio(np.array([1, 1.5, 1]), one, one) == (0.5, 1)
    assert worst_ratio(np.array([1, np.nan, 1]), one, one)[0] == np.inf
    assert worst_ratio(np.array([1, np.inf, 1]), one, one)[0] == np.inf
    assert worst_ratio(np.array([1, 1, 1.0001]), one, 0 * one) == (np.inf, 2)
    nan = np.array([np.nan, 1.0])
    assert worst_ratio(nan, nan, np.ones(2), nan)[0] == 0
    assert worst_ratio(np.array([0.0, 1.0]), nan, np.ones(2), nan)[0] == np.inf
