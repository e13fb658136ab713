"""A workload: what one kernel must compute (op, extents, formats), with a text form that is its key.

``mpgemm:m=1,n=4096,k=4096,w=w2g64,a=a8`` - parameters keep the order of the op's definition and those
equal to the op's default are left out, so equal workloads have equal text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mimo_compile.errors import UsageError

Value = int | float | str

_NAME = re.compile(r"[a-z][a-z0-9_]*\Z")
_TEXT = re.compile(r"[A-Za-z0-9_.+\-]+\Z")
BUCKETS: tuple[int, ...] = (1, 4, 16, 64, 256)
"""Token counts M that decoder kernels are specialised for: 1, 2-4, 5-16, 17-64, 65-256."""


def bucket_of(tokens: int) -> int:
    """Return the smallest bucket that holds ``tokens`` (the largest bucket beyond it)."""
    return next((b for b in BUCKETS if tokens <= b), BUCKETS[-1])


def _parse_value(text: str) -> Value:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


@dataclass(frozen=True, slots=True)
class Workload:
    """An op with its parameters; hashable, ordered by its text."""

    op: str
    params: tuple[tuple[str, Value], ...]

    @classmethod
    def make(cls, op: str, params: Mapping[str, Value]) -> Workload:
        """Build a workload from a mapping (kept in the mapping's order)."""
        return cls(op, tuple(params.items()))

    @classmethod
    def parse(cls, text: str) -> Workload:
        """Parse ``op:name=value,...``.

        Raises:
            UsageError: the text is malformed; the op's own definition checks names and ranges.
        """
        op, _, rest = text.partition(":")
        params: dict[str, Value] = {}
        for item in rest.split(",") if rest else []:
            name, eq, value = item.partition("=")
            if not eq or not _NAME.match(name) or not _TEXT.match(value) or name in params:
                raise UsageError(
                    f"malformed workload {text!r} at {item!r} (--op)",
                    remedy="write op:name=value,... for example "
                    "mpgemm:m=1,n=4096,k=4096,w=w4g64,a=a8",
                )
            params[name] = _parse_value(value)
        if not _NAME.match(op):
            raise UsageError(
                f"malformed workload {text!r} (--op)", remedy="begin with the op's name"
            )
        return cls.make(op, params)

    def __getitem__(self, name: str) -> Value:
        """Return one parameter; KeyError names the workload."""
        for key, value in self.params:
            if key == name:
                return value
        raise KeyError(f"{self} has no parameter {name!r}")

    def integer(self, name: str) -> int:
        """Return an integer parameter."""
        value = self[name]
        if not isinstance(value, int):
            raise UsageError(f"{self}: {name} must be an integer, not {value!r}")
        return value

    def number(self, name: str) -> float:
        """Return a number as float."""
        value = self[name]
        if isinstance(value, str):
            raise UsageError(f"{self}: {name} must be a number, not {value!r}")
        return float(value)

    def text(self, name: str) -> str:
        """Return a parameter as text."""
        return f"{self[name]}"

    def replace(self, **changes: Value) -> Workload:
        """Return the same workload with some parameters changed."""
        return Workload.make(self.op, {**dict(self.params), **changes})

    def __str__(self) -> str:
        return self.op + ":" + ",".join(f"{k}={v}" for k, v in self.params)
