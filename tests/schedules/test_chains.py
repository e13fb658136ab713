"""Long float32 sums whose terms have one sign: roundings that all go one way stay within the op's bound."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import numpy as np
import pytest
from every import LONG, Built, Case, cases, names
from harness import Arrays, compare

from mimo_compile.ir.formats import parse_act_format
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.workload import Workload

NAMES = names()


def float_cases(name: str) -> list[Case]:
    """Return the cases of a schedule whose sums are float32, of one scale a row."""
    found: dict[tuple[str, str], Case] = {}
    for case in cases(name):
        exact = parse_act_format(case.act).is_int8 and case.fmt.is_integer
        if not exact and (case.fmt.is_float or case.fmt.name.endswith("grow")):
            found.setdefault((case.fmt.name, parse_act_format(case.act).kind), case)
    return list(found.values())


def one_signed(case: Case, workload: Workload, seed: int) -> Arrays:
    """Return inputs whose products are all positive and nearly equal, so that each sum grows evenly."""
    rng = np.random.default_rng(seed)
    inputs = get_op("mpgemm").make_inputs(workload, rng)
    fmt = case.fmt
    inputs["x"] = np.full_like(inputs["x"], 1.1) + np.float32(1e-3) * inputs["x"]
    if fmt.is_float:
        w = np.full(inputs["w"].shape, 0.7, np.float32)
        inputs["w"] = (w.view(np.uint32) >> 16).astype(np.uint16) if fmt.bits == 16 else w
        return inputs
    code = fmt.max_code if fmt.is_integer else 0
    if fmt.family in ("codebook", "fp8"):
        code = int(np.nanargmax(np.array(fmt.values)))
    inputs["codes"] = np.full_like(inputs["codes"], code)
    inputs["scale"] = np.full_like(inputs["scale"], np.float16(0.3))
    if fmt.has_zero:
        inputs["zero"] = np.zeros_like(inputs["zero"])
    return inputs


def prove(chosen: Iterable[Case], seed: int) -> None:
    """Run each case; tell all that are off.

    Raises:
        AssertionError: with the message of each case that is wrong.
    """
    wrong, op = [], get_op("mpgemm")
    for case in chosen:
        workload = case.workload(17, LONG)
        assert workload is not None, case
        inputs = one_signed(case, workload, seed)
        built = Built(case, workload, case.schedule.space(workload, case.hardware).default)
        want = op.reference(workload, inputs)
        try:
            bound = op.bound(workload, inputs, want)["y"]
            compare(built.where, "y", built.run(inputs), want["y"], bound)
        except AssertionError as error:
            wrong.append(str(error))
    assert not wrong, f"{len(wrong)} cases fail:\n" + "\n".join(wrong)


@pytest.mark.parametrize("name", NAMES)
def test_sums_of_one_sign_are_within_the_bound(name):
    if not (found := float_cases(name)):
        pytest.skip("whole numbers only, or not on this CPU")
    seed = zlib.crc32(name.encode())
    few = -(-len(found) // 2)
    prove(found[seed % few :: few], seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_sums_of_one_sign_are_within_the_bound_in_every_format(name):
    if not (found := float_cases(name)):
        pytest.skip("whole numbers only, or not on this CPU")
    prove(found, 1)
