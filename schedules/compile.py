"""Kernels to object code: the one place where LLVM runs, for search and pipeline alike."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mimo_compile.ir.hardware import Hardware
from mimo_compile.schedules.base import Kernel


def kernel_target(kernel: Kernel, hardware: Hardware) -> dict[str, Any]:
    """Return the dictionary of TVM's Target: the hardware's, then what the kernel adds."""
    return {**hardware.tvm_target(), **kernel.target}


def compile_kernel(kernel: Kernel, hardware: Hardware) -> bytes:
    """Compile one kernel; see `compile_kernels`."""
    return compile_kernels([kernel], hardware)


def compile_kernels(kernels: Sequence[Kernel], hardware: Hardware) -> bytes:
    """Compile kernels into one relocatable ELF object (no linker, no C compiler is used).

    LLVM may abort the process on code it cannot select: untried candidates belong in a child.

    Args:
        kernels: At least one; those named alike must be the same kernel and are compiled once.
        hardware: What to generate code for.

    Returns:
        The object file; `mimo_compile._tvm.load_object` links it and finds each kernel by its name.

    Raises:
        ValueError: No kernels, or kernels that want different target attributes (group them by
            `kernel_target` and compile each group by itself).
    """
    module = build_module(kernels, hardware)
    with tempfile.TemporaryDirectory(prefix="mimo-") as folder:
        path = Path(folder) / "kernels.o"
        module.write_to_file(str(path))
        return path.read_bytes()


def assembly(kernels: Sequence[Kernel], hardware: Hardware) -> str:
    """Return the assembly text of `compile_kernels` (for `inspect` and for tests)."""
    text: str = build_module(kernels, hardware).inspect_source("asm")
    return text


def build_module(kernels: Sequence[Kernel], hardware: Hardware) -> Any:
    """Run TVM and LLVM on kernels; returns TVM's module, not yet written or linked."""
    from mimo_compile._tvm import compiler, runtime

    tvm = compiler()
    targets = {_key(kernel_target(k, hardware)): kernel_target(k, hardware) for k in kernels}
    if len(targets) != 1:
        raise ValueError(f"one object, but {len(targets)} sets of target attributes: {targets}")
    functions = {kernel.name: kernel.func for kernel in kernels}
    for kernel in kernels:
        if not functions[kernel.name].same_as(kernel.func) and not runtime().structural_equal(
            functions[kernel.name], kernel.func
        ):
            raise ValueError(f"two different kernels are named {kernel.name}")
    module = tvm.IRModule(
        {name: func.with_attr("global_symbol", name) for name, func in functions.items()}
    )
    (target,) = targets.values()
    # it takes up to 40 % of the time, and leaves what was written by hand as it is, to the byte
    unneeded = [] if any(k.compact for k in kernels) else ["s_tir.CompactBufferAllocation"]
    with tvm.transform.PassContext(disabled_pass=unneeded):
        return tvm.compile(module, target=tvm.target.Target(target)).mod


def _key(target: dict[str, Any]) -> str:
    return repr(sorted(target.items(), key=lambda item: item[0]))
