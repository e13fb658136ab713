"""Generic functions by their content: a workload names one, and this process knows what it stands for.

``tir:hash=h0123456789abcdef,does=max_map_sum_map,out=f32.3x5x48``: the hash is of the function's structure,
so functions that differ in names alone are one workload, in any model and on any machine. The rest follows
from the function too (`canonical`), and is there to be read. Looking records up needs a workload's text
alone; building or verifying a kernel needs the function, which comes from the model, or as text from another
process.
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
LONGEST = 6
"""Blocks that a workload's name tells of."""
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


def kinds_of(func: Any) -> str:
    """Return what a function's blocks do, in order and each run once: ``max_map_sum_map`` is a softmax."""
    from tvm_ffi import structural_walk

    found: list[Any] = []
    structural_walk(func.body, (_tvm.compiler().s_tir.SBlock, found.append))
    kinds: list[str] = []
    for block in found:
        if block.iter_vars and (not kinds or kinds[-1] != _kind(block)):
            kinds.append(_kind(block))
    word = "_".join(kinds[:LONGEST]) or "whole"
    return word if len(kinds) <= LONGEST else f"{word}_more"


def _kind(block: Any) -> str:
    if not any(int(v.iter_type) == 2 for v in block.iter_vars):
        return "map"
    value = getattr(block.body, "value", None)
    kind = type(value).__name__
    if value is not None and kind in ("Add", "Max", "Min"):
        terms = {type(value.a).__name__, type(value.b).__name__}
        return "dot" if kind == "Add" and "Mul" in terms else {"Add": "sum"}.get(kind, kind.lower())
    return "fold"


def workload_of(func: Any) -> Workload:
    """Return a function's workload, and remember the function.

    Args:
        func: A PrimFunc with static shapes.
    """
    func = plain(func)
    digest = f"h{_tvm.runtime().structural_hash(func) & (2**64 - 1):016x}"
    outs = [
        ".".join([short_dtype(str(p.dtype)), "x".join(_extent(n) for n in p.shape) or "1"])
        for p in written(func)
    ]
    _KNOWN.setdefault(digest, func)
    out = re.sub(r"[^A-Za-z0-9_.+\-]", "_", "+".join(outs)) or "none"
    return Workload.make(OP, {"hash": digest, "does": kinds_of(func), "out": out})


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


def canonical(workload: Workload) -> Workload:
    """Return a workload with what follows from its hash put right, where its function is at hand."""
    return workload_of(function_of(workload)) if known(workload) else workload


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
        found = hash_of(text)
    except ValueError as error:
        raise InputError(str(error), file=workload) from error
    if found != digest:
        raise InputError(f"this is the text of another function, {found}", file=workload)


def hash_of(text: str) -> str:
    """Remember the function that a text is of, and return its hash.

    Raises:
        ValueError: the text is none.
    """
    try:
        return workload_of(_tvm.compiler().ir.load_json(text)).text("hash")
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise ValueError("this is not the text of a function") from error
