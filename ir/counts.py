"""How much work a kernel does: operations by kind and bytes by memory level.

Schedules declare counts (analysis cannot see into intrinsics); ops declare the *necessary* counts of a
workload, which give the roofline and the physical floor no honest measurement can beat.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

OP_KINDS = (
    "fma_f32", "dot_i8", "tile_i8", "add_f32", "exp_f32", "unpack_u8", "shuffle_u8", "int_op",
    "dot_bf16", "tile_bf16",
)  # fmt: skip
"""Units: fma_f32, add_f32, exp_f32, int_op, shuffle_u8, unpack_u8 count scalar operations (lanes);
dot_i8 counts 8-bit multiply-adds of vectors, tile_i8 those of matrix tiles; dot_bf16 and tile_bf16 those of
bfloat16 numbers."""

LEVELS = ("dram", "l3", "l2", "l1")
"""Bytes that cross into the core from each level, in one run with nothing resident beforehand."""

TRAITS = ("tasks", "share", "useful", "lanes", "sums", "loads", "tile_bytes")
"""How a kernel goes about its work, for cost models; a kernel states all of them or none.

tasks: independent tasks of its widest loop, 1 when it runs on one thread. share: part of the work that
the busiest thread does. useful: part of the arithmetic that is not padding. lanes: elements of a
vector. sums: accumulators in flight in the inner loop. loads: vectors and scalars it loads for each
vector multiply-add. tile_bytes: bytes that one run of the inner loop touches."""

LAUNCH = ("blocks", "threads", "shared_bytes")
"""Traits of a launch on a GPU: its blocks, and of each of them the threads and the dynamic shared memory."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Operations by kind (`OP_KINDS`), bytes by level (`LEVELS`); `TRAITS` and `LAUNCH` of a kernel."""

    ops: Mapping[str, float] = field(default_factory=dict)
    bytes: Mapping[str, float] = field(default_factory=dict)
    traits: Mapping[str, float] = field(default_factory=dict)
    parts: tuple[Counts, ...] = ()
    """Those of the blocks of a kernel that run one after the other, whose sum this is."""
    name: str = ""
    """Of a part: knobs `name.knob` are its own."""

    def __post_init__(self) -> None:
        """Refuse unknown kinds, so that a misspelt count cannot pass as zero."""
        unknown = (set(self.ops) - set(OP_KINDS)) | (set(self.bytes) - set(LEVELS))
        unknown |= set(self.traits) - {*TRAITS, *LAUNCH}
        if unknown:
            raise ValueError(f"unknown counts {sorted(unknown)}")

    def __add__(self, other: Counts) -> Counts:
        """Return the sum of two counts; traits are of one kernel, so the sum has none."""
        return Counts(
            {k: self.ops.get(k, 0.0) + other.ops.get(k, 0.0) for k in {*self.ops, *other.ops}},
            {
                k: self.bytes.get(k, 0.0) + other.bytes.get(k, 0.0)
                for k in {*self.bytes, *other.bytes}
            },
        )

    def named(self, name: str) -> Counts:
        """Return these counts as a part called so."""
        return replace(self, name=name)

    @property
    def flops(self) -> float:
        """Arithmetic operations, a multiply-add counted as two."""
        o = self.ops
        multiplied = sum(
            o.get(k, 0.0) for k in ("fma_f32", "dot_i8", "tile_i8", "dot_bf16", "tile_bf16")
        )
        return 2.0 * multiplied + sum(o.get(k, 0.0) for k in ("add_f32", "exp_f32"))


def in_turn(*parts: Counts) -> Counts:
    """Return the counts of parts that run one after the other, each of them known by itself as well."""
    total = sum(parts, Counts())
    return Counts(total.ops, total.bytes, parts=parts)
