"""Small safetensors files that a run reads and writes by itself, without the package."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mimo_compile.errors import ArtifactError, InputError
from mimo_compile.runtime import dtypes, strict_json

MOST_BYTES = 1 << 32
"""Longer files are refused before they are read."""


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, npt.NDArray[Any]],
    metadata: Mapping[str, str],
) -> None:
    """Write tensors and texts; the same input gives the same bytes.

    Raises:
        OSError: The file cannot be written; what was there before is as it was.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name, tensor in tensors.items():
        size = tensor.size * tensor.itemsize
        header[name] = {
            "dtype": dtypes.to_safetensors(tensor.dtype.name),
            "shape": list(tensor.shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    target = Path(path)
    beside = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        with beside.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors.values():
                file.write(np.ascontiguousarray(tensor).tobytes())
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str]]:
    """Return the tensors by name, and the texts of the metadata.

    Raises:
        InputError: The file cannot be read, is too long, or is no sound safetensors file.
    """
    try:
        with Path(path).open("rb") as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode) or facts.st_size > MOST_BYTES:
                raise InputError(f"it is no regular file of at most {MOST_BYTES} bytes", file=path)
            data = file.read()
    except OSError as error:
        raise InputError(f"it cannot be read: {error.strerror or error}", file=path) from error
    start = 8 + int.from_bytes(data[:8], "little")
    if not 10 <= start <= len(data):
        raise InputError("it is no safetensors file: its header does not fit", file=path)
    try:
        header = strict_json.decode(data[8:start], os.fspath(path))
    except ArtifactError as error:
        raise InputError(f"its safetensors header is {error.what}", file=path) from error
    if not isinstance(header, dict):
        raise InputError("its safetensors header is no object", file=path)
    texts = header.pop("__metadata__", {})
    if not isinstance(texts, dict) or not all(isinstance(t, str) for t in texts.values()):
        raise InputError("the metadata of its header is no object of texts", file=path)
    return {name: _tensor(data, start, name, fact, path) for name, fact in header.items()}, texts


def _tensor(data: bytes, start: int, name: str, fact: Any, path: object) -> npt.NDArray[Any]:
    """Return one tensor, checked against the bytes that there are."""
    try:
        dtype = dtypes.from_safetensors(fact["dtype"])
        shape = [int(n) for n in fact["shape"]]
        begin, end = (int(n) for n in fact["data_offsets"])
        if dtype is None or min([0, *shape]) < 0 or len(shape) > 16:
            raise ValueError
        size = dtypes.size(dtype, tuple(shape))
        if not 0 <= begin <= end <= len(data) - start or end - begin != size:
            raise ValueError
        kind = dtypes.numpy_dtype(dtype)
        out: npt.NDArray[Any] = np.frombuffer(data[start + begin : start + end], kind)
        return out.reshape(shape)
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise InputError(
            f"tensor {name[:80]!r} is of an unknown type, or not where its header says", file=path
        ) from error
