"""Decisions of a record that the compiler refuses give the default kernel, and the plan says so."""

from __future__ import annotations

import pytest
import torch

from mimo_compile.errors import MimoError
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.pipeline.build import Extras, build_artifact, lower_choice
from mimo_compile.pipeline.graphs import module_graphs
from mimo_compile.runtime.program import Choice
from mimo_compile.schedules import get_schedule

pytestmark = pytest.mark.compile
CPU = local_cpu().with_threads(1)


class Scores(torch.nn.Module):
    """Two functions."""

    def forward(self, x):
        return torch.softmax(x @ x, -1)


def refuses(*_):
    raise ValueError("TVM refuses the decisions: no such loop")


def test_refused_decisions_give_the_default(monkeypatch, caplog):
    graphs = module_graphs(Scores(), (torch.randn(1, 12, 12),))
    trace = get_schedule("tir.x86_trace")
    choices = {
        w: Choice(
            str(w),
            trace.name,
            trace.config_to_json(trace.space(w, CPU).default),
            "",
            "measured",
            3.0,
        )
        for w in graphs.functions()
    }
    monkeypatch.setattr(type(trace), "lower", refuses)
    plan = build_artifact(graphs, choices, CPU, Extras()).manifest.plan
    assert {(c.schedule, c.source, c.latency_us) for c in plan} == {
        ("tir.x86_rules", "default", None)
    }
    assert all(c.schedule_version == get_schedule(c.schedule).version for c in plan)
    warnings = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert sum("no such loop" in text for text in warnings) == len(plan) == 2


def test_where_nothing_can_stand_in_it_is_an_error(monkeypatch):
    graphs = module_graphs(Scores(), (torch.randn(1, 12, 12),))
    rules = get_schedule("tir.x86_rules")
    monkeypatch.setattr(type(rules), "lower", refuses)
    (workload, *_) = graphs.functions()
    with pytest.raises(MimoError, match=r"no such loop.*schedule tir.x86_rules"):
        lower_choice(workload, rules, rules.space(workload, CPU).default, CPU)
