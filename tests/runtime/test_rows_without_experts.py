"""Rows that are no tokens have no experts, where kernels promise that this changes no token's bits."""

from __future__ import annotations

from functools import cache

import expert_samples as samples
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.ir.hardware import local_cpu
from mimo_compile.runtime import host, load
from mimo_compile.runtime.batch import append_each
from mimo_compile.runtime.expert_memory import rules_of
from mimo_compile.runtime.routing import recording
from mimo_compile.schedules import get_schedule
from mimo_compile.schedules.emit.bf16 import NEEDS

pytestmark = pytest.mark.slow
KINDS = [
    "float",
    pytest.param(
        "int8",
        marks=[
            pytest.mark.skipif(
                not get_schedule("moe.x86_vnni").supports(samples.workload(1, "int8"), local_cpu()),
                reason="the CPU has no dots of bytes",
            ),
        ],
    ),
    pytest.param(
        "pairs",
        marks=[
            pytest.mark.skipif(
                not local_cpu().features >= NEEDS, reason="the CPU has no bfloat16 dots"
            ),
        ],
    ),
]
ENTRIES = ("step_1", "step_16", f"batch_{samples.BATCH}")


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """Return a function that loads an artifact twice: as it is, and with experts for all rows."""
    folder = tmp_path_factory.mktemp("rows")

    @cache
    def load_both(kind):
        path = samples.experts(kind).save(folder / f"{kind}.mimo")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(host, "spare", lambda bound, apart: None)
            every = load(path, threads=1)
            for name in ENTRIES:
                every.bind(name)
        return load(path, threads=1), every

    return load_both


def chosen(module, entry):
    """Return what the expert kernels of the entry's last run were given, ``[layers, rows, k]``."""
    bound = module.bind(entry)
    kernels = rules_of(module.manifest)
    calls = [call for call in bound.program.calls if call.kernel in kernels]
    return np.array([bound.array(call.args[1]) for call in calls])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None)
@given(st.integers(1, 16), st.integers(0, 2**32 - 1))
def test_padding_of_a_step_has_none(modules, kind, count, seed):
    spared, every = modules(kind)
    tokens = np.random.default_rng(seed).integers(0, 250, count).tolist()
    states = []
    for module in (spared, every):
        bound = module.bind("step_16")
        bound.inputs["ids"][...], bound.inputs["pos"][...] = 0, (0, count)
        bound.inputs["ids"][:count] = tokens
        bound.run()
        states.append(bound.outputs["hidden"][:count].copy())
    ids, others = chosen(spared, "step_16"), chosen(every, "step_16")
    assert len(ids) == len(samples.LAYERS) and (others >= 0).all()
    if kind == "pairs":  # how many rows an expert has may change a bit there
        assert (ids == others).all()
    else:
        assert (ids[:, :count] == others[:, :count]).all() and (ids[:, count:] == -1).all()
    assert np.array_equal(*states)


def test_sequences_that_rest_have_none(modules):
    states = []
    for module in modules("float"):
        sessions = [module.session(slot=slot) for slot in range(samples.BATCH)]
        for session, token in zip(sessions, (3, 90, 200), strict=True):
            session.append([token])
        states += [append_each(module, sessions, [5, 6, 7]).copy()]
        states += [append_each(module, [sessions[0], sessions[2]], [8, 9]).copy()]
        ids = chosen(module, f"batch_{samples.BATCH}")
        rest = (ids[:, 1] == -1).all()
        assert rest == (module is modules("float")[0]) and (ids[:, [0, 2]] >= 0).all()
    assert np.array_equal(states[0], states[2]) and np.array_equal(states[1], states[3])


def test_logs_have_the_experts_of_all_tokens(modules):
    logs = []
    for module in modules("float"):
        with recording(module) as recorder:
            module.session().append(list(range(15)))
        logs.append(recorder.log().ids)
    assert len(logs[0]) == 15 and np.array_equal(*logs) and (logs[0] >= 0).all()
