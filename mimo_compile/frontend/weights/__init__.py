"""How weights are stored: one module per storage format, found by what a folder or file looks like.

Adding one: a module here with a `Checkpoint` class and a line in `WEIGHT_FORMATS`, or a plug-in's entry
point.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimo_compile.errors import InputError
from mimo_compile.plugins import Kind

if TYPE_CHECKING:
    from mimo_compile.frontend.weights.checkpoint import Checkpoint

WEIGHT_FORMATS: dict[str, Any] = {
    "safetensors": "plain:Safetensors",
    "gguf": "gguf.checkpoint:Gguf",
    "i2_s": "gguf.i2s:I2s",
    "gptq": "gptq:Gptq",
    "awq": "awq:Awq",
    "bitnet": "bitnet:Bitnet",
    "fp8": "fp8:BlockFp8",
    "bitsandbytes": "nf4:Nf4",
    "compressed-tensors": "compressed:CompressedTensors",
    "fairy2i": "fairy:Fairy",
}
"""Name -> where its class lives; the first that detects a source reads it. Modules are imported on use."""

_KIND = Kind("weight format", "mimo_compile.weight_formats", __name__)


def weight_format_names() -> list[str]:
    """Return the names of all storage formats, those of plug-ins last."""
    return _KIND.names(WEIGHT_FORMATS)


def get_weight_format(name: str) -> type[Checkpoint]:
    """Return the class of a storage format.

    Raises:
        UsageError: there is none of this name; the known ones are listed.
        EnvironmentMismatch: it is a plug-in's, which cannot be used.
    """
    from mimo_compile.frontend.weights.checkpoint import Checkpoint

    cls = _KIND.get(name, WEIGHT_FORMATS)
    if not (isinstance(cls, type) and issubclass(cls, Checkpoint)):
        raise _KIND.broken(name, f"{cls!r} is no Checkpoint", WEIGHT_FORMATS)
    if cls.name != name:
        raise _KIND.broken(name, f"{cls!r} is named {cls.name!r}", WEIGHT_FORMATS)
    found: type[Checkpoint] = cls
    return found


def detect_format(source: Path, config: Mapping[str, Any]) -> type[Checkpoint] | None:
    """Return the first storage format that recognises a folder or file (None: none does)."""
    classes = (get_weight_format(name) for name in weight_format_names())
    return next((cls for cls in classes if cls.detect(source, config)), None)


def open_checkpoint(source: Path) -> Checkpoint:
    """Open a model folder, or a file that holds a whole model.

    Raises:
        InputError: nothing there, no weights, a way of quantisation that no format reads, damaged files.
        EnvironmentMismatch: a plug-in that reads weights is broken.
    """
    from mimo_compile.frontend.weights.checkpoint import quantisation, read_json

    folder = source.is_dir()
    if not folder and not source.is_file():
        raise InputError(f"{source.name} is no model folder", file=source)
    config_file = source / "config.json"
    config = read_json(config_file) if folder and config_file.exists() else {}
    found = detect_format(source, config)
    if found is not None:
        return found(source, config)
    if not folder:
        raise _unknown_file(source)
    if not config:
        read_json(config_file)  # says what is wrong with it
    if settings := quantisation(config):
        raise _unknown_method(config_file, settings)
    raise _no_weights(source)


def _unknown_file(source: Path) -> InputError:
    return InputError(
        f"{source.name} is a file, and none of the formats that hold a whole model",
        file=source,
        remedy=f"Known formats: {', '.join(weight_format_names())}",
    )


def _unknown_method(config_file: Path, settings: Mapping[str, Any]) -> InputError:
    known = sorted({m for n in weight_format_names() for m in get_weight_format(n).methods})
    also = f", and weights quantised by {', '.join(known)}" if known else ""
    return InputError(
        "the checkpoint is already quantised (quantization_config, method "
        f"{settings.get('quant_method')!r}), in a way that is not known",
        file=config_file,
        remedy="Supported: weights stored as float32, bfloat16 or float16, which --quant quantises"
        + also,
    )


def _no_weights(source: Path) -> InputError:
    from mimo_compile.frontend.weights.plain import INDEX, SINGLE

    others = [
        p.name for kind in ("*.bin", "*.gguf", "*.safetensors") for p in sorted(source.glob(kind))
    ]
    found = f"; found {', '.join(others[:3])}" if others else ""
    return InputError(
        f"no weights: neither {SINGLE} nor {INDEX}{found}",
        file=source,
        remedy="Save the model as safetensors"
        + (", or give the .gguf file itself" if any(n.endswith(".gguf") for n in others) else ""),
    )


__all__ = [
    "WEIGHT_FORMATS",
    "detect_format",
    "get_weight_format",
    "open_checkpoint",
    "weight_format_names",
]
