"""Our side of a comparison of whole models: an artifact, and a kernel that only reads as many bytes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mimo_compile.bench.models.entrant import Entrant, warm
from mimo_compile.runtime import load
from mimo_compile.runtime.generate import Stats
from mimo_compile.runtime.module import Module

ROOF_S = 0.2
"""Seconds of one turn of the read roof."""


def entrant(artifact: Path, module: Module) -> Entrant:
    """Return an artifact as one who takes part."""
    return Entrant(
        f"mimo {module.manifest.quant}",
        f"{__name__}:CompiledRunner",
        {"artifact": str(artifact), "threads": module.threads},
        artifact.stat().st_size,
    )


class CompiledRunner:
    """Generates with an artifact; imports the runtime alone."""

    def __init__(self, artifact: str, threads: int) -> None:
        """Remember what to load."""
        self.artifact, self.threads = artifact, threads
        self._module: Module | None = None

    def load(self) -> dict[str, float]:
        """Load the artifact.

        Returns:
            ``open_s`` until `load` returns; ``load_s`` until the first token can be computed, each chunk of
            the weights it needs hashed; ``check_s`` of a load that hashes all of them at once. Seconds.
        """
        warm([Path(self.artifact)])
        begin = time.perf_counter()
        load(self.artifact, threads=self.threads, verify="full")
        checked = time.perf_counter()
        self._module = load(self.artifact, threads=self.threads)
        opened = time.perf_counter()
        for entry in ("step_1", "head_1"):
            self._module.bind(entry)
        ready = time.perf_counter()
        return {"check_s": checked - begin, "open_s": opened - checked, "load_s": ready - checked}

    def run(self, prompt: Sequence[int], new: int) -> dict[str, Any]:
        """Generate; see `Runner.run`. Also ``joules`` for each token, where a meter tells."""
        assert self._module is not None
        stats = Stats()
        ids = np.array(prompt, np.int32)
        for _ in self._module.generate_ids(ids, new, stop_at_eos=False, stats=stats):
            pass
        return {
            "prefill": stats.prefill_tokens_per_s, "decode": stats.decode_tokens_per_s,
            "joules": stats.joules_per_token, "joules_source": stats.joules_source or "",
        }  # fmt: skip


def batch_entrant(artifact: Path, module: Module) -> Entrant:
    """Return an artifact that generates as many texts at a time as it was compiled for."""
    alone = entrant(artifact, module)
    return replace(
        alone, impl=f"{alone.impl}, {module.batch} together", runner=f"{__name__}:BatchRunner"
    )


class BatchRunner(CompiledRunner):
    """Generates several texts together; rates are those of all of them."""

    def run(self, prompt: Sequence[int], new: int) -> dict[str, Any]:
        """Generate from prompts of equal length; see `Runner.run`."""
        assert self._module is not None
        stats = Stats()
        prompts = [np.roll(np.array(prompt, np.int32), i) for i in range(self._module.batch)]
        for _ in self._module.generate_batch_ids(prompts, new, stop_at_eos=False, stats=stats):
            pass
        return {"prefill": stats.prefill_tokens_per_s, "decode": stats.decode_tokens_per_s}


class ReadRoof:
    """A kernel that reads one buffer again and again, as decoding reads the weights."""

    def __init__(self, nbytes: float, threads: int) -> None:
        """Remember how much to read, with how many threads."""
        self.nbytes, self.threads = nbytes, threads
        self._turn: Callable[[], float] = lambda: 0.0

    def load(self) -> dict[str, float]:
        """Compile the kernel and fill the buffer."""
        from mimo_compile.bench.roof import read_contestant
        from mimo_compile.ir.hardware import resolve_target

        begin = time.perf_counter()
        hardware = resolve_target("cpu", self.threads)
        contestant = read_contestant("model", hardware, self.nbytes, "hot", 0, int(self.nbytes))
        (arguments,) = contestant.sets

        def turn() -> float:
            contestant.prepare()
            contestant.call(arguments)
            number, start = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - start) < ROOF_S:
                contestant.call(arguments)
                number += 1
            return number * contestant.bytes / elapsed / 1e9

        self._turn = turn
        return {"load_s": time.perf_counter() - begin}

    def run(self) -> dict[str, Any]:
        """Read for a while; return ``gb_per_s``."""
        return {"gb_per_s": self._turn()}


def roof_entrant(nbytes: float, threads: int) -> Entrant:
    """Return the read roof as one who takes part."""
    return Entrant("read roof", f"{__name__}:ReadRoof", {"nbytes": nbytes, "threads": threads})


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
