"""Generic functions by their content: a workload names one, and this process knows what it stands for.

``tir:hash=h0123456789abcdef,name=softmax,out=f32.3x5x48``: the hash is of the function's structure, so
functions that differ in names alone are one workload, in any model and on any machine. Name and output are
there to be read. Looking records up needs the hash alone; building or verifying a kernel needs the function,
which comes from the model, or as text from another process.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from mimo_compile import _tvm
from mimo_compile.errors import InputError, UsageError
from mimo_compile.ir.workload import Workload

OP = "tir"
"""The op of workloads that name a function."""
_SHORT = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "bool": "b"}
_KNOWN: dict[str, Any] = {}
_SOURCES: list[Callable[[str], str | None]] = []


def short_dtype(dtype: str) -> str:
    """Return ``f32`` for ``float32``, and so on."""
    word = dtype.rstrip("0123456789")
    return _SHORT.get(word, word) + dtype[len(word) :]


def plain(func: Any) -> Any:
    """Return a function without what is not its content: its name, and how TVM came by it."""
    for name in ("global_symbol", "op_pattern"):
        func = func.without_attr(name)
    return func


def written(func: Any) -> list[Any]:
    """Return the parameters that a function writes, in order."""
    from tvm_ffi import structural_walk

    stores: set[int] = set()
    tvm = _tvm.compiler()
    structural_walk(func.body, (tvm.tirx.BufferStore, lambda s: stores.add(hash(s.buffer))))
    return [p for p in func.params if hash(p) in stores]


def workload_of(func: Any, name: str) -> Workload:
    """Return a function's workload, and remember the function.

    Args:
        func: A PrimFunc with static shapes.
        name: What to call it; numbers at its end do not count.
    """
    func = plain(func)
    digest = f"h{_tvm.runtime().structural_hash(func) & (2**64 - 1):016x}"
    word = re.sub(r"[^A-Za-z0-9_]", "_", str(name)).rstrip("0123456789_") or "function"
    outs = [
        ".".join([short_dtype(str(p.dtype)), "x".join(_extent(n) for n in p.shape) or "1"])
        for p in written(func)
    ]
    _KNOWN.setdefault(digest, func)
    out = re.sub(r"[^A-Za-z0-9_.+\-]", "_", "+".join(outs)) or "none"
    return Workload.make(OP, {"hash": digest, "name": word, "out": out})


def _extent(value: Any) -> str:
    number = getattr(value, "value", value)
    return str(number) if isinstance(number, int) else "n"


def is_function(workload: Workload) -> bool:
    """Say whether a workload names a function."""
    return workload.op == OP


def add_source(source: Callable[[str], str | None]) -> None:
    """Look for functions that are not known here: ``source`` takes a hash and returns a text, or None."""
    if source not in _SOURCES:
        _SOURCES.append(source)


def known(workload: Workload) -> bool:
    """Say whether a workload's function is at hand."""
    try:
        function_of(workload)
    except UsageError:
        return False
    return True


def function_of(workload: Workload) -> Any:
    """Return the function that a workload names.

    Raises:
        UsageError: it is not known here.
    """
    digest = workload.text("hash")
    for source in _SOURCES:
        if digest in _KNOWN:
            break
        if (text := source(digest)) is not None:
            learn(workload, text)
    if digest not in _KNOWN:
        raise UsageError(
            f"the function of {workload} is not known here",
            remedy="tune or compile the model that it comes from",
        )
    return _KNOWN[digest]


def text_of(workload: Workload) -> str:
    """Return a function as text (JSON), for another process or a later one.

    Raises:
        UsageError: it is not known here.
    """
    text: str = _tvm.compiler().ir.save_json(function_of(workload))
    return text


def learn(workload: Workload, text: str) -> None:
    """Remember a function that came as text.

    Raises:
        InputError: the text is none, or of another function.
    """
    digest = workload.text("hash")
    if digest in _KNOWN:
        return
    try:
        func = _tvm.compiler().ir.load_json(text)
        found = workload_of(func, workload.text("name")).text("hash")
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise InputError("this is not the text of a function", file=workload) from error
    if found != digest:
        raise InputError(f"this is the text of another function, {found}", file=workload)
