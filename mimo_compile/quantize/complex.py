"""Complex weights as fourth roots of unity (iFairy), and real ones in widely-linear form (Fairy2i).

A complex weight becomes the root nearest in phase; the weights of the real axis share one scale, those of
the imaginary axis another: the mean magnitude of the part that is kept. A real matrix ``R`` of blocks
``[[R11, R12], [R21, R22]]`` acts on ``x = x_top + i x_bottom`` as ``U x + W conj(x)`` with
``U = ((R11 + R22) + i (R21 - R12)) / 2`` and ``W = ((R11 - R22) + i (R12 + R21)) / 2``, exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mimo_compile.errors import MimoError, UsageError
from mimo_compile.ir.formats import GROUP_TENSOR, QuantTensor, WeightFormat
from mimo_compile.quantize.integer import half


def quantize_phase(
    re: Tensor, im: Tensor, *, per_row: bool = False, what: str = "weight"
) -> tuple[Tensor, Tensor]:
    """Quantise complex weights to 1, i, -1, -i with a scale for each axis.

    A phase of exactly 45 degrees goes to i, of -45 to 1, of 135 to -1, of -135 to -i; zero counts as 1.

    Args:
        re: ``[N, K]`` real parts.
        im: ``[N, K]`` imaginary parts.
        per_row: scales of each row, not of the whole matrix.
        what: name of the matrix for errors.

    Returns:
        Codes ``[N, K]`` uint8 (0, 1, 2, 3 for 1, i, -1, -i) and scale ``[N, 2]`` float32; an axis without
        weights has scale 0.

    Raises:
        MimoError: NaN, infinity, or values too large for a float16 scale.
    """
    re, im = re.to(torch.float32), im.to(torch.float32)
    if not bool(torch.isfinite(re).all() and torch.isfinite(im).all()):
        raise MimoError(f"{what} holds NaN or infinity, which cannot be quantised")
    # sectors by comparisons, which unlike atan2 are exact on their borders
    right = (im >= -re) & (im < re) | (re == 0) & (im == 0)
    top = (im >= re) & (im > -re)
    left = (im <= -re) & (im > re)
    codes = torch.where(right, 0, torch.where(top, 1, torch.where(left, 2, 3))).to(torch.uint8)
    real = codes % 2 == 0

    def mean(values: Tensor, mask: Tensor) -> Tensor:
        kept = torch.where(mask, values.abs(), 0.0).to(torch.float64)
        total, count = kept.sum(-1, keepdim=True), mask.sum(-1, keepdim=True)
        if not per_row:
            total, count = total.sum(), count.sum()
        out = (total / count.clamp_min(1)).to(torch.float32)
        return half(out.expand(re.shape[0], 1), what)

    return codes, torch.cat([mean(re, real), mean(im, ~real)], -1)


def check_extents(fmt: WeightFormat, rows: int, columns: int, what: str) -> None:
    """Refuse real matrices that a widely-linear format cannot hold; others hold any.

    Raises:
        UsageError: an odd extent.
    """
    if fmt.family == "complex" and (rows % 2 or columns % 2):
        raise UsageError(
            f"{what}: {fmt} needs even extents, got {rows} x {columns}",
            remedy="use another --quant",
        )


def quantize_real(weight: Tensor, fmt: WeightFormat, what: str) -> QuantTensor:
    """Quantise a real matrix to ``complex2wl`` or ``complex2wl2``.

    Args:
        weight: ``[N, K]``, both even.
        fmt: a widely-linear format; its second stage quantises what the first left.
        what: name of the matrix for errors.

    Raises:
        UsageError: see `check_extents`.
        MimoError: see `quantize_phase`.
    """
    rows, columns = weight.shape
    check_extents(fmt, rows, columns, what)
    upper, lower = weight.to(torch.float32).chunk(2, 0)
    (r11, r12), (r21, r22) = upper.chunk(2, 1), lower.chunk(2, 1)
    pairs = [
        ((r11 + r22) / 2, (r21 - r12) / 2),
        ((r11 - r22) / 2, (r12 + r21) / 2),
    ]
    codes, scales = [], []
    for _ in range(fmt.terms // 2):
        rest = []
        for re, im in pairs:
            code, scale = quantize_phase(re, im, per_row=fmt.group != GROUP_TENSOR, what=what)
            codes.append(code)
            scales.append(scale)
            axis = torch.tensor([1.0, 0.0, -1.0, 0.0])
            index = code.to(torch.int64)
            rest.append(
                (re - axis[index] * scale[:, :1], im - axis[(index + 3) % 4] * scale[:, 1:])
            )
        pairs = rest
    return QuantTensor(fmt, torch.cat(codes).numpy(), torch.cat(scales).numpy())
