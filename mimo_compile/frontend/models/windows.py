"""Which layers of a decoder attend through a window: what families say of it in ``config.json``.

Each rule takes the configuration and the number of layers, and returns the window of each layer (0: full).
All of them read ``layer_types``, which newer files have and which wins; what contradicts it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mimo_compile.frontend.models.family import Fields

Rule = Callable[["Fields", int], list[int]]


def no_windows(fields: Fields, layers: int) -> list[int]:
    """All layers are full; a file that says otherwise is refused."""
    fields.require("use_sliding_window", (False,))
    if fields.get("use_sliding_window") is False:  # what size they would have says nothing
        fields.asked.update(("sliding_window", "max_window_layers"))
    if any(_listed(fields, layers) or ()):
        raise fields.fail(
            f"layer_types names sliding windows, which no {fields.get('model_type')} model has"
        )
    return [0] * layers


def from_a_layer(fields: Fields, layers: int) -> list[int]:
    """Qwen2's rule: with ``use_sliding_window`` all layers from ``max_window_layers`` on."""
    listed, used = _listed(fields, layers), fields.flag("use_sliding_window", False)
    if listed is None and used:
        first = fields.integer("max_window_layers", low=0)
        listed = [i >= first for i in range(layers)]
    return _sized(fields, listed or [False] * layers)


def in_all_layers(fields: Fields, layers: int) -> list[int]:
    """Qwen3's with experts: with ``use_sliding_window`` all layers."""
    listed, used = _listed(fields, layers), fields.flag("use_sliding_window", False)
    if listed is not None and used and not all(listed):
        raise fields.fail("layer_types names full_attention, though use_sliding_window is true")
    return _sized(fields, [used] * layers if listed is None else listed)


def one_window(fields: Fields, layers: int) -> list[int]:
    """Mixtral's: all layers, where ``sliding_window`` is given."""
    listed, size = _listed(fields, layers), fields.integer("sliding_window", 0, low=0)
    if listed is not None and any(sliding != bool(size) for sliding in listed):
        raise fields.fail(
            f"layer_types does not fit sliding_window={fields.get('sliding_window')}",
            "All layers have the window, or none",
        )
    return _sized(fields, [bool(size)] * layers)


def from_a_layer_where_given(fields: Fields, layers: int) -> list[int]:
    """dots.llm1's: where ``sliding_window`` is given, all layers from ``max_window_layers`` on."""
    listed = _listed(fields, layers)
    if listed is None:
        size = fields.integer("sliding_window", 0, low=0)
        first = fields.integer("max_window_layers", None if size else layers, low=0)
        listed = [bool(size) and i >= first for i in range(layers)]
    return _sized(fields, listed)


def _listed(fields: Fields, layers: int) -> list[bool] | None:
    """Return which layers have a window by ``layer_types`` (None: it is not given)."""
    kinds = fields.per_layer("layer_types", layers, ("full_attention", "sliding_attention"))
    return None if kinds is None else [kind == "sliding_attention" for kind in kinds]


def _sized(fields: Fields, sliding: Sequence[bool]) -> list[int]:
    """Return the windows of layers; refuse them where ``use_sliding_window`` says that there are none."""
    fields.asked.update(("sliding_window", "max_window_layers", "use_sliding_window"))
    if not any(sliding):
        return [0] * len(sliding)
    if fields.raw.get("use_sliding_window") is False:
        raise fields.fail(
            "layers have a sliding window, though use_sliding_window is false",
            "Set it to true, or leave the windows out",
        )
    size = fields.integer("sliding_window")
    return [size if one else 0 for one in sliding]
