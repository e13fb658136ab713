"""The last word of a `bench`: in each cell our fastest kernel beside the fastest peer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mimo_compile.bench.contest import Row


@dataclass(frozen=True, slots=True)
class Cell:
    """One workload in one cache state."""

    ours: Row
    peer: Row | None
    """The fastest peer; None where none took part."""

    @property
    def slower(self) -> bool:
        """True where a peer was faster than ours, by the medians."""
        return self.peer is not None and self.peer.median_us < self.ours.median_us

    @property
    def sure(self) -> bool:
        """True where nine of ten rounds have the same sign as the medians."""
        ratio = self.peer.ratio if self.peer is not None else None
        return ratio is not None and (ratio[2] < 1 if self.slower else ratio[1] > 1)

    def json(self) -> dict[str, Any]:
        """Return the cell as `bench --json` prints it."""
        c, out = self.ours.contestant, self.ours.json()
        best = self.peer.json() if self.peer is not None else {}
        return {
            "op": c.op, "threads": c.threads, "cache": c.cache, "schedule": c.schedule,
            "median_us": out["median_us"], "bits_per_weight": out["bits_per_weight"],
            "roof_share": out["roof_share"], "foreign_cores": out["foreign_cores"],
            "sure": self.sure, "best_peer": best.get("impl"),
            "peer_us": best.get("median_us"), "peer_bits_per_weight": best.get("bits_per_weight"),
            **{key: best.get(key) for key in ("ratio", "ratio_p10", "ratio_p90")},
        }  # fmt: skip


def cells(rows: Sequence[Row]) -> list[Cell]:
    """Return a cell for each workload and cache state that a kernel of ours took part in."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.contestant.op, row.contestant.cache), []).append(row)
    out = []
    for group in groups.values():
        ours = [r for r in group if r.contestant.impl == "mimo"]
        peers = [r for r in group if r.contestant.peer]
        if ours:
            best = min(peers, key=lambda r: r.median_us) if peers else None
            out.append(Cell(min(ours, key=lambda r: r.median_us), best))
    return out
