"""PyTorch as a peer of whole models: transformers' own implementation, eager, in float32 or bfloat16."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mimo_compile.bench.models.entrant import Entrant, ModelAsk, warm
from mimo_compile.bench.peers.base import LeftOut

_DTYPES = {"float32": 4, "bfloat16": 2}
_SHARE = 0.5
"""Of the memory that is free, what one model may take."""


def entrants(ask: ModelAsk, free_bytes: int) -> Iterator[Entrant | LeftOut]:
    """Offer the model in float32 and in bfloat16, as far as memory allows.

    Args:
        ask: What to run.
        free_bytes: Memory that is free now.
    """
    name = f"torch eager {version('torch')}"
    if ask.source is None or not ask.source.is_dir():
        yield LeftOut("torch", "needs the checkpoint's folder", "give it with --source")
        return
    try:
        library = version("transformers")
    except PackageNotFoundError:
        pip = "pip install 'mimo-compile[hf]'"
        yield LeftOut("torch", "package transformers is not installed", pip)
        return
    numbers = parameters(ask.source)
    for dtype, size in _DTYPES.items():
        impl = f"{name} {dtype} (transformers {library})"
        if numbers * size > _SHARE * free_bytes:
            why = f"takes {numbers * size / 1e9:.1f} GB, and {free_bytes / 1e9:.1f} GB are free"
            yield LeftOut(impl, why)
            continue
        arguments = {"folder": str(ask.source), "dtype": dtype, "threads": ask.threads}
        files = sum(file.stat().st_size for file in ask.source.glob("*.safetensors"))
        yield Entrant(impl, f"{__name__}:EagerRunner", arguments, files, "torch")


def parameters(folder: Path) -> int:
    """Return how many numbers the weights of a folder have, from their headers."""
    import math

    from mimo_compile.frontend.weights import open_checkpoint

    return sum(math.prod(entry.shape) for entry in open_checkpoint(folder).entries.values())


class EagerRunner:
    """Generates greedily with a transformers model and its KV cache."""

    def __init__(self, folder: str, dtype: str, threads: int) -> None:
        """Import the libraries."""
        import torch
        import transformers

        torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.folder, self.dtype = Path(folder), getattr(torch, dtype)
        self._model: Any = None

    def load(self) -> dict[str, float]:
        """Load the folder."""
        import transformers

        warm(self.folder.glob("*.safetensors"))
        begin = time.perf_counter()
        model = transformers.AutoModelForCausalLM.from_pretrained(
            self.folder, config=_config(self.folder), dtype=self.dtype, local_files_only=True
        )
        self._model = model.eval()
        return {"load_s": time.perf_counter() - begin}

    def run(self, prompt: Sequence[int], new: int) -> dict[str, Any]:
        """Generate; see `Runner.run`."""
        import torch

        ids = torch.tensor(prompt, dtype=torch.int64)[None]
        with torch.inference_mode():
            begin = time.perf_counter()
            out = self._model(input_ids=ids, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
            first = time.perf_counter()
            for _ in range(new - 1):
                out = self._model(
                    input_ids=token, past_key_values=out.past_key_values, use_cache=True
                )
                token = out.logits[:, -1:].argmax(-1)
            end = time.perf_counter()
        return {
            "prefill": ids.shape[1] / (first - begin),
            "decode": (new - 1) / (end - first) if new > 1 else None,
        }


def _config(folder: Path) -> Any:
    """Read ``config.json`` so that transformers takes it: no nulls, rotary bases in its newer spelling."""
    import transformers

    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    values = {k: v for k, v in values.items() if v is not None}
    if values.get("model_type") == "mimo_v2_flash" and "rope_scaling" not in values:
        share = values.get("partial_rotary_factor", 1.0)
        kinds = (("full_attention", "rope_theta"), ("sliding_attention", "swa_rope_theta"))
        values["rope_parameters"] = {
            kind: {
                "rope_type": "default",
                "rope_theta": values[key],
                "partial_rotary_factor": share,
            }
            for kind, key in kinds
        }
    return transformers.AutoConfig.for_model(values.pop("model_type"), **values)
