"""Lower everything that is not in the `mimo` dialect to TIR functions, fused by TVM's own passes."""

from __future__ import annotations

from typing import Any

from mimo_compile import _tvm


def lower_generic(module: Any) -> Any:
    """Return the module with generic operators as fused ``call_tir``; dialect calls and reshapes stay.

    Reshapes remain operators because the flat program gives them for free, as views.
    """
    tvm = _tvm.compiler()
    relax = tvm.relax
    passes = tvm.transform.Sequential(
        [
            relax.transform.CanonicalizeBindings(),
            relax.transform.DeadCodeElimination(["main"]),
            relax.transform.DecomposeOpsForInference(),
            relax.transform.LegalizeOps(skip_ops=["relax.reshape"]),
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.FoldConstant(),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
            relax.transform.RewriteDataflowReshape(),
            relax.transform.DeadCodeElimination(["main"]),
            relax.transform.CanonicalizeBindings(),
        ]
    )
    with tvm.transform.PassContext(opt_level=3):
        return passes(module)
