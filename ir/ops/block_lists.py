"""Lists of blocks: the contract between what selects keys and what attends to them.

A list row belongs to ``rows`` consecutive tokens of the call (1: each token has its own) and to one list
head; ``hs`` list heads serve ``h`` query heads evenly, in order. Of a row, the first ``cnt`` ids are
ascending block ids without duplicates and the rest is -1. Block ``b`` holds the positions
``b * block ... b * block + block - 1``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mimo_compile.errors import UsageError


def blocks_of(length: int, block: int) -> int:
    """Return how many blocks hold ``length`` positions; the last one may be partial."""
    return -(-length // block)


def row_spans(start: int, valid: int, count: int, rows: int) -> Tensor:
    """Return the first and last position of each list row, int64 ``[count, 2]``; padding: (0, -1)."""
    first = torch.arange(count) * rows
    last = torch.clamp(first + rows, max=valid) - 1
    span = torch.stack([first + start, last + start], -1)
    return torch.where((first < valid)[:, None], span, torch.tensor([0, -1]))


def check_lists(idx: Tensor, cnt: Tensor, blocks: int) -> None:
    """Refuse lists that break the contract: a block listed twice would count twice in a kernel.

    Args:
        idx: int32 ``[R, HS, kmax]``.
        cnt: int32 ``[R, HS]``.
        blocks: Ids lie below it.

    Raises:
        UsageError: naming the first row that is wrong.
    """
    inside = torch.arange(idx.shape[2]) < cnt[..., None]
    steps = idx[..., 1:] > idx[..., :-1]
    found = {
        "has a count outside of its length": ((cnt < 0) | (cnt > idx.shape[2]))[..., None],
        f"has an id outside of 0 ... {blocks - 1}": inside & ((idx < 0) | (idx >= blocks)),
        "is not -1 behind its end": ~inside & (idx != -1),
        "is not strictly ascending": ~steps & inside[..., 1:],
    }
    for what, wrong in found.items():
        if wrong.any():
            row, head = wrong.any(-1).nonzero()[0].tolist()
            raise UsageError(
                f"the list of row {row}, list head {head} {what}",
                remedy="lists are ascending block ids without duplicates, then -1",
            )


def listed_keys(ids: Tensor, last: int, block: int, window: int) -> Tensor:
    """Return the visible positions of one list, ascending.

    Args:
        ids: Block ids.
        last: The query's own position: later keys are invisible.
        block: Positions in a block.
        window: Besides the blocks, that many last positions are visible (each key counts once).
    """
    keys = (ids.to(torch.int64)[:, None] * block + torch.arange(block)).reshape(-1)
    if window:
        keys = torch.cat([keys, torch.arange(max(0, last - window + 1), last + 1)])
    found: Tensor = torch.unique(keys[keys <= last])
    return found


def to_lists(chosen: Tensor, kmax: int) -> tuple[Tensor, Tensor]:
    """Turn a mask ``[R, HS, NB]`` with at most ``kmax`` set in a row into lists ``idx``, ``cnt``."""
    blocks = chosen.shape[-1]
    ids = torch.where(chosen, torch.arange(blocks), blocks)
    ids = torch.sort(ids, dim=-1).values[..., :kmax]
    if kmax > blocks:
        pad = ids.new_full((*ids.shape[:-1], kmax - blocks), blocks)
        ids = torch.cat([ids, pad], -1)
    cnt = (ids < blocks).sum(-1)
    return torch.where(ids < blocks, ids, -1).to(torch.int32), cnt.to(torch.int32)


def to_mask(idx: Tensor, cnt: Tensor, blocks: int) -> Tensor:
    """Return the mask ``[R, HS, blocks]`` of the listed blocks."""
    mask = torch.zeros((*idx.shape[:2], blocks + 1), dtype=torch.bool)
    inside = torch.arange(idx.shape[2]) < cnt[..., None]
    mask.scatter_(-1, torch.where(inside, idx, blocks).to(torch.int64), True)
    return mask[..., :blocks]


def outside_tie_band(chosen: Tensor, free: Tensor, score: Tensor, tolerance: Tensor) -> Tensor:
    """Return the rows ``[R, HS]`` whose choice no error of the scores explains.

    If each score is off by at most its tolerance, a block that was left out can beat one that was chosen
    by no more than the sum of their tolerances. Whatever is chosen within this band is right.

    Args:
        chosen: The choice, bool ``[R, HS, NB]``.
        free: The blocks that were neither forced nor barred, bool, same shape.
        score: float64 scores, same shape.
        tolerance: Of each score, same shape.
    """
    inf = float("inf")
    least = torch.where(chosen & free, score + tolerance, inf).amin(-1)
    most = torch.where(~chosen & free, score - tolerance, -inf).amax(-1)
    return most > least
