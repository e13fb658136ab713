"""A counter that plays back recorded readings, to test what depends on a meter."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mimo_compile.errors import InputError


class ReplayMeter:
    """Returns one recorded counter value after the other, and OSError when they are used up."""

    name = "replay"
    measures = ("cpu", "cuda")
    reads = "a recorded counter"
    step_s = 0.1

    def __init__(self, readings_mj: Iterable[float] | None = None, step_s: float = 0.1) -> None:
        """Play back ``readings_mj`` (counter values, millijoules).

        Raises:
            OSError: none were given.
        """
        if readings_mj is None:
            raise OSError("plays back a recorded counter; needs a recording")
        self._readings = iter(readings_mj)
        self.step_s = step_s

    @classmethod
    def from_file(cls, path: str | Path, step_s: float = 0.1) -> ReplayMeter:
        """Read one number a line.

        Raises:
            InputError: the file is missing or holds something else.
        """
        try:
            return cls([float(line) for line in Path(path).read_text().split()], step_s)
        except (OSError, ValueError) as error:
            raise InputError(f"no meter readings: {error}", file=path) from error

    def read_mj(self) -> float:
        """Return the next reading."""
        for value in self._readings:
            return value
        raise OSError("the recorded readings are used up")
