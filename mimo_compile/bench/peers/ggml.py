"""The matrix multiplication of ggml, the library inside llama.cpp, through its C interface.

Only functions are called, but for the place of one pointer in `ggml_type_traits`; the struct of a thread
pool's settings is filled by the library itself. Written against the headers of ggml 0.25.
"""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
import sys
import weakref
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mimo_compile.errors import EnvironmentMismatch
from mimo_compile.ir.ops.base import Array

TYPES = {
    "F16": 1, "Q4_0": 2, "Q5_0": 6, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13,
    "Q6_K": 14, "TQ1_0": 34, "TQ2_0": 35, "Q1_0": 41, "Q2_0": 42,
}  # fmt: skip
"""Name -> number of a storage type."""
_F32 = 0
_MEGABYTE = 1 << 20
_POOL_SETTINGS = 4096
"""Bytes kept for the settings of a thread pool: more than the struct has (536)."""

_P, _I, _L, _S = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t

_LOG = ctypes.CFUNCTYPE(None, _I, ctypes.c_char_p, _P)


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", _S), ("mem_buffer", _P), ("no_alloc", ctypes.c_bool))


class _Traits(ctypes.Structure):
    _fields_ = (
        ("type_name", ctypes.c_char_p), ("block", _L), ("interleave", _L), ("type_size", _S),
        ("is_quantized", ctypes.c_bool), ("to_float", _P), ("from_float", _P),
    )  # fmt: skip


_BASE: dict[str, tuple[Any, list[Any]]] = {
    "ggml_init": (_P, [_InitParams]),
    "ggml_free": (None, [_P]),
    "ggml_new_tensor_2d": (_P, [_P, _I, _L, _L]),
    "ggml_mul_mat": (_P, [_P, _P, _P]),
    "ggml_new_graph": (_P, [_P]),
    "ggml_build_forward_expand": (None, [_P, _P]),
    "ggml_get_data": (_P, [_P]),
    "ggml_blck_size": (_L, [_I]),
    "ggml_type_size": (_S, [_I]),
    "ggml_type_name": (ctypes.c_char_p, [_I]),
    "ggml_row_size": (_S, [_I, _L]),
    "ggml_get_type_traits": (ctypes.POINTER(_Traits), [_I]),
    "ggml_log_set": (None, [_LOG, _P]),
    "ggml_quantize_chunk": (_S, [_I, _P, _P, _L, _L, _L, _P]),
    "ggml_threadpool_params_init": (None, [_P, _I]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_P, [_P, _P]),
    "ggml_backend_tensor_alloc": (_I, [_P, _P, _P]),
    "ggml_backend_tensor_set": (None, [_P, _P, _S, _S]),
    "ggml_backend_tensor_get": (None, [_P, _P, _S, _S]),
    "ggml_backend_buffer_free": (None, [_P]),
    "ggml_backend_buft_name": (ctypes.c_char_p, [_P]),
    "ggml_backend_graph_compute": (_I, [_P, _P]),
    "ggml_backend_reg_dev_get": (_P, [_P, _S]),
    "ggml_backend_reg_get_proc_address": (_P, [_P, ctypes.c_char_p]),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, [_P, _P]),
    "ggml_backend_cpu_buffer_type": (_P, []),
}
_CPU: dict[str, tuple[Any, list[Any]]] = {
    "ggml_backend_cpu_init": (_P, []),
    "ggml_backend_cpu_set_n_threads": (None, [_P, _I]),
    "ggml_backend_cpu_set_threadpool": (None, [_P, _P]),
    "ggml_backend_cpu_reg": (_P, []),
    "ggml_threadpool_new": (_P, [_P]),
}


class Ggml:
    """The library, its CPU backend, and the kinds of memory that it can keep weights in."""

    def __init__(self, folder: Path) -> None:
        """Load the library from the folder of its shared objects.

        Raises:
            EnvironmentMismatch: it is absent, or has not the functions that are used.
        """
        try:
            base = ctypes.CDLL(str(folder / "libggml-base.so"), ctypes.RTLD_GLOBAL)
            cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"), ctypes.RTLD_GLOBAL)
            self._call = {
                name: _bind(library, name, *signature)
                for library, table in ((base, _BASE), (cpu, _CPU))
                for name, signature in table.items()
            }
        except (OSError, AttributeError) as error:
            raise EnvironmentMismatch(
                f"the ggml library cannot be used: {error}",
                where=str(folder),
                remedy="Run: pip install 'mimo-compile[peers]'",
            ) from error
        self._silent = _LOG(
            lambda level, text, data: None
        )  # it reports each tensor that it lays out
        self("log_set", self._silent, None)
        self.backend = self("backend_cpu_init")
        registry = self("backend_cpu_reg")
        self.device = self("backend_reg_dev_get", registry, 0)
        self.memories: dict[str, int] = {"plain": self("backend_cpu_buffer_type")}
        extra = self("backend_reg_get_proc_address", registry, b"ggml_backend_dev_get_extra_bufts")
        if extra:
            kinds = ctypes.CFUNCTYPE(ctypes.POINTER(_P), _P)(extra)(self.device)
            at = 0
            while kinds and kinds[at]:
                name = self("backend_buft_name", kinds[at]).decode()
                self.memories[name.removeprefix("CPU_").lower()] = kinds[at]
                at += 1
        self._pools: dict[int, int] = {}

    def __call__(self, name: str, *arguments: Any) -> Any:
        """Call ``ggml_name``."""
        return self._call[f"ggml_{name}"](*arguments)

    def use_threads(self, threads: int) -> None:
        """Let the backend compute with a pool of as many threads."""
        if threads not in self._pools:
            settings = ctypes.create_string_buffer(_POOL_SETTINGS)
            self("threadpool_params_init", settings, threads)
            self._pools[threads] = self("threadpool_new", settings)
        self("backend_cpu_set_threadpool", self.backend, self._pools[threads])
        self("backend_cpu_set_n_threads", self.backend, threads)

    def bits(self, name: str) -> float:
        """Return the stored bits of one weight, scales included."""
        number = TYPES[name]
        return 8 * float(self("type_size", number)) / float(self("blck_size", number))

    def has(self, name: str) -> bool:
        """Return whether this build knows a storage type under the number it had when this was written."""
        found = self("type_name", TYPES[name])
        return found is not None and found.decode().upper() == name

    def block(self, name: str) -> int:
        """Return the columns of a block; a row must be a multiple of it."""
        return int(self("blck_size", TYPES[name]))

    def quantise(self, name: str, w: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        """Return the rows of ``w [N, K]`` in a storage type, uint8 [N, bytes]."""
        n, k = w.shape
        out = np.empty((n, self("row_size", TYPES[name], k)), np.uint8)
        self("quantize_chunk", TYPES[name], w.ctypes.data, out.ctypes.data, 0, n, k, None)
        return out

    def dequantise(self, name: str, rows: npt.NDArray[np.uint8], k: int) -> Array:
        """Return the real values of rows that `quantise` gave, float32 [rows, K]."""
        convert = ctypes.CFUNCTYPE(None, _P, _P, _L)(
            self("get_type_traits", TYPES[name]).contents.to_float
        )
        out = np.empty((len(rows), k), np.float32)
        for row, place in zip(np.ascontiguousarray(rows), out, strict=True):
            convert(row.ctypes.data, place.ctypes.data, k)
        return out


class Buffers:
    """x [M, K] and y [M, N], float32, which the multiplications of one contestant share."""

    def __init__(self, ggml: Ggml, x: npt.NDArray[np.float32], n: int) -> None:
        """Copy x."""
        self.ggml, self.shape = ggml, (x.shape[0], n)
        context = _context(ggml)
        self.x = ggml("new_tensor_2d", context, _F32, x.shape[1], x.shape[0])
        y = ggml("new_tensor_2d", context, _F32, n, x.shape[0])
        self.buffer = ggml("backend_alloc_ctx_tensors_from_buft", context, ggml.memories["plain"])
        rows = np.ascontiguousarray(x, np.float32)
        ggml("backend_tensor_set", self.x, rows.ctypes.data, 0, rows.nbytes)
        self.y, self._y = ggml("get_data", y), y
        weakref.finalize(self, _release, ggml, [self.buffer], [context])

    def result(self) -> Array:
        """Return y as it is now."""
        out = np.empty(self.shape, np.float32)
        self.ggml("backend_tensor_get", self._y, out.ctypes.data, 0, out.nbytes)
        return out


class Multiplication:
    """One graph ``y = x wᵀ`` over weights in memory of their own."""

    def __init__(
        self, buffers: Buffers, name: str, rows: npt.NDArray[np.uint8], k: int, memory: str
    ) -> None:
        """Copy quantised rows into a kind of memory, which may lay them out anew.

        Raises:
            ValueError: ggml has no kernel for this type in this memory.
        """
        ggml = self.ggml = buffers.ggml
        self.buffers = buffers
        inner, outer = _context(ggml), _context(ggml)
        w = ggml("new_tensor_2d", inner, TYPES[name], k, len(rows))
        buffer = ggml("backend_alloc_ctx_tensors_from_buft", inner, ggml.memories[memory])
        weakref.finalize(self, _release, ggml, [buffer], [inner, outer])
        y = ggml("mul_mat", outer, w, buffers.x)
        ggml("backend_tensor_alloc", buffers.buffer, y, buffers.y)
        if not ggml("backend_dev_supports_op", ggml.device, y):
            raise ValueError(f"no kernel for {name} in {memory} memory")
        ggml("backend_tensor_set", w, rows.ctypes.data, 0, rows.nbytes)
        self.graph = ggml("new_graph", outer)
        ggml("build_forward_expand", self.graph, y)

    def __call__(self) -> None:
        """Compute once."""
        self.ggml("backend_graph_compute", self.ggml.backend, self.graph)


def _bind(library: Any, name: str, result: Any, arguments: list[Any]) -> Callable[..., Any]:
    function = getattr(library, name)
    function.restype, function.argtypes = result, arguments
    found: Callable[..., Any] = function
    return found


def _context(ggml: Ggml) -> int:
    """Return memory for descriptions of tensors; their data lies elsewhere."""
    made: int = ggml("init", _InitParams(_MEGABYTE, None, True))
    return made


def _release(ggml: Ggml, buffers: list[int], contexts: list[int]) -> None:
    for buffer in buffers:
        if buffer:
            ggml("backend_buffer_free", buffer)
    for context in contexts:
        ggml("free", context)


@cache
def load() -> Ggml:
    """Return the library of the installed llama-cpp-python, loaded once.

    Raises:
        EnvironmentMismatch: it cannot be used.
    """
    return Ggml(library_folder())


def library_folder() -> Path:
    """Return where the installed llama-cpp-python has its libraries."""
    spec = find_spec("llama_cpp")  # not imported: that loads models' code too
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(places[0] if places else ".") / "lib"


@cache
def survives(memory: str) -> bool:
    """Return whether multiplications of one and many rows in a kind of memory end without a crash.

    They run in a process of their own: the tile kernels of a library that gcc 12 built die of an illegal
    instruction, and would take all measurements with them.
    """
    command = [sys.executable, "-m", __name__, memory]
    done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    return done.returncode == 0


def _try(memory: str) -> None:
    ggml = load()
    ggml.use_threads(1)
    w = np.ones((64, 256), np.float32)
    for name in TYPES:
        if not ggml.has(name):
            continue
        for tokens in (1, 32):
            buffers = Buffers(ggml, np.ones((tokens, 256), np.float32), 64)
            with contextlib.suppress(ValueError):  # no kernel for this type
                Multiplication(buffers, name, ggml.quantise(name, w), 256, memory)()


if __name__ == "__main__":
    _try(sys.argv[1])
