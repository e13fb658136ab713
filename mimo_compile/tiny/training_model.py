"""The built-in model in plain, trainable torch: the MiMo-V2-Flash maths with its tensor names.

Written for training on a CPU: matrix products run in a low-precision compute type (bfloat16),
norms, softmax, router and loss in float32; sliding-window attention works on bands of one
window; the experts' products are grouped, without a loop over tokens. This file is used for
training and evaluation only; the product runs its own definition of the architecture.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimo_compile.ir.formats import WeightFormat
from mimo_compile.tiny.training_config import TinyConfig
from mimo_compile.tiny.training_ops import grouped_linear, permute_rows, round_straight, route


class Linear(nn.Module):
    """Product with a float32 master weight `[out, in]`, in the type of the input; no bias."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] → [..., out], in x's type."""
        return F.linear(x, self.weight.to(x.dtype))


class Block(nn.Module):
    """A block whose matrices may read activations rounded to int8, as those of `rounding` do."""

    rounding: WeightFormat | None = None

    def rounded(self, x: Tensor) -> Tensor:
        """x: [..., in] → the same, as the matrices see it."""
        return x if self.rounding is None else round_straight(x, self.rounding)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in float32."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., size] → the same shape and type."""
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.epsilon)
        return (y * self.weight).to(x.dtype)


def rotary_tables(positions: int, dims: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding: two tensors [positions, dims / 2] f32."""
    frequency = theta ** (-torch.arange(0, dims, 2, dtype=torch.float64) / dims)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * frequency[None, :]
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the leading dims of x: [batch, heads, time, dim], half-split pairing."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


def sink_softmax(scores: Tensor, allowed: Tensor, sink: Tensor | None) -> Tensor:
    """Softmax over the last axis with an optional extra logit that takes weight but has no value.

    scores: [..., rows, keys]; allowed: broadcastable bool; sink: broadcastable to
    [..., rows, 1] f32, or None. Returns the weights in the type of `scores`.
    """
    a = scores.float().masked_fill(~allowed, -1e30)
    top = a.amax(-1, keepdim=True)
    if sink is not None:
        top = torch.maximum(top, sink)
    top = top.detach()
    e = torch.exp(a - top)
    total = e.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - top)
    return (e / total).to(scores.dtype)


FLASH_FROM = 1024
"""Length from which attention without window and sink runs in torch's tiled kernel."""


def attend_tiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attend` without window and sink, without ever holding the scores of a whole sequence.

    torch's kernel wants values as wide as keys and a key head for each query head.
    """
    group, v_dim = q.shape[1] // k.shape[1], v.shape[-1]
    v = F.pad(v, (0, q.shape[-1] - v_dim))
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
    return out[..., :v_dim]


def attend(q: Tensor, k: Tensor, v: Tensor, window: int | None, sink: Tensor | None) -> Tensor:
    """Causal attention of equal-length queries and keys, banded where a window allows it.

    q: [batch, heads, time, dim], scaled already; k: [batch, kv_heads, time, dim];
    v: [batch, kv_heads, time, v_dim]; sink: [heads] f32 or None. Returns
    [batch, heads, time, v_dim]. A window counts the query's own position.
    """
    batch, heads, time, dim = q.shape
    kv_heads, v_dim = k.shape[1], v.shape[-1]
    group = heads // kv_heads
    if window is None and sink is None and time >= FLASH_FROM and v_dim <= dim:
        return attend_tiled(q, k, v)
    shaped = None if sink is None else sink.float().view(1, kv_heads, 1, group, 1, 1)
    if window is not None and time % window == 0 and time > window:
        bands, rows = time // window, window
        k = _with_previous_band(k, bands)
        v = _with_previous_band(v, bands)
    else:
        bands, rows = 1, time
        k = k.view(batch, kv_heads, 1, time, dim)
        v = v.view(batch, kv_heads, 1, time, v_dim)
    keys = k.shape[3]
    at = torch.arange(rows, device=q.device)[:, None] + (keys - rows)
    key = torch.arange(keys, device=q.device)[None, :]
    allowed = key <= at
    if window is not None:
        allowed = allowed & (key > at - window)
    if bands > 1:
        first = torch.arange(bands, device=q.device)[:, None, None] == 0
        allowed = allowed & ~(first & (key < keys - rows))
        allowed = allowed.view(1, 1, bands, 1, rows, keys)
    q = q.view(batch, kv_heads, group, bands, rows, dim).transpose(2, 3)
    q = q.reshape(batch, kv_heads, bands, group * rows, dim)
    scores = torch.matmul(q, k.transpose(-1, -2))
    scores = scores.view(batch, kv_heads, bands, group, rows, keys)
    weights = sink_softmax(scores, allowed, shaped)
    out = torch.matmul(weights.view(batch, kv_heads, bands, group * rows, keys), v)
    out = out.view(batch, kv_heads, bands, group, rows, v_dim).transpose(2, 3)
    return out.reshape(batch, heads, time, v_dim)


def _with_previous_band(x: Tensor, bands: int) -> Tensor:
    """[batch, heads, time, dim] → [batch, heads, bands, 2·window, dim]: previous band, band."""
    x = x.unflatten(2, (bands, -1))
    previous = F.pad(x[:, :, :-1], (0, 0, 0, 0, 1, 0))
    return torch.cat((previous, x), dim=3)


class Attention(Block):
    """One attention block; `windowed` selects the sliding-window geometry with its sinks."""

    def __init__(self, config: TinyConfig, windowed: bool) -> None:
        super().__init__()
        c = config
        self.windowed = windowed
        self.heads = c.swa_num_attention_heads if windowed else c.num_attention_heads
        self.kv_heads = c.swa_num_key_value_heads if windowed else c.num_key_value_heads
        self.dim = c.swa_head_dim if windowed else c.head_dim
        self.v_dim = c.swa_v_head_dim if windowed else c.v_head_dim
        self.window = c.sliding_window if windowed else None
        self.value_scale = c.attention_value_scale
        self.q_proj = Linear(c.hidden_size, self.heads * self.dim)
        self.k_proj = Linear(c.hidden_size, self.kv_heads * self.dim)
        self.v_proj = Linear(c.hidden_size, self.kv_heads * self.v_dim)
        self.o_proj = Linear(self.heads * self.v_dim, c.hidden_size)
        if windowed:
            self.attention_sink_bias = nn.Parameter(torch.zeros(self.heads))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: [batch, time, hidden], normed → (q, k, v), [batch, heads or kv_heads, time, dim].

        Nothing is rotated yet; values are scaled, queries are not.
        """
        batch, time, _ = x.shape
        x = self.rounded(x)
        q = self.q_proj(x).view(batch, time, self.heads, self.dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, time, self.kv_heads, self.dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, time, self.kv_heads, self.v_dim).transpose(1, 2)
        return q, k, v * self.value_scale

    def merge(self, out: Tensor) -> Tensor:
        """out: [batch, heads, time, v_dim] → [batch, time, hidden]."""
        joined = out.transpose(1, 2).flatten(2)
        projected: Tensor = self.o_proj(self.rounded(joined))
        return projected

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """x: [batch, time, hidden], normed; rope: tables [time, rotary / 2] → same shape."""
        q, k, v = self.project(x)
        q = rotate(q, *rope) * (1.0 / math.sqrt(self.dim))
        sink = self.attention_sink_bias if self.windowed else None
        return self.merge(attend(q, rotate(k, *rope), v, self.window, sink))


class MLP(Block):
    """Dense SwiGLU block."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, width)
        self.up_proj = Linear(hidden, width)
        self.down_proj = Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden] → the same shape."""
        x = self.rounded(x)
        out: Tensor = self.down_proj(self.rounded(F.silu(self.gate_proj(x)) * self.up_proj(x)))
        return out


class Experts(Block):
    """Sigmoid-routed experts. The bias steers which experts are chosen, never their weights."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        c = config
        self.top_k = c.num_experts_per_tok
        self.count = c.n_routed_experts
        width = c.moe_intermediate_size
        self.router = nn.Parameter(torch.empty(self.count, c.hidden_size))
        self.gate_proj = nn.Parameter(torch.empty(self.count, width, c.hidden_size))
        self.up_proj = nn.Parameter(torch.empty(self.count, width, c.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(self.count, c.hidden_size, width))
        self.e_score_correction_bias: Tensor
        self.register_buffer("e_score_correction_bias", torch.zeros(self.count))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: [tokens, hidden] → (the same shape, tokens per expert [experts] int64)."""
        chosen = route(x.float(), self.router, self.e_score_correction_bias, self.top_k)
        return self.routed(x, *chosen)

    def routed(self, x: Tensor, weights: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, with what `route` returns."""
        tokens, hidden = x.shape
        flat = chosen.flatten()
        order = torch.argsort(flat, stable=True)
        back = torch.argsort(order)
        load = (flat[:, None] == torch.arange(self.count, device=x.device)).sum(0)
        ends = load.cumsum(0).to(torch.int32)
        rows = self.rounded(x)[:, None, :].expand(tokens, self.top_k, hidden).reshape(-1, hidden)
        rows = permute_rows(rows, order, back)
        both = torch.cat((self.gate_proj, self.up_proj), dim=1).to(x.dtype)
        gate, up = grouped_linear(rows, both, ends).chunk(2, dim=-1)
        out = grouped_linear(self.rounded(F.silu(gate) * up), self.down_proj.to(x.dtype), ends)
        out = permute_rows(out, back, order).view(tokens, self.top_k, hidden)
        return (out.float() * weights[..., None]).sum(1).to(x.dtype), load


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, config: TinyConfig, index: int) -> None:
        super().__init__()
        c = config
        self.windowed = bool(c.hybrid_layer_pattern[index])
        self.input_layernorm = RMSNorm(c.hidden_size, c.layernorm_epsilon)
        self.self_attn = Attention(c, self.windowed)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.layernorm_epsilon)
        self.mlp: MLP | Experts = (
            Experts(c) if c.moe_layer_freq[index] else MLP(c.hidden_size, c.intermediate_size)
        )

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
        """x: [batch, time, hidden] → (the same shape, expert load [experts] or None)."""
        return self.feed(x + self.self_attn(self.input_layernorm(x), rope))

    def feed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The layer behind its attention: x [batch, time, hidden] → (the same, expert load)."""
        y = self.post_attention_layernorm(x)
        if isinstance(self.mlp, Experts):
            out, load = self.mlp(y.flatten(0, 1))
            return x + out.view_as(x), load
        return x + self.mlp(y), None


class MTPLayer(Block):
    """One multi-token-prediction head: a light layer on the target's hidden state and a token."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        c = config
        size, epsilon = c.hidden_size, c.layernorm_epsilon
        self.enorm = RMSNorm(size, epsilon)
        self.hnorm = RMSNorm(size, epsilon)
        self.eh_proj = Linear(2 * size, size)
        self.input_layernorm = RMSNorm(size, epsilon)
        self.self_attn = Attention(c, windowed=True)
        self.pre_mlp_layernorm = RMSNorm(size, epsilon)
        self.mlp = MLP(size, c.mtp_intermediate_size)
        self.final_layernorm = RMSNorm(size, epsilon)

    def forward(self, hidden: Tensor, embedded: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """The input of the shared output projection: [batch, time, hidden].

        hidden: [batch, time, hidden] before the final norm; embedded: the embedding of the
        token that follows, same shape.
        """
        both = torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1)
        x = self.eh_proj(self.rounded(both))
        x = x + self.self_attn(self.input_layernorm(x), rope)
        x = x + self.mlp(self.pre_mlp_layernorm(x))
        out: Tensor = self.final_layernorm(x)
        return out


class TinyModel(nn.Module):
    """The decoder with its MTP heads. The output projection is the embedding."""

    def __init__(self, config: TinyConfig, compute: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.config = config
        self.compute = compute
        self.embed_tokens = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.mtp = nn.ModuleList(MTPLayer(config) for _ in range(config.mtp_layers))
        self._rope: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}

    def initialise(self, seed: int) -> None:
        """Fill the parameters: normal with deviation 0.02; outputs of blocks scaled down."""
        generator = torch.Generator().manual_seed(seed)
        blocks = 2 * self.config.num_hidden_layers
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim < 2:
                    continue
                scale = 1.0 / math.sqrt(blocks) if "o_proj" in name or "down_proj" in name else 1.0
                parameter.normal_(0.0, 0.02 * scale, generator=generator)

    def round_activations(self, rounding: WeightFormat | None) -> None:
        """Let every matrix but router and output projection read int8 activations (None: floats)."""
        for module in self.modules():
            if isinstance(module, Block):
                module.rounding = rounding

    def rope(self, time: int, windowed: bool) -> tuple[Tensor, Tensor]:
        """Rotary tables [time, rotary / 2] of the global or the sliding-window layers."""
        key = (time, windowed)
        if key not in self._rope:
            c = self.config
            dims = c.rotary_dims(c.swa_head_dim if windowed else c.head_dim)
            self._rope[key] = rotary_tables(
                time, dims, c.swa_rope_theta if windowed else c.rope_theta
            )
        return self._rope[key]

    def hidden(
        self, ids: Tensor, windowed: tuple[Tensor, Tensor], full: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Run the layers on ids: [batch, time] int64, with both sets of rotary tables.

        Returns (hidden state before the final norm [batch, time, hidden], tokens per expert
        [MoE layers, experts]).
        """
        x = F.embedding(ids, self.embed_tokens).to(self.compute)
        loads: list[Tensor] = []
        for layer in self.layers:
            assert isinstance(layer, Layer)
            x, load = layer(x, windowed if layer.windowed else full)
            if load is not None:
                loads.append(load)
        return x, torch.stack(loads) if loads else torch.zeros(0, 0)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run the decoder on ids: [batch, time] int64.

        Returns (normed hidden state, hidden state before the final norm, both
        [batch, time, hidden], tokens per expert [MoE layers, experts]).
        """
        time = ids.shape[1]
        x, loads = self.hidden(ids, self.rope(time, True), self.rope(time, False))
        return self.norm(x), x, loads

    def draft(self, head: int, hidden: Tensor, ids: Tensor) -> Tensor:
        """Run MTP head `head`; returns the input of the output projection [batch, time, hidden].

        hidden: [batch, time, hidden] before the final norm; ids: [batch, time] int64, the token
        `head + 1` places after each position.
        """
        embedded = F.embedding(ids, self.embed_tokens).to(hidden.dtype)
        out: Tensor = self.mtp[head](hidden, embedded, self.rope(ids.shape[1], True))
        return out

    def logits(self, x: Tensor) -> Tensor:
        """x: [..., hidden], normed → [..., vocab] f32."""
        return F.linear(x, self.embed_tokens.to(x.dtype)).float()
