"""Files of thresholds for `sale`: one for each layer and query head, found by calibration.

JSON with ``format`` (1), ``model``, ``policy`` (what was estimated with, as ``--attention`` spells it),
``theta`` (the error that was allowed), ``text`` (what on), ``layers`` (number of a layer -> thresholds of its
query heads; 0: the head is dense) and ``share`` (number of a layer -> part of the blocks that heads kept).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mimo_compile.errors import InputError, UsageError
from mimo_compile.frontend.models.decoder import STEP_TOKENS, DecoderConfig
from mimo_compile.frontend.models.found_files import AGAIN, FORMAT, read_found
from mimo_compile.ir.policies import LayerRole
from mimo_compile.ir.policies.sale import Sale

_MOST = 1e38
"""Greatest threshold: a float32 number."""


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What a calibration found."""

    model: str
    """Family of the model, ``model_type`` of its configuration."""
    policy: str
    """Text of `Sale.estimate`."""
    theta: float
    """L1 error of a head's output that was allowed for each token."""
    layers: Mapping[int, tuple[float, ...]]
    """Number of a choosing layer -> thresholds of its query heads; 0: dense."""
    share: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    """Likewise: part of the causal blocks that a head kept on the text."""
    text: Mapping[str, Any] = field(default_factory=dict)
    """What it was calibrated on: ``file``, ``sequences``, ``length``, ``seed``, ``sha256`` of the tokens."""

    def save(self, path: Path) -> None:
        """Write the file."""
        body = {
            "format": FORMAT, "model": self.model, "policy": self.policy, "theta": self.theta,
            "text": dict(self.text), "layers": {str(i): row for i, row in self.layers.items()},
            "share": {str(i): row for i, row in self.share.items()},
        }  # fmt: skip
        path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


def prepared(policy: Sale, config: DecoderConfig, roles: Sequence[LayerRole]) -> Sale:
    """Return the policy as a decoder follows it: with what its file of thresholds says.

    Args:
        policy: As it was asked for; with a table of thresholds it needs no file.
        config: The decoder.
        roles: Of its layers.

    Raises:
        UsageError: tiles do not fit the steps in which prompts are read.
        InputError: the file is missing, malformed, or of another model or policy.
    """
    if STEP_TOKENS % policy.bq:
        raise UsageError(
            f"--attention {policy.name}: bq={policy.bq} does not divide the {STEP_TOKENS} tokens in which "
            "prompts are read",
            remedy="use a power of two, for example bq=64",
        )
    if policy.table or not policy.thresholds:
        return policy
    return _with_file(policy, config, [i for i, r in enumerate(roles) if r.kind == "select"])


def _with_file(policy: Sale, config: DecoderConfig, choosing: Sequence[int]) -> Sale:
    """Return the policy with what its file says; the text then has the file's name without folders.

    Args:
        policy: Names a file, relative to the current folder.
        config: The decoder that it is for.
        choosing: Numbers of the layers that choose.

    Raises:
        InputError: the file is missing, malformed, or of another model or policy.
    """
    path = Path(policy.thresholds)
    found = read_found(path, "thresholds", config.name)
    if found.get("policy") != str(policy.estimate):
        raise InputError(
            f"these thresholds were calibrated for {found.get('policy')}, not for {policy.estimate}",
            file=path, remedy=f"Give --attention the same arguments, or {AGAIN}",
        )  # fmt: skip
    rows = found.get("layers")
    if not isinstance(rows, dict) or set(rows) != {str(i) for i in choosing}:
        wanted = ", ".join(map(str, choosing))
        raise InputError(
            f"`layers` must have thresholds of exactly the layers {wanted}",
            file=path,
            remedy=AGAIN,
        )
    table = []
    for i, spec in enumerate(config.layers):
        row = rows.get(str(i), [])
        if i in choosing and not _is_row(row, spec.heads):
            raise InputError(
                f"layer {i} needs {spec.heads} thresholds, numbers of at least 0 and at most {_MOST:g}",
                file=path, remedy=AGAIN,
            )  # fmt: skip
        table.append(tuple(float(tau) for tau in row))
    return replace(policy, thresholds=path.name, table=tuple(table))


def _is_row(row: Any, heads: int) -> bool:
    return (
        isinstance(row, list)
        and len(row) == heads
        and all(
            isinstance(tau, int | float) and not isinstance(tau, bool) and 0 <= tau <= _MOST
            for tau in row
        )
    )
