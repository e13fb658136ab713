"""Gates of SeerAttention-R: found in a checkpoint or a file of their own, checked against the model, read.

The tensors of a layer are ``model.layers.N.self_attn.attn_gate.attngate_linear_q.weight`` ``[KV, group * D,
G]`` (or ``[KV, group, D, G]``, as their authors store it), ``..._linear_k.weight`` ``[KV, 3 * D, G]`` and, of
gates with norms, ``attngate_qnorm.weight`` and ``attngate_knorm.weight`` ``[G]``. What blocks they were
trained for stands in ``config.json`` (``seerattn_gate_block_size``), or in ``gates`` of a file's metadata.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from mimo_compile.errors import InputError, UsageError
from mimo_compile.frontend.models.attend import READY
from mimo_compile.frontend.models.decoder import LayerSpec
from mimo_compile.frontend.models.gated import GateWeights, rotated
from mimo_compile.frontend.trained import Shapes, Trained, asked, file_entries, file_says, positive
from mimo_compile.frontend.weights.checkpoint import Checkpoint
from mimo_compile.ir.policies.seer import Seer

TENSOR = re.compile(r"model\.layers\.\d+\.self_attn\.attn_gate\..+")
"""Everything that belongs to gates, whatever it is."""
_Q, _K, _NORMS = "attngate_linear_q", "attngate_linear_k", ("attngate_qnorm", "attngate_knorm")
_FIXED = {
    "seerattn_use_rope": True, "seerattn_k_seq_pooling_type": "Kmaxminavg",
    "seerattn_q_head_pooling_type": "Qproj",
}  # fmt: skip
"""Fields of ``config.json`` and their only values that can be compiled."""


@dataclass(frozen=True)
class Gates(Trained):
    """Gates as their headers describe them."""

    policy: Seer
    what: ClassVar[str] = "gate"

    def unfit(self, spec: LayerSpec) -> str:
        """Rotated channels come in pairs."""
        turned = rotated(spec, self.policy.gate)
        if turned and turned % 2 == 0:
            return ""
        return (
            f"gates of width {self.policy.gate} would rotate {turned} channels, not an even number, "
            f"as the layer rotates {spec.rotary_dim} of {spec.d}"
        )

    def shapes(self, layer: int, spec: LayerSpec, hidden: int) -> Shapes:
        """Return the shapes that each tensor of a layer may have, by name."""
        kv, group, d, width = spec.kv_heads, spec.heads // spec.kv_heads, spec.d, self.policy.gate
        out: Shapes = {
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
        found = {name: self.read(name) for name in self.shapes(layer, spec, 0)}
        q, k = found[_name(layer, _Q)], found[_name(layer, _K)]
        norms = (found.get(_name(layer, norm)) for norm in _NORMS)
        q_norm, k_norm = (None if norm is None else norm.float() for norm in norms)
        return GateWeights(
            q.reshape(spec.kv_heads, -1, self.policy.gate).contiguous(),
            k.contiguous(),
            q_norm,
            k_norm,
        )


def find_gates(policy: Seer, checkpoint: Checkpoint, file: Path | None) -> Gates:
    """Return the gates that a policy chooses by.

    Args:
        policy: What was asked for.
        checkpoint: The model's, whose own gates are used where no file is given.
        file: Safetensors file of gates, or None.

    Raises:
        UsageError: there are none, or they were trained for other blocks.
        InputError: the file is missing, damaged, or holds no gates of a kind that can be compiled.
    """
    place = checkpoint.config_file if file is None else file
    if file is None:
        every, said = checkpoint.entries, _said_by_config(checkpoint)
    else:
        every = file_entries(place)
        said = positive(file_says(place, "gates").get("block"), "block of its metadata", place)
    entries = {name: entry for name, entry in every.items() if TENSOR.fullmatch(name)}
    widths = sorted({e.shape[-1] for name, e in entries.items() if f".{_Q}." in name and e.shape})
    if not widths and file is None:
        others = ", ".join(name for name in READY if name not in ("seer", "dsa"))
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
    return Gates(entries, checkpoint if file is None else None, place, fitted)


def _fitted(policy: Seer, width: int, block: int | None, place: Path) -> Seer:
    """Return a policy with the width and (where they are known) the blocks that gates were trained with.

    Raises:
        UsageError: others were asked for.
    """
    trained = {"gate": width, "block": block or policy.block}
    for name, value in trained.items():
        if name in asked(policy) and getattr(policy, name) != value:
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
    return positive(block, "seerattn_gate_block_size", checkpoint.config_file)


def _name(layer: int | str, part: str) -> str:
    return f"model.layers.{layer}.self_attn.attn_gate.{part}.weight"
