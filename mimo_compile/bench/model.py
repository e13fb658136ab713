"""Whole models side by side: tokens/s of an artifact and of the same model in eager PyTorch.

The eager peer is transformers' own implementation of the model with the checkpoint's weights in float32 or
bfloat16; all sides get the same prompt and the same number of new tokens, and take turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mimo_compile.bench.roof import read_contestant
from mimo_compile.errors import InputError, MissingExtra
from mimo_compile.ir.hardware import Hardware
from mimo_compile.runtime.generate import Stats
from mimo_compile.runtime.module import Module

ROOF_S = 0.2
"""Seconds of one turn of the read roof."""


@dataclass(slots=True)
class ModelRow:
    """Tokens/s of one implementation: median, lowest and highest of the rounds."""

    impl: str
    threads: int
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    joules: list[float] = field(default_factory=list)
    joules_source: str = ""
    weight_bytes: float = 0.0
    """Bytes of weights that one decoded token reads; 0 when unknown."""
    roof_gb_per_s: list[float] = field(default_factory=list)
    """What a kernel that only reads as many bytes reached in each round."""

    def json(self) -> dict[str, Any]:
        """Return the row as `bench model --json` prints it."""
        rate = statistics.median(self.decode)
        moved = rate * self.weight_bytes / 1e9 if self.weight_bytes else None
        roof = statistics.median(self.roof_gb_per_s) if self.roof_gb_per_s else None
        return {
            "op": "model", "impl": self.impl, "threads": self.threads,
            "prefill_tokens_per_s": statistics.median(self.prefill),
            "prefill_spread": [min(self.prefill), max(self.prefill)],
            "decode_tokens_per_s": rate, "decode_spread": [min(self.decode), max(self.decode)],
            "decode_gb_per_s": moved, "roof_gb_per_s": roof,
            "decode_roof_share": moved / roof if moved and roof else None,
            "joules": statistics.median(self.joules) if self.joules else None,
            "joules_source": self.joules_source or None,
        }  # fmt: skip


Run = Callable[[], tuple[float, float]]
"""Generates once and returns prefill and decode tokens/s."""


def compiled_run(module: Module, prompt: npt.NDArray[Any], new: int, row: ModelRow) -> Run:
    """Return a function that generates with an artifact."""

    def run() -> tuple[float, float]:
        stats = Stats()
        for _ in module.generate_ids(prompt, new, stop_at_eos=False, stats=stats):
            pass
        if stats.joules_per_token is not None:
            row.joules.append(stats.joules_per_token)
            row.joules_source = stats.joules_source or ""
        return stats.prefill_tokens_per_s or 0.0, stats.decode_tokens_per_s or 0.0

    return run


def eager_run(model: Any, prompt: npt.NDArray[Any], new: int, threads: int) -> Run:
    """Return a function that generates greedily with a transformers model and its KV cache."""
    import torch

    ids = torch.from_numpy(prompt.astype(np.int64))[None]

    def run() -> tuple[float, float]:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            begin = time.perf_counter()
            out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
            first = time.perf_counter()
            for _ in range(new - 1):
                out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)
            end = time.perf_counter()
        return ids.shape[1] / (first - begin), max(new - 1, 1) / max(end - first, 1e-9)

    return run


def eager_peer(folder: Path, dtype: str) -> Any:
    """Load a model folder into transformers' own implementation.

    Raises:
        MissingExtra: transformers is not installed.
        InputError: transformers cannot load the folder.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise MissingExtra("the eager peer", extra="hf", missing="transformers") from error
    import torch

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, config=_peer_config(folder), dtype=getattr(torch, dtype), local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"transformers cannot load it: {first}", file=folder) from error
    return model.eval()


def _peer_config(folder: Path) -> Any:
    """Read ``config.json`` so that transformers takes it: no nulls, rotary bases in its newer spelling."""
    import json

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


def compare_models(
    entries: Sequence[tuple[ModelRow, Run]],
    rounds: int,
    log: Callable[[str], None],
    roofs: Sequence[tuple[ModelRow, Callable[[], float]]] = (),
) -> list[ModelRow]:
    """Let implementations, and the read roofs of rows, take turns; a first round of each only warms up."""
    for number in range(rounds + 1):
        for row, run in entries:
            prefill, decode = run()
            if number:
                row.prefill.append(prefill)
                row.decode.append(decode)
        for row, read in roofs:
            rate = read()
            if number:
                row.roof_gb_per_s.append(rate)
        log(f"round {number} of {rounds}")
    return [row for row, _ in entries]


def weight_bytes(module: Module) -> float:
    """Return the bytes of weights that a decoding step reads: each tensor of ``step_1`` and ``head_1`` once.

    Of expert weights, the share that is routed to; of an embedding table, nothing to speak of.
    """
    from mimo_compile.ir.ops import get_op
    from mimo_compile.ir.workload import Workload

    total = 0.0
    for choice in module.manifest.plan:
        workload = Workload.parse(choice.workload)
        if workload.op not in ("mpgemm", "moe"):
            continue
        calls = choice.calls.get("step_1", 0) + choice.calls.get("head_1", 0)
        total += calls * get_op(workload.op).counts(workload).bytes.get("dram", 0.0)
    return total


def read_roof(hardware: Hardware, nbytes: float) -> Callable[[], float]:
    """Return a function that gives the GB/s of a kernel that only reads ``nbytes``, again and again.

    It reads one buffer of that size, as decoding reads the weights: from a cache where they fit it.
    """
    contestant = read_contestant("model", hardware, nbytes, "hot", 0, int(nbytes))
    (arguments,) = contestant.sets

    def run() -> float:
        contestant.prepare()
        contestant.call(arguments)
        number, begin = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - begin) < ROOF_S:
            contestant.call(arguments)
            number += 1
        return number * contestant.bytes / elapsed / 1e9

    return run


def peer_name(dtype: str) -> str:
    """Return how the eager peer is called in tables."""
    return f"torch eager {dtype} {version('torch')} (transformers {version('transformers')})"


def random_prompt(vocab: int, tokens: int, seed: int) -> npt.NDArray[np.int32]:
    """Return token ids drawn uniformly."""
    return np.random.default_rng(seed).integers(0, vocab, tokens).astype(np.int32)
