"""A checkpoint as a GGUF file, for llama.cpp to run beside ours: the same weights in its own types.

The file is written with the package ``gguf`` in the checkpoint's own float type; llama.cpp itself then
quantises it, every matrix to one type ("pure"), the embedding and the output projection too.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mimo_compile.errors import MimoError, UsageError
from mimo_compile.frontend.models import get_family
from mimo_compile.frontend.models.build import EMBED, expected_tensors
from mimo_compile.frontend.models.decoder import DecoderConfig
from mimo_compile.frontend.models.family import Fields
from mimo_compile.frontend.weights import open_checkpoint
from mimo_compile.frontend.weights.checkpoint import Checkpoint

FAMILIES = ("llama", "qwen2", "qwen3")
"""Families that llama.cpp knows by the same name, with the same tensors."""
FILE_TYPES = {
    "F16": 1, "Q4_0": 2, "Q8_0": 7, "Q5_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 14, "Q5_K": 16,
    "Q6_K": 18, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37, "Q1_0": 40,
}  # fmt: skip
"""Storage type -> number of the file type whose matrices all have it, if it is pure."""
HEADS = {"Q8_0": 8}
"""Storage type of an output projection that differs from the other matrices -> its number.

A kind such as ``TQ2_0+Q8_0`` names both."""
_WRITER = 1
"""Raised when files of the same checkpoint come out differently."""
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Export:
    """A checkpoint that can be written as GGUF."""

    def __init__(self, source: Path) -> None:
        """Read configuration and headers.

        Raises:
            UsageError: llama.cpp has no such model, or none with these parts.
            InputError: the checkpoint is damaged.
        """
        self.checkpoint: Checkpoint = open_checkpoint(source)
        fields = Fields(self.checkpoint.config, self.checkpoint.config_file)
        self.family = str(fields.get("model_type"))
        if self.family not in FAMILIES:
            raise UsageError(
                f"runs no {self.family} model from files written here",
                remedy=f"Models of {', '.join(FAMILIES)} are compared",
            )
        if any(entry.fmt is not None for entry in self.checkpoint.entries.values()):
            raise UsageError("is compared on checkpoints of floats; this one is quantised")
        family = get_family(self.family, fields.file)
        self.config: DecoderConfig = family.configure(fields, self.checkpoint)
        if any(layer.rope_scaling or layer.window for layer in self.config.layers):
            raise UsageError("is compared without rotary scaling and sliding windows")
        self._names = expected_tensors(self.config, family, self.checkpoint)
        self.checkpoint.require(self._names)

    @property
    def widths(self) -> list[int]:
        """The K of all matrices, each once, ascending."""
        return sorted({shape[-1] for shape in self._names.values() if len(shape) == 2})

    @property
    def dtype(self) -> str:
        """What most matrices are stored as: ``F32``, ``F16`` or ``BF16``."""
        return self.checkpoint.entries[EMBED].dtype

    def key(self) -> str:
        """Return what the files of this checkpoint are told apart by."""
        files = sorted({entry.file for entry in self.checkpoint.entries.values()})
        facts: list[object] = [
            (str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files
        ]
        facts += [_WRITER, version("llama-cpp-python"), self.config]
        return f"{self.family}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:12]}"

    def write(self, path: Path) -> None:
        """Write the file in the checkpoint's float type, vectors in float32, tensor by tensor."""
        import gguf

        part = path.with_name(path.name + ".part")
        try:
            writer = gguf.GGUFWriter(part, self.family)
            self._describe(writer, gguf)
            names = gguf.get_tensor_name_map(
                gguf.MODEL_ARCH[self.family.upper()], len(self.config.layers)
            )
            kind = getattr(gguf.GGMLQuantizationType, self.dtype)
            size = 4 if self.dtype == "F32" else 2
            for name, shape in self._names.items():
                theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
                if theirs is None:
                    raise UsageError(f"has no tensor for {name}")
                raw, each = (kind, size) if len(shape) == 2 else (gguf.GGMLQuantizationType.F32, 4)
                nbytes = each * int(np.prod(shape))
                writer.add_tensor_info(theirs, shape, np.dtype(np.float32), nbytes, raw_dtype=raw)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for data in self._data():
                writer.write_tensor_data(data)
            writer.close()
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    def _describe(self, writer: Any, gguf: Any) -> None:
        """Write the configuration; token ids are all that is run, so there is no tokenizer."""
        config, layer = self.config, self.config.layers[0]
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        writer.add_vocab_size(config.vocab)
        writer.add_context_length(config.max_context)
        writer.add_embedding_length(config.hidden)
        writer.add_block_count(len(config.layers))
        writer.add_feed_forward_length(layer.ffn)
        writer.add_head_count(layer.heads)
        writer.add_head_count_kv(layer.kv_heads)
        writer.add_key_length(layer.d)
        writer.add_value_length(layer.dv)
        writer.add_rope_dimension_count(layer.rotary_dim)
        writer.add_rope_freq_base(layer.rope_theta)
        writer.add_layer_norm_rms_eps(config.eps)
        writer.add_tokenizer_model("none")

    def _data(self) -> Iterator[npt.NDArray[Any]]:
        layer = self.config.layers[0]
        for name, shape in self._names.items():
            tensor = self.checkpoint.tensor(name)
            if len(shape) == 1:
                yield tensor.to(torch.float32).numpy()
                continue
            tensor = tensor.to(_FLOATS[self.dtype])
            if self.family == "llama":  # qwen's rotary pairs lie as in the checkpoint
                for part, heads in (("q_proj", layer.heads), ("k_proj", layer.kv_heads)):
                    if f".{part}." in name:
                        tensor = paired(tensor, heads)
            if self.dtype == "BF16":
                tensor = tensor.contiguous().view(torch.int16)
            yield tensor.contiguous().numpy()


def paired(w: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of each head of a projection from halves to neighbouring pairs.

    Hugging Face rotates dimension i with i + d/2; llama.cpp's ``llama`` rotates 2i with 2i + 1.

    Args:
        w: [heads * d, K].
        heads: How many.
    """
    rows, columns = w.shape
    return w.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def quantised(source: Path, target: Path, kind: str, threads: int, *, tied: bool = False) -> None:
    """Let llama.cpp store all matrices of a float file in one type, the output projection perhaps in another.

    ``tied``: the embedding is the output projection.

    Raises:
        MimoError: it cannot.
    """
    import llama_cpp

    part = target.with_name(target.name + ".part")
    settings = llama_cpp.llama_model_quantize_default_params()
    body, _, head = kind.partition("+")
    settings.nthread, settings.ftype, settings.pure = threads, FILE_TYPES[body], True
    if head:
        settings.output_tensor_type = HEADS[head]
        if tied:
            settings.token_embedding_type = HEADS[head]
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, None)
    try:
        code = llama_cpp.llama_model_quantize(
            os.fsencode(source), os.fsencode(part), ctypes.byref(settings)
        )
        if code:
            raise MimoError(f"llama.cpp cannot store this model as {kind} (code {code})")
        os.replace(part, target)
    finally:
        llama_cpp.llama_log_set(llama_cpp.llama_log_callback(0), None)
        part.unlink(missing_ok=True)


def make_files(export: Export, kinds: list[str], folder: Path, threads: int) -> dict[str, Path]:
    """Return a file for each storage type, made now or found in the folder.

    Raises:
        MimoError: llama.cpp cannot quantise to a type.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {kind: folder / f"{export.key()}-{kind}.gguf" for kind in kinds}
    absent = [kind for kind in kinds if not paths[kind].exists()]
    plain = folder / f"{export.key()}-{export.dtype}.gguf"
    made = bool(absent) and not plain.exists()
    if made:
        export.write(plain)
    try:
        for kind in absent:
            if kind != export.dtype:
                quantised(plain, paths[kind], kind, threads, tied=export.config.tied)
    finally:
        if made and export.dtype not in kinds:
            plain.unlink(missing_ok=True)
    return paths
