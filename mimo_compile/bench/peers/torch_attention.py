"""PyTorch's attention beside ours, in every form that its users write, in float32 and bfloat16.

`torch-sdpa`: `scaled_dot_product_attention` with ``enable_gqa``. `torch-sdpa-folded`: the same, with the
heads of a group folded into the rows of the query, so that keys and values are read once for each KV head:
several times faster at decode. `torch-matmul`: softmax between two products, folded as well. `torch-flex`:
FlexAttention under `torch.compile`, with a block mask.

Keys and values are the visible ones, in order of their positions, laid out as [B, KV, S, D] before the
clock starts, B = 1 but for batches; so are the query and its folding. All forms of one type share them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mimo_compile.bench.contest import Contestant
from mimo_compile.bench.oracle import visible_keys
from mimo_compile.bench.peers.base import Ask, LeftOut, Peer, Variant
from mimo_compile.ir import kv_groups
from mimo_compile.ir.ops import batches, pages, pooled
from mimo_compile.ir.ops.base import Array
from mimo_compile.ir.ops.cached_attention import CachedAttention

if TYPE_CHECKING:
    import torch

ERRORS = {"fp32": 1e-4, "bf16": 0.02}
"""Relative error (root mean square) allowed: 2**-9 of q, k, v, weights and result each, and logits around 4
rounded to 2**-7 where a form keeps them in bfloat16."""
INT8_ERROR = 0.05
"""Allowed besides where the workload's own arithmetic is int8: peers compute in float."""
_SCORES = "its scores and masks would take {:.1f} GB: it knows no blocks of keys"


class Setting:
    """A workload as PyTorch gets it, in one type."""

    def __init__(self, ask: Ask, label: str) -> None:
        import torch

        self.ask, self.label = ask, label
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[label]
        p = ask.params
        self.b, self.t, self.h, self.kv = (p[n] for n in ("b", "t", "h", "kv"))
        self.d, self.dv = p["d"], p["dv"]
        self.group, self.window = self.h // self.kv, p["window"]
        self.keys, self.scale = visible_keys(p), CachedAttention().softmax_scale(p)
        self.sink = torch.from_numpy(ask.inputs["sink"]).to(self.dtype) if p["sink"] else None

    @property
    def q(self) -> torch.Tensor:
        """The query, [B, H, T, D]."""
        import torch

        rows = torch.from_numpy(self.ask.inputs["q"]).to(self.dtype)
        return rows.view(self.b, self.t, self.h, self.d).transpose(1, 2).contiguous()

    @property
    def folded(self) -> torch.Tensor:
        """The query with its groups in its rows, [B, KV, group * T, D]."""
        return self.q.reshape(self.b, self.kv, self.group * self.t, self.d)

    def cached(self, name: str, number: int, width: int) -> torch.Tensor:
        """Return copy ``number`` of the visible keys or values, [B, KV, S, width], zeros behind their own."""
        copies = self.ask.shared.setdefault((name, self.label, width), [])
        while len(copies) <= number:
            copies.append(copies[0].clone() if copies else self._lay_out(name, width))
        made: torch.Tensor = copies[number]
        return made

    def _lay_out(self, name: str, width: int) -> torch.Tensor:
        import torch

        stored, p = self.ask.inputs[name], self.ask.params
        length = CachedAttention().kv_length(p)
        slots = torch.arange(length - self.keys, length) % p["cap"]
        if fmt := kv_groups.grouped(p):
            given, op = self.ask.inputs, CachedAttention()
            several = self.b > 1 or pages.paged(p)
            parts = batches.split(op, self.ask.workload, given) if several else iter([given])
            rows = torch.stack([self._real(name, fmt, part) for part in parts])
        else:
            if pages.paged(p):  # peers get each sequence's keys in their order
                held = (pooled.gathered(p, self.ask.inputs, i)[name] for i in range(self.b))
                stored = np.stack(list(held))
            each = stored.reshape(self.b, *stored.shape[-3:])
            if p["c"] == "bf16":
                rows = torch.from_numpy(each.view(np.int16)).view(torch.bfloat16)[:, slots]
            else:
                rows = torch.from_numpy(each)[:, slots]
        rows = torch.nn.functional.pad(rows.to(self.dtype), (0, width - rows.shape[-1]))
        return rows.transpose(1, 2).contiguous()

    def _real(
        self, name: str, fmt: kv_groups.GroupedFormat, arrays: Mapping[str, Array]
    ) -> torch.Tensor:
        """Return what the codes of a sequence's cache stand for, and behind them the rows of its tail.

        That is what one token sees. Of several some see codes of the rows.
        """
        import torch

        given = {n: torch.from_numpy(arrays[n]) for n in (*kv_groups.STATES, "pos")}
        start, valid = (int(n) for n in given["pos"])
        k, v, _ = kv_groups.visible(given, given["pos"], self.t, fmt, torch.float32)
        both = k if name == "k_cache" else v
        first = (start + valid - 1) // fmt.group * fmt.group  # rows stand behind all codes
        return torch.cat([both[: start // fmt.group * fmt.group], both[first:]])

    def sets(self, width: int) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        """Return what gives one set of keys and values after the other; values padded to ``width``."""
        number = iter(range(1 << 30))

        def make() -> tuple[torch.Tensor, torch.Tensor]:
            at = next(number)
            return self.cached("k_cache", at, self.d), self.cached("v_cache", at, width)

        return make

    def mask(self) -> torch.Tensor | None:
        """Return which keys each token sees, bool [T, S]; None where all see all."""
        import torch

        if self.t == 1:
            return None
        query = torch.arange(self.keys - self.t, self.keys)[:, None]
        key = torch.arange(self.keys)[None]
        seen = key <= query
        return seen & (key > query - self.window) if self.window else seen

    def variant(self, call: Callable[[Any], Any], width: int = 0) -> Variant:
        """Return the variant whose call gives [B, H, T, DV or more], or the same rows folded.

        Args:
            call: Computes with a pair of keys and values.
            width: Columns that values are padded to; 0: none are added.
        """
        import torch

        width = width or self.dv

        def guarded(arguments: Any) -> Any:
            with torch.inference_mode():
                return call(arguments)

        def result(arguments: Any) -> Any:
            out = guarded(arguments)[..., : self.dv].reshape(self.b, self.h, self.t, self.dv)
            return out.transpose(1, 2).flatten(0, 1).float().numpy()

        heads = self.b * self.kv
        size = heads * self.keys * (self.d + width) * self.dtype.itemsize
        label = self.label if width == self.dv else f"{self.label} v-padded"
        bits = 8 * size / (heads * self.keys * (self.d + self.dv))
        error = ERRORS[self.label] + (INT8_ERROR if self.ask.params["arith"] != "float" else 0)
        return Variant(label, self.sets(width), guarded, size, bits, result, error=error)


class TorchAttention(Peer):
    """One form of attention in PyTorch; a subclass makes it."""

    packages = ("torch",)
    remedy = "pip install 'mimo-compile[compile]'"
    no_models = "runs attention alone; torch runs whole models"
    sinks: ClassVar[bool] = False
    """Whether it knows learnable sinks."""
    scores: ClassVar[bool] = False
    """Whether it holds scores, or masks as large, of all tokens of all heads."""

    def prepare(self, ask: Ask) -> Callable[[], None]:
        """Return what sets the number of threads."""
        import torch

        return lambda: torch.set_num_threads(ask.hardware.threads)

    def variants(self, ask: Ask) -> Iterator[Variant | LeftOut]:
        """Offer the form in float32 and bfloat16; nothing for other ops."""
        if ask.workload.op != "cached_attention":
            return
        for label in ERRORS:
            setting = Setting(ask, label)
            size = 4.0 * setting.b * setting.h * setting.t * setting.keys
            if setting.b > 1 and not ask.params["even"]:
                yield LeftOut(
                    label, "its batches are of sequences of one length: compare with even=1"
                )
            elif setting.sink is not None and not self.sinks:
                yield LeftOut(label, "knows no sink")
            elif self.scores and setting.t > 1 and size > ask.memory_bytes:
                yield LeftOut(label, _SCORES.format(size / 1e9))
            else:
                yield self.form(setting)

    def form(self, setting: Setting) -> Variant:
        """Return the variant of one type."""
        raise NotImplementedError


class TorchSdpa(TorchAttention):
    """`scaled_dot_product_attention` as model code calls it.

    Values narrower than keys are padded: it has a flash kernel for equal widths alone, and without it is up
    to ten times slower.
    """

    name = "torch-sdpa"

    def form(self, setting: Setting) -> Variant:
        """Return the variant of one type; all of a prompt is causal without a mask."""
        from torch.nn.functional import scaled_dot_product_attention

        square = setting.t == setting.keys > 1 and not setting.window
        q, mask = setting.q, None if square else setting.mask()
        more = {"scale": setting.scale, "enable_gqa": setting.group > 1, "is_causal": square}

        def call(arguments: Any) -> Any:
            k, v = arguments
            return scaled_dot_product_attention(q, k, v, attn_mask=mask, **more)

        return setting.variant(call, max(setting.d, setting.dv))


class TorchSdpaFolded(TorchAttention):
    """`scaled_dot_product_attention` over folded queries; values are padded as for `TorchSdpa`."""

    name = "torch-sdpa-folded"
    scores = True

    def form(self, setting: Setting) -> Variant:
        """Return the variant of one type."""
        from torch.nn.functional import scaled_dot_product_attention

        q, mask = setting.folded, setting.mask()
        rows = None if mask is None else mask.repeat(setting.group, 1)

        def call(arguments: Any) -> Any:
            k, v = arguments
            return scaled_dot_product_attention(q, k, v, attn_mask=rows, scale=setting.scale)

        return setting.variant(call, max(setting.d, setting.dv))


class TorchMatmul(TorchAttention):
    """Two products with a softmax between them, over folded queries; a sink is one more column of scores."""

    name = "torch-matmul"
    sinks = True
    scores = True

    def form(self, setting: Setting) -> Variant:
        """Return the variant of one type."""
        import torch

        q = setting.folded.flatten(0, 1) * setting.scale
        mask, keys = setting.mask(), setting.keys
        hidden = None if mask is None else ~mask.repeat(setting.group, 1)
        column = None
        if setting.sink is not None:
            column = setting.sink.view(setting.kv, setting.group, 1, 1)
            column = column.expand(-1, -1, setting.t, 1).reshape(setting.kv, -1, 1)
            column = column.repeat(setting.b, 1, 1)

        def call(arguments: Any) -> Any:
            k, v = (each.flatten(0, 1) for each in arguments)
            scores = torch.bmm(q, k.transpose(1, 2))
            if hidden is not None:
                scores.masked_fill_(hidden, float("-inf"))
            if column is None:
                return torch.bmm(torch.softmax(scores, -1), v)
            weights = torch.softmax(torch.cat([scores, column], -1), -1)
            return torch.bmm(weights[..., :keys], v)

        return setting.variant(call)


class TorchFlex(TorchAttention):
    """FlexAttention, compiled before the clock starts.

    A sink would scale its result by what the logarithm of its sums says, which it does not give on CPUs.
    """

    name = "torch-flex"

    def missing(self) -> LeftOut | None:
        """Return what is said without PyTorch, or without a C++ compiler, else None."""
        return super().missing() or without_compiler(self.name)

    def variants(self, ask: Ask) -> Iterator[Variant | LeftOut]:
        """Offer the form in both types."""
        import torch

        # functions compiled for earlier workloads would count against the limit of recompilations
        torch._dynamo.reset()
        yield from super().variants(ask)

    def form(self, setting: Setting) -> Variant:
        """Return the variant of one type."""
        import torch
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        t, keys, window = setting.t, setting.keys, setting.window
        offset = keys - t

        def seen(b: Any, h: Any, query: Any, key: Any) -> Any:
            causal = key <= query + offset
            return causal & (key > query + offset - window) if window else causal

        blocks = create_block_mask(seen, None, None, t, keys, device="cpu") if t > 1 else None
        more = {"block_mask": blocks, "scale": setting.scale, "enable_gqa": setting.group > 1}

        def attend(q: Any, k: Any, v: Any) -> Any:
            return flex_attention(q, k, v, **more)

        # workers that compile would outlive the comparison and keep cores busy
        with torch._inductor.config.patch(compile_threads=1):
            compiled = torch.compile(attend, dynamic=False)
        q = setting.q
        return setting.variant(lambda arguments: compiled(q, *arguments))


FORMS: tuple[type[TorchAttention], ...] = (TorchSdpa, TorchSdpaFolded, TorchMatmul, TorchFlex)
"""What `torch` stands for where attention is compared."""


def without_compiler(name: str) -> LeftOut | None:
    """Return what is said of a peer where `torch.compile` finds no C++ compiler, else None."""
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler) or shutil.which("clang++"):
        return None
    reason = f"torch.compile needs a C++ compiler, and there is no {compiler}"
    return LeftOut(name, reason, "install g++, or name a compiler in CXX")


def enter_all(ask: Ask) -> tuple[list[Contestant], list[LeftOut]]:
    """Return what takes part of all forms, and what cannot."""
    field: list[Contestant] = []
    out: list[LeftOut] = []
    for form in FORMS:
        peer = form()
        if absent := peer.missing():
            out.append(absent)
            continue
        entered, left_out = peer.enter(ask)
        field += entered
        out += left_out
    return field, out
