"""What `verify` runs end to end, and that wrong rows among many right ones are found."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from mimo_compile.errors import ArtifactError
from mimo_compile.verify import LogitsBound, end_to_end


def manifest(policy, context, rerun=0, group=0):
    layers = (SimpleNamespace(name="head", group=0), SimpleNamespace(name="mtp.0", group=group))
    decoder = SimpleNamespace(max_context=context, rerun=rerun, layers=layers, steps=(1, 64))
    return SimpleNamespace(name="m", attention=policy, decoder=decoder)


def test_decoded_rows_cannot_hide_among_those_of_a_long_prompt():
    reference = np.random.default_rng(0).standard_normal((400, 9))
    bound = LogitsBound(1e-3, math.inf)
    assert end_to_end.compare_rows(reference, reference, bound, decoded=8).ok
    wrong = reference.copy()
    wrong[-8:] *= 1.5
    found = end_to_end.compare_rows(wrong, reference, bound, decoded=8)
    assert found.p95_error <= found.bound_p95 and found.decoded_median > 0.4 and not found.ok
    # one that chose otherwise where scores nearly tie
    wrong[-7:] = reference[-7:]
    assert end_to_end.compare_rows(wrong, reference, bound, decoded=8).ok


@pytest.mark.parametrize(
    ("policy", "context", "asked", "rerun", "count", "all_seen"),
    [
        ("model", 4096, None, 0, 96, False),
        ("full", 64, None, 0, 64, False),
        ("quest", 4096, None, 0, 1024 + 8, False),
        ("quest", 4096, 200, 0, 200, True),
        ("quest", 512, None, 0, 512, True),
        ("lessismore", 4096, None, 0, 2048 + 8, False),
        ("moba", 4096, None, 0, 3 * 512 + 8, False),
        ("stream", 4096, None, 0, 1024 + 8, False),
        ("resa", 4096, None, 32, 16 * 16 + 34, False),
        ("resa:p=1", 4096, None, 32, 96, True),
        ("window:size=8", 4096, None, 0, 96, False),
    ],
)
def test_so_many_tokens_are_run_that_a_policy_leaves_something_out(
    policy, context, asked, rerun, count, all_seen
):
    notes: list[str] = []
    found = end_to_end.compared_tokens(manifest(policy, context, rerun), asked, notes)
    assert found == count
    assert bool(notes) == all_seen and all("nothing was left out" in note for note in notes)


def test_so_many_tokens_are_run_that_rows_see_two_groups_and_one_that_fills():
    notes: list[str] = []
    assert end_to_end.compared_tokens(manifest("model", 4096, group=64), None, notes) == 196
    assert end_to_end.compared_tokens(manifest("model", 128, group=64), None, notes) == 128
    assert not notes


@pytest.mark.parametrize(
    ("span", "context", "asked", "count", "noted"),
    [
        (256, 4096, None, 2 * 256 + 9, False),
        (16, 4096, None, 200, False),  # as many as it takes to leave something out
        (256, 4096, 200, 200, True),
        (256, 256, None, 256, True),
        (256, 300, None, 300, False),
    ],
)
def test_so_many_tokens_are_run_that_estimates_go_by_two_spans(span, context, asked, count, noted):
    notes: list[str] = []
    made = manifest(f"tailorkv:quantised=0,span={span}", context)
    assert end_to_end.compared_tokens(made, asked, notes) == count
    assert any("no estimate went by the magnitudes of keys" in note for note in notes) == noted


def test_a_policy_that_nobody_knows_is_the_artifacts_fault():
    with pytest.raises(ArtifactError, match="attention policy 'quest:x=1', which this version"):
        end_to_end.compared_tokens(manifest("quest:x=1", 64), None, [])
