"""An op for the verifier's tests: a grouped low-bit matmul whose inputs and results have one of three types.

``y[m, n] = sum_k x[m, k] * (codes[n, k] - zero[n, k // g]) * scale[n, k // g] + bias[n]``: in float32, in
float16 (added up in float32), or exactly in int32. It names its arguments as `mpgemm` does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mimo_compile.ir.counts import Counts
from mimo_compile.ir.ops.base import Arg, Array, OpDef, Param
from mimo_compile.ir.workload import Workload

TYPES = {
    "f32": ("float32", "float32", "float32"),
    "f16": ("float16", "float16", "float32"),
    "i32": ("int8", "int32", "int32"),
}
"""Type of results -> dtypes of x; of scale, zero, bias and y; of the sum."""


class ZooLinear(OpDef):
    """``zoo_linear:m=5,n=19,k=64,g=32,y=f16``."""

    name = "zoo_linear"
    params = (
        Param("m", int, low=1),
        Param("n", int, low=1),
        Param("k", int, low=1),
        Param("g", int, 32),
        Param("y", str, "f32"),
    )

    def args(self, workload: Workload) -> tuple[Arg, ...]:
        p = self.full(workload)
        m, n, k, groups = p["m"], p["n"], p["k"], p["k"] // p["g"]
        x, other, _ = TYPES[p["y"]]
        return (
            Arg("x", "input", (m, k), x), Arg("codes", "weight", (n, k), "uint8"),
            Arg("scale", "weight", (n, groups), other), Arg("zero", "weight", (n, groups), other),
            Arg("bias", "weight", (n,), other), Arg("y", "output", (m, n), other),
        )  # fmt: skip

    def make_inputs(self, workload: Workload, rng: np.random.Generator) -> dict[str, Array]:
        p = self.full(workload)
        shapes = {a.name: a.shape for a in self.args(workload)}
        out = {
            "codes": rng.integers(0, 16, shapes["codes"], np.uint8),
            "zero": rng.integers(0, 16, shapes["zero"]),
        }
        if p["y"] == "i32":
            out["x"] = rng.integers(-128, 128, shapes["x"])
            out["scale"] = rng.integers(1, 8, shapes["scale"])
            out["bias"] = rng.integers(-9999, 9999, shapes["bias"])
            out["x"][0], out["codes"][0], out["zero"][0] = 127, 15, 0  # the largest sum
        else:
            out["x"] = rng.standard_normal(shapes["x"])
            out["x"][:, rng.integers(0, p["k"], 2)] *= 8
            out["scale"] = rng.random(shapes["scale"]) * 0.01 + 1e-3
            out["bias"] = rng.standard_normal(shapes["bias"])
        return self.typed(workload, out)

    def typed(self, workload: Workload, values: Mapping[str, Any]) -> dict[str, Array]:
        """Return arrays in the dtypes of the op's arguments (scales as float16 holds them)."""
        out = {a.name: a for a in self.args(workload) if a.role != "output"}
        half = {
            n: values[n].astype(np.float16) if n == "scale" and a.dtype == "float32" else values[n]
            for n, a in out.items()
        }
        return {n: np.ascontiguousarray(half[n].astype(a.dtype)) for n, a in out.items()}

    def _parts(self, workload: Workload, inputs: Mapping[str, Array]) -> tuple[Array, Array]:
        g = self.full(workload)["g"]
        wide = {n: a.astype(np.float64) for n, a in inputs.items()}
        scale, zero = (np.repeat(wide[n], g, axis=1) for n in ("scale", "zero"))
        return wide["x"], (wide["codes"] - zero) * scale

    def reference(self, workload: Workload, inputs: Mapping[str, Array]) -> dict[str, Array]:
        x, w = self._parts(workload, inputs)
        y = x @ w.T + inputs["bias"].astype(np.float64)
        if self.full(workload)["y"] == "f16":
            with np.errstate(over="ignore"):
                y = np.where(np.abs(y) >= 65520, np.sign(y) * np.inf, y)  # what rounds to infinity
        return {"y": y}

    def bound(
        self, workload: Workload, inputs: Mapping[str, Array], expected: Mapping[str, Array]
    ) -> dict[str, Array]:
        p = self.full(workload)
        if p["y"] == "i32":
            return {"y": np.zeros(expected["y"].shape)}
        x, w = self._parts(workload, inputs)
        finite = np.where(np.isfinite(expected["y"]), np.abs(expected["y"]), 0.0)
        total = np.abs(x) @ np.abs(w).T + np.abs(inputs["bias"].astype(np.float64))
        bound = 4 * math.sqrt(max(p["k"], 16)) * 2.0**-24 * total + 1e-30
        if p["y"] == "f16":
            bound = bound + 2.0**-11 * (finite + bound) + 2.0**-25
        return {"y": bound}

    def counts(self, workload: Workload) -> Counts:
        p = self.full(workload)
        return Counts(
            {"fma_f32": float(p["m"] * p["n"] * p["k"])}, {"dram": float(p["n"] * p["k"])}
        )
