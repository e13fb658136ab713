"""Model families. Adding one: a module here with ``configure`` and ``layer_names``, a line in `FAMILIES`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import cast

from mimo_compile.errors import InputError
from mimo_compile.frontend.models.family import Family

FAMILIES: dict[str, str] = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "mixtral": "mixtral",
    "qwen2_moe": "qwen2_moe",
    "qwen3_moe": "qwen3_moe",
    "olmoe": "olmoe",
    "deepseek": "deepseek",
    "dots1": "dots1",
    "glm4_moe": "glm4_moe",
    "mimo": "mimo",
    "mimo_v2_flash": "mimo_v2_flash",
    "hysparse": "hysparse",
}
"""``model_type`` of a ``config.json`` to the module here that reads it."""


def get_family(model_type: object, file: Path) -> Family:
    """Return the family's module.

    Raises:
        InputError: no family reads this model type; the known ones are listed.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError(
            f"unknown architecture: model_type={model_type!r}",
            file=file,
            remedy=f"Known: {', '.join(FAMILIES)}",
        )
    return cast(Family, import_module(f"mimo_compile.frontend.models.{FAMILIES[model_type]}"))
