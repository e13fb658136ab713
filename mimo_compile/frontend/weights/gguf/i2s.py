"""Ternary I2_S tensors of bitnet.cpp in a GGUF file, two bits a weight and one scale a matrix.

The file does not say how its codes lie: that depends on the machine and build that wrote it, and the type's
number means something else in files of llama.cpp. So the model is a folder with the file (and the
tokenizer, if wanted) and a ``config.json`` with

    {"quantization_config": {"quant_method": "i2_s", "layout": "x86"}}

``x86``: 128 weights in 32 bytes, byte p holding p, p + 32, p + 64, p + 96 from its high bits down; ``arm``:
64 in 16 bytes likewise; ``rows``: 4 neighbouring rows in a byte (newer builds for x86). Codes 0, 1, 2 stand
for -1, 0, 1; a float32 scale follows the codes, filled up to 32 bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from mimo_compile.errors import InputError
from mimo_compile.frontend.weights.checkpoint import Entry, quantisation
from mimo_compile.frontend.weights.gguf.checkpoint import Gguf
from mimo_compile.frontend.weights.gguf.reader import Stored
from mimo_compile.ir.formats import QuantTensor, parse_weight_format

_TYPE, _TAIL = 36, 32
_BLOCKS = {"x86": 32, "arm": 16, "rows": 0}
"""Layout -> bytes of a block."""


class I2s(Gguf):
    """A folder with one GGUF file of bitnet.cpp and the settings above."""

    name = "i2_s"
    methods = ("i2_s",)
    activations = 8

    @classmethod
    def detect(cls, source: Path, config: Mapping[str, Any]) -> bool:
        """By ``quant_method``, as folders are."""
        return source.is_dir() and quantisation(config).get("quant_method") in cls.methods

    def __init__(self, source: Path, config: Mapping[str, Any]) -> None:
        """Find the file and read it.

        Raises:
            InputError: no or several files, a layout that is not known, or as for `Gguf`.
        """
        settings = quantisation(config)
        self.folder = source
        self._layout = settings.get("layout")
        if self._layout not in _BLOCKS:
            raise InputError(
                f"the layout of I2_S weights is {self._layout!r}",
                file=source / "config.json",
                remedy=f"State how the file was written: {', '.join(_BLOCKS)}",
            )
        files = sorted(source.glob("*.gguf"))
        if len(files) != 1:
            raise InputError(f"{len(files)} GGUF files in the folder, not one", file=source)
        super().__init__(files[0], config)

    def tokenizer_json(self) -> bytes | None:
        """Return the folder's tokenizer, else the file's."""
        path = self.folder / "tokenizer.json"
        return path.read_bytes() if path.is_file() else super().tokenizer_json()

    def _bytes(self, stored: Stored) -> int:
        if stored.kind != _TYPE:
            return super()._bytes(stored)
        if len(stored.shape) != 2:
            raise self.file.fail(f"{stored.name} is quantised and no matrix")
        n, k = stored.shape
        block = 4 * _BLOCKS[str(self._layout)]
        if (block and k % block) or (not block and n % 4):
            need = f"columns, no multiple of {block}" if block else "rows, no multiple of 4"
            raise self.file.fail(
                f"{stored.name} has {k if block else n} {need} (layout {self._layout})"
            )
        return n * k // 4 + _TAIL

    def _entry(self, name: str, stored: Stored) -> Entry:
        if stored.kind != _TYPE:
            return super()._entry(name, stored)
        fmt = parse_weight_format("w1.58")
        return Entry(self.file.path, stored.shape, fmt.name, fmt)

    def _matrix(self, name: str, stored: Stored) -> Tensor | QuantTensor:
        if stored.kind != _TYPE:
            return super()._matrix(name, stored)
        n, k = stored.shape
        raw = self.file.raw(stored, self._bytes(stored))
        codes = unpack(raw[: n * k // 4], n, k, _BLOCKS[str(self._layout)])
        if (codes > 2).any():
            raise self.file.fail(f"{stored.name}: the code 3 stands for no ternary weight")
        scale = raw[n * k // 4 :][:4].view("<f4")[0]
        if not np.isfinite(scale):
            raise self.file.fail(f"{stored.name}: its scale is not finite")
        return QuantTensor(parse_weight_format("w1.58"), codes, np.full((n, 1), scale, np.float32))


def unpack(raw: npt.NDArray[np.uint8], n: int, k: int, block: int) -> npt.NDArray[np.uint8]:
    """Return codes ``[N, K]`` of bytes in blocks of so many (0: of four rows to a byte)."""
    shifts = np.array([6, 4, 2, 0], np.uint8)[:, None]
    blocks = raw.reshape(-1, 1, block or k)
    return np.ascontiguousarray(((blocks >> shifts) & 3).reshape(n, k))
