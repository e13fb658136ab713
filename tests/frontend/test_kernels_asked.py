"""Kernels of a policy are asked for before anything is made; bits of caches that serve no layer are said."""

from __future__ import annotations

import warnings

import pytest

from mimo_compile.errors import CheckpointWarning, UsageError
from mimo_compile.frontend.huggingface import load_checkpoint
from mimo_compile.frontend.models.kernels import require_attention
from mimo_compile.ir.formats import parse_scheme
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.policies import parse_policy

CONTEXT = 96


def loaded(folder, attention, quant="none"):
    return load_checkpoint(folder, parse_scheme(quant), CONTEXT, attention=parse_policy(attention))


@pytest.mark.parametrize("rolling", [0, 1])
def test_both_parts_of_a_stream_are_asked_for(saved, monkeypatch, rolling):
    """Sinks and window in a ring behind slots of the sinks; where positions roll, the sinks alone as well."""
    config = loaded(saved("llama")[1], f"stream:sink=3,recent=8,rolling={rolling}").decoder.config
    asked, missing = [], []
    monkeypatch.setattr(
        "mimo_compile.schedules.schedules_for",
        lambda work, _: asked.append(work) or [w for w in [work] if w not in missing],
    )
    require_attention(config, "bf16", local_cpu())
    found = [get_op(w.op).full(w) for w in asked]
    assert {w.op for w in asked} == {"sparse_attention"}
    assert {p["window"] for p in found} == ({0, 8} if rolling else {8})
    assert {(p["first"], p["block"], p["c"]) for p in found} == {(16, 3, "bf16")}
    assert all(p["window"] + p["t"] - 1 <= p["cap"] - p["first"] < CONTEXT for p in found)
    for work in list(dict.fromkeys(asked)):
        missing[:] = [work]
        with pytest.raises(UsageError, match=r"there is no kernel on .* for sparse_attention"):
            require_attention(config, "bf16", local_cpu())


def test_bits_that_serve_no_cache_are_said(saved):
    folder = saved("llama")[1]
    with pytest.warns(
        CheckpointWarning, match=r"kv4 .* changes no cache under --attention stream:"
    ):
        loaded(folder, "stream:sink=3,recent=8", "w8a8kv4")
    with warnings.catch_warnings():
        warnings.simplefilter("error", CheckpointWarning)
        loaded(folder, "stream:sink=3,recent=8", "w8a8kv16")
        loaded(folder, "full", "w8a8kv4")
        loaded(folder, "stream:sink=3,recent=96", "w8a8kv4")  # nothing is left out: full caches


@pytest.mark.parametrize("quant", ["kvfp8", "kv8", "kv4"])
@pytest.mark.parametrize("attention", ["quest:budget=32,page=16", "lessismore:budget=12"])
def test_policies_that_read_keys_refuse_caches_of_few_bits_by_the_words_of_options(
    saved, attention, quant
):
    """Before the model is exported; as ``--quant`` spells the format."""
    with pytest.raises(
        UsageError, match=rf"--attention {attention[:6]}.* which {quant} caches \(--q"
    ):
        load_checkpoint(
            saved("llama")[1],
            parse_scheme(quant),
            CONTEXT,
            None,
            local_cpu(),
            parse_policy(attention),
        )
