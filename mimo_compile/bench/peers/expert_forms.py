"""PyTorch's mixtures of experts, in the forms that its users write, from the weights and routing of ours.

`loop`: over the experts that are hit, as model code has it. `sorted`: rows are sorted by expert once, each
expert takes a slice of them, and results go back in one step. `grouped`: the same with `grouped_mm` for all
experts. `gathered`: weights are copied for each token and choice, and multiplied by `bmm`. All sort, or
look for, the experts inside the clock, as ours does.

`sorted packed` is `sorted` over bfloat16 weights that oneDNN has packed before the clock starts, as ours are:
from plain ones it packs in each call.

In float32 and bfloat16 from the real weights; of 8 and 4 bits also in torch's own formats from the same
codes, sorted: ``int8-int-mm`` quantises rows by eager operations around `_int_mm`; ``int8-weight-only`` and
``int4-weight-only`` have bfloat16 activations and scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from mimo_compile.bench.draws import Draws, draws_of
from mimo_compile.bench.oracle import Oracle
from mimo_compile.bench.peers.base import Ask, LeftOut, Variant
from mimo_compile.ir.ops.moe import expert_arrays
from mimo_compile.ir.ops.mpgemm import real_weights

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ERRORS = {"fp32": 1e-4, "bf16": 0.02}
"""Relative error (root mean square) allowed, from float64 over float activations. bfloat16 rounds x, weights
that are none, gate, up, their product, each expert's result and share, and sums of k of them: for k = 8 some
20 roundings of at most 2**-9 that add up at random to 0.009; silu may double that of the gate."""
INT8_ERROR = 0.01
"""Allowed from the op's own arithmetic where that is int8 as well: hidden values next to a tie may be a step
of 1/127 off."""
INT4_GROUPS = (32, 64, 128, 256)
_GATHERED = "its copies of each token's experts would take {:.1f} GB"

Form = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""``form(x [T, D], ids [T, k], share [T, k], w13 [E, 2F, D], w2 [E, D, F])`` -> ``[T, D]``."""
Product = Callable[[int, Tensor], Tensor]
"""``product(expert, rows)`` -> the rows times the expert's matrix."""


def gated(both: Tensor) -> Tensor:
    """Return ``silu(gate) * up`` of rows ``[n, 2F]``."""
    gate, up = both.chunk(2, -1)
    return silu(gate) * up


def mlp(rows: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """Return one expert's result for rows ``[n, D]``."""
    return linear(gated(linear(rows, w13)), w2)


def looped(expert: Callable[[Tensor, Tensor, Tensor], Tensor] = mlp) -> Form:
    """Return the form `loop`, whose experts are computed by ``expert(rows, w13, w2)``."""

    def loop(x: Tensor, ids: Tensor, share: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for e in torch.unique(ids).tolist():
            rows, slot = torch.where(ids == e)
            y.index_add_(0, rows, expert(x[rows], w13[e], w2[e]) * share[rows, slot, None])
        return y

    return loop


def in_slices(x: Tensor, ids: Tensor, share: Tensor, first: Product, second: Product) -> Tensor:
    """Compute experts slice by slice of the sorted rows; ``x``, ``ids`` and ``share`` as for a form."""
    order = torch.argsort(ids.flatten())
    rows, out = x[order // ids.shape[1]], x.new_empty((ids.numel(), x.shape[1]))
    at = 0
    for e, count in enumerate(torch.bincount(ids.flatten()).tolist()):
        if count:
            out[at : at + count] = second(e, gated(first(e, rows[at : at + count])))
            at += count
    return _combined(out, order, share)


def sorted_rows(x: Tensor, ids: Tensor, share: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """Form `sorted`."""
    return in_slices(
        x, ids, share, lambda e, rows: linear(rows, w13[e]), lambda e, rows: linear(rows, w2[e])
    )


def grouped(x: Tensor, ids: Tensor, share: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """Form `grouped`."""
    experts, order = torch.sort(ids.flatten())
    every = torch.arange(w13.shape[0])
    ends = torch.searchsorted(experts, every, right=True, out_int32=True)
    grouped_mm = torch.nn.functional.grouped_mm
    both = grouped_mm(x[order // ids.shape[1]], w13.mT, offs=ends)
    return _combined(grouped_mm(gated(both), w2.mT, offs=ends), order, share)


def gathered(x: Tensor, ids: Tensor, share: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """Form `gathered`."""
    chosen = ids.flatten()
    rows = x.repeat_interleave(ids.shape[1], 0)[..., None]
    both = torch.bmm(w13[chosen], rows).squeeze(-1)
    out = torch.bmm(w2[chosen], gated(both)[..., None]).squeeze(-1)
    return (out.view(*ids.shape, -1) * share[..., None]).sum(1)


def _combined(out: Tensor, order: Tensor, share: Tensor) -> Tensor:
    """Return tokens from sorted rows ``[T * k, D]``: each its choices' results in their order, weighed."""
    back = torch.empty_like(out)
    back[order] = out
    return (back.view(*share.shape, -1) * share[..., None]).sum(1)


class Setting:
    """A layer as PyTorch gets it, in one type."""

    def __init__(self, ask: Ask, label: str) -> None:
        self.ask, self.label, self.dtype = ask, label, TYPES[label]
        self.x = torch.from_numpy(ask.inputs["x"]).to(self.dtype)
        self.share = torch.from_numpy(ask.inputs["weights"]).to(self.dtype)
        self.draws: Draws = draws_of(ask.workload, ask.inputs)

    @property
    def numbers(self) -> int:
        """Weights of all experts."""
        p = self.ask.params
        return int(3 * p["e"] * p["d"] * p["f"])

    @property
    def nbytes(self) -> float:
        """Bytes of the weights that one call reads."""
        return self.draws.share * self.numbers * self.dtype.itemsize

    @property
    def gathered_bytes(self) -> float:
        """Bytes of copies of the weights for each token and choice."""
        p = self.ask.params
        return float(self.numbers / p["e"] * p["t"] * p["k"] * self.dtype.itemsize)

    def left_out(self, label: str) -> LeftOut | None:
        """Say that copies for each token and choice exceed the memory, or return None."""
        if self.gathered_bytes <= self.ask.memory_bytes:
            return None
        return LeftOut(label, _GATHERED.format(self.gathered_bytes / 1e9))

    def weights(self) -> tuple[Tensor, ...]:
        """Return the real w13 ``[E, 2F, D]`` and w2 ``[E, D, F]``, expert by expert from the codes."""
        p, fmt = self.ask.params, self.ask.format
        shapes = {"w13_": (2 * p["f"], p["d"]), "w2_": (p["d"], p["f"])}
        made = {n: torch.empty((p["e"], *shape), dtype=self.dtype) for n, shape in shapes.items()}
        for e in range(p["e"]):
            one = expert_arrays(self.ask.inputs, e)
            for prefix, all_of_them in made.items():
                all_of_them[e].copy_(real_weights(one, prefix, fmt))
        return made["w13_"], made["w2_"]

    def sets(self, lay_out: Callable[[], tuple[Tensor, ...]], name: str = "") -> Callable[[], Any]:
        """Return what gives one argument set after the other: x, ids, share, and tensors of weights.

        Args:
            lay_out: Makes the tensors; copies of them are kept for all who ask for this ``name`` and type.
            name: Of the form of the weights; empty: real ones.
        """
        numbers = iter(range(1 << 30))
        kept = self.ask.shared.setdefault(("experts", self.label, name), [])

        def make() -> tuple[Tensor, ...]:
            copy, inputs = self.draws.place(next(numbers))
            while len(kept) <= copy:
                kept.append(tuple(t.clone() for t in kept[0]) if kept else lay_out())
            ids = torch.from_numpy(np.asarray(inputs["ids"], np.int64))
            return self.x, ids, self.share, *kept[copy]

        return make

    def variant(self, name: str, form: Form) -> Variant:
        """Return a form over the real weights."""

        def call(arguments: Any) -> Any:
            with torch.inference_mode():
                return form(*arguments)

        return self.checked(f"{name} {self.label}", self.sets(self.weights), call, self.nbytes)

    def checked(
        self, label: str, make: Callable[[], Any], call: Callable[[Any], Any], nbytes: float
    ) -> Variant:
        """Return a variant that is compared with float activations, as it has them."""
        oracle = (self.ask.oracle or Oracle(self.ask.workload, self.ask.inputs)).in_floats
        bits = 8 * nbytes / self.draws.share / self.numbers
        return Variant(
            label, make, call, nbytes, bits, lambda given: call(given).float().numpy(),
            error=ERRORS[self.label], oracle=oracle,
        )  # fmt: skip


def experts(ask: Ask) -> Iterator[Variant | LeftOut]:
    """Offer every eager form in both types, and torch's own formats near the workload's."""
    for label in TYPES:
        setting = Setting(ask, label)
        yield setting.variant("loop", looped())
        yield setting.variant("sorted", sorted_rows)
        if label == "bf16":
            yield _packed(setting)
        yield setting.variant("grouped", grouped)
        yield setting.left_out(f"gathered {label}") or setting.variant("gathered", gathered)
    fmt, k = ask.format, min(ask.params["d"], ask.params["f"])
    if fmt.family != "int" or fmt.has_zero:
        return
    if fmt.bits == 8 and fmt.group_size(k) == k:
        if ask.params["a"] == "a8":
            yield _int_mm(Setting(ask, "fp32"))
        yield _int8(Setting(ask, "bf16"))
    if fmt.bits == 4 and fmt.group in INT4_GROUPS:
        yield _int4(Setting(ask, "bf16"))


def _packed(setting: Setting) -> Variant | LeftOut:
    """Return the form `sorted` over packed bfloat16 weights: first E of w13, then E of w2, opaque."""
    label, e = "sorted packed bf16", setting.ask.params["e"]
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return LeftOut(label, "oneDNN packs bfloat16 for CPUs with AVX-512 alone")
    plain = setting.sets(setting.weights)

    def lay_out() -> tuple[Tensor, ...]:
        _, _, _, w13, w2 = plain()
        pack = torch.ops.mkldnn._reorder_linear_weight
        return tuple(pack(one, None) for one in (*w13, *w2))

    def product(rows: Tensor, packed: Tensor) -> Tensor:
        made: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")
        return made

    def call(arguments: Any) -> Any:
        x, ids, share, *packed = arguments
        with torch.inference_mode():
            return in_slices(
                x, ids, share, lambda i, rows: product(rows, packed[i]),
                lambda i, rows: product(rows, packed[e + i]),
            )  # fmt: skip

    return setting.checked(label, setting.sets(lay_out, "packed"), call, setting.nbytes)


def _sliced(
    setting: Setting, label: str, lay_out: Callable[[], tuple[Tensor, ...]],
    product: Callable[..., Tensor], stored: float,
) -> Variant:  # fmt: skip
    """Return the form `sorted` over pairs of codes and scales for each matrix.

    Args:
        setting: The layer.
        label: Of the variant.
        lay_out: Gives codes and scales of w13, then those of w2, experts first.
        product: ``product(rows, codes, scale)``.
        stored: Bytes of all of them.
    """

    def call(arguments: Any) -> Any:
        x, ids, share, c13, s13, c2, s2 = arguments
        with torch.inference_mode():
            return in_slices(
                x, ids, share, lambda e, rows: product(rows, c13[e], s13[e]),
                lambda e, rows: product(rows, c2[e], s2[e]),
            )  # fmt: skip

    nbytes = setting.draws.share * stored
    return setting.checked(f"sorted {label}", setting.sets(lay_out, label), call, nbytes)


def _row_codes(ask: Ask, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return int8 codes around zero ``[E, N, K]`` and scales ``[E, N]`` of both matrices."""
    out: list[Tensor] = []
    for prefix in ("w13_", "w2_"):
        codes = ask.inputs[f"{prefix}codes"] ^ 0x80
        scale = torch.from_numpy(ask.inputs[f"{prefix}scale"][..., 0].copy())
        out += [torch.from_numpy(codes.view(np.int8)), scale.to(dtype)]
    return tuple(out)


def _row_bytes(ask: Ask, width: int) -> float:
    p = ask.params
    return float(p["e"] * (3 * p["d"] * p["f"] + width * (2 * p["f"] + p["d"])))


def _int8(setting: Setting) -> Variant:
    ask = setting.ask
    return _sliced(
        setting, "int8-weight-only", lambda: _row_codes(ask, torch.bfloat16),
        torch.ops.aten._weight_int8pack_mm, _row_bytes(ask, 2),
    )  # fmt: skip


def _int_mm(setting: Setting) -> Variant:
    ask = setting.ask

    def product(rows: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        step = rows.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / 127
        y = torch._int_mm((rows / step).round_().to(torch.int8), codes.t())
        return y.float().mul_(step).mul_(scale)

    made = _sliced(
        setting, "int8-int-mm", lambda: _row_codes(ask, torch.float32), product, _row_bytes(ask, 4)
    )
    made.oracle, made.error = None, INT8_ERROR  # its activations are quantised, as the op's are
    return made


def _int4(setting: Setting) -> Variant | LeftOut:
    ask, group = setting.ask, setting.ask.format.group
    p, label = ask.params, f"int4-weight-only-g{group}"
    if p["d"] % group or p["f"] % group or p["d"] % 16 or p["f"] % 8:
        return LeftOut(f"sorted {label}", f"d or f is no multiple of {group}, or of 16")

    def lay_out() -> tuple[Tensor, ...]:
        out: list[Tensor] = []
        for prefix in ("w13_", "w2_"):
            codes, scale = ask.inputs[f"{prefix}codes"], ask.inputs[f"{prefix}scale"]
            pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu
            packed = [pack(torch.from_numpy(c.astype(np.int32)), 1) for c in codes]
            columns = torch.from_numpy(scale.swapaxes(1, 2).copy()).to(torch.bfloat16)
            out += [torch.stack(packed), torch.stack([columns, torch.zeros_like(columns)], -1)]
        return tuple(out)

    def product(rows: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        made: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, codes, group, scale)
        return made

    # a scale and an offset for each group, both bf16
    return _sliced(setting, label, lay_out, product, setting.numbers * (0.5 + 4 / group))
