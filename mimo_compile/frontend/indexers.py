"""Indexers of DSA (DeepSeek-V3.2): found in a checkpoint or a file, checked against the model, read.

The tensors of a layer, J heads of width W, under ``model.layers.N.self_attn.indexer.``: ``wq.weight`` ``[J *
W, hidden]``, ``wk.weight`` ``[W, hidden]``, ``weights_proj.weight`` ``[J, hidden]``, all of which read the
layer's normed input, and the norm of keys, ``k_norm.weight`` and ``k_norm.bias`` ``[W]``. How many tokens the
model was trained to attend to stands in ``config.json`` (``index_topk``), or in ``indexer`` of a file's
metadata (``k``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch

from mimo_compile.errors import InputError, UsageError
from mimo_compile.frontend.gates import find_gates
from mimo_compile.frontend.models.attend import READY
from mimo_compile.frontend.models.decoder import LayerSpec
from mimo_compile.frontend.models.indexed import IndexWeights
from mimo_compile.frontend.trained import Shapes, Trained, asked, file_entries, file_says, positive
from mimo_compile.frontend.weights.checkpoint import Checkpoint, Entry
from mimo_compile.ir.policies import AttentionPolicy
from mimo_compile.ir.policies.dsa import Dsa
from mimo_compile.ir.policies.seer import Seer

TENSOR = re.compile(r"model\.layers\.\d+\.self_attn\.indexer\..+")
"""Everything that belongs to indexers, whatever it is."""
_MATRICES = ("wq.weight", "wk.weight", "weights_proj.weight")
_NORM = ("k_norm.weight", "k_norm.bias")


@dataclass(frozen=True)
class Indexers(Trained):
    """Indexers as their headers describe them."""

    policy: Dsa
    what: ClassVar[str] = "indexer"

    def unfit(self, spec: LayerSpec) -> str:
        """An indexer turns as many channels as the layer does, by the same angles."""
        if self.policy.width >= spec.rotary_dim:
            return ""
        return (
            f"an indexer of width {self.policy.width} cannot rotate as many channels as the layer does, "
            f"{spec.rotary_dim}"
        )

    def shapes(self, layer: int, spec: LayerSpec, hidden: int) -> Shapes:
        """Return the shape of each tensor of a layer, by name."""
        heads, width = self.policy.heads, self.policy.width
        rows = dict(zip(_MATRICES, (heads * width, width, heads), strict=True))
        return {_name(layer, part): ((n, hidden),) for part, n in rows.items()} | {
            _name(layer, part): ((width,),) for part in _NORM
        }

    def of(self, stage: str, spec: LayerSpec) -> IndexWeights:
        """Read the indexer of a layer's stage (``layers.3``).

        Raises:
            InputError: it cannot be read, or holds what is no finite number.
        """
        layer = int(stage.rpartition(".")[2])
        parts = [self.read(_name(layer, part)) for part in _MATRICES]
        if len({part.dtype for part in parts}) > 1:
            parts = [part.float() for part in parts]
        weight, bias = (self.read(_name(layer, part)).float() for part in _NORM)
        return IndexWeights(torch.cat(parts).contiguous(), weight, bias)


def find_trained(
    policy: AttentionPolicy | None, checkpoint: Checkpoint, file: str | Path | None
) -> Trained | None:
    """Return what a policy chooses by that a model was trained with; None: it needs nothing.

    Args:
        policy: What was asked for.
        checkpoint: The model's, whose own tensors are used where no file is given.
        file: Safetensors file of gates or indexers, or None.

    Raises:
        UsageError: there are none, a file is given to another policy, or they are of other sizes.
        InputError: the file is missing, damaged, or holds none of a kind that can be compiled.
    """
    path = None if file is None else Path(file)
    if isinstance(policy, Seer):
        return find_gates(policy, checkpoint, path)
    if isinstance(policy, Dsa):
        return _find_indexers(policy, checkpoint, path)
    if path is not None:
        raise UsageError(
            f"--gates {path} goes with --attention seer, which chooses by gates, and dsa, which does by "
            "indexers",
            remedy="leave out --gates, or use --attention seer or dsa",
        )
    return None


def _find_indexers(policy: Dsa, checkpoint: Checkpoint, file: Path | None) -> Indexers:
    """Return the indexers that a policy chooses by; raises as `find_trained`."""
    place = checkpoint.config_file if file is None else file
    if file is None:
        every = checkpoint.entries
        trained = positive(checkpoint.config.get("index_topk"), "index_topk", place)
    else:
        every = file_entries(place)
        trained = positive(file_says(place, "indexer").get("k"), "k of its metadata", place)
    entries = {name: entry for name, entry in every.items() if TENSOR.fullmatch(name)}
    if not entries and file is None:
        others = ", ".join(name for name in READY if name not in ("seer", "dsa"))
        raise UsageError(
            "--attention dsa needs an indexer, which this model does not have",
            remedy=f"give a file of indexers by --gates FILE.safetensors, or use one of {others}",
        )
    if latent := sorted(name for name in entries if ".wq_b." in name):
        raise InputError(
            f"{latent[0]} reads the latent queries of multi-head latent attention, which no family here has",
            file=place,
            remedy="Only indexers whose wq reads the layer's input can be compiled",
        )
    extents = {part: _extent(entries, part) for part in _MATRICES}
    if missing := next((part for part, rows in extents.items() if not rows), ""):
        raise InputError(
            f"there are no indexers: no matrix {_name('N', missing)}", file=place,
            remedy="Give the indexers that were trained for this model",
        )  # fmt: skip
    heads, width = extents["weights_proj.weight"], extents["wk.weight"]
    fitted = _fitted(policy, heads, width, trained, place)
    return Indexers(entries, checkpoint if file is None else None, place, fitted)


def _extent(entries: dict[str, Entry], part: str) -> int:
    """Return the rows of the first layer's matrix of a part; 0: there is none."""
    found = [e for n, e in sorted(entries.items()) if n.endswith(f".{part}") and len(e.shape) == 2]
    return found[0].shape[0] if found else 0


def _fitted(policy: Dsa, heads: int, width: int, k: int | None, place: Path) -> Dsa:
    """Return a policy with the sizes of the indexers, and the tokens that they were trained for.

    Raises:
        UsageError: other heads or another width were asked for.
    """
    for name, value in (("heads", heads), ("width", width)):
        if name in asked(policy) and getattr(policy, name) != value:
            raise UsageError(
                f"--attention {policy}: the indexers of {place} have {name}={value}",
                remedy=f"leave out {name}=",
            )
    most = policy.k if "k" in asked(policy) else k or policy.k
    return replace(policy, heads=heads, width=width, k=most)


def _name(layer: int | str, part: str) -> str:
    return f"model.layers.{layer}.self_attn.indexer.{part}"
