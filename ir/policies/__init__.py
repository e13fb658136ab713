"""Attention policies: one file for each system; ``--attention`` text is parsed here."""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module

from mimo_compile.errors import UsageError
from mimo_compile.ir.policies.base import (
    ARITHMETIC,
    AttentionPolicy,
    Geometry,
    LayerRole,
    Score,
    Select,
    Steps,
)

POLICIES: dict[str, str] = {
    "model": "Model",
    "full": "Full",
    "window": "Window",
    "stream": "Stream",
    "quest": "Quest",
    "seer": "Seer",
    "lessismore": "LessIsMore",
    "resa": "Resa",
    "sale": "Sale",
    "hysparse": "HySparse",
    "hysparse2": "HySparse2",
    "tailorkv": "TailorKV",
    "nsa": "Nsa",
    "moba": "Moba",
    "dsa": "Dsa",
}
"""Name of a policy (also its module's name; `model` lives in `full`) to its class."""


def get_policy(name: str) -> type[AttentionPolicy]:
    """Return the class of a policy.

    Raises:
        UsageError: no policy has this name.
    """
    if name not in POLICIES:
        raise UsageError(
            f"unknown attention {name!r} (--attention)",
            remedy=f"choose from {', '.join(POLICIES)}",
        )
    module = import_module(f"mimo_compile.ir.policies.{'full' if name == 'model' else name}")
    found: type[AttentionPolicy] = getattr(module, POLICIES[name])
    return found


def parse_policy(text: str) -> AttentionPolicy:
    """Parse ``NAME[:ARGUMENT=VALUE,...][+int8|+int8half]``, for example ``quest:budget=1024,page=16``.

    Raises:
        UsageError: an unknown name or argument, a value of the wrong kind or out of range.
    """
    body, plus, arithmetic = text.partition("+")
    if plus and arithmetic not in ARITHMETIC[1:]:
        raise UsageError(
            f"malformed --attention {text!r} at '+{arithmetic}'",
            remedy="write +int8 or +int8half; a file that it names may have no + in its name",
        )
    name, colon, rest = body.partition(":")
    policy = get_policy(name)
    kinds = {f.name: str(f.type) for f in fields(policy) if f.metadata}
    values: dict[str, int | float | str] = {"arithmetic": arithmetic} if plus else {}
    for item in rest.split(",") if colon else []:
        key, eq, value = item.partition("=")
        if not eq or not value:
            raise UsageError(
                f"malformed --attention {text!r} at {item!r}", remedy=f"write {name}:ARGUMENT=VALUE"
            )
        if key not in kinds:
            takes = f"it takes {', '.join(kinds)}" if kinds else "it takes none"
            raise UsageError(f"--attention {name} has no argument {key!r}", remedy=takes)
        if key in values:
            raise UsageError(f"--attention {name}: {key} is given twice")
        values[key] = _value(name, key, value, kinds[key])
    given = tuple(name for name in policy.trained if name in values)
    return policy(given=given, **values)  # type: ignore[arg-type]


def _value(name: str, key: str, text: str, kind: str) -> int | float | str:
    if kind == "str":
        return text
    try:
        return int(text) if kind == "int" else float(text)
    except ValueError:
        wanted = {"int": "a whole number", "float": "a number"}[kind]
        raise UsageError(f"--attention {name}: {key}={text} is not {wanted}") from None


__all__ = [
    "POLICIES",
    "AttentionPolicy",
    "Geometry",
    "LayerRole",
    "Score",
    "Select",
    "Steps",
    "get_policy",
    "parse_policy",
]
