"""The stages of the decoder as torch modules over `mimo` ops; they hold the weights as they are stored."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from mimo_compile.frontend.models import kv
from mimo_compile.frontend.models.attend import Attending, Lists
from mimo_compile.frontend.models.decoder import LayerSpec
from mimo_compile.frontend.models.rotary import inverse_frequencies
from mimo_compile.ir.caches import parse_cache_format
from mimo_compile.ir.formats import QuantTensor, parse_act_format
from mimo_compile.ir.ops import load_all

if TYPE_CHECKING:
    from mimo_compile.frontend.models.early import Routes
    from mimo_compile.frontend.models.feed import Feed

load_all()


def frozen(tensor: Tensor) -> nn.Parameter:
    """Wrap a weight as a parameter without gradient."""
    return nn.Parameter(tensor, requires_grad=False)


def float_name(tensor: Tensor) -> str:
    """Return the format name of a float weight: ``bf16`` or ``f32``."""
    return "bf16" if tensor.dtype == torch.bfloat16 else "f32"


def float_act(act: str) -> str:
    """Return the activation format of float weights, which have no int8 kernels: ``a16`` then."""
    return "a16" if parse_act_format(act).is_int8 else act


def scale_name(*weights: QuantTensor) -> str:
    """Return ``f16`` if float16 holds all scales and zero points exactly, else ``f32``."""
    arrays = [a for weight in weights for a in (weight.scale, weight.zero) if a is not None]
    with np.errstate(over="ignore"):
        return "f16" if all(np.array_equal(a.astype(np.float16), a) for a in arrays) else "f32"


class QuantLinear(nn.Module):
    """``x [T, K] -> [T, N]`` with quantised codes or a float weight."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: Tensor | None
    perm: Tensor | None
    """int64 ``[K]``: the input feature of each column of codes, where these are in another order."""
    lora_a: Tensor | None
    lora_b: Tensor | None
    gain: Tensor | None
    parts = ""
    """Of the adapters, as are those three: see `mimo::lora_mpgemm`."""

    def __init__(
        self, weight: Tensor | QuantTensor, bias: Tensor | None = None, act: str = "a16"
    ) -> None:
        """Hold ``weight [N, K]`` and ``bias [N]``; ``act``: see `float_act` for float weights."""
        super().__init__()
        for name, tensor in (("bias", bias), ("lora_a", None), ("lora_b", None), ("gain", None)):
            self.register_buffer(name, tensor)
        if isinstance(weight, QuantTensor):
            self.w, self.a, self.s = weight.fmt.name, act, scale_name(weight)
            order = None if weight.perm is None else torch.from_numpy(weight.perm.astype(np.int64))
            self.register_buffer("perm", order)
            self.register_buffer("codes", torch.from_numpy(weight.codes))
            self.register_buffer("scale", torch.from_numpy(weight.scale))
            zero = None if weight.zero is None else torch.from_numpy(weight.zero)
            self.register_buffer("zero", zero)
        else:
            self.w, self.a, self.s, self.perm = float_name(weight), float_act(act), "", None
            self.weight = weight if isinstance(weight, nn.Parameter) else frozen(weight)

    @property
    def kind(self) -> str:
        """What the graph of this layer depends on beside shapes."""
        order = "" if self.perm is None else "p"
        return f"{self.w}{self.a}{self.s}{order}" + ("" if self.bias is None else "b")

    @property
    def lora_kind(self) -> str:
        """What the graph depends on when adapters are attached; empty: there are none."""
        if self.lora_a is None or self.lora_b is None:
            return ""
        shapes = f"{tuple(self.lora_a.shape)}{tuple(self.lora_b.shape)}"
        return f"{shapes}{self.lora_a.dtype}{self.parts}"

    def set_adapters(self, lora_a: Tensor, lora_b: Tensor, gain: Tensor, parts: str) -> None:
        """Attach adapters; arguments as for `mimo::lora_mpgemm`."""
        for name, value in (("lora_a", lora_a), ("lora_b", lora_b), ("gain", gain)):
            self.register_buffer(name, value)
        self.parts = parts

    def forward(self, x: Tensor, adapter: Tensor | None = None) -> Tensor:
        """Return ``x @ weight.T + bias``, and what the adapters ``[T]`` of the rows add."""
        y: Tensor
        plain = "weight" in self._parameters
        if not plain and self.perm is not None:
            x = x.index_select(-1, self.perm)
        lora = (self.lora_a, self.lora_b, self.gain)
        if self.lora_a is not None and plain:
            y = torch.ops.mimo.lora_linear(
                x, adapter, self.weight, self.bias, *lora, self.parts, self.a
            )
        elif self.lora_a is not None:
            y = torch.ops.mimo.lora_mpgemm(
                x, adapter, self.codes, self.scale, self.zero, self.bias, *lora,
                self.w, self.a, self.s, self.parts,
            )  # fmt: skip
        elif plain:
            y = torch.ops.mimo.linear(x, self.weight, self.bias, self.a)
        else:
            y = torch.ops.mimo.mpgemm(
                x, self.codes, self.scale, self.zero, self.bias, self.w, self.a, self.s
            )
        return y


class Experts(nn.Module):
    """Routed SwiGLU experts; gate rows stand first in ``w13``."""

    def __init__(
        self, w13: Tensor | QuantTensor, w2: Tensor | QuantTensor, act: str = "a16"
    ) -> None:
        """Hold ``w13 [E, 2F, D]`` and ``w2 [E, D, F]``."""
        super().__init__()
        self.a = float_act(act)
        both = [weight for weight in (w13, w2) if isinstance(weight, QuantTensor)]
        self.s = scale_name(*both)
        for name, weight in (("w13", w13), ("w2", w2)):
            if isinstance(weight, QuantTensor):
                self.w, self.a = weight.fmt.name, act
                self.register_buffer(name, torch.from_numpy(weight.codes))
                self.register_buffer(f"{name}_scale", torch.from_numpy(weight.scale))
                zero = None if weight.zero is None else torch.from_numpy(weight.zero)
                self.register_buffer(f"{name}_zero", zero)
            else:
                self.w = float_name(weight)
                self.register_parameter(name, frozen(weight))
                self.register_buffer(f"{name}_scale", None)
                self.register_buffer(f"{name}_zero", None)

    @property
    def kind(self) -> str:
        """What the graph depends on beside shapes."""
        return self.w + self.a + self.s

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts: ``x [T, D]``, ``ids/weights [T, k]``."""
        y: Tensor = torch.ops.mimo.moe(
            x, ids, weights, self.w13, self.w13_scale, self.w13_zero,
            self.w2, self.w2_scale, self.w2_zero, self.w, self.a, self.s,
        )  # fmt: skip
        return y


class Embed(nn.Module):
    """``ids int32 [T] -> x float32 [T, D]``."""

    def __init__(self, table: nn.Parameter) -> None:
        """Hold the table ``[V, D]`` (f32 or bf16)."""
        super().__init__()
        self.table = table

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of ``ids``."""
        x: Tensor = torch.ops.mimo.embed(ids, self.table)
        return x


class Rope(nn.Module):
    """``pos int32 [2] -> table float32 [T, 2, R/2]``; T is the attribute ``tokens``."""

    inv_freq: Tensor

    def __init__(self, spec: LayerSpec) -> None:
        """Compute the frequencies of a layer."""
        super().__init__()
        self.tokens = 1
        self.register_buffer("inv_freq", inverse_frequencies(spec))

    def forward(self, pos: Tensor) -> Tensor:
        """Return cosines and sines of the positions from ``pos[0]`` on."""
        table: Tensor = torch.ops.mimo.rope_table(pos, self.inv_freq, self.tokens)
        return table


class Attention(nn.Module):
    """Weights of one attention block."""

    q_norm: Tensor | None
    k_norm: Tensor | None
    sink: Tensor | None
    listed_sink: Tensor | None

    def __init__(
        self,
        spec: LayerSpec,
        qkv: QuantLinear,
        o: QuantLinear,
        small: dict[str, Tensor],
        gates: QuantLinear | None = None,
    ) -> None:
        """Take the projections and, in ``small``, ``q_norm``, ``k_norm`` and ``sink`` where used.

        A layer with two branches has ``listed_sink`` and ``gates``, the listed branch's rows first.
        """
        super().__init__()
        self.spec = spec
        self.qkv, self.o, self.gates = qkv, o, gates
        for name in ("q_norm", "k_norm", "sink", "listed_sink"):
            self.register_buffer(name, small.get(name))


class LayerCore(nn.Module):
    """A decoder layer from its normed input on; holds the KV caches, first on the meta device."""

    k_cache: Tensor
    v_cache: Tensor
    mlp_norm: Tensor
    pages: Tensor | None
    """Block tables while the caches are a pool's (`kv.paged`); None: the layer has caches of its own."""
    paging: kv.Paging | None = None

    def __init__(
        self,
        spec: LayerSpec,
        attention: Attention,
        feed: Feed,
        norms: dict[str, Tensor],
        eps: float,
        max_context: int,
        caches: kv.Caches | None = None,
        attend: Attending | None = None,
    ) -> None:
        """Take the blocks and the norm weights ``attn_norm`` and ``mlp_norm`` ``[D]`` float32.

        ``caches`` is the format of the model's keys and values between calls (None: float32), ``attend`` what
        the layer attends to (None: what its spec says).
        """
        super().__init__()
        self.spec, self.eps = spec, eps
        self.caches = kv.format_of(spec, caches or parse_cache_format("f32"))
        self.attend, self.chooses = attend or Attending(), False
        self.attention, self.feed = attention, feed
        self.attn_norm = frozen(norms["attn_norm"])
        self.register_parameter("mlp_norm", frozen(norms["mlp_norm"]))
        held = kv.cache_arrays(spec, self.caches, max_context)
        more = self.attend.states(spec, spec.capacity(max_context), held["k_cache"].dtype)
        for name, tensor in (held | more | self.attend.constants(spec)).items():
            self.register_buffer(name, tensor, persistent=False)
        self.register_buffer("pages", None, persistent=False)
        self.states = (*held, *more)
        """Buffers that live across calls."""

    @property
    def kind(self) -> str:
        """What the graph depends on: the spec without its angles, and the weight formats."""
        s, a = self.spec, self.attention
        shape = (
            s.heads, s.kv_heads, s.d, s.dv, s.window, s.sink, s.rotary_dim, s.v_scale, s.qk_norm, s.clip_qkv,
            s.mlp, s.ffn, s.experts, s.top_k, s.moe_ffn, s.scoring, s.norm_topk, s.router_bias,
            s.factor, s.groups, s.top_groups, s.shared_ffn, s.shared_gate, a.qkv.kind, a.o.kind,
            self.feed.kind, self.caches.name, self.attend.kind, s.gate,
            "" if a.gates is None else a.gates.kind,
        )  # fmt: skip
        return repr(shape)

    def after_norm(
        self,
        normed: Tensor,
        x: Tensor,
        table: Tensor,
        pos: Tensor,
        adapter: Tensor | None = None,
        lists: Lists | None = None,
        routes: Routes | None = None,
    ) -> tuple[Tensor, ...]:
        """Run the layer on normed rows and the residual ``x``; ``routes``: experts that are chosen already.

        Returns:
            The residual after attention, the block's output, the lists that it lends, if any, and the next
            layer's experts, where it chooses them.
        """
        found = self.attend.look(self, normed, table, pos)
        q = kv.append(self, kv.project(self, normed, adapter), table, pos)
        out, made = self.attend(self, q, pos, lists if found is None else found)
        return self.after_attention(out, x, adapter, made, routes)

    def after_attention(
        self,
        out: Tensor,
        x: Tensor,
        adapter: Tensor | None,
        made: Lists | None = None,
        routes: Routes | None = None,
    ) -> tuple[Tensor, ...]:
        """Run the layer on what attention gave, ``[T, H, DV]``, and the residual; returns as `after_norm`."""
        delta = self.attention.o(out.flatten(1), adapter)
        normed, x = torch.ops.mimo.add_rms_norm(delta, x, self.mlp_norm, self.eps)
        delta, *chosen = self.feed(normed, adapter, routes)
        return x, delta, *(made or ()), *chosen


def pair_of(first: Tensor | None, second: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Return two tensors that come together; None: there are none."""
    return None if first is None or second is None else (first, second)


class Layer(LayerCore):
    """``(x, delta, table, pos[, adapter]) -> (x', delta')``: the residual stream is ``x + delta``.

    Where layers follow lists of others it takes ``idx`` and ``cnt``, and gives them where it makes some;
    likewise ``expert_ids`` and ``expert_weights``, where the layer before chooses.
    """

    def forward(
        self,
        x: Tensor,
        delta: Tensor,
        table: Tensor,
        pos: Tensor,
        adapter: Tensor | None = None,
        idx: Tensor | None = None,
        cnt: Tensor | None = None,
        expert_ids: Tensor | None = None,
        expert_weights: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Add the pending delta, normalise, run the layer."""
        normed, x = torch.ops.mimo.add_rms_norm(delta, x, self.attn_norm, self.eps)
        lists = pair_of(idx, cnt)
        routes = pair_of(expert_ids, expert_weights)
        return self.after_norm(normed, x, table, pos, adapter, lists, routes)


class FirstLayer(LayerCore):
    """``(x, table, pos[, adapter]) -> (x', delta')``: nothing is pending yet."""

    def forward(
        self, x: Tensor, table: Tensor, pos: Tensor, adapter: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Normalise, run the layer."""
        normed = torch.nn.functional.rms_norm(x, (x.shape[-1],), self.attn_norm, self.eps)
        return self.after_norm(normed, x, table, pos, adapter)


class FinalNorm(nn.Module):
    """``(x, delta) -> (hidden = x + delta, normed)``, both ``[T, D]``."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        """Hold the norm's weight ``[D]`` float32."""
        super().__init__()
        self.weight, self.eps = frozen(weight), eps

    def forward(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Return the hidden state before and after the final norm."""
        normed, hidden = torch.ops.mimo.add_rms_norm(delta, x, self.weight, self.eps)
        return hidden, normed


class Head(nn.Module):
    """``normed [T, D] -> logits [T, V]``."""

    def __init__(self, lm_head: QuantLinear) -> None:
        """Hold the output projection."""
        super().__init__()
        self.lm_head = lm_head

    def forward(self, normed: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.lm_head(normed)
        return logits
