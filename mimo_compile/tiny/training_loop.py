"""What every training run of the built-in model shares: optimisers, rates, clock, log and state file.

A subclass of `Loop` says what a micro-step is and where its data comes from.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mimo_compile.tiny import corpus as text
from mimo_compile.tiny.optimizer import Muon, split_parameters
from mimo_compile.tiny.training_model import Experts, TinyModel


@dataclass(frozen=True, slots=True)
class Settings:
    """How to train. Times in minutes, sizes in tokens or sequences."""

    minutes: float = 100.0
    length: int = 512
    micro_batch: int = 4
    accumulate: int = 4
    mtp_sequences: int = 1
    mtp_weight: float = 0.1
    tests_share: float = 0.5
    matrix_rate: float = 0.02
    matrix_decay: float = 0.05
    rest_rate: float = 3e-3
    router_rate: float = 5e-4
    bias_rate: float = 5e-3
    warm_up: float = 0.01
    decay_from: float = 0.55
    compiled: bool = True
    seed: int = 0
    quant: str = "none"


@dataclass(slots=True)
class Progress:
    """What has been done so far; kept in the state file."""

    minutes: float = 0.0
    steps: int = 0
    tokens: int = 0
    log: list[dict[str, float]] = field(default_factory=list)


def vars_of(progress: Progress) -> dict[str, object]:
    """The fields of `progress` as plain data."""
    return {name: getattr(progress, name) for name in Progress.__slots__}


def mean_by_name(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each entry over the rows that have it."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


class Loop(ABC):
    """Model, optimisers and progress of one run. Parameters without `requires_grad` stay as they are."""

    def __init__(self, model: TinyModel, settings: Settings, tokenizer_json: str = "") -> None:
        self.model = model
        self.settings = settings
        self.progress = Progress()
        self.tokenizer_json = tokenizer_json
        matrices, rest, routers = split_parameters(model)
        self.muon = Muon(matrices, settings.matrix_rate, weight_decay=settings.matrix_decay)
        self.adam = torch.optim.AdamW(
            [{"params": rest}, {"params": routers}],
            settings.rest_rate,
            betas=(0.9, 0.95),
            weight_decay=0.0,
            foreach=True,
        )

    @abstractmethod
    def micro_step(self) -> tuple[dict[str, Tensor], Tensor]:
        """Draw a micro-batch, backpropagate `1 / accumulate` of its loss.

        Returns (what to log, "loss" among it, tokens per expert [MoE layers, experts]), detached.
        """

    @abstractmethod
    def new_data(self, seed: int) -> None:
        """Draw from here on as `seed` says."""

    def done(self) -> float:
        """The share of the run that is done; 1 ends it."""
        return self.progress.minutes / self.settings.minutes

    def accumulate(self) -> int:
        """Micro-batches of a step."""
        return self.settings.accumulate

    def step_tokens(self) -> int:
        """Tokens of a step."""
        return self.accumulate() * self.settings.micro_batch * self.settings.length

    def before_gradients(self) -> None:  # noqa: B027
        """Prepare the parameters for the micro-steps of a step; nothing by default."""

    def after_gradients(self) -> None:  # noqa: B027
        """Put them back, before the optimisers; nothing by default."""

    def rate(self) -> float:
        """The factor on the learning rates at this moment, 0 to 1."""
        s = self.settings
        done = min(1.0, self.done())
        if done < s.warm_up:
            return max(done / s.warm_up, 0.02)
        if done < s.decay_from:
            return 1.0
        return (1.0 - done) / (1.0 - s.decay_from)

    def step(self) -> dict[str, float]:
        """One optimiser step; returns what to log (losses in nats per token)."""
        s, rate, tokens = self.settings, self.rate(), self.step_tokens()
        rows: list[dict[str, float]] = []
        load = torch.zeros(())
        self.before_gradients()
        for _ in range(self.accumulate()):
            losses, loads = self.micro_step()
            rows.append({name: float(value) for name, value in losses.items()})
            load = load + loads
        self.after_gradients()
        for group in self.muon.param_groups:
            group["lr"] = s.matrix_rate * rate
            group["momentum"] = min(0.95, 0.85 + 0.1 * self.progress.steps / 300)
        for group, most in zip(self.adam.param_groups, (s.rest_rate, s.router_rate), strict=True):
            group["lr"] = most * rate
        self.muon.step()
        self.adam.step()
        self.muon.zero_grad(set_to_none=True)
        self.adam.zero_grad(set_to_none=True)
        self._balance(load, s.bias_rate * rate)
        self.progress.steps += 1
        self.progress.tokens += tokens
        worst = (load.amax(-1) / load.mean(-1)).max().item() if load.numel() > 1 else 1.0
        return {**mean_by_name(rows), "worst_load": worst, "rate": rate}

    @torch.no_grad()
    def _balance(self, load: Tensor, amount: float) -> None:
        """Move each expert's selection bias towards an even load, by the sign of its error."""
        if not amount or load.ndim != 2:
            return
        experts = [m for m in self.model.modules() if isinstance(m, Experts)]
        for module, counts in zip(experts, load, strict=True):
            module.e_score_correction_bias += amount * torch.sign(counts.mean() - counts)

    def save(self, path: Path) -> None:
        """Write the state file, whole or not at all."""
        part = path.with_suffix(path.suffix + ".part")
        torch.save(
            {
                "model": self.model.state_dict(),
                "muon": self.muon.state_dict(),
                "adam": self.adam.state_dict(),
                "progress": vars_of(self.progress),
                "tokenizer": self.tokenizer_json,
            },
            part,
        )
        part.replace(path)

    def resume(self, path: Path) -> None:
        """Read a state file written by `save`."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        self.progress = Progress(**state["progress"])
        self.new_data(self.settings.seed + 1000 + self.progress.steps)


@torch.no_grad()
def mean_loss(model: TinyModel, tokens: text.Tokens, length: int = 512) -> float:
    """Cross-entropy in nats per token over consecutive windows of `tokens`."""
    total, count = 0.0, 0
    for start in range(0, len(tokens) - 1, length):
        ids = torch.from_numpy(tokens[start : start + length + 1].astype(np.int64))[None]
        if ids.shape[1] < 2:
            break
        logits = model.logits(model(ids[:, :-1])[0])
        total += F.cross_entropy(logits[0], ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return total / count


def show(row: dict[str, float]) -> None:
    """Print one line of the log."""
    print(
        json.dumps({k: float(f"{v:.4g}") if v < 1e4 else int(v) for k, v in row.items()}),
        flush=True,
    )


def run(
    loop: Loop, test: Callable[[], dict[str, float]], state: Path | None, every: float = 5.0
) -> None:
    """Train until `loop.done()`; log each minute, test and save every `every` minutes."""
    p = loop.progress
    last = time.monotonic()
    logged, saved, tokens_then = p.minutes, p.minutes, p.tokens
    recent: list[dict[str, float]] = []
    while loop.done() < 1.0:
        recent.append(loop.step())
        now = time.monotonic()
        p.minutes += (now - last) / 60.0
        last = now
        if p.minutes - logged < 1.0 and loop.done() < 1.0:
            continue
        row = mean_by_name(recent)
        row["tokens_per_s"] = (p.tokens - tokens_then) / max(p.minutes - logged, 1e-9) / 60.0
        row.update(minutes=p.minutes, step=p.steps, tokens=p.tokens)
        if p.minutes - saved >= every or loop.done() >= 1.0:
            row.update(test())
            saved = p.minutes
            if state is not None:
                loop.save(state)
        p.log.append(row)
        show(row)
        recent, logged, tokens_then = [], p.minutes, p.tokens
        if not math.isfinite(row["loss"]):
            raise RuntimeError("the loss is not finite; lower the rate and resume")


def run_or_stop(
    loop: Loop, test: Callable[[], dict[str, float]], state: Path | None, every: float = 5.0
) -> None:
    """`run`; a signal to end (SIGTERM, Ctrl-C) saves the state and returns."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(loop, test, state, every)
    except KeyboardInterrupt:
        print("stopped; writing the model as it is", file=sys.stderr)
        loop.after_gradients()
        if state is not None:
            loop.save(state)
