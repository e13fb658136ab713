"""llama.cpp as a peer of whole models: the same weights in its own types, through its C interface."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mimo_compile.bench.models.entrant import Entrant, ModelAsk, warm
from mimo_compile.bench.peers.base import LeftOut
from mimo_compile.errors import MimoError
from mimo_compile.ir.formats import parse_scheme

_NEAR: tuple[tuple[float, tuple[str, ...]], ...] = (
    (1, ("Q1_0",)),
    (1.6, ("TQ1_0", "TQ2_0", "TQ2_0+Q8_0")),
    (2, ("TQ2_0", "TQ2_0+Q8_0", "Q2_K")),
    (3, ("Q3_K",)),
    (4, ("Q4_0", "Q4_K")),
    (5, ("Q5_0", "Q5_K")),
    (6, ("Q6_K",)),
    (8, ("Q8_0",)),
)
"""Storage types near a number of bits; the last one holds any more.

Below 4 bits ours keeps the output projection in 8: what stands after ``+`` is llama.cpp's type for it, where
not all matrices have one."""
_FLOATS = ("BF16", "F16")
_FALL_BACK = "Q4_0"
"""What llama.cpp itself stores a matrix in whose rows do not fit a ternary type."""
_BLOCK = {"Q4_0": 32, "Q5_0": 32, "Q8_0": 32, "BF16": 1, "F16": 1, "Q1_0": 128}
_SUPERBLOCK = 256
_BATCH = 512
"""Tokens of one pass of a prompt: llama.cpp's default."""


def entrants(ask: ModelAsk) -> Iterator[Entrant | LeftOut]:
    """Offer the checkpoint in each storage type near the bits of ours; writes the files."""
    from mimo_compile.bench.models.gguf_file import Export, make_files

    if ask.source is None:
        yield LeftOut("llama.cpp", "needs the checkpoint's folder", "give it with --source")
        return
    try:
        version("gguf")
    except PackageNotFoundError:
        pip = "pip install 'mimo-compile[peers]'"
        yield LeftOut("llama.cpp", "package gguf is not installed", pip)
        return
    try:
        export = Export(ask.source)
    except MimoError as error:
        yield LeftOut("llama.cpp", error.what, error.remedy)
        return
    kinds: list[str] = []
    for kind in kinds_near(ask.quant):
        block = _BLOCK.get(kind.partition("+")[0], _SUPERBLOCK)
        wrong = [k for k in export.widths if k % block]
        if wrong:
            yield LeftOut(f"llama.cpp {kind}", f"K={wrong[0]} is no multiple of {block}")
        else:
            kinds.append(kind)
    if not kinds and not any(k % _BLOCK[_FALL_BACK] for k in export.widths):
        kinds.append(_FALL_BACK)
    try:
        paths = make_files(export, kinds, ask.scratch, ask.threads)
    except MimoError as error:
        yield LeftOut("llama.cpp", error.what, error.remedy)
        return
    for kind, path in paths.items():
        arguments = {"path": str(path), "threads": ask.threads, "context": ask.context}
        impl = f"llama.cpp {kind} {version('llama-cpp-python')}"
        runner = f"{__name__}:LlamaRunner"
        yield Entrant(impl, runner, arguments, path.stat().st_size, "llama.cpp")


def kinds_near(quant: str) -> tuple[str, ...]:
    """Return the storage types that hold what `--quant` says with the fewest bits."""
    fmt = parse_scheme(quant).weight
    if fmt is None or fmt.is_float:
        return _FLOATS
    bits = fmt.bits_per_weight
    return next((kinds for most, kinds in _NEAR if most >= bits), _NEAR[-1][1])


class LlamaRunner:
    """Generates greedily with a GGUF file; weights are mapped, as llama.cpp does unless asked otherwise."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        """Import the library."""
        import llama_cpp

        self.path, self.threads, self.context = path, threads, context
        self._api: Any = llama_cpp
        self._model: Any = None
        self._run: Any = None
        self.vocab = 0

    def load(self) -> dict[str, float]:
        """Load the file and make a context for one sequence.

        Raises:
            MimoError: llama.cpp refuses the file.
        """
        warm([Path(self.path)])
        api, begin = self._api, time.perf_counter()
        api.llama_backend_init()
        settings = api.llama_model_default_params()
        settings.n_gpu_layers = 0
        settings.load_mode = api.LLAMA_LOAD_MODE_MMAP
        self._model = api.llama_model_load_from_file(self.path.encode(), settings)
        if not self._model:
            raise MimoError("llama.cpp cannot load the file", where=self.path)
        context = api.llama_context_default_params()
        context.n_ctx = -(-self.context // _SUPERBLOCK) * _SUPERBLOCK
        context.n_batch = context.n_ubatch = _BATCH
        context.n_threads = context.n_threads_batch = self.threads
        self._run = api.llama_init_from_model(self._model, context)
        if not self._run:
            raise MimoError("llama.cpp cannot make a context", where=self.path)
        self.vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        return {"load_s": time.perf_counter() - begin}

    def run(self, prompt: Sequence[int], new: int) -> dict[str, Any]:
        """Generate; see `Runner.run`."""
        api = self._api
        api.llama_memory_clear(api.llama_get_memory(self._run), True)
        begin = time.perf_counter()
        for at in range(0, len(prompt), _BATCH):
            self._append(prompt[at : at + _BATCH])
        token = self._best()
        first = time.perf_counter()
        for _ in range(new - 1):
            self._append([token])
            token = self._best()
        end = time.perf_counter()
        return {
            "prefill": len(prompt) / (first - begin),
            "decode": (new - 1) / (end - first) if new > 1 else None,
        }

    def logits(self, prompt: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the logits [n, vocab] after each token of a new sequence."""
        api, rows = self._api, []
        api.llama_memory_clear(api.llama_get_memory(self._run), True)
        for token in prompt:
            self._append([token])
            rows.append(self._logits().copy())
        return np.stack(rows)

    def _append(self, tokens: Sequence[int]) -> None:
        ids = (self._api.llama_token * len(tokens))(*tokens)
        code = self._api.llama_decode(self._run, self._api.llama_batch_get_one(ids, len(tokens)))
        if code:
            raise MimoError(f"llama_decode fails with code {code}")

    def _logits(self) -> npt.NDArray[np.float32]:
        found = self._api.llama_get_logits_ith(self._run, -1)
        values = ctypes.cast(found, ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(values, (self.vocab,))

    def _best(self) -> int:
        return int(self._logits().argmax())
