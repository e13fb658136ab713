"""Dense attention, and attention as the model defines it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mimo_compile.ir.policies.base import AttentionPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class Full(AttentionPolicy):
    """Every layer sees everything, but for windows that the model was trained with."""

    name: ClassVar[str] = "full"


@dataclass(frozen=True, slots=True, kw_only=True)
class Model(AttentionPolicy):
    """Whatever the checkpoint's config says: its own windows, sinks and branches."""

    name: ClassVar[str] = "model"
