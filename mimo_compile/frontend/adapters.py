"""Low-rank adapters in PEFT's format: read, checked against the model, attached to a decoder's matrices.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors`` with, for each adapted module, the
tensors ``base_model.model.<module>.lora_A.weight [r, K]`` and ``lora_B.weight [N, r]``. The model's own
weights are never changed: several adapters share them, and each request chooses one.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mimo_compile.errors import InputError, UsageError
from mimo_compile.frontend.models import get_family
from mimo_compile.frontend.models.build import prefixes
from mimo_compile.frontend.models.family import Fields, Names
from mimo_compile.frontend.models.stage import Stage
from mimo_compile.frontend.models.stages import LayerCore, QuantLinear
from mimo_compile.frontend.weights import open_checkpoint
from mimo_compile.frontend.weights.checkpoint import Checkpoint, read_json

if TYPE_CHECKING:
    from mimo_compile.frontend.huggingface import LoadedModel

FORMATS = ("exact", "bf16", "fp8")
"""How adapters may be stored: as they are (bf16 where that loses nothing, else f32), or rounded."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z")
_TENSOR = re.compile(
    r"base_model\.model\.(?P<module>[\w.]+)\.lora_(?P<side>[AB])(?:\.default)?\.weight"
)
_PLACES = {
    "attention.qkv": ("q", "k", "v"), "attention.o": ("o",),
    "feed.gate_up": ("gate", "up"), "feed.down": ("down",),
}  # fmt: skip
"""Matrix of a layer's stage -> what it is made of, by key in `Names`."""
_E4M3_MAX = 448.0


@dataclass(frozen=True)
class LowRank:
    """One adapted module: ``gain * b @ a`` is added to its matrix."""

    a: Tensor
    """``[r, K]``."""
    b: Tensor
    """``[N, r]``."""
    gain: float
    """alpha / r, or alpha / sqrt(r) for rank-stabilised adapters."""


@dataclass(frozen=True)
class Adapter:
    """One adapter folder."""

    name: str
    folder: Path
    modules: dict[str, LowRank]
    """By the name of the adapted module in the model, such as ``model.layers.0.self_attn.q_proj``."""


def load_adapter(name: str, folder: str | os.PathLike[str]) -> Adapter:
    """Read one folder.

    Raises:
        UsageError: the name cannot be one.
        InputError: a file is missing, damaged, or asks for what plain LoRA is not; it is named.
    """
    if not _NAME.match(name):
        raise UsageError(
            f"{name!r} cannot be an adapter's name",
            remedy="use letters, digits, - _ and ., at most 64 of them",
        )
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"adapter {name}: there is no such folder", file=folder)
    config = Settings(read_json(folder / "adapter_config.json"), folder / "adapter_config.json")
    config.check()
    file = folder / "adapter_model.safetensors"
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in _tensors(file).items():
        match = _TENSOR.fullmatch(key)
        if match is None:
            raise InputError(
                f"{key} is no matrix of a plain LoRA adapter", file=file,
                remedy="Matrices are called base_model.model.<module>.lora_A.weight and lora_B.weight",
            )  # fmt: skip
        pairs.setdefault(match["module"], {})[match["side"]] = tensor
    if not pairs:
        raise InputError("the adapter holds no matrices", file=file)
    modules = {}
    for module, sides in sorted(pairs.items()):
        if len(sides) < 2:
            there = next(iter(sides))
            raise InputError(f"{module} has lora_{there} but not the other matrix", file=file)
        modules[module] = _low_rank(module, sides["A"], sides["B"], config, file)
    return Adapter(name, folder, modules)


def _low_rank(module: str, a: Tensor, b: Tensor, config: Settings, file: Path) -> LowRank:
    r = config.rank(module)
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise InputError(
            f"{module}: lora_A {list(a.shape)} and lora_B {list(b.shape)} do not belong together",
            file=file,
        )
    if a.shape[0] != r:
        raise InputError(
            f"{module} has rank {a.shape[0]}, adapter_config.json says {r}", file=file,
            remedy="Set r or rank_pattern in adapter_config.json as the adapter was trained",
        )  # fmt: skip
    for side, tensor in (("A", a), ("B", b)):
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor.float()).all()):
            raise InputError(f"{module}: lora_{side} holds what is no finite number", file=file)
    return LowRank(a.contiguous(), b.contiguous(), config.gain(module))


def _tensors(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        pickled = file.with_name("adapter_model.bin")
        remedy = "Save the adapter as safetensors: .bin files may run code when they are read"
        raise InputError(
            f"{file.name} is missing", file=file, remedy=remedy if pickled.exists() else ""
        )
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise InputError(f"the adapter cannot be read: {error}", file=file) from error


@dataclass(frozen=True)
class Settings:
    """An ``adapter_config.json``."""

    raw: Mapping[str, Any]
    file: Path

    def check(self) -> None:
        """Refuse whatever is not plain LoRA over an unchanged model.

        Raises:
            InputError: names the field.
        """
        kind = self.raw.get("peft_type")
        if kind != "LORA":
            raise InputError(f"peft_type is {kind!r}: only LORA is supported", file=self.file)
        plain = {"bias": ("none",)}
        absent = (
            "use_dora", "fan_in_fan_out", "modules_to_save", "lora_bias", "layer_replication",
            "megatron_config", "trainable_token_indices", "alora_invocation_tokens", "use_qalora",
            "target_parameters", "arrow_config",
        )  # fmt: skip
        for field in ("bias", *absent):
            value = self.raw.get(field)
            if value and value not in plain.get(field, ()):
                raise InputError(
                    f"{field}={json.dumps(value)} is not supported", file=self.file,
                    remedy="Adapters are plain LoRA: two matrices a module, no biases or magnitudes",
                )  # fmt: skip
        start = self.raw.get("init_lora_weights", True)
        if isinstance(start, str) and start.split("_")[0] in ("pissa", "olora", "corda", "loftq"):
            raise InputError(
                f"init_lora_weights={start!r} means an adapter of other base weights",
                file=self.file,
                remedy="Convert it: save_pretrained(path_initial_model_for_weight_conversion=...)",
            )
        if not isinstance(self.raw.get("use_rslora", False), bool):
            raise InputError("use_rslora must be true or false", file=self.file)
        for field in ("rank_pattern", "alpha_pattern"):
            if not isinstance(self.raw.get(field) or {}, dict):
                raise InputError(f"{field} must be an object", file=self.file)

    def rank(self, module: str) -> int:
        """Return the rank of a module."""
        value = self._for(module, "rank_pattern", "r")
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= 4096:
            raise InputError(f"the rank {value!r} is no number from 1 to 4096", file=self.file)
        return value

    def gain(self, module: str) -> float:
        """Return what the product of a module's matrices is multiplied by."""
        alpha = self._for(module, "alpha_pattern", "lora_alpha")
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) < 1e30:
            raise InputError(f"lora_alpha={alpha!r} is no number", file=self.file)
        r = self.rank(module)
        return float(alpha) / (r**0.5 if self.raw.get("use_rslora") else r)

    def _for(self, module: str, patterns: str, default: str) -> Any:
        """Look a value up as PEFT does: the first pattern that the module's name ends with."""
        for pattern, value in (self.raw.get(patterns) or {}).items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return value
            except re.error as error:
                raise InputError(
                    f"{patterns}: {pattern!r} is no pattern: {error}", file=self.file
                ) from error
        if default not in self.raw:
            raise InputError(f"{default} is missing", file=self.file)
        return self.raw[default]


def attach_adapters(
    loaded: LoadedModel, folders: Mapping[str, str | os.PathLike[str]], storage: str = "exact"
) -> None:
    """Attach adapters to a loaded model, whose decoder then has one more input: which of them.

    Args:
        loaded: The model; its decoder's stages are replaced.
        folders: Name -> folder, in the order of the numbers that they get.
        storage: One of `FORMATS`.

    Raises:
        UsageError: a name or the storage is wrong.
        InputError: a folder is wrong, or does not fit the model.
    """
    if storage not in FORMATS:
        raise UsageError(
            f"adapters cannot be stored as {storage!r}", remedy=f"use {', '.join(FORMATS)}"
        )
    adapters = [load_adapter(name, folder) for name, folder in folders.items()]
    decoder = loaded.decoder
    checkpoint = open_checkpoint(loaded.source)
    fields = Fields(checkpoint.config, checkpoint.config_file)
    family = get_family(fields.get("model_type"), fields.file)
    layers = [entry for entry in prefixes(decoder.config) if entry[0].startswith("layers.")]
    names = {n: family.layer_names(spec, prefix, checkpoint) for n, prefix, spec in layers}
    _check_modules(adapters, names, checkpoint)
    if storage == "exact":
        every = [t for ad in adapters for low in ad.modules.values() for t in (low.a, low.b)]
        storage = "bf16" if all(_fits_bf16(t) for t in every) else "f32"
    kinds: dict[str, str] = {}
    stages = [
        stage
        if stage.name not in names
        else _adapted(stage, names[stage.name], checkpoint, adapters, storage, kinds)
        for stage in decoder.stages()
    ]
    loaded.decoder.replace_stages(stages, tuple(adapter.name for adapter in adapters))


def _check_modules(
    adapters: list[Adapter], names: Mapping[str, Names], checkpoint: Checkpoint
) -> None:
    """Refuse adapters of modules that are not there, cannot have one, or have another shape."""
    known = {key for keys in _PLACES.values() for key in keys}
    places = {
        tensor.removesuffix(".weight")
        for layer in names.values() for key, tensor in layer.items() if key in known
    }  # fmt: skip
    for adapter in adapters:
        for module, low in adapter.modules.items():
            entry = checkpoint.entries.get(f"{module}.weight")
            file = adapter.folder / "adapter_model.safetensors"
            if module not in places:
                what = "cannot have one here" if entry else "the model does not have"
                raise InputError(
                    f"adapter {adapter.name} is for {module}, which {what}", file=file,
                    remedy="Modules with adapters: attention's q, k, v and o, a dense block's gate, "
                    "up and down",
                )  # fmt: skip
            assert entry is not None
            wanted = low.b.shape[0], low.a.shape[1]
            if entry.shape != wanted:
                raise InputError(
                    f"adapter {adapter.name}: {module} is {list(entry.shape)} in the model, the "
                    f"adapter is for {list(wanted)}", file=file,
                )  # fmt: skip


def _adapted(
    stage: Stage,
    names: Names,
    checkpoint: Checkpoint,
    adapters: list[Adapter],
    storage: str,
    kinds: dict[str, str],
) -> Stage:
    """Attach what adapters have for a layer; a layer that none of them knows stays as it is."""
    module = stage.module
    assert isinstance(module, LayerCore)
    for path, keys in _PLACES.items():
        if not all(key in names for key in keys):
            continue
        parts = [names[key].removesuffix(".weight") for key in keys]
        table = [[adapter.modules.get(part) for part in parts] for adapter in adapters]
        if any(low is not None for row in table for low in row):
            linear = module.get_submodule(path)
            assert isinstance(linear, QuantLinear)
            attach(
                linear, table, [checkpoint.entries[names[key]].shape[0] for key in keys], storage
            )
    lora = [linear.lora_kind for linear in module.modules() if isinstance(linear, QuantLinear)]
    if not any(lora):
        return stage
    key = f"{stage.kind} {lora}"
    kinds.setdefault(key, f"{stage.kind}.lora{len(kinds)}")
    return replace(stage, kind=kinds[key], inputs=(*stage.inputs, "adapter"))


def attach(
    linear: QuantLinear, table: list[list[LowRank | None]], rows: list[int], storage: str
) -> None:
    """Put adapters on one matrix.

    Args:
        linear: The matrix, which may be several on top of each other.
        table: ``[adapters][parts]``; None where an adapter leaves a part alone.
        rows: Rows of each part.
        storage: ``f32``, ``bf16`` or ``fp8``.
    """
    some = next(low for row in table for low in row if low is not None)
    k = some.a.shape[1]
    r = max(low.a.shape[0] for row in table for low in row if low is not None)
    count, parts = len(table), len(rows)
    a, b = torch.zeros(count, parts, r, k), torch.zeros(count, sum(rows), r)
    gain = torch.zeros(count, parts)
    for i, row in enumerate(table):
        at = 0
        for p, low in enumerate(row):
            if low is not None:
                own, factor = low.a.shape[0], low.gain
                values_a, values_b = low.a.float(), low.b.float()
                if storage == "fp8":
                    values_a, scale_a = _to_e4m3(values_a)
                    values_b, scale_b = _to_e4m3(values_b)
                    factor *= scale_a * scale_b
                a[i, p, :own] = values_a
                b[i, at : at + rows[p], :own] = values_b
                gain[i, p] = factor
            at += rows[p]
    a = a.reshape(count, parts * r, k)
    if linear.perm is not None:  # the matrix takes its columns in another order
        a = a[..., linear.perm]
    spelled = "+".join(map(str, rows)) if parts > 1 else ""
    linear.set_adapters(_stored(a, storage), _stored(b, storage), gain, spelled)


def _to_e4m3(values: Tensor) -> tuple[Tensor, float]:
    """Return values over a scale that makes the largest 448, and the scale."""
    scale = float(values.abs().max()) / _E4M3_MAX
    return (values / scale, scale) if scale > 0 else (values, 1.0)


def _stored(values: Tensor, storage: str) -> Tensor:
    if storage == "fp8":
        limited = values.clamp(-_E4M3_MAX, _E4M3_MAX)
        return limited.to(torch.float8_e4m3fn).view(torch.uint8).contiguous()
    return values.to(torch.bfloat16 if storage == "bf16" else torch.float32).contiguous()


def _fits_bf16(values: Tensor) -> bool:
    return bool((values.to(torch.bfloat16).double() == values.double()).all())
