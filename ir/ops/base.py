"""What every op of the `mimo` dialect defines.

An op is one file: a ``torch.library`` custom op (schema, fake rule, plain reference in torch) and one
`OpDef` that turns it into workloads that can be tuned: canonical arguments, fresh random inputs, the
reference result in float64 and an element-wise error bound.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from mimo_compile.errors import UsageError
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.workload import Value, Workload

Array = npt.NDArray[Any]
Role = Literal["input", "weight", "state", "output"]
"""input: changes each call; weight: constant, packed by the schedule; state: lives across calls (KV
caches) in a layout that the schedule chooses; output: written completely by the kernel."""


@dataclass(frozen=True, slots=True)
class Arg:
    """One canonical argument of an op."""

    name: str
    role: Role
    shape: tuple[int, ...]
    dtype: str
    """numpy dtype name; ``bfloat16`` arrays travel as uint16 with this dtype named."""
    mutated: bool = False
    """True for a state that the op writes."""


@dataclass(frozen=True, slots=True)
class Param:
    """One workload parameter: its type, default (None = required) and allowed range."""

    name: str
    kind: type
    default: Value | None = None
    low: float = 0


class OpDef(ABC):
    """Definition of one op as the search sees it."""

    name: ClassVar[str]
    params: ClassVar[tuple[Param, ...]]

    def workload(self, **values: Value) -> Workload:
        """Build a canonical workload: declared order, defaults left out.

        Raises:
            UsageError: unknown, missing or out-of-range parameter.
        """
        known = {p.name: p for p in self.params}
        if extra := sorted(set(values) - set(known)):
            raise UsageError(
                f"{self.name} has no parameter {extra[0]!r}", remedy=f"it takes {', '.join(known)}"
            )
        out: dict[str, Value] = {}
        for p in self.params:
            value = values.get(p.name, p.default)
            if value is None:
                raise UsageError(f"{self.name} needs {p.name}=", remedy="add it to --op")
            if p.kind is float and isinstance(value, int):
                value = float(value)
            if p.kind is str:
                value = str(value)
            if not isinstance(value, p.kind):
                raise UsageError(f"{self.name}: {p.name}={value!r} is not {p.kind.__name__}")
            if not isinstance(value, str) and value < p.low:
                raise UsageError(f"{self.name}: {p.name}={value} is below {p.low:g}")
            if value != p.default:
                out[p.name] = value
        workload = Workload.make(self.name, out)
        self.check(self.full(workload))
        return workload

    def full(self, workload: Workload) -> dict[str, Any]:
        """Return every parameter of a workload with defaults filled in."""
        given = dict(workload.params)
        return {p.name: given.get(p.name, p.default) for p in self.params}

    def check(self, p: Mapping[str, Any]) -> None:  # noqa: B027 - most ops have nothing to add
        """Raise UsageError when parameters do not fit together."""

    @abstractmethod
    def args(self, workload: Workload) -> tuple[Arg, ...]:
        """Return the canonical arguments in order: inputs, weights, states, outputs."""

    @abstractmethod
    def make_inputs(self, workload: Workload, rng: np.random.Generator) -> dict[str, Array]:
        """Draw fresh canonical inputs, weights and states."""

    @abstractmethod
    def reference(self, workload: Workload, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return outputs (and mutated states) computed plainly, float64 where floating."""

    @abstractmethod
    def bound(
        self, workload: Workload, inputs: Mapping[str, Array], expected: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Return, per output, the largest absolute error that an honest float32 kernel may make."""

    def exact_bound(
        self, workload: Workload, inputs: Mapping[str, Array], expected: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Return the bound of kernels that round nothing beyond float32, where `bound` allows more."""
        return self.bound(workload, inputs, expected)

    @abstractmethod
    def counts(self, workload: Workload) -> Counts:
        """Return the work that no kernel can avoid (each byte once, each operation once)."""

    def counts_of(self, workload: Workload, inputs: Mapping[str, Array]) -> Counts:
        """Return `counts` for inputs that say more about the work than extents do (which experts are hit)."""
        return self.counts(workload)
