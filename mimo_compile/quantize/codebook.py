"""Codebook and fp8 codes of groups of weights; two-sided scales after AFPQ (arXiv 2311.01792)."""

from __future__ import annotations

import torch
from torch import Tensor

from mimo_compile.ir.formats import WeightFormat
from mimo_compile.quantize.integer import half

_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Clipping ratios that the search tries, for each side of two-sided formats apart."""


def quantize_rows(
    x: Tensor, stats: Tensor, fmt: WeightFormat, search: bool, what: str, fp8_rows: int
) -> tuple[Tensor, Tensor]:
    """Quantise groups to the nearest values of a codebook, a tie to the lower value.

    Args:
        x: ``[R, G, S]`` float32.
        stats: least value (or 0), largest (or 0) and mean magnitude, ``[3, R, G]`` or ``[3, 1, 1]``.
        fmt: a codebook or fp8 format.
        search: try clipped scales and keep those with the least squared error.
        what: name of the matrix for errors.
        fp8_rows: rows that share a scale of fp8.

    Returns:
        Codes ``[R, G, S]`` int64 and scale ``[R, G]`` (two-sided: ``[R, 2 G]``).
    """
    low, high, _ = stats
    book = Book(fmt)
    if fmt.family == "fp8":
        amax = torch.maximum(-low, high)
        scale = torch.cat([_shared(part) for part in amax.split(fp8_rows)]) / book.most
        return book.nearest(x * _inverse(scale)[..., None]), scale
    above, below = half(high / book.most, what), half(low / book.least, what)
    if not fmt.two_sided:
        above = below = torch.maximum(above, below)
    kept, errors = (above, below), [torch.full_like(x[..., 0], torch.inf) for _ in range(2)]
    for ratio in _SHRINK if search else ():
        tried = half(above * ratio, what), half(below * ratio, what)
        for side, error in enumerate(book.errors(x, *tried, both=not fmt.two_sided)):
            better = error < errors[side]
            errors[side] = torch.where(better, error, errors[side])
            new = torch.where(better, tried[side], kept[side])
            kept = (new, kept[1]) if side == 0 else (kept[0], new)
    above, below = kept
    codes = book.nearest(book.normalised(x, above, below))
    if not fmt.two_sided:
        return codes, above
    return codes, torch.stack(torch.broadcast_tensors(above, below), -1).flatten(-2)


class Book:
    """A codebook's values in order, and how to find the nearest."""

    def __init__(self, fmt: WeightFormat) -> None:
        values = torch.tensor(fmt.values)
        codes = torch.arange(len(values))[~torch.isnan(values)]
        values = values[codes]
        # of two zeros the one without a sign counts
        keep = ~((values == 0) & torch.signbit(values))
        self.values, order = values[keep].sort()
        self.codes = codes[keep][order]
        self.middles = (self.values[1:] + self.values[:-1]) / 2
        self.least, self.most = float(self.values[0]), float(self.values[-1])

    def place(self, x: Tensor) -> Tensor:
        """Return the index of the nearest of `values`."""
        return torch.bucketize(x, self.middles)

    def nearest(self, x: Tensor) -> Tensor:
        """Return the code of the nearest value."""
        return self.codes[self.place(x)]

    def normalised(self, x: Tensor, above: Tensor, below: Tensor) -> Tensor:
        """Divide ``x [R, G, S]`` by the scales ``[R, G]`` of its sides."""
        return x * torch.where(x >= 0, _inverse(above)[..., None], _inverse(below)[..., None])

    def errors(self, x: Tensor, above: Tensor, below: Tensor, *, both: bool) -> tuple[Tensor, ...]:
        """Return the squared error ``[R, G]`` of the values above and below zero, or their sum twice."""
        found = self.values[self.place(self.normalised(x, above, below))]
        positive = x >= 0
        error = (x - found * torch.where(positive, above[..., None], below[..., None])).square_()
        upper = torch.where(positive, error, 0.0).sum(-1)
        total = error.sum(-1)
        return (total, total) if both else (upper, total - upper)


def _shared(amax: Tensor) -> Tensor:
    """Return the largest magnitude of a block of rows, for each of its rows."""
    return amax.amax(0, keepdim=True).expand_as(amax)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, 1.0 / scale, 0.0)
