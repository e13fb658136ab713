"""StreamingLLM (arXiv 2309.17453): the first positions and the most recent ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mimo_compile.ir.policies.base import AttentionPolicy, Geometry, LayerRole, Steps, arg


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream(AttentionPolicy):
    """``sink`` first positions and the last ``recent``; nothing is scored.

    With ``rolling=1`` a query meets keys as if each were rotated by its place among those that stay, so that
    distances never reach ``sink + recent``; with 0 it is a mask over absolute positions: another function.
    """

    name: ClassVar[str] = "stream"

    sink: int = arg(4, "first positions that stay")
    recent: int = arg(1020, "last positions that stay, the token's own included", low=1)
    rolling: int = arg(1, "1: positions are counted in the cache; 0: in the text", high=1)

    @property
    def kept_window(self) -> int:
        """The recent positions."""
        return self.recent

    @property
    def sees_all(self) -> int:
        """Sinks and recent positions."""
        return self.sink + self.recent

    def role_alone(self, layer: int) -> LayerRole:
        """Every layer is the same."""
        return LayerRole("window", False, None, layer, self.recent)

    def workloads(self, g: Geometry) -> Steps:
        """One list for all heads whose only block holds the sinks; the window does the rest.

        Beside it, where positions roll: the sinks alone, for queries that meet them under another rotation.
        The cache is what stays of one of ``g.cap`` positions: slots for the sinks, and a ring.
        """
        if not self.sink:
            return AttentionPolicy.workloads(self, g)
        from mimo_compile.ir.ops import get_op

        stays, ring = (-(-n // 16) * 16 for n in (self.sink, self.recent + g.t - 1))
        attend, alone = (
            get_op("sparse_attention").workload(
                t=g.t, h=g.h, kv=g.kv, d=g.d, dv=g.dv, cap=stays + ring, hs=1, block=self.sink, kmax=1,
                window=window, sink=sink, len=g.length or g.cap, first=stays, c=g.c,
            )
            for window, sink in ((self.recent, g.sink), (0, 0))
        )  # fmt: skip
        return Steps(None, None, attend, (alone,) if self.rolling else ())
