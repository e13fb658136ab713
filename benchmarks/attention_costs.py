"""What systems of sparse attention keep and take beside dense attention, for `attention_quality.py`."""

from __future__ import annotations

from dataclasses import replace

import torch

from mimo_compile.bench.sparse import Cell, bench_cell
from mimo_compile.frontend.models import kv
from mimo_compile.frontend.models.attend import attending, with_attention
from mimo_compile.frontend.models.decoder import DecoderConfig, LayerSpec
from mimo_compile.ir.caches import parse_cache_format
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.policies import AttentionPolicy
from mimo_compile.ir.policies.hysparse import HySparse
from mimo_compile.tiny.training_model import TinyModel


def kept_bytes(policy: AttentionPolicy, model: TinyModel, length: int) -> float:
    """Return bytes that global layers hold between tokens, over those of dense attention.

    Of compiled layers with float32 caches for `length` positions; rings have room for a step of a prompt.
    """
    if isinstance(policy, HySparse):  # its sparse layers have the rings that they had before
        return 1.0
    c = model.config
    heads = (c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.v_head_dim)
    spec = LayerSpec(*heads, rotary_dim=c.rotary_dims(c.head_dim))
    count = c.hybrid_layer_pattern.count(0)
    plain = DecoderConfig("tiny", c.hidden_size, c.vocab_size, (spec,) * count, 1e-5, True, length)
    return _held(with_attention(plain, policy)) / _held(plain)


def _held(config: DecoderConfig) -> int:
    """Bytes of all states of a decoder's layers."""
    total, caches = 0, parse_cache_format("f32")
    for i, spec in enumerate(config.layers):
        states = kv.cache_arrays(spec, caches, config.max_context)
        more = attending(config, f"layers.{i}")[0].states(
            spec, spec.capacity(config.max_context), torch.float32
        )
        total += sum(t.numel() * t.element_size() for t in (*states.values(), *more.values()))
    return total


def decode_time(
    policy: AttentionPolicy, keys: int, rounds: int = 8
) -> tuple[float, float, float] | None:
    """Time of a choosing layer's kernels for one token over `keys` keys, over that of dense attention.

    One thread, untuned, 32 query heads on 8 KV heads of 128, bfloat16 caches, all in turn in one run. Returns
    the median, p10 and p90 over rounds; None of systems that score nothing at decode.
    """
    if policy.score is None or policy.select is None or "decode" not in policy.phases:
        return None
    found = bench_cell(Cell(str(policy), 1, keys), replace(local_cpu(), threads=1), None, rounds)
    return found[0].time
