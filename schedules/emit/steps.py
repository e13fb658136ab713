"""Runs of columns that share the scales of both sides: what is summed as integers before it is scaled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mimo_compile.schedules.emit.layout import CodeLayout


@dataclass(frozen=True, slots=True)
class Steps:
    """The steps of a row of codes times int8 activations: groups of either side, or parts of them."""

    codes: CodeLayout
    group: int = 0
    """Columns of activations that share a scale; 0: the row."""

    @property
    def size(self) -> int:
        """Columns of a step that is not the last."""
        if not self.group:
            return self.codes.fmt.group_size(self.codes.k)
        return self.group if self.codes.groups == 1 else min(self.group, self.codes.fmt.group)

    @property
    def fits(self) -> bool:
        """True if steps are whole blocks of columns."""
        return not self.group or self.size % self.codes.block == 0

    @property
    def count(self) -> int:
        """Steps of a row."""
        return -(-self.codes.k // self.size) if self.group else self.codes.groups

    @property
    def blocks(self) -> int:
        """Blocks of columns of a step that is not the last."""
        return self.size // self.codes.block if self.group else self.codes.group_blocks

    @property
    def last(self) -> int:
        """Blocks of the last step."""
        return min(self.blocks, self.codes.blocks - (self.count - 1) * self.blocks)

    @property
    def scales(self) -> int:
        """Scales of a row of activations."""
        return -(-self.codes.k // self.group) if self.group else 1

    def weight_group(self, step: Any) -> Any:
        """Return the weights' group that a step belongs to."""
        if not self.group or (self.codes.groups > 1 and self.size == self.codes.fmt.group):
            return step
        return 0 if self.codes.groups == 1 else step * self.size // self.codes.fmt.group

    def act_group(self, step: Any) -> Any:
        """Return the activations' group that a step belongs to."""
        return step if self.size == self.group else step * self.size // self.group
