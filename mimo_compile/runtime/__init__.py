"""Run compiled artifacts: load, call, generate text; needs numpy and TVM's runtime, no compiler.

`load` opens an artifact; everything else follows from the `Module` that it returns. Nothing heavy
is imported until then.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mimo_compile.runtime.expert_memory import ExpertMemory
    from mimo_compile.runtime.generate import Stats
    from mimo_compile.runtime.module import Module, load
    from mimo_compile.runtime.speculate import Speculation

__all__ = ["ExpertMemory", "Module", "Speculation", "Stats", "load"]

_HOME_OF = {
    "ExpertMemory": "mimo_compile.runtime.expert_memory",
    "Module": "mimo_compile.runtime.module",
    "Speculation": "mimo_compile.runtime.speculate",
    "Stats": "mimo_compile.runtime.generate",
    "load": "mimo_compile.runtime.module",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its home module the first time it is asked for."""
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'mimo_compile.runtime' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value
