"""Compile language models into artifacts whose every hot kernel was chosen by measurement.

Three verbs carry the package: `compile` turns a model into an artifact, `tune` searches for
faster or thriftier kernels, `load` runs an artifact. Nothing heavy is imported until one of
them is used: `import mimo_compile` alone loads neither torch, TVM nor numpy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mimo_compile.api import compile, tune
    from mimo_compile.artifact import Artifact
    from mimo_compile.runtime import load
    from mimo_compile.search import TuningResult

__version__ = "0.1.0"

__all__ = ["Artifact", "TuningResult", "__version__", "compile", "load", "tune"]

_HOME_OF = {
    "Artifact": "mimo_compile.artifact",
    "TuningResult": "mimo_compile.search",
    "compile": "mimo_compile.api",
    "load": "mimo_compile.runtime",
    "tune": "mimo_compile.api",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its home module the first time it is asked for."""
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'mimo_compile' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Public names, including those not imported yet."""
    return sorted({*globals(), *__all__})
