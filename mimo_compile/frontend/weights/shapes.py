"""A model of which nothing but its configuration is there: every tensor has a shape, and takes no memory.

What a model of this shape compiles to, how much memory that needs and how long its kernels are predicted to
take can so be known before there are weights, or without reading them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mimo_compile.errors import InputError
from mimo_compile.frontend.weights.checkpoint import Checkpoint, Entry, quantisation, read_json


class Shapes(Checkpoint):
    """Tensors of zeros, each of which holds a single number; `expect` says which there are.

    It is no storage format (`WEIGHT_FORMATS`): a user asks for it by ``--shapes-only``.
    """

    name: ClassVar[str] = "shapes"
    has_tensors: ClassVar[bool] = False

    @classmethod
    def open(cls, source: Path) -> Shapes:
        """Read the configuration of a model folder, and nothing else.

        Raises:
            InputError: there is none, or it says that matrices are stored quantised: in which formats is
                known of their files alone.
        """
        if not source.is_dir():
            raise InputError(
                f"{source.name} is no folder: shapes alone (--shapes-only) are read from its config.json",
                file=source,
                remedy="Give a folder with config.json, or leave out --shapes-only",
            )
        config = read_json(source / "config.json")
        if settings := quantisation(config):
            raise InputError(
                f"the matrices of this model are stored quantised ({settings.get('quant_method')}), in "
                "formats that only their files tell (--shapes-only)",
                file=source / "config.json",
                remedy="Leave out --shapes-only, or give the config.json of the model before, with --quant",
            )
        return cls(source, config)

    def __init__(self, source: Path, config: Mapping[str, Any]) -> None:
        """As every `Checkpoint`."""
        super().__init__(source, config)
        self._made: dict[str, Tensor] = {}

    def expect(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Have these tensors, by name, of the type that the configuration names; bfloat16 otherwise."""
        said = self.config.get("dtype", self.config.get("torch_dtype"))
        dtype = {"float32": "F32", "float16": "F16"}.get(str(said), "BF16")
        self.entries = {n: Entry(self.config_file, shape, dtype) for n, shape in shapes.items()}

    def read(self, name: str) -> Tensor:
        """Return zeros, the same ones each time: files that are mapped give one tensor once, too."""
        entry = self.entries[name]
        kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        if name not in self._made:
            self._made[name] = blank(entry.shape, kinds[entry.dtype])
        return self._made[name]


def blank(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return zeros that share one number in memory; of no other tensor, and of none that is a view."""
    one = torch.zeros(1, dtype=dtype).untyped_storage()
    return torch.empty(0, dtype=dtype).set_(one, 0, shape, (0,) * len(shape))
