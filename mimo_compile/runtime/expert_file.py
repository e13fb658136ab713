"""Experts as they lie in an artifact's file, and how they come from there into slots of memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mimo_compile.errors import ArtifactError
from mimo_compile.runtime import dtypes
from mimo_compile.runtime.expert_bank import Key
from mimo_compile.runtime.memory import Zeroed, as_array, as_tensor
from mimo_compile.runtime.weights import MappedWeights

if TYPE_CHECKING:
    from mimo_compile.runtime.entry import Array

PIECE = 256 << 10
"""Bytes that are read at a time: between two pieces a load may be broken off."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What experts of a layer are: layers of one shape share slots."""

    experts: int
    parts: tuple[tuple[str, tuple[int, ...]], ...]
    """Dtype and shape of each array of an expert."""

    @property
    def part_bytes(self) -> tuple[int, ...]:
        """Bytes of each array of an expert."""
        return tuple(dtypes.size(dtype, shape) for dtype, shape in self.parts)

    @property
    def bytes(self) -> int:
        """Bytes of an expert."""
        return sum(self.part_bytes)


@dataclass(frozen=True, slots=True)
class Stack:
    """The experts of a layer in the artifact."""

    label: str
    """Where they stand: ``layers.3.feed.experts``."""
    sources: tuple[str, ...]
    """Tensors of all experts, in the order of the kernel's arguments."""
    shape: Shape
    chosen: int
    """Experts of a token."""


class Slots:
    """Memory for some experts of one shape, as kernels see it: arrays of E, and nothing behind the others."""

    def __init__(self, shape: Shape, slots: int) -> None:
        """Reserve addresses; memory is taken where ``slots`` are filled, and nowhere else."""
        self._shape = shape
        self._sizes = shape.part_bytes
        self.memory = [Zeroed(shape.experts * size, used=slots * size) for size in self._sizes]

    def argument(self, part: int) -> tuple[Array, Any]:
        """Return one of the arrays ``[E, ...]``, and the same as an argument of kernels."""
        dtype, extents = self._shape.parts[part]
        array = as_array(self.memory[part].bytes, dtype, (self._shape.experts, *extents))
        return array, as_tensor(array)

    def fill(
        self, slot: int, expert: int, sources: Sequence[str], weights: MappedWeights
    ) -> Iterator[int]:
        """Read an expert into a slot, piece by piece; yields after each the bytes that were read.

        Raises:
            ArtifactError: It is not what was written.
            EOFError: The file is shorter than it was.
            OSError: It cannot be read.
        """
        for source, size, memory in zip(sources, self._sizes, self.memory, strict=True):
            into, at = memory.bytes[slot * size : (slot + 1) * size], 0
            while at < size:
                first = expert * size + at
                end = min(at + weights.piece(source, first, PIECE), size)
                yield weights.read(source, first, into[at:end])
                at = end


class Throttle:
    """Makes those who have read wait as if they shared one link of a given bandwidth."""

    def __init__(self, bytes_per_s: float | None) -> None:
        """Set the bandwidth; None: nobody waits."""
        self._rate = bytes_per_s
        self._lock = threading.Lock()
        self._free = 0.0

    def wait(self, count: int, begin: float) -> float:
        """Wait until the link would have carried so many bytes, which were asked for at `begin`.

        Args:
            count: Bytes.
            begin: Time by `time.monotonic`.

        Returns:
            When it had carried them: who reads on has asked for what follows by then.
        """
        if self._rate is None:
            return begin
        with self._lock:
            self._free = end = max(self._free, begin) + count / self._rate
        if (left := end - time.monotonic()) > 0:
            time.sleep(left)
        return end


class ExpertFile:
    """Loads experts of any layer into slots of its bank."""

    def __init__(
        self, stacks: Sequence[Stack], slots: Sequence[Slots], weights: MappedWeights,
        throttle: Throttle, where: str,
    ) -> None:  # fmt: skip
        """Take each layer's experts and the slots that are for them.

        Args:
            stacks: Of each layer.
            slots: Of each layer; layers that share a bank have the same.
            weights: Of the artifact.
            throttle: Limits the rate.
            where: Path of the artifact, for messages.
        """
        self._stacks, self._slots, self._weights = stacks, slots, weights
        self._throttle, self._where = throttle, where

    def __call__(self, key: Key, slot: int) -> Iterator[int]:
        """Fill a slot with an expert: see `residency.Load`.

        Raises:
            ArtifactError: It cannot be read, or is not what was written.
        """
        layer, expert = key
        stack, begin = self._stacks[layer], time.monotonic()
        try:
            for count in self._slots[layer].fill(slot, expert, stack.sources, self._weights):
                begin = self._throttle.wait(count, begin)
                yield count
        except (EOFError, OSError) as error:
            reason = getattr(error, "strerror", None) or error
            raise self._failure(stack, expert, f"the file cannot be read: {reason}") from error
        except ArtifactError as error:
            raise self._failure(stack, expert, error.what) from error

    def _failure(self, stack: Stack, expert: int, reason: str) -> ArtifactError:
        return ArtifactError(
            f"expert {expert} of {stack.label} cannot be loaded: {reason}",
            where=self._where,
            remedy="Copy the file again or compile it again.",
        )
