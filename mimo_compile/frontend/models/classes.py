"""Files of classes for `tailorkv`: how much of each layer's attention lies outside of its best keys.

JSON with ``format`` (1), ``model``, ``text`` (what on) and ``outside`` (number of a layer without a window ->
mean mass of attention outside of the best 5 % of the keys). The policy's ``tau`` makes classes of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mimo_compile.errors import InputError, UsageError
from mimo_compile.frontend.models.decoder import DecoderConfig
from mimo_compile.frontend.models.found_files import AGAIN, FORMAT, read_found
from mimo_compile.ir.policies.tailorkv import TailorKV


@dataclass(frozen=True, slots=True)
class Classes:
    """What a calibration found."""

    model: str
    """Family of the model, ``model_type`` of its configuration."""
    outside: Mapping[int, float]
    """Number of a layer -> mean attention mass outside of the best 5 % of the keys."""
    text: Mapping[str, Any] = field(default_factory=dict)
    """What it was calibrated on: ``file``, ``sequences``, ``length``, ``seed``, ``sha256`` of the tokens."""

    def save(self, path: Path) -> None:
        """Write the file."""
        body = {
            "format": FORMAT, "model": self.model, "text": dict(self.text),
            "outside": {str(i): mass for i, mass in self.outside.items()},
        }  # fmt: skip
        path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


def classified(policy: TailorKV, config: DecoderConfig) -> TailorKV:
    """Return the policy with what its file of classes says; the text then has the file's name alone.

    Args:
        policy: As it was asked for; with the masses of layers it needs no file.
        config: The decoder that it is for.

    Raises:
        UsageError: there is no file, but a limit for what it would say.
        InputError: the file is missing, malformed, or of another model.
    """
    if not policy.classes and policy.tau != TailorKV().tau:
        raise UsageError(
            f"--attention {policy}: tau={policy.tau:g} does nothing without classes=FILE",
            remedy="calibrate the model (`mimo-compile calibrate --attention tailorkv`), or leave out tau",
        )
    if policy.outside or not policy.classes:
        return policy
    path = Path(policy.classes)
    found = read_found(path, "classes", config.name).get("outside")
    seeing = [i for i, spec in enumerate(config.layers) if not spec.window]
    if not isinstance(found, dict) or set(found) != {str(i) for i in seeing}:
        raise InputError(
            f"`outside` must have a mass for exactly the layers {', '.join(map(str, seeing))}",
            file=path, remedy=AGAIN,
        )  # fmt: skip
    for layer, mass in found.items():
        if isinstance(mass, bool) or not isinstance(mass, int | float) or not 0 <= mass <= 1:
            raise InputError(f"layer {layer} needs a mass from 0 to 1", file=path, remedy=AGAIN)
    masses = tuple(float(found.get(str(i), 0)) for i in range(len(config.layers)))
    return replace(policy, classes=path.name, outside=masses)
