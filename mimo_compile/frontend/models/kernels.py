"""Whether a target has kernels for what a scheme makes of a model's matrices, asked before any is made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from mimo_compile.errors import UsageError
from mimo_compile.frontend.models.attend import Attending, Int8, Selecting, attending
from mimo_compile.frontend.models.branches import Branches, Oracle
from mimo_compile.frontend.models.decoder import DecoderConfig, LayerSpec
from mimo_compile.ir.caches import FORMATS, SCALED, scheme_cache_format, window_cache_format
from mimo_compile.ir.formats import QuantScheme
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.kv_groups import GROUPED
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.policies import Geometry
from mimo_compile.ir.workload import BUCKETS, Workload
from mimo_compile.quantize import head_format

_ACTS = ("bf16", "f16", "8", "16")
"""Activations that are tried where those of a scheme have no kernels; the first that have some are named."""


def require_kernels(config: DecoderConfig, scheme: QuantScheme, hardware: Hardware) -> None:
    """Check that each matrix that will be quantised can be multiplied, by as many tokens as steps have.

    Args:
        config: The model's shape.
        scheme: What its matrices become; those that stay floats have kernels everywhere.
        hardware: The target.

    Raises:
        UsageError: a matrix has no kernel; says which, and other activations with which all have.
    """
    found = _without_kernel(config, scheme, hardware)
    if found is None:
        return
    what, workload = found
    listed = "`mimo-compile targets --formats` lists what has kernels where"
    acts = ("8", *_ACTS) if scheme.act.startswith("8") else _ACTS
    others = (replace(scheme, act=act) for act in acts if act != scheme.act)
    other = next((o for o in others if _has_kernels(config, o, hardware)), None)
    raise UsageError(
        f"--quant {scheme}: there is no kernel on {hardware.name} for {what} with a{scheme.act} "
        f"activations ({workload})",
        remedy=f"{listed}; some layouts have none for small groups"
        if other is None
        else f"--quant {other} has kernels for all matrices; {listed}",
    )


def _without_kernel(
    config: DecoderConfig, scheme: QuantScheme, hardware: Hardware
) -> tuple[str, Workload] | None:
    """Return name and workload of a quantised matrix without kernel; None: all have one.

    Raises:
        UsageError: the format of weights does not take such activations.
    """
    from mimo_compile.schedules import schedules_for

    for tokens in BUCKETS:
        if tokens == 1 or tokens <= config.max_context:
            for what, workload in dict(_quantised(config, scheme, tokens)).items():
                if not schedules_for(workload, hardware):
                    return what if tokens == 1 else f"{what}, {tokens} tokens,", workload
    return None


def _has_kernels(config: DecoderConfig, scheme: QuantScheme, hardware: Hardware) -> bool:
    try:
        return _without_kernel(config, scheme, hardware) is None
    except UsageError:
        return False


def require_attention(config: DecoderConfig, caches: str, hardware: Hardware) -> None:
    """Check that each step of the attention policy has a kernel.

    Args:
        config: The model's shape under the policy.
        caches: Name of the format of its KV caches.
        hardware: The target.

    Raises:
        UsageError: a step has none; says which.
    """
    from mimo_compile.schedules import schedules_for

    single = all(
        _held(spec, caches) in FORMATS or type(attending(config, f"layers.{i}")[0]) is Attending
        for i, spec in enumerate(config.layers)
    )
    if not single:
        raise UsageError(
            f"--attention {config.attention} reads keys of single positions, which kv{_scheme(caches)} "
            "caches (--quant) do not keep as they are",
            remedy="use kv16, or leave kv... out of --quant",
        )
    for workload in dict.fromkeys(_steps(config, caches)):
        if not schedules_for(workload, hardware):
            raise UsageError(
                f"--attention {config.attention}: there is no kernel on {hardware.name} for {workload.op} "
                f"({workload})",
                remedy="use --attention model, full or window, and float caches",
            )


def with_rounded_activations(scheme: QuantScheme) -> QuantScheme:
    """Return the scheme of a GPU: matrices that are not quantised here take activations in bfloat16.

    Matrix units multiply 16-bit floats; a scheme that names codes, or other activations, is left as it is.
    """
    if scheme.act == "16" and scheme.codes is None:
        return replace(scheme, act="bf16")
    return scheme


def without_groups(config: DecoderConfig, scheme: QuantScheme) -> str:
    """Return the note that a scheme's few bits for caches serve no layer; empty where one has them.

    Args:
        config: The model's shape under its policy.
        scheme: What it was asked for.
    """
    caches = scheme_cache_format(scheme.kv).name
    if caches not in GROUPED or any(not spec.window for spec in config.layers):
        return ""
    bf16 = window_cache_format(GROUPED[caches])
    return (
        f"kv{scheme.kv} (--quant) changes no cache under --attention {config.attention}: all layers keep "
        f"rings, which are kv{bf16.scheme} then"
    )


def _scheme(caches: str) -> str:
    """Return how ``--quant`` spells a format of caches, behind ``kv``."""
    return (FORMATS.get(caches) or SCALED.get(caches) or GROUPED[caches]).scheme


def _held(spec: LayerSpec, caches: str) -> str:
    """Return the name of the format of a layer's cache in a model with these."""
    return (
        window_cache_format(GROUPED[caches]).name if spec.window and caches in GROUPED else caches
    )


def _steps(config: DecoderConfig, caches: str) -> Iterator[Workload]:
    """Yield what choosing layers do for a token that is decoded and for tokens of a prompt."""
    policy = config.attention
    for number, own in enumerate(config.layers):
        attend = attending(config, f"layers.{number}")[0]
        if type(attend) is Attending:
            continue
        branches = isinstance(attend, Branches)  # what such a layer reads is its lender's
        spec = attend.lender if isinstance(attend, Branches) else own
        held = _held(spec, caches)
        cap, sink = spec.capacity(config.max_context), int(spec.sink or branches)
        for phase, t in (("decode", 1), ("prefill", min(16, config.max_context))):
            if isinstance(attend, Selecting):
                yield from attend.describing(spec, cap, t, held)
            if isinstance(attend, Int8):
                yield get_op("cached_attention").workload(
                    t=t, h=spec.heads, kv=spec.kv_heads, d=spec.d, dv=spec.dv, cap=cap, c=held,
                    window=spec.window, sink=int(spec.sink), arith=attend.arith,
                )  # fmt: skip
            elif phase in policy.phases:
                shape = (t, spec.heads, spec.kv_heads, spec.d, spec.dv, cap)
                steps = policy.workloads(Geometry(*shape, 0, sink, held))
                found: tuple[Workload | None, ...]
                found = (steps.score, steps.select, steps.attend, *steps.beside)
                if isinstance(attend, Selecting) and attend.role.dense and not attend.lends:
                    found = (_dense(config, own, t, held),)
                elif isinstance(attend, Oracle):
                    found = (*_oracle(config, attend, spec, t, held), steps.select)
                elif isinstance(attend, Branches):
                    found = (steps.attend, _dense(config, own, t, _held(own, caches)))
                yield from (w for w in found if w is not None)


def _dense(config: DecoderConfig, spec: LayerSpec, t: int, held: str) -> Workload:
    """Return attention of a layer to its own cache, or its window in it."""
    return get_op("cached_attention").workload(
        t=t, h=spec.heads, kv=spec.kv_heads, d=spec.d, dv=spec.dv,
        cap=spec.capacity(config.max_context), c=held, window=spec.window, sink=int(spec.sink),
    )  # fmt: skip


def _oracle(
    config: DecoderConfig, attend: Oracle, spec: LayerSpec, t: int, held: str
) -> tuple[Workload, ...]:
    """Return what a layer does that attends to everything and scores blocks by what that gave."""
    op: Any = get_op("oracle_attention")
    both: Workload = op.workload(
        t=t, h=spec.heads, kv=spec.kv_heads, d=spec.d, dv=spec.dv,
        cap=spec.capacity(config.max_context), block=config.attention.block, c=held,
    )  # fmt: skip
    if attend.at_once(spec.sink):
        return (both,)
    return _dense(config, spec, t, held), op.parts(both)[1]


def _quantised(
    config: DecoderConfig, scheme: QuantScheme, tokens: int
) -> Iterator[tuple[str, Workload]]:
    """Yield names and workloads of all matrices that the scheme quantises, in a step of so many tokens."""
    fmt, head, hidden = scheme.codes, head_format(scheme), config.hidden
    act, matmul = f"a{scheme.act}", get_op("mpgemm").workload
    if fmt is not None:
        for spec in dict.fromkeys((*config.layers, *config.mtp)):
            for name, (n, k) in _shapes(spec, hidden).items():
                yield f"{name} of {n} x {k}", matmul(m=tokens, n=n, k=k, w=fmt.name, a=act)
            if spec.mlp == "moe":
                extents = {
                    "t": tokens,
                    "e": spec.experts,
                    "k": spec.top_k,
                    "d": hidden,
                    "f": spec.moe_ffn,
                }
                experts = get_op("moe").workload(**extents, w=fmt.name, a=act)
                yield f"experts of {spec.moe_ffn} x {hidden}", experts
        if config.mtp:
            yield "eh_proj", matmul(m=tokens, n=hidden, k=2 * hidden, w=fmt.name, a=act)
    if head is not None and tokens <= 64:
        yield "the output projection", matmul(m=1, n=config.vocab, k=hidden, w=head.name, a=act)


def _shapes(s: LayerSpec, hidden: int) -> dict[str, tuple[int, int]]:
    """Return the matrices of a layer that are multiplied as one, but for experts: ``[N, K]``."""
    q, k, v = s.heads * s.d, s.kv_heads * s.d, s.kv_heads * s.dv
    out = {"qkv": (q + k + v, hidden), "o": (hidden, s.heads * s.dv)}
    if s.gate:
        out["gates"] = (2 * s.gate_rows, hidden)
    if s.mlp == "dense":
        out |= {"gate_up": (2 * s.ffn, hidden), "down": (hidden, s.ffn)}
    elif s.shared_ffn:
        out |= {
            "gate_up of shared experts": (2 * s.shared_ffn, hidden),
            "down of shared experts": (hidden, s.shared_ffn),
        }
    return out
