"""Build a decoder's stages from a checkpoint: tensor by tensor, quantised on the way.

What is quantised: all matrices of the layers (experts and draft layers too) and the output projection, which
keeps at least four bits. What is not: embedding, router, the gate of shared experts, norms, biases, sinks and
KV caches.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mimo_compile.errors import InputError
from mimo_compile.frontend.models import kv
from mimo_compile.frontend.models.attend import attending
from mimo_compile.frontend.models.branches import Branches, BranchLayer
from mimo_compile.frontend.models.decoder import Decoder, DecoderConfig, LayerSpec
from mimo_compile.frontend.models.drafts import MtpLayer
from mimo_compile.frontend.models.early import PreGate
from mimo_compile.frontend.models.family import Family, Names
from mimo_compile.frontend.models.feed import Feed
from mimo_compile.frontend.models.gated import Gated
from mimo_compile.frontend.models.indexed import Indexed
from mimo_compile.frontend.models.stacking import pile, real, same_order, same_type, stack
from mimo_compile.frontend.models.stage import Stage, lists_of, routes_of
from mimo_compile.frontend.models.stages import (
    Attention,
    Embed,
    Experts,
    FinalNorm,
    FirstLayer,
    Head,
    Layer,
    LayerCore,
    QuantLinear,
    Rope,
    frozen,
)
from mimo_compile.frontend.weights.canonical import common_format, widen
from mimo_compile.frontend.weights.checkpoint import Checkpoint
from mimo_compile.ir.caches import scheme_cache_format
from mimo_compile.ir.formats import QuantScheme, QuantTensor, WeightFormat
from mimo_compile.quantize import head_format, quantize

if TYPE_CHECKING:
    from mimo_compile.frontend.pre_gates import PreGates
    from mimo_compile.frontend.trained import Trained

EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
"""Names that all families share."""
_MISSING = 10_000
"""Tensors that may be missing and are still listed."""
_SHAPES = 1_000_000
"""Tensors that a model may have of which only shapes are there."""


def prefixes(config: DecoderConfig) -> list[tuple[str, str, LayerSpec]]:
    """Return stage name, tensor prefix and spec of every layer, draft layers last."""
    main = [(f"layers.{i}", f"model.layers.{i}.", s) for i, s in enumerate(config.layers)]
    start = config.drafts.prefix
    return main + [(f"mtp.{i}", f"{start}{i}.", s) for i, s in enumerate(config.mtp)]


def expected_tensors(
    config: DecoderConfig, family: Family, checkpoint: Checkpoint
) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor that the decoder reads.

    Raises:
        InputError: there are far more than the checkpoint has; they are not all listed first.
    """
    most = len(checkpoint.entries) + (_MISSING if checkpoint.has_tensors else _SHAPES)
    out: dict[str, tuple[int, ...]] = {
        EMBED: (config.vocab, config.hidden),
        NORM: (config.hidden,),
    }
    if not config.tied:
        out[HEAD] = (config.vocab, config.hidden)
    for _, prefix, spec in prefixes(config):
        shapes = _shapes(spec, config.hidden)
        for key, name in family.layer_names(spec, prefix, checkpoint).items():
            for e in range(spec.experts if "{e}" in name else 1):
                out[name.replace("{e}", str(e))] = shapes[key]
        if len(out) > most:
            raise InputError(
                f"config.json describes more than {most} tensors, of which at most "
                f"{len(checkpoint.entries)} are there",
                file=checkpoint.config_file,
                remedy="Check that config.json belongs to these weights",
            )
    return out


def _shapes(s: LayerSpec, hidden: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight that a layer may have, by its key in `Names`."""
    q, k, v = s.heads * s.d, s.kv_heads * s.d, s.kv_heads * s.dv
    vectors = ("attn_norm", "mlp_norm", "enorm", "hnorm", "final_norm")
    return {
        **dict.fromkeys(vectors, (hidden,)),
        "q": (q, hidden),
        "k": (k, hidden),
        "v": (v, hidden),
        "q_bias": (q,),
        "k_bias": (k,),
        "v_bias": (v,),
        "q_norm": (q if s.qk_norm == "all" else s.d,),
        "k_norm": (k if s.qk_norm == "all" else s.d,),
        "sink": (s.heads,),
        "listed_sink": (s.heads,),
        **dict.fromkeys(("listed_gate", "window_gate"), (s.gate_rows, hidden)),
        "o": (hidden, s.heads * s.dv),
        "eh_proj": (hidden, 2 * hidden),
        "gate": (s.ffn, hidden),
        "up": (s.ffn, hidden),
        "down": (hidden, s.ffn),
        "router": (s.experts, hidden),
        "router_bias": (s.experts,),
        **dict.fromkeys(("shared.gate", "shared.up"), (s.shared_ffn, hidden)),
        "shared.down": (hidden, s.shared_ffn),
        "shared_gate": (1, hidden),
        "experts.gate": (s.moe_ffn, hidden),
        "experts.up": (s.moe_ffn, hidden),
        "experts.down": (hidden, s.moe_ffn),
        "experts.gate_up": (s.experts, 2 * s.moe_ffn, hidden),
        "experts.all_down": (s.experts, hidden, s.moe_ffn),
    }


@dataclass
class Builder:
    """Turns the tensors of one checkpoint into stages."""

    config: DecoderConfig
    family: Family
    checkpoint: Checkpoint
    scheme: QuantScheme
    kinds: dict[str, str] = field(default_factory=dict)
    """Structural key of a layer -> the short kind it got."""
    ropes: dict[object, str] = field(default_factory=dict)
    """`LayerSpec.rope_key` -> the stage that makes these angles."""
    gates: Trained | None = None
    """Gates or indexers of layers that choose by them."""
    pre_gates: PreGates | None = None
    """Gates of layers that choose the next one's experts."""

    def build(self) -> Decoder:
        """Read and quantise everything."""
        config = self.config
        table = frozen(self._stored(EMBED))
        stages = [Stage("embed", "embed", Embed(table), {}, ("ids",), ("x",))]
        ropes = self.ropes
        for spec in (*config.layers, *config.mtp):
            if spec.rope_key not in ropes:
                name = ropes[spec.rope_key] = f"rope.{len(ropes)}"
                kind = f"rope.r{spec.rotary_dim}"
                stages.append(Stage(name, kind, Rope(spec), {}, ("pos",), (name,)))
        drafts: list[Stage] = []
        for name, prefix, spec in prefixes(config):
            stage = self._layer(name, prefix, spec, ropes[spec.rope_key], table)
            (drafts if name.startswith("mtp.") else stages).append(stage)
        norm = FinalNorm(self.checkpoint.real(NORM), config.eps)
        stages.append(
            Stage("final_norm", "final_norm", norm, {}, ("x", "delta"), ("hidden", "normed"))
        )
        stages.append(Stage("head", "head", self._head(table), {}, ("normed",), ("logits",)))
        return Decoder(config, [*stages, *drafts])

    def _stored(self, name: str) -> Tensor:
        """Return a matrix that stays float: bf16 as it is or if the scheme says so, all else in f32."""
        tensor = self.checkpoint.tensor(name)
        if self.scheme.weight is not None and self.scheme.weight.is_float:
            return tensor.to(torch.bfloat16)
        return tensor if tensor.dtype == torch.bfloat16 else tensor.to(torch.float32)

    def _matrix(self, names: list[str], fmt: WeightFormat | None) -> Tensor | QuantTensor:
        """Return matrices stacked along their rows, each quantised by itself or as it is stored.

        Complex formats pair upper with lower rows, so that a stack of them is quantised as one matrix.
        """
        if any(self.checkpoint.entries[name].fmt for name in names):
            return self._as_stored(names)
        if fmt is None:
            parts = [self._stored(name) for name in names]
            return parts[0] if len(parts) == 1 else torch.cat(same_type(parts))
        if fmt.family == "complex" and len(names) > 1:
            whole = torch.cat(same_type([self.checkpoint.tensor(name) for name in names]))
            return self._quantise(" + ".join(names), whole, fmt)
        done = [self._quantise(name, self.checkpoint.tensor(name), fmt) for name in names]
        return done[0] if len(done) == 1 else stack(done)

    def _quantise(
        self, name: str, weight: Tensor, fmt: WeightFormat, expert: int | None = None
    ) -> QuantTensor:
        """Return a matrix in a quantised format; ``expert``: which, where a tensor holds those of all."""
        return quantize(weight, fmt, what=name)

    def _as_stored(self, names: list[str]) -> QuantTensor | Tensor:
        """Return matrices that the checkpoint holds quantised, stacked along their rows.

        Those in different integer formats take one that holds all of them; where columns stand in
        different orders, only real values can be stacked.
        """
        if (whole := self.checkpoint.joined(names)) is not None:
            return whole
        fmt = self._common(names)
        if (
            fmt.family == "complex" and len(names) > 1
        ):  # its codes belong to pairs of rows of the stack
            raise InputError(
                f"{', '.join(names)}: {fmt} matrices that are multiplied as one must be stored as one",
                file=self.checkpoint.source,
            )
        done = [widen(self.checkpoint.quantised(name), fmt) for name in names]
        if len(done) == 1:
            return done[0]
        if all(same_order(part, done[0]) for part in done):
            return stack(done)
        return torch.cat([torch.from_numpy(part.dequantize()) for part in done])

    def _common(self, names: list[str]) -> WeightFormat:
        entries = [self.checkpoint.entries[name] for name in names]
        formats = [entry.fmt for entry in entries if entry.fmt is not None]
        fmt = common_format(formats, entries[0].shape[-1]) if len(formats) == len(names) else None
        if fmt is None:
            what = ", ".join(f"{n} {e.dtype}" for n, e in zip(names, entries, strict=True))
            raise InputError(
                f"matrices that are multiplied as one are stored in different formats: {what}",
                file=entries[0].file,
            )
        return fmt

    def _linear(self, names: list[str], bias: Tensor | None = None) -> QuantLinear:
        weight = self._matrix(names, self.scheme.codes)
        return QuantLinear(weight, bias, f"a{self.scheme.act}")

    def _head(self, table: nn.Parameter) -> Head:
        fmt = head_format(self.scheme)
        name = EMBED if self.config.tied else HEAD
        if fmt is None and self.checkpoint.entries[name].fmt is None:
            whole = table if self.config.tied else self._stored(HEAD)
            return Head(QuantLinear(whole, act=f"a{self.scheme.act}"))
        return Head(QuantLinear(self._matrix([name], fmt), act=f"a{self.scheme.act}"))

    def _layer(
        self, name: str, prefix: str, spec: LayerSpec, rope: str, table: nn.Parameter
    ) -> Stage:
        names = self.family.layer_names(spec, prefix, self.checkpoint)
        draft, first = name.startswith("mtp."), name == "layers.0"
        make: type[LayerCore] = MtpLayer if draft else FirstLayer if first else Layer
        gates = None
        if spec.gate:
            make, gates = BranchLayer, self._linear([names["listed_gate"], names["window_gate"]])
        small = {k: self.checkpoint.real(n) for k, n in names.items() if k in _SMALL}
        bias = [small.pop(f"{part}_bias") for part in "qkv"] if spec.qkv_bias else None
        qkv = self._linear(
            [names[part] for part in "qkv"], None if bias is None else torch.cat(bias)
        )
        attention = Attention(spec, qkv, self._linear([names["o"]]), small, gates)
        attend, follows, lends = attending(self.config, name)
        if isinstance(attend, Gated | Indexed):
            assert self.gates is not None
            attend = replace(attend, weights=self.gates.of(name, spec))
        module = make(
            spec,
            attention,
            self._feed(name, spec, names),
            small,
            self.config.eps,
            self.config.max_context,
            kv.asked_format(self.config, name, scheme_cache_format(self.scheme.kv)),
            attend,
        )
        kind = "layer"
        inputs: tuple[str, ...] = ("x", "delta")
        outputs: tuple[str, ...] = ("x", "delta")
        if isinstance(module, MtpLayer):
            join = self._linear([names["eh_proj"]])
            module.bind(table, join, small, self.config.drafts, self.checkpoint.real(NORM))
            kind, inputs, outputs = "mtp", ("hidden", "ids"), ("normed",)
        elif first:
            kind, inputs = "first", ("x",)
        states = {state: f"{name}.{state}" for state in module.states}
        angles: tuple[str, ...] = (rope, "pos")
        if isinstance(attend, Branches):
            states |= attend.borrowed
            angles += (self.ropes[attend.lender.rope_key],)
        return Stage(
            name, self._kind(kind, module), module, states, (*inputs, *angles), outputs,
            lists_of(follows), lists_of(lends), routes_of(name if self._early(name) else ""),
            routes_of(after if self._early(after := following(name)) else ""),
        )  # fmt: skip

    def _kind(self, family: str, module: LayerCore) -> str:
        """Return ``first``, ``layer``, ``layer.1`` ...: one short name for each different graph."""
        key = f"{family}:{module.kind}"
        if key not in self.kinds:
            count = sum(known.startswith(f"{family}:") for known in self.kinds)
            self.kinds[key] = f"{family}.{count}" if count else family
        return self.kinds[key]

    def _early(self, name: str) -> bool:
        """Say whether the experts of a stage are chosen by the layer before it."""
        part, _, number = name.partition(".")
        return (
            self.pre_gates is not None and part == "layers" and int(number) in self.pre_gates.layers
        )

    def _pre_gate(self, name: str) -> PreGate | None:
        """Return the gate that a stage has for the next one, if it has one."""
        if self.pre_gates is None or not self._early(after := following(name)):
            return None
        number = int(after.partition(".")[2])
        spec = self.config.layers[number]
        names = self.family.layer_names(spec, f"model.layers.{number}.", self.checkpoint)
        bias = self.checkpoint.real(names["router_bias"]) if spec.router_bias else None
        return self.pre_gates.of(number, spec, bias)

    def _feed(self, name: str, spec: LayerSpec, names: Names) -> Feed:
        pre_gate = self._pre_gate(name)
        if spec.mlp == "dense":
            gate_up = self._linear([names["gate"], names["up"]])
            down = self._linear([names["down"]])
            return Feed(spec, {"gate_up": gate_up, "down": down}, None, pre_gate)
        act = f"a{self.scheme.act}"
        if "experts.gate_up" in names:
            w13 = self._fused_experts(names["experts.gate_up"])
            w2 = self._fused_experts(names["experts.all_down"])
        else:
            pair = [names["experts.gate"], names["experts.up"]]
            w13, w2 = self._experts(spec, pair), self._experts(spec, [names["experts.down"]])
        w13, w2 = self._same_format(names, w13, w2)
        parts: dict[str, QuantLinear | Experts] = {"experts": Experts(w13, w2, act)}
        if own := not self._early(name):
            parts = {"router": QuantLinear(self.checkpoint.real(names["router"])), **parts}
        if spec.shared_ffn:
            parts["shared_gate_up"] = self._linear([names["shared.gate"], names["shared.up"]])
            parts["shared_down"] = self._linear([names["shared.down"]])
        if spec.shared_gate:
            parts["shared_gate"] = QuantLinear(self.checkpoint.real(names["shared_gate"]))
        bias = self.checkpoint.real(names["router_bias"]) if own and spec.router_bias else None
        return Feed(spec, parts, bias, pre_gate)

    def _experts(self, spec: LayerSpec, names: list[str]) -> Tensor | QuantTensor:
        """Return ``[E, N, K]`` from one tensor per expert (and half)."""
        each = [
            self._matrix([n.replace("{e}", str(e)) for n in names], self.scheme.codes)
            for e in range(spec.experts)
        ]
        found = pile(each)
        if not isinstance(found, QuantTensor) and self._codes(names[0]):
            self.checkpoint.note(
                "experts whose columns stand in orders of their own (desc_act), or in formats that none "
                "holds together, are read as float32"
            )
        return found

    def _codes(self, name: str) -> bool:
        """Say whether a matrix of (the first of) the experts is stored quantised."""
        return self.checkpoint.entries[name.replace("{e}", "0")].fmt is not None

    def _same_format(
        self, names: Names, w13: Tensor | QuantTensor, w2: Tensor | QuantTensor
    ) -> tuple[Tensor | QuantTensor, Tensor | QuantTensor]:
        """Check, and where it is possible see to it, that both matrices of experts have one format."""
        first, second = (w.fmt if isinstance(w, QuantTensor) else None for w in (w13, w2))
        if first == second:
            return w13, w2
        if isinstance(w13, QuantTensor) and isinstance(w2, QuantTensor):
            # the wider of both: a group that holds all of the other's columns may be a part of its own
            fmt = common_format([w13.fmt, w2.fmt], max(w13.codes.shape[-1], w2.codes.shape[-1]))
            if fmt is not None:
                return widen(w13, fmt), widen(w2, fmt)
        elif all(self._codes(n) for key, n in names.items() if key.startswith("experts.")):
            real13, real2 = real([w13, w2])  # orders of columns were undone in one of them
            return real13, real2
        name = names.get("experts.down", names.get("experts.all_down", "")).replace("{e}", "*")
        raise InputError(
            f"{name} is stored as {second or 'float'}, the other matrices of the experts as "
            f"{first or 'float'}: experts need one format",
            file=self.checkpoint.source,
        )

    def _fused_experts(self, name: str) -> Tensor | QuantTensor:
        """Return ``[E, N, K]`` from one tensor of all experts."""
        if self.checkpoint.entries[name].fmt is not None:
            found = self.checkpoint.quantised(name)
            return found if found.perm is None else torch.from_numpy(found.dequantize())
        tensor = self._stored(name)
        fmt = self.scheme.codes
        if fmt is None:
            return tensor
        # complex formats pair gates with ups
        halves = 2 if name.endswith("gate_up_proj") and fmt.family != "complex" else 1
        return pile(
            [
                stack([self._quantise(name, part, fmt, e) for part in expert.chunk(halves)])
                for e, expert in enumerate(tensor)
            ]
        )


def following(stage: str) -> str:
    """Return the name of the layer behind one, by the name of its stage; of a draft layer: empty."""
    part, _, number = stage.partition(".")
    return f"layers.{int(number) + 1}" if part == "layers" else ""


_SMALL = frozenset(
    "attn_norm mlp_norm q_norm k_norm sink listed_sink q_bias k_bias v_bias enorm hnorm final_norm".split()
)
