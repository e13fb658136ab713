"""Gates of SeerAttention-R: found in a checkpoint or a file of their own, checked against the model, read.

The tensors of a layer are ``model.layers.N.self_attn.attn_gate.attngate_linear_q.weight`` ``[KV, group * D,
G]`` (or ``[KV, group, D, G]``, as their authors store it), ``..._linear_k.weight`` ``[KV, 3 * D, G]`` and, of
gates with norms, ``attngate_qnorm.weight`` and ``attngate_knorm.weight`` ``[G]``. What blocks they were
trained for stands in ``config.json`` (``seerattn_gate_block_size``), or in ``gates`` of a file's metadata.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimo_compile.errors import ArtifactError, InputError, UsageError
from mimo_compile.frontend.models.attend import READY
from mimo_compile.frontend.models.decoder import DecoderConfig, LayerSpec
from mimo_compile.frontend.models.gated import GateWeights, rotated
from mimo_compile.frontend.weights.checkpoint import Checkpoint, Entry
from mimo_compile.frontend.weights.plain import read_header
from mimo_compile.ir.policies import AttentionPolicy
from mimo_compile.ir.policies.seer import Seer
from mimo_compile.runtime.program import GateFile
from mimo_compile.runtime.strict_json import decode

TENSOR = re.compile(r"model\.layers\.\d+\.self_attn\.attn_gate\..+")
"""Everything that belongs to gates, whatever it is."""
_Q, _K, _NORMS = "attngate_linear_q", "attngate_linear_k", ("attngate_qnorm", "attngate_knorm")
_FIXED = {
    "seerattn_use_rope": True, "seerattn_k_seq_pooling_type": "Kmaxminavg",
    "seerattn_q_head_pooling_type": "Qproj",
}  # fmt: skip
"""Fields of ``config.json`` and their only values that can be compiled."""


@dataclass(frozen=True)
class Gates:
    """Gates as their headers describe them."""

    policy: Seer
    """The one that was asked for, with the gates' own blocks and width."""
    entries: Mapping[str, Entry]
    checkpoint: Checkpoint | None
    """Where they are, unless in a file."""
    file: Path

    @property
    def record(self) -> GateFile | None:
        """Say which file they come from; None: from the checkpoint."""
        return None if self.checkpoint is not None else gate_record(self.file)

    def check(self, config: DecoderConfig) -> None:
        """Check names, types and shapes of all layers that choose; those of other layers are left unread.

        Raises:
            InputError: a tensor is missing, is another one than the model needs, or has no place in it.
        """
        known = {name for i, spec in enumerate(config.layers) for name in self._shapes(i, spec)}
        if odd := sorted(set(self.entries) - known):
            raise self._wrong(
                f"{odd[0]} belongs to no gate of this model of {len(config.layers)} layers"
            )
        for i, (spec, role) in enumerate(zip(config.layers, config.roles, strict=True)):
            if role.kind != "select":
                continue
            if not rotated(spec, self.policy.gate) or rotated(spec, self.policy.gate) % 2:
                raise self._wrong(
                    f"gates of width {self.policy.gate} would rotate {rotated(spec, self.policy.gate)} "
                    f"channels, as layer {i} rotates {spec.rotary_dim} of {spec.d}: not an even number"
                )
            for name, shapes in self._shapes(i, spec).items():
                entry = self.entries.get(name)
                if entry is None:
                    raise self._wrong(f"{name} is missing, which layer {i} needs")
                if entry.fmt is not None or entry.dtype not in ("F32", "BF16", "F16"):
                    raise self._wrong(f"{name} is stored as {entry.dtype}, not as floats")
                if entry.shape not in shapes:
                    wanted = " or ".join(str(list(shape)) for shape in shapes)
                    raise self._wrong(
                        f"{name} has shape {list(entry.shape)}, this model needs {wanted}"
                    )

    def _shapes(self, layer: int, spec: LayerSpec) -> dict[str, tuple[tuple[int, ...], ...]]:
        """Return the shapes that each tensor of a layer may have, by name."""
        kv, group, d, width = spec.kv_heads, spec.heads // spec.kv_heads, spec.d, self.policy.gate
        out: dict[str, tuple[tuple[int, ...], ...]] = {
            _name(layer, _Q): ((kv, group * d, width), (kv, group, d, width)),
            _name(layer, _K): ((kv, 3 * d, width),),
        }
        if any(_name(layer, norm) in self.entries for norm in _NORMS):
            out |= {_name(layer, norm): ((width,),) for norm in _NORMS}
        return out

    def of(self, stage: str, spec: LayerSpec) -> GateWeights:
        """Read the gate of a layer's stage (``layers.3``).

        Raises:
            InputError: it cannot be read, or holds what is no finite number.
        """
        layer = int(stage.rpartition(".")[2])
        found = {name: self._read(name) for name in self._shapes(layer, spec)}
        q, k = found[_name(layer, _Q)], found[_name(layer, _K)]
        norms = (found.get(_name(layer, norm)) for norm in _NORMS)
        q_norm, k_norm = (None if norm is None else norm.float() for norm in norms)
        return GateWeights(
            q.reshape(spec.kv_heads, -1, self.policy.gate).contiguous(),
            k.contiguous(),
            q_norm,
            k_norm,
        )

    def _read(self, name: str) -> Tensor:
        if self.checkpoint is not None:
            tensor = self.checkpoint.tensor(name)
        else:
            from safetensors import SafetensorError, safe_open

            try:
                with safe_open(self.file, framework="pt") as file:
                    tensor = file.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise self._wrong(f"{name} cannot be read: {error}") from error
        if not bool(torch.isfinite(tensor.float()).all()):
            raise self._wrong(f"{name} holds what is no finite number")
        return tensor if tensor.dtype == torch.bfloat16 else tensor.float()

    def _wrong(self, what: str) -> InputError:
        return InputError(
            what, file=self.file, remedy="Give gates that were trained for this model"
        )


def gate_record(file: Path) -> GateFile:
    """Return what an artifact says of a file of gates.

    Raises:
        InputError: the file is missing or cannot be read.
    """
    try:
        with file.open("rb") as opened:
            return GateFile(file.name, hashlib.file_digest(opened, "sha256").hexdigest())
    except OSError as error:
        raise InputError(
            f"the gates cannot be read: {error.strerror or error}", file=file,
            remedy="Give the file of gates that was compiled with (--gates)",
        ) from error  # fmt: skip


def find_gates(
    policy: AttentionPolicy | None, checkpoint: Checkpoint, file: str | os.PathLike[str] | None
) -> Gates | None:
    """Return the gates that a policy chooses by; None: it needs none.

    Args:
        policy: What was asked for.
        checkpoint: The model's, whose own gates are used where no file is given.
        file: Safetensors file of gates, or None.

    Raises:
        UsageError: there are none, a file is given to another policy, or they were trained for other blocks.
        InputError: the file is missing, damaged, or holds no gates of a kind that can be compiled.
    """
    if not isinstance(policy, Seer):
        if file is not None:
            raise UsageError(
                f"--gates {os.fspath(file)} goes with --attention seer, which chooses by gates",
                remedy="leave out --gates, or use --attention seer",
            )
        return None
    place = checkpoint.config_file if file is None else Path(file)
    if file is None:
        every, said = checkpoint.entries, _said_by_config(checkpoint)
    else:
        every, said = _file_entries(place), _said_by_file(place)
    entries = {name: entry for name, entry in every.items() if TENSOR.fullmatch(name)}
    widths = sorted({e.shape[-1] for name, e in entries.items() if f".{_Q}." in name and e.shape})
    if not widths and file is None:
        others = ", ".join(name for name in READY if name != "seer")
        raise UsageError(
            "--attention seer needs gates, which this model does not have",
            remedy=f"give a file of them by --gates FILE.safetensors, or use one of {others}",
        )
    if not widths:
        raise InputError(
            f"the file holds no gates (tensors {_name('N', _Q)} ...)", file=place,
            remedy="Give the gates that were trained for this model",
        )  # fmt: skip
    fitted = _fitted(policy, widths[0], said, place)
    return Gates(fitted, entries, checkpoint if file is None else None, place)


def _fitted(policy: Seer, width: int, block: int | None, place: Path) -> Seer:
    """Return a policy with the width and (where they are known) the blocks that gates were trained with.

    Raises:
        UsageError: others were asked for.
    """
    defaults = {field.name: field.default for field in fields(policy)}
    trained = {"gate": width, "block": block or policy.block}
    for name, value in trained.items():
        if getattr(policy, name) not in (value, defaults[name]):
            raise UsageError(
                f"--attention {policy}: the gates of {place} were trained with {name}={value}",
                remedy=f"leave out {name}=, or use {name}={value}",
            )
    return replace(policy, gate=width, block=trained["block"])


def _said_by_config(checkpoint: Checkpoint) -> int | None:
    """Return the blocks that ``config.json`` names, if any.

    Raises:
        InputError: it tells of gates of another kind.
    """
    for name, value in _FIXED.items():
        if (found := checkpoint.config.get(name, value)) != value:
            raise InputError(
                f"{name}={found!r}: only gates with {value!r} can be compiled",
                file=checkpoint.config_file,
            )
    block = checkpoint.config.get("seerattn_gate_block_size")
    return _block(block, "seerattn_gate_block_size", checkpoint.config_file)


def _said_by_file(file: Path) -> int | None:
    """Return the blocks that a file's metadata names, if any."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            text = (opened.metadata() or {}).get("gates", "{}")
        said = decode(text.encode(), "gates")
    except (SafetensorError, OSError, ArtifactError) as error:
        raise InputError(f"its metadata cannot be read: {error}", file=file) from error
    if not isinstance(said, dict):
        raise InputError(f"gates of its metadata must be a JSON object, found {said!r}", file=file)
    return _block(said.get("block"), "block of its metadata", file)


def _block(value: Any, what: str, file: Path) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"the {what} must be a number of tokens, found {value!r}", file=file)
    return value


def _file_entries(file: Path) -> dict[str, Entry]:
    """Read the header of a file of gates."""
    if file.suffix in (".pth", ".pt", ".bin"):
        raise InputError(
            "the file holds pickled tensors, which may run code when they are read", file=file,
            remedy="Save them as safetensors: "
            "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'gates.safetensors')",
        )  # fmt: skip
    return read_header(file)


def _name(layer: int | str, part: str) -> str:
    return f"model.layers.{layer}.self_attn.attn_gate.{part}.weight"
