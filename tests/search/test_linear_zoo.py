"""The verifier's own test: kernels that are wrong in thirty ways are rejected, right ones never are."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from mimo_compile.ir import ops
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.ir.workload import Workload
from mimo_compile.search.measure import Measurement, Measurer
from mimo_compile.search.measure.cases import Case, make_case
from mimo_compile.search.records import Verdict
from mimo_compile.search.space import JointSpace

pytestmark = [pytest.mark.compile, pytest.mark.fault]
TYPES = {
    "f32": "mpgemm:m=5,n=19,k=64,w=w4zg32,a=a16,bias=1",
    "f16": "zoo_linear:m=5,n=19,k=64,y=f16",
    "i32": "zoo_linear:m=5,n=19,k=64,y=i32",
}
"""Type of results -> workload: float32 is the op that models use."""


@pytest.fixture(scope="module")
def zoo() -> Iterator[Any]:
    """The zoo's module; its op is known while the tests of this file run."""
    import linear_op
    import linear_zoo

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "mimo_compile.ir.ops.zoo_linear", linear_op)
        patch.setitem(ops.OPS, "zoo_linear", "ZooLinear")
        yield linear_zoo


def space_of(zoo: Any, y: str) -> JointSpace:
    workload = parse_workload(TYPES[y])
    schedule = zoo.MpgemmZoo() if workload.op == "mpgemm" else zoo.LinearZoo()
    return JointSpace(workload, local_cpu(), [schedule])


def verdicts(
    zoo: Any, measurer: Measurer, y: str, kinds: tuple[str, ...], cases: list[Case]
) -> dict[str, list[Measurement]]:
    """Build each kernel once, and verify it on each case; only what must ends its process."""
    space = space_of(zoo, y)
    (schedule,) = space.schedules
    candidates = [space.candidate(schedule, zoo.LinearConfig(kind)) for kind in kinds]
    out: dict[str, list[Measurement]] = {kind: [] for kind in kinds}
    for candidate, built in zip(candidates, measurer.build(space, candidates), strict=True):
        assert built.status == "ok", (candidate, built)
        for case in cases:
            m = measurer.runner.verified(space, candidate, built, case)
            out[str(candidate.config["kind"])].append(m)
            if "was written" in m.message:
                measurer.runner.pool.replace()
            else:
                measurer.runner.drop()
    measurer.builder.forget(*(c.key for c in candidates))
    return out


def adversarial(workload: Workload, kind: str, seed: int) -> Case:
    """Return a case whose inputs are of a kind that rounds, cancels, vanishes or overflows."""
    op, base = get_op(workload.op), make_case(workload, seed)
    rng = np.random.default_rng(seed)
    integer = base.inputs["x"].dtype == np.int8
    x = base.inputs["x"].astype(np.float64)
    if kind == "zeros":
        x = 0 * x
    elif kind == "negative_zeros":
        x = -0.0 * np.abs(x)
    elif kind == "ones":
        x = 0 * x + 1
    elif kind == "cancelling":
        x[:, 1::2] = -x[:, ::2]
    elif kind == "one_hot":
        x = np.eye(*x.shape) * 100
    elif kind == "largest":
        x = np.sign(x) * 127
    elif kind == "wide":
        x = x if integer else np.sign(x) * 2.0 ** rng.integers(-12, 9, x.shape)
    elif kind == "tiny":
        x = x // 64 if integer else x * 2.0**-14
    inputs = {**base.inputs, "x": x.astype(base.inputs["x"].dtype)}
    expected = op.reference(workload, inputs)
    return Case(workload, seed, base.args, inputs, expected, op.bound(workload, inputs, expected))


ADVERSARIAL = (
    "zeros", "negative_zeros", "ones", "cancelling", "one_hot", "largest", "wide", "tiny",
)  # fmt: skip


def wrong_kinds(zoo: Any) -> tuple[str, ...]:
    left_out = {"third_call"} | ({"race"} if local_cpu().threads < 2 else set())
    return tuple(kind for kind in zoo.WRONG if kind not in left_out)


@pytest.mark.parametrize("y", TYPES)
def test_every_wrong_kernel_is_rejected(zoo: Any, measurer: Measurer, y: str) -> None:
    kinds = wrong_kinds(zoo)
    found = verdicts(zoo, measurer, y, kinds, [make_case(parse_workload(TYPES[y]), 3)])
    assert len(kinds) >= 20
    assert {k: m.verdict for k, (m,) in found.items()} == dict.fromkeys(kinds, Verdict.WRONG)
    assert "beyond y" in found["past_end"][0].message
    assert "beyond y" in found["before_start"][0].message
    assert "x was changed" in found["writes_input"][0].message
    assert "scale was changed" in found["writes_weight"][0].message
    if y == "f32":  # each single result is within its bound
        assert "two runs on the same inputs differ" in found["random"][0].message


@pytest.mark.parametrize("y", TYPES)
def test_a_kernel_that_is_right_twice_only_is_rejected(
    zoo: Any, measurer: Measurer, y: str
) -> None:
    measurer.runner.pool.replace()
    space = space_of(zoo, y)
    (schedule,) = space.schedules
    candidates = [space.candidate(schedule, zoo.LinearConfig(k)) for k in ("third_call", "plain")]
    bad, good = measurer.measure(space, candidates, 4)
    assert bad.verdict is Verdict.WRONG and "after many calls" in bad.message
    assert good.verdict is Verdict.OK and good.latency_us is not None


@pytest.mark.parametrize("y", TYPES)
def test_no_honest_kernel_is_rejected(zoo: Any, measurer: Measurer, y: str) -> None:
    """Half of the kernels here, all of them in `test_many_seeds`."""
    workload = parse_workload(TYPES[y])
    cases = [make_case(workload, seed) for seed in range(3)]
    cases += [adversarial(workload, kind, 100 + i) for i, kind in enumerate(ADVERSARIAL)]
    found = verdicts(zoo, measurer, y, zoo.HONEST[y == "f16" :: 2], cases)
    assert 3 * len(zoo.HONEST) >= 30
    bad = {k: [m.message for m in ms if m.verdict is not Verdict.OK] for k, ms in found.items()}
    assert {k: messages for k, messages in bad.items() if messages} == {}


@pytest.mark.slow
@pytest.mark.parametrize("y", TYPES)
def test_many_seeds(zoo: Any, measurer: Measurer, y: str) -> None:
    """No honest kernel fails on 20 seeds and 3 of each hard input; no wrong one passes on any of 5."""
    workload = parse_workload(TYPES[y])
    cases = [make_case(workload, seed) for seed in range(1000, 1020)]
    cases += [
        adversarial(workload, kind, 2000 + 10 * i + seed)
        for i, kind in enumerate(ADVERSARIAL)
        for seed in range(3)
    ]
    for ms in verdicts(zoo, measurer, y, zoo.HONEST, cases).values():
        assert [m.message for m in ms if m.verdict is not Verdict.OK] == []
    kinds = wrong_kinds(zoo)
    for kind, ms in verdicts(zoo, measurer, y, kinds, cases[:5]).items():
        assert {m.verdict for m in ms} == {Verdict.WRONG}, kind
