"""The `mimo` op dialect: one file per op; definitions are found by name, lazily (they import torch)."""

from __future__ import annotations

from importlib import import_module

from mimo_compile.errors import UsageError
from mimo_compile.ir import functions
from mimo_compile.ir.ops.base import Arg, OpDef, Param
from mimo_compile.ir.workload import Workload

OPS: dict[str, str] = {
    "mpgemm": "MpGemm",
    "lora_mpgemm": "LoraMpGemm",
    "cached_attention": "CachedAttention",
    "oracle_attention": "OracleAttention",
    "sparse_attention": "SparseAttention",
    "select_blocks": "SelectBlocks",
    "score_keys": "ScoreKeys",
    "score_blocks": "ScoreBlocks",
    "score_lowbit": "ScoreLowbit",
    "describe_blocks": "DescribeBlocks",
    "gate_queries": "GateQueries",
    "gate_keys": "GateKeys",
    "kv_append": "KvAppend",
    "index_keys": "IndexKeys",
    "append_entries": "AppendEntries",
    "key_mean": "KeyMean",
    "moe": "Moe",
    "route": "Route",
    "rms_norm": "RmsNorm",
    "rope_table": "RopeTable",
    "swiglu": "SwiGlu",
    "embed": "Embed",
}
"""Op name (also its module's name) to the class that defines it; `functions.OP` is none of them."""

_FORMS = ("paged",)
"""Modules with torch ops that are workloads of ops above."""


def get_op(name: str) -> OpDef:
    """Return the definition of an op.

    Raises:
        UsageError: no op has this name.
    """
    if name == functions.OP:
        return _generic()
    if name not in OPS:
        raise UsageError(f"unknown op {name!r}", remedy=f"known ops: {', '.join(OPS)}")
    module = import_module(f"mimo_compile.ir.ops.{name}")
    op: OpDef = getattr(module, OPS[name])()
    return op


def _generic() -> OpDef:
    from mimo_compile.ir.ops.tir import Tir

    return Tir()


def load_all() -> None:
    """Import every op module, which registers the torch custom ops ``torch.ops.mimo.*``."""
    for name in (*OPS, *_FORMS):
        import_module(f"mimo_compile.ir.ops.{name}")


def parse_workload(text: str) -> Workload:
    """Parse and canonicalise ``--op`` text against the op's definition.

    Raises:
        UsageError: malformed text, unknown op or bad parameters.
    """
    raw = Workload.parse(text)
    return get_op(raw.op).workload(**dict(raw.params))


__all__ = ["OPS", "Arg", "OpDef", "Param", "get_op", "load_all", "parse_workload"]
