"""The debugging reference: an imported module run op by op in TVM's Relax virtual machine.

Slow and plain on purpose: dialect ops run their definition's float64 reference, everything else TVM's
unscheduled lowering. When a compiled model is wrong, this says whether import or kernels are to blame.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mimo_compile import _tvm
from mimo_compile.ir.importer import PREFIX, Imported
from mimo_compile.ir.ops import get_op, parse_workload
from mimo_compile.ir.ops.base import Array


def run_reference(imported: Imported, values: Mapping[str, Array]) -> list[Array]:
    """Run ``main``.

    Args:
        imported: What the importer made of an exported program.
        values: Inputs by name, and weights and states by the names that the module gives them. States are
            updated in place.

    Returns:
        The outputs.
    """
    tvm = _tvm.compiler()
    relax = tvm.relax
    _register_ops(imported.module)
    machine = relax.VirtualMachine(
        tvm.compile(imported.module, target=tvm.target.Target({"kind": "llvm"})), tvm.cpu()
    )
    names = [*imported.inputs, *imported.tensors.values()]
    tensors = {n: tvm.runtime.tensor(_plain(values[n])) for n in names}
    out = machine["main"](*(tensors[n] for n in names))
    for name in imported.tensors.values():
        after = tensors[name].numpy()
        if not np.array_equal(after, _plain(values[name]), equal_nan=after.dtype.kind == "f"):
            values[name][...] = after
    outputs = [out] if hasattr(out, "numpy") else list(out)
    return [o.numpy() for o in outputs]


def _plain(array: Array) -> Array:
    return np.ascontiguousarray(array)


def _register_ops(module: Any) -> None:
    """Register each dialect call of a module as a packed function of the machine."""
    import tvm_ffi

    relax = _tvm.compiler().relax
    for block in module["main"].body.blocks:
        for binding in block.bindings:
            call = binding.value
            if getattr(getattr(call, "op", None), "name", "") != "relax.call_dps_packed":
                continue
            assert isinstance(call.args[0], relax.ExternFunc)
            target = str(call.args[0].global_symbol)
            function = _op_function(target.removeprefix(PREFIX))
            tvm_ffi.register_global_func(target, function, override=True)


def _op_function(text: str) -> Any:
    workload = parse_workload(text)
    op = get_op(workload.op)
    args = op.args(workload)
    given = [a for a in args if a.role != "output"]
    outs = [a for a in args if a.role == "output"]

    def run(*tensors: Any) -> None:
        arrays = [np.from_dlpack(t) for t in tensors]
        inputs = dict(zip([a.name for a in given], arrays, strict=False))
        results = op.reference(workload, {k: v.copy() for k, v in inputs.items()})
        for arg, array in zip(given, arrays, strict=False):
            if arg.mutated:
                np.copyto(array, results[arg.name], casting="same_kind")
        for arg, array in zip(outs, arrays[len(given) :], strict=True):
            np.copyto(array, results[arg.name].astype(arg.dtype))

    return run
