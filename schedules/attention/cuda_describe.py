"""Descriptors of blocks of keys on GPUs: each entry that tokens were written to is made anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.base import Array
from mimo_compile.ir.ops.describe_blocks import PARTS, entries_of
from mimo_compile.ir.ops.pages import TABLE, paged, width_of
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.attention import cuda_layout as layout
from mimo_compile.schedules.base import Kernel, Schedule, Space, kernel_name
from mimo_compile.schedules.cuda.code import DeviceCode, Launch
from mimo_compile.schedules.cuda.template import rendered

_PLACES = {
    "bounds": {"LEAST": 0, "GREATEST": 1}, "mean": {"SUM": 0}, "peak": {"SPAN": 0},
    "pool3": {"GREATEST": 0, "LEAST": 1, "SUM": 2},
}  # fmt: skip
"""Which part of a kind holds what."""


@dataclass(frozen=True, slots=True)
class ThreadsConfig:
    """Knobs of a kernel whose threads do not know of each other."""

    threads: int = 128
    """Of a block."""


class CudaDescribe(Schedule):
    """A thread has two columns of an entry, so that a warp reads 128 neighbouring bytes of each key."""

    name = "describe_blocks.cuda"
    op = "describe_blocks"
    config = ThreadsConfig

    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Every workload of the op over bfloat16 caches."""
        return workload.op == self.op and layout.takes(workload, hardware)

    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Threads of a block."""
        return Space(ThreadsConfig, {"threads": (32, 64, 128, 256)}, ThreadsConfig())

    def order(self, workload: Workload, config: ThreadsConfig, hardware: Hardware) -> str | None:
        """Keys are added up in their order."""
        return "keys"

    def lower(self, workload: Workload, config: ThreadsConfig, hardware: Hardware) -> Kernel:
        """Generate the kernel of one config."""
        p = get_op(self.op).full(workload)
        stride = p["stride"] or p["size"]
        entries = entries_of(p["cap"], p["size"], stride)
        most = min(entries, (p["t"] - 1 + p["size"]) // stride + 1)
        places = {n: _PLACES[p["kind"]].get(n, -1) for n in ("SUM", "LEAST", "GREATEST", "SPAN")}
        table = width_of(p["cap"], p["page"]) if paged(p) else 0
        constants = places | {
            "B": p["b"], "KV": p["kv"], "D": p["d"], "DK": layout.whole(p["d"]), "CAP": p["cap"],
            "ENTRIES": entries, "SIZE": p["size"], "STRIDE": stride, "MOST": most,
            "SLOTS": layout.slots_of(p), "PAGE": p["page"], "TABLE": table, "PARTS": PARTS[p["kind"]],
            "WHOLE": bool(p["whole"]), "THREADS": config.threads,
            "ENTRY": "unsigned short" if p["e"] == "bf16" else "float",
        }  # fmt: skip
        args = layout.kernel_args(workload)
        threads = p["b"] * most * p["kv"] * -(-p["d"] // 2)
        launch = Launch(
            "describe_blocks", (-(-threads // config.threads), 1, 1), config.threads,
            ("pos", TABLE if paged(p) else "pos", "k_cache", "desc"),
        )  # fmt: skip
        return Kernel(
            kernel_name(self, workload, config, hardware), None, args,
            self.work(workload, config, hardware), features=frozenset({"cuda"}),
            device=DeviceCode(rendered(Path(__file__).with_suffix(".cu"), constants), (launch,)),
        )  # fmt: skip

    def work(self, workload: Workload, config: ThreadsConfig, hardware: Hardware) -> Counts:
        """What the op cannot avoid: keys of the entries once, with their padding where they have any."""
        p, need = get_op(self.op).full(workload), get_op(self.op).counts(workload)
        return Counts(need.ops, {"dram": need.bytes["dram"] * layout.whole(p["d"]) / p["d"]})

    def layouts(self, workload: Workload, config: ThreadsConfig) -> dict[str, str]:
        """Return the name of the cache's layout; entries are canonical."""
        return {"k_cache": layout.LAYOUTS["k_cache"]}

    def pack(
        self, workload: Workload, config: ThreadsConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Lay out the cache."""
        return layout.pack(workload, arrays)

    def unpack_state(
        self, workload: Workload, config: ThreadsConfig, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Return the canonical cache."""
        return layout.unpack(workload, arrays)
