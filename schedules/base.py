"""The contract between one kernel algorithm and everything that uses it.

A schedule is a parametrised generator: ``space`` says which configs it has for a workload on a target,
``lower`` turns one config into a kernel, ``pack`` lays out constant weights (and states) as that kernel
reads them. Algorithms compete with each other in one search because each is just another schedule.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any, ClassVar

import numpy as np

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops.base import Arg, Array
from mimo_compile.ir.workload import Workload
from mimo_compile.schedules.cuda.code import DeviceCode

KnobValue = int | float | str | bool


@dataclass(frozen=True, slots=True)
class Space:
    """All configs of one schedule for one workload: a product of knobs cut by a constraint.

    ``make(**knobs)`` builds the schedule's config; ``legal`` refuses combinations before anything is built.
    """

    make: Callable[..., Any]
    knobs: Mapping[str, tuple[KnobValue, ...]]
    default: Any
    """The config that is used without a tuning record; must be legal."""
    legal: Callable[[Any], bool] = lambda config: True

    @property
    def size(self) -> int:
        """Number of combinations before the constraint."""
        return math.prod(len(v) for v in self.knobs.values())

    def __iter__(self) -> Iterator[Any]:
        """Enumerate all legal configs."""
        for values in itertools.product(*self.knobs.values()):
            config = self.make(**dict(zip(self.knobs, values, strict=True)))
            if self.legal(config):
                yield config


@dataclass(frozen=True, slots=True)
class Kernel:
    """One generated kernel.

    ``args`` gives the order, roles, shapes and dtypes of the PrimFunc's parameters; names are those of the
    op's canonical arguments, or of packed arrays that ``pack`` returns (roles ``weight`` and ``state``).
    """

    name: str
    """Symbol name; a C identifier, unique for workload and config."""
    func: Any
    """A TVM PrimFunc whose ``global_symbol`` is ``name``; None where ``device`` holds the code."""
    args: tuple[Arg, ...]
    counts: Counts
    """Work done by this kernel (declared; at least the workload's necessary counts)."""
    workspace_bytes: int = 0
    features: frozenset[str] = frozenset()
    """ISA features the code needs (LLVM spelling), which the artifact records."""
    target: Mapping[str, Any] = field(default_factory=dict)
    """Extra TVM target attributes, e.g. ``{"fast-math-reassoc": True}``."""
    notes: tuple[str, ...] = ()
    """What the generator tried and TVM refused, one line each: it explains a slow kernel."""
    compact: bool = False
    """Whether loops were moved into others: TVM then has to find how much of each buffer is still needed."""
    device: DeviceCode | None = None
    """CUDA code and its launches; None for kernels of CPUs."""


class Schedule(ABC):
    """One algorithm for one op on one hardware family; stateless."""

    name: ClassVar[str]
    """Unique, e.g. ``mpgemm.x86_vnni``."""
    op: ClassVar[str]
    config: ClassVar[type]
    """Frozen dataclass of knobs with plain values (int, str, bool), so that it round-trips through JSON."""
    version: ClassVar[int] = 1
    """Raised when the generated code changes, so that old records are not taken for new code."""

    @abstractmethod
    def supports(self, workload: Workload, hardware: Hardware) -> bool:
        """Say whether this schedule can compute the workload on the hardware."""

    @abstractmethod
    def space(self, workload: Workload, hardware: Hardware) -> Space:
        """Return the configs to search (the same knobs for the same workload and hardware)."""

    @abstractmethod
    def lower(self, workload: Workload, config: Any, hardware: Hardware) -> Kernel:
        """Generate the kernel of one config."""

    def work(self, workload: Workload, config: Any, hardware: Hardware) -> Counts:
        """Return the counts that the kernel will declare.

        Override it where that needs no code generation: the search ranks many candidates by it.
        """
        return self.lower(workload, config, hardware).counts

    def told(self, workload: Workload, config: Any, hardware: Hardware) -> Counts:
        """Return `work` as cost models see it: of CUDA kernels with what each launch asks an SM for.

        Registers are not in it: they are known when a kernel is compiled, and models rank what is not.
        """
        counts = self.work(workload, config, hardware)
        if hardware.kind != "cuda" or type(self).work is Schedule.work:
            return counts
        device = self.lower(workload, config, hardware).device
        launches = () if device is None else device.launches
        parts = counts.parts or (counts,)
        if len(launches) != len(parts):
            return counts
        with_launches = tuple(
            replace(
                part,
                traits={
                    **part.traits, "blocks": float(math.prod(launch.grid)),
                    "threads": float(launch.threads), "shared_bytes": float(launch.shared_bytes),
                },
            )
            for part, launch in zip(parts, launches, strict=True)
        )  # fmt: skip
        return replace(counts, parts=with_launches) if counts.parts else with_launches[0]

    def exact(self, config: Any) -> bool:
        """Say whether kernels of a config are held to the op's `exact_bound`."""
        return False

    def order(self, workload: Workload, config: Any, hardware: Hardware) -> str | None:
        """Name the order in which a kernel adds up the results of one token.

        Where two kernels of one op, for workloads that differ in their number of tokens alone, have orders
        of the same name, a token's results are the same in both, bit for bit. None promises nothing.
        """
        return None

    def layouts(self, workload: Workload, config: Any) -> dict[str, str]:
        """Name the layout of each weight or state group, e.g. ``{"weight": "rows16.k4"}``.

        Kernels that share a tensor (other token counts, append and attend) must agree on its layout; the
        plan chooses one layout per tensor. An empty dictionary means canonical arrays.
        """
        return {}

    def pack(
        self, workload: Workload, config: Any, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Lay out canonical weights and states (those given) as the kernel's arguments want them.

        The result depends on ``config`` only through ``layouts``.
        """
        return {name: np.ascontiguousarray(a) for name, a in arrays.items()}

    def unpack_weights(
        self, workload: Workload, config: Any, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Inverse of ``pack`` for weights: canonical arrays from packed ones, equal to the bit."""
        return dict(arrays)

    def unpack_state(
        self, workload: Workload, config: Any, arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Inverse of ``pack`` for states: canonical arrays from packed ones (used to verify appends)."""
        return dict(arrays)

    def config_from_json(self, values: Mapping[str, Any]) -> Any:
        """Rebuild a config from `config_to_json`."""
        return self.config(**values)

    @staticmethod
    def config_to_json(config: Any) -> dict[str, Any]:
        """Return a config's knobs as plain values (a search does this for thousands of candidates)."""
        kind: Any = type(config)
        return {name: getattr(config, name) for name in _field_names(kind)}


@cache
def _field_names(config: Any) -> tuple[str, ...]:
    return tuple(f.name for f in fields(config))


def kernel_name(schedule: Schedule, workload: Workload, config: Any, hardware: Hardware) -> str:
    """Return a C identifier: the workload in words, then a hash of all that shapes the code."""
    words = re.sub(r"[^a-zA-Z0-9]+", "_", re.sub(r"[a-z]+=(?=[a-z])|=", "", str(workload)))
    facts = [
        schedule.name, schedule.version, str(workload), schedule.config_to_json(config),
        sorted(hardware.features),
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
    return f"{words}__{digest}"
