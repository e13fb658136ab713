"""One decoder for all families: its shape as plain data, its pieces (stages), and their eager driver.

A family (``llama.py``, ...) only translates its ``config.json`` into a `DecoderConfig` and says under which
names its tensors stand; everything below that is shared. The eager result of the stages is the oracle of
the compiled artifact, with the same quantisation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mimo_compile.errors import UsageError
from mimo_compile.frontend.models.draft_rule import DraftRule
from mimo_compile.frontend.models.stage import Stage
from mimo_compile.ir.policies import AttentionPolicy, LayerRole
from mimo_compile.ir.policies.full import Model
from mimo_compile.ir.workload import BUCKETS

_AS_IT_SAYS, _USUAL_DRAFTS = Model(), DraftRule()
STEP_TOKENS = 256
"""Most tokens of one call: rings of window layers hold the window and this many more."""


@dataclass(frozen=True)
class LayerSpec:
    """Shape and semantics of one decoder layer."""

    heads: int
    kv_heads: int
    d: int
    """Width of a query or key head."""
    dv: int
    """Width of a value head."""
    window: int = 0
    """Keys a query sees, itself included; 0: all."""
    first: int = 0
    """Leading positions that are seen beside the window."""
    sink: bool = False
    """One learned logit per query head in the softmax denominator."""
    rope_theta: float = 10000.0
    rotary_dim: int = 0
    """Leading dimensions of a head that are rotated."""
    v_scale: float = 1.0
    qk_norm: Literal["", "head", "all"] = ""
    """What q and k are normalised over before they are rotated: each head, all heads together, or nothing."""
    qkv_bias: bool = False
    clip_qkv: float = 0.0
    """Largest magnitude of q, k and v, behind norms over all heads; 0: there is no limit."""
    gate: Literal["", "element", "head"] = ""
    """Width of the sigmoid gates that weigh what it follows and its window; empty: it has one branch."""
    rope_scaling: Mapping[str, Any] | None = field(default=None, hash=False)
    """None, or ``type`` (linear or llama3) and ``factor``; llama3 has ``low``, ``high``, ``original`` too."""
    mlp: Literal["dense", "moe"] = "dense"
    ffn: int = 0
    """Width of the dense block."""
    experts: int = 0
    top_k: int = 0
    moe_ffn: int = 0
    scoring: str = "softmax"
    norm_topk: bool = True
    router_bias: bool = False
    factor: float = 1.0
    groups: int = 1
    top_groups: int = 1
    shared_ffn: int = 0
    """Width of the block that every token passes beside its experts; 0: there is none."""
    shared_gate: bool = False
    """What that block gives is multiplied by the sigmoid of one logit of the token."""

    @property
    def gate_rows(self) -> int:
        """Outputs of one branch's gate."""
        return self.heads * (self.dv if self.gate == "element" else 1)

    @property
    def rope_key(self) -> tuple[Any, ...]:
        """What the angle table of the layer depends on."""
        scaling = None if self.rope_scaling is None else tuple(sorted(self.rope_scaling.items()))
        return self.rope_theta, self.rotary_dim, scaling

    def capacity(self, max_context: int) -> int:
        """Return the slots of the KV cache, a multiple of 16: a ring holds the window and one step."""
        slots = max_context
        if self.window:
            slots = self.window + min(STEP_TOKENS, max_context)
        return self.stays + -(-slots // 16) * 16

    @property
    def stays(self) -> int:
        """Leading positions that have slots of their own before a ring, a multiple of 16."""
        return -(-self.first // 16) * 16


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a whole decoder."""

    name: str
    hidden: int
    vocab: int
    layers: tuple[LayerSpec, ...]
    eps: float
    tied: bool
    """True when the output projection is the embedding table."""
    max_context: int
    bos: int | None = None
    eos: tuple[int, ...] = ()
    mtp: tuple[LayerSpec, ...] = ()
    """Draft layers (multi-token prediction), possibly none."""
    drafts: DraftRule = _USUAL_DRAFTS
    """How these are stored, and what they join."""
    left_out: tuple[str, ...] = ()
    """How the names of stored tensors begin that are not read on purpose."""
    dtype: Literal["f32", "bf16"] = "f32"
    """How unquantised matrices are stored."""
    attention: AttentionPolicy = _AS_IT_SAYS
    """What its layers attend to."""
    roles: tuple[LayerRole, ...] = ()
    """Of each layer under a policy (`attend.with_attention`); empty: all do as their specs say."""

    def chooses(self, *, decode: bool) -> bool:
        """Say whether layers choose what they attend to when they decode, or when they read a prompt."""
        phase = "decode" if decode else "prefill"
        return phase in self.attention.phases and any(
            role.kind in ("select", "reuse") for role in self.roles
        )

    @property
    def decodes_apart(self) -> bool:
        """True when a token that is decoded attends in another way than one of a prompt."""
        return self.chooses(decode=True) != self.chooses(decode=False)

    def with_context(self, max_context: int) -> DecoderConfig:
        """Return the same decoder for fewer positions; a window that leaves none of them out is none."""
        layers, drafts = (
            tuple(
                replace(spec, window=0, first=0)
                if spec.window and spec.window + spec.first >= max_context
                else spec
                for spec in specs
            )
            for specs in (self.layers, self.mtp)
        )
        return replace(self, max_context=max_context, layers=layers, mtp=drafts)


class Decoder:
    """A decoder as a list of stages, which it can also run eagerly (batch of one)."""

    def __init__(self, config: DecoderConfig, stages: Sequence[Stage]) -> None:
        """Take stages in running order; their KV caches may be on the meta device until first used."""
        self.config = config
        self.adapters: tuple[str, ...] = ()
        """Names of adapters that some matrices have."""
        self.adapter = -1
        """Which one the eager driver uses: its index, -1 for none."""
        self.replace_stages(stages)

    def replace_stages(self, stages: Sequence[Stage], adapters: tuple[str, ...] = ()) -> None:
        """Take other pieces, which may have the value ``adapter int32 [T]`` among their inputs."""
        self._stages = list(stages)
        self._by_name = {stage.name: stage for stage in self._stages}
        self.adapters = adapters

    def stages(self) -> list[Stage]:
        """Return all pieces in running order; draft layers (``mtp.*``) come last."""
        return list(self._stages)

    def stage(self, name: str) -> Stage:
        """Return one piece by name."""
        return self._by_name[name]

    def reset(self) -> None:
        """Empty (and if need be allocate) every KV cache; a layer that reads another's gets that one."""
        made: dict[str, Tensor] = {}
        for module, buffer, name, cache in self._caches():
            if name in made:
                setattr(module, buffer, made[name])
            elif cache.is_meta:
                made[name] = torch.zeros_like(cache, device="cpu")
                setattr(module, buffer, made[name])
            else:
                made[name] = cache.zero_()

    def release(self) -> None:
        """Give the memory of the KV caches back; the next step allocates them again."""
        for module, buffer, _, cache in self._caches():
            setattr(module, buffer, cache.to("meta"))

    def _caches(self) -> Iterator[tuple[nn.Module, str, str, Tensor]]:
        """Yield module, buffer, global name and tensor of every state."""
        for stage in self._stages:
            for buffer, name in stage.states.items():
                yield stage.module, buffer, name, stage.module.get_buffer(buffer)

    def _check_call(self, tokens: int, start: int, valid: int) -> None:
        if not 0 < valid <= tokens <= STEP_TOKENS:
            raise UsageError(f"one step takes 1 to {STEP_TOKENS} tokens, got {valid} of {tokens}")
        if start < 0 or start + valid > self.config.max_context:
            raise UsageError(
                f"positions {start} to {start + valid - 1} do not fit into the context of "
                f"{self.config.max_context}",
                remedy="raise max_context",
            )

    def _run(self, stage: Stage, values: dict[str, Tensor], chooses: bool) -> None:
        stage.prepare(values["ids"].shape[0], chooses)
        given = [values[name] for name in stage.inputs]
        named = {key: values[name] for key, name in stage.named(chooses).items()}
        out = stage.module(*given, **named)
        results = out if isinstance(out, tuple) else (out,)
        values.update(zip(stage.gives(chooses), results, strict=True))

    @torch.no_grad()
    def _steps(
        self,
        names: Sequence[str],
        values: dict[str, Tensor],
        start: int,
        valid: int | None,
        decode: bool = False,
    ) -> dict[str, Tensor]:
        ids = values["ids"] = values["ids"].to(torch.int32)
        count = ids.shape[0] if valid is None else valid
        self._check_call(ids.shape[0], start, count)
        if bool(((ids < 0) | (ids >= self.config.vocab)).any()):
            raise UsageError(f"token ids must be from 0 to {self.config.vocab - 1}")
        if any(cache.is_meta for *_, cache in self._caches()):
            self.reset()
        values["pos"] = torch.tensor([start, count], dtype=torch.int32)
        values["adapter"] = torch.full((ids.shape[0],), self.adapter, dtype=torch.int32)
        for name in names:
            self._run(self._by_name[name], values, self.config.chooses(decode=decode))
        return values

    def forward_step(
        self, ids: Tensor, start: int, valid: int | None = None, *, decode: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Run ``T`` tokens at positions ``start ...`` and append them to the KV caches.

        Args:
            ids: ``[T]`` integers; from ``valid`` on they are padding.
            start: position of the first token; earlier positions must have been run.
            valid: number of tokens that count; None: all.
            decode: these tokens were generated: under some attention policies they attend to less.

        Returns:
            The hidden state before the final norm ``[T, D]`` and the logits ``[T, V]``, both float32.

        Raises:
            UsageError: too many tokens, ids outside the vocabulary or positions outside the context.
        """
        names = [s.name for s in self._stages if not s.name.startswith("mtp.")]
        values = self._steps(names, {"ids": ids}, start, valid, decode)
        return values["hidden"], values["logits"]

    def draft(
        self, head: int, hidden: Tensor, ids: Tensor, start: int, valid: int | None = None
    ) -> Tensor:
        """Run draft layer ``head`` on the decoder's hidden states and the tokens ``head + 1`` further on.

        Args:
            head: index of the draft layer.
            hidden: ``[T, D]`` from `forward_step`, position i of the call stands at ``start + i``.
            ids: ``[T]``, the token after position i (for head 0), the one after that (for head 1), ...
            start: position of the first row.
            valid: number of rows that count; None: all.

        Returns:
            Logits ``[T, V]`` of the token after ``ids``.
        """
        if not 0 <= head < len(self.config.mtp):
            raise UsageError(f"the model has {len(self.config.mtp)} draft layers, not {head + 1}")
        stage = self._by_name[f"mtp.{head}"]
        ropes = [name for name in stage.inputs if name.startswith("rope.")]
        values = {"ids": ids, "hidden": hidden}
        return self._steps([*ropes, stage.name, "head"], values, start, valid)["logits"]

    def pieces(self, count: int) -> list[tuple[int, int]]:
        """Return start and length of the calls in which a compiled module reads a prompt of so many tokens.

        Some attention policies choose by what a call holds.
        """
        from mimo_compile.runtime.steps import plan_steps

        most = self.config.max_context
        steps = tuple(t for t in BUCKETS if t == 1 or t <= most)
        out, at = [], 0
        for step in plan_steps(count, steps, max(0, most - count)):
            out.append((at, min(step, count - at)))
            at += step
        return out

    def prefill(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Empty the caches and run a prompt; returns hidden states ``[T, D]`` and logits ``[T, V]``."""
        self.reset()
        every = torch.tensor(list(ids), dtype=torch.int32)
        parts = [self.forward_step(every[at : at + n], at) for at, n in self.pieces(len(every))]
        if not parts:
            raise UsageError("the prompt holds no token")
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def decode(self, tokens: Sequence[int], prompt: int) -> Tensor:
        """Run the last of the tokens, which was generated, and make exact what the policy says.

        Args:
            tokens: All so far; those before the last have been run.
            prompt: How many of them were the prompt.

        Returns:
            Logits ``[1, V]``.
        """
        last = torch.tensor([tokens[-1]], dtype=torch.int32)
        logits = self.forward_step(last, len(tokens) - 1, decode=True)[1]
        if self.config.decodes_apart:
            span = self.config.attention.rectified(len(tokens) - prompt, prompt) or (0, 0)
            for at in range(*span, STEP_TOKENS):
                part = tokens[at : min(at + STEP_TOKENS, span[1])]
                self.forward_step(torch.tensor(part, dtype=torch.int32), at)
        return logits

    def generate_greedy(
        self, ids: Sequence[int], max_new_tokens: int, *, stop: Sequence[int] | None = None
    ) -> list[int]:
        """Continue a prompt with the most likely tokens.

        Args:
            ids: the prompt, at least one token.
            max_new_tokens: upper limit of new tokens.
            stop: tokens that end the text (returned too); None: the model's own.

        Returns:
            The new tokens.
        """
        ends = self.config.eos if stop is None else tuple(stop)
        logits = self.prefill(ids)[1]
        every = list(ids)
        while len(every) - len(ids) < max_new_tokens:
            every.append(int(logits[-1].argmax()))
            if every[-1] in ends or len(every) - len(ids) == max_new_tokens:
                break
            logits = self.decode(every, len(ids))
        return every[len(ids) :]
