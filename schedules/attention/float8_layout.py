"""The layout of KV caches of 8-bit floats (`ir.float8`), on which append and attention agree.

- Keys ``k16.e4m3``: ``[KV, ceil(cap/16), D + 1, 16]``: 16 slots of a channel are neighbours; behind the
  channels stand the slots' bytes.
- Values ``v16.e4m3``: ``[KV, ceil(cap/16), 16 * W + 16]`` with W = 16 * ceil(DV/16): one slot after the
  other, then the slots' bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from mimo_compile.ir import float8
from mimo_compile.ir.ops.base import Array
from mimo_compile.schedules.emit.vector import LANES

LAYOUTS = {"k_cache": "k16.e4m3", "v_cache": "v16.e4m3"}


def _up(n: int) -> int:
    return -(-n // LANES) * LANES


def float8_shapes(p: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the packed shapes for an op's parameters; all are bytes."""
    blocks, heads = _up(p["cap"]) // LANES, p["kv"] * p.get("b", 1)
    return {
        "k_cache": (heads, blocks, p["d"] + 1, LANES),
        "v_cache": (heads, blocks, LANES * _up(p["dv"]) + LANES),
    }


def pack_float8(p: Mapping[str, Any], name: str, rows: Array) -> Array:
    """Lay out float32 rows ``[cap, KV, D]``; padding is zero."""
    cap, kv, width = rows.shape
    given = torch.from_numpy(np.ascontiguousarray(rows))
    codes, scale = (t.numpy() for t in float8.encode(given))
    wide = width if name == "k_cache" else _up(width)
    codes = np.pad(codes, ((0, _up(cap) - cap), (0, 0), (0, wide - width)))
    scale = np.pad(scale, ((0, _up(cap) - cap), (0, 0), (0, 0)))
    codes, scale = codes.reshape(-1, LANES, kv, wide), scale.reshape(-1, LANES, kv)
    if name == "k_cache":
        lanes = np.concatenate(
            [codes.transpose(2, 0, 3, 1), scale.transpose(2, 0, 1)[:, :, None]], 2
        )
    else:
        flat = codes.transpose(2, 0, 1, 3).reshape(kv, -1, LANES * wide)
        lanes = np.concatenate([flat, scale.transpose(2, 0, 1)], 2)
    return np.ascontiguousarray(lanes)


def unpack_float8(p: Mapping[str, Any], name: str, packed: Array) -> Array:
    """Return the float32 rows of a packed cache."""
    kv, blocks = packed.shape[:2]
    if name == "k_cache":
        width, codes = p["d"], packed[:, :, : p["d"]].transpose(1, 3, 0, 2)
        scale = packed[:, :, p["d"]].transpose(1, 2, 0)
    else:
        width = p["dv"]
        codes = packed[:, :, :-LANES].reshape(kv, blocks, LANES, -1)[..., :width]
        codes, scale = codes.transpose(1, 2, 0, 3), packed[:, :, -LANES:].transpose(1, 2, 0)
    tensors = (torch.from_numpy(np.ascontiguousarray(a)) for a in (codes, scale[..., None]))
    rows = float8.decode(*tensors).numpy().reshape(-1, kv, width)
    return np.ascontiguousarray(rows[: p["cap"]])
