"""Build a decoder whose codes are chosen by what the layers compute on calibration text.

Layer by layer: the layer is built with its float weights and fed with what the quantised layers before it
gave, which yields the moments of its matrices' inputs; then it is quantised (GPTQ), or its weights are
scaled and then quantised (AWQ), and the sequences go on through the quantised one. One layer is held at a
time; of the text, one residual stream for each sequence.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mimo_compile.errors import UsageError
from mimo_compile.frontend.models.build import EMBED, HEAD, NORM, Builder
from mimo_compile.frontend.models.decoder import (
    STEP_TOKENS,
    Decoder,
    DecoderConfig,
    LayerSpec,
)
from mimo_compile.frontend.models.family import Family, Names
from mimo_compile.frontend.models.fold import Folded, fold_layer
from mimo_compile.frontend.models.stage import Stage
from mimo_compile.frontend.models.stages import Experts, Head, QuantLinear, Rope
from mimo_compile.frontend.weights.checkpoint import Checkpoint
from mimo_compile.ir.formats import QuantScheme, QuantTensor, WeightFormat
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.quantize import quantize
from mimo_compile.quantize.calibration import Calibration, describe
from mimo_compile.quantize.gptq import Gain, gptq
from mimo_compile.quantize.moments import Moments

if TYPE_CHECKING:
    from mimo_compile.frontend.trained import Trained

_SMALL = 1024
"""Hidden sizes below this are run by one thread: waking others takes longer than the work."""
_LEAST = 8
"""An expert whose matrices have more than this many columns for each of its tokens takes the layer's
average moments."""


class Observed:
    """Moments of the inputs of all matrices of one layer."""

    def __init__(self, stage: Stage | None = None) -> None:
        """Watch a layer with float weights, until `done`."""
        self.linear: dict[str, Moments] = {}
        self.routed: list[tuple[Tensor, Tensor]] = []
        """Inputs ``[T, D]`` of the experts and the experts' numbers ``[T, k]``."""
        self.experts: Experts | None = None
        self.fallbacks: set[int] = set()
        self._cache: dict[tuple[str, int], Moments] = {}
        self._hooks = []
        for name, module in () if stage is None else stage.module.named_modules():
            if isinstance(module, QuantLinear) and not name.endswith(("router", "shared_gate")):
                self._hooks.append(module.register_forward_pre_hook(self._linear(name)))
            elif isinstance(module, Experts):
                self.experts = module
                self._hooks.append(module.register_forward_pre_hook(self._routed))

    def _linear(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if name not in self.linear:
                self.linear[name] = Moments(args[0].shape[-1])
            self.linear[name].add(args[0])

        return add

    def _routed(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.routed.append((args[0].clone(), args[1].clone()))

    def done(self) -> None:
        """Watch no longer."""
        for hook in self._hooks:
            hook.remove()
        if self.routed:
            x, ids = (torch.cat(part) for part in zip(*self.routed, strict=True))
            self.routed = [(x, ids)]

    def expert(self, half: str, e: int) -> Moments:
        """Return the moments of inputs of expert ``e``: of ``w13`` or ``w2``; a rare one gets the average."""
        own = self._own(half, e)
        if own.count * _LEAST >= len(own.magnitude):
            return own
        self.fallbacks.add(e)
        return self.average(half)

    def average(self, half: str) -> Moments:
        """Return the moments of all experts together."""
        if (half, -1) not in self._cache:
            total = Moments(self._weight(half).shape[-1])
            for e in range(len(self._weight(half))):
                total.join(self._compute(half, e))
            self._cache[half, -1] = total
        return self._cache[half, -1]

    def _own(self, half: str, e: int) -> Moments:
        if (half, e) not in self._cache:  # one expert at a time, beside the average
            self._cache = {key: m for key, m in self._cache.items() if key[1] == -1}
            self._cache[half, e] = self._compute(half, e)
        return self._cache[half, e]

    def _weight(self, half: str) -> Tensor:
        assert self.experts is not None
        weight: Tensor = getattr(self.experts, half)
        return weight

    def _compute(self, half: str, e: int) -> Moments:
        out = Moments(self._weight(half).shape[-1])
        for x, ids in self.routed:
            rows = x[(ids == e).any(-1)]
            if half == "w2":
                first = self._weight("w13")[e].to(x.dtype)
                gate, up = (rows @ first.mT).chunk(2, dim=-1)
                rows = torch.nn.functional.silu(gate) * up
            out.add(rows)
        return out


class CalibratedBuilder(Builder):
    """A `Builder` that takes codes from GPTQ, or scales channels by AWQ first."""

    def __init__(
        self,
        config: DecoderConfig,
        family: Family,
        checkpoint: Checkpoint,
        scheme: QuantScheme,
        calibration: Calibration,
        ids: Tensor,
        gates: Trained | None = None,
    ) -> None:
        """Prepare a build.

        Args:
            config: the decoder.
            family: names of its tensors.
            checkpoint: float weights.
            scheme: a quantised weight format.
            calibration: method ``gptq`` or ``awq``.
            ids: ``[S, L]`` tokens of the calibration text, L at most the model's context.
            gates: Gates or indexers of layers that choose by them, which stay as they are.

        Raises:
            UsageError: the method does not fit the format.
        """
        fmt = scheme.weight
        if fmt is None or fmt.is_float:
            raise UsageError(
                f"--calibrate {calibration.method} chooses codes of quantised weights",
                remedy="Name a weight format, for example --quant w3g64a8",
            )
        if fmt.family == "complex":  # its codes belong to pairs of rows and columns
            raise UsageError(
                f"--calibrate {calibration.method} has no {fmt}", remedy="Use --calibrate rtn"
            )
        self._folded = Folded(checkpoint)
        super().__init__(config, family, self._folded, scheme, gates=gates)
        self._plain = Builder(config, family, self._folded, QuantScheme(None), gates=gates)
        self.calibration, self._ids = calibration, ids
        self._x: list[Tensor] = []
        self._delta: list[Tensor] = []
        self._role: dict[str, tuple[str, int | None]] = {}
        self._observed: Observed | None = None
        self._gains: list[Gain] = []

    @torch.no_grad()
    def build(self) -> Decoder:
        """Read, calibrate and quantise everything."""
        c = self.calibration
        count, length = self._ids.shape
        c.log(f"{c.method} on {count} x {length} tokens: {describe(c)}")
        begin = time.perf_counter()
        with _fixed_threads(self.config.hidden):
            table = self._stored(EMBED)
            self._x = [torch.ops.mimo.embed(ids, table) for ids in self._ids]
            decoder = super().build()
        c.log(f"{c.method} took {time.perf_counter() - begin:.1f} s")
        return decoder

    def _quantise(
        self, name: str, weight: Tensor, fmt: WeightFormat, expert: int | None = None
    ) -> QuantTensor:
        if self.calibration.method != "gptq" or self._observed is None:
            return quantize(weight, fmt, what=name)
        role, number = self._role[name]  # every matrix of a layer has one
        number = number if expert is None else expert
        seen = self._observed
        moments = seen.linear[role] if number is None else seen.expert(role, number)
        found, gain = gptq(weight, moments, fmt, name)
        self._gains.append(gain)
        return found

    def _layer(
        self, name: str, prefix: str, spec: LayerSpec, rope: str, table: nn.Parameter
    ) -> Stage:
        begin = time.perf_counter()
        names = self.family.layer_names(spec, prefix, self.checkpoint)
        plain = self._plain._layer(name, prefix, spec, rope, table)
        self._observed = Observed(plain)
        self._run(plain, spec, keep=False)
        self._observed.done()
        self._role, self._gains = roles(names, spec), []
        if self.calibration.method == "awq":
            assert self.scheme.weight is not None
            self._gains = fold_layer(
                self._folded,
                names,
                spec,
                self._observed,
                self.scheme.weight,
                self.config.drafts.norms,
            )
        stage = super()._layer(name, prefix, spec, rope, table)
        self._folded.forget()
        observed, self._observed = self._observed, None
        if not name.startswith("mtp."):
            self._run(stage, spec, keep=True)
        self._tell(name, observed, time.perf_counter() - begin)
        return stage

    def _tell(self, name: str, observed: Observed | None, seconds: float) -> None:
        log = self.calibration.log
        rtn, ours = sum(g.rtn for g in self._gains), sum(g.calibrated for g in self._gains)
        share = f"{100 * ours / rtn:.1f} % of" if rtn > 0 else "no"
        log(f"{name}: squared error {share} round-to-nearest's, {seconds:.1f} s")
        if observed is not None and observed.fallbacks:
            few = ", ".join(map(str, sorted(observed.fallbacks)))
            log(f"{name}: too few tokens reach experts {few}: the layer's average moments are used")

    def _run(self, stage: Stage, spec: LayerSpec, *, keep: bool) -> None:
        """Run all sequences through a layer; ``keep``: its results are the next layer's inputs."""
        angles, module = Rope(spec), stage.module
        shift = 1 + int(stage.name.split(".")[1]) if stage.name.startswith("mtp.") else 0
        for i, ids in enumerate(self._ids):
            for cache in stage.states:
                old = module.get_buffer(cache)
                setattr(module, cache, torch.zeros_like(old, device="cpu"))
            results: list[tuple[Tensor, Tensor]] = []
            last = len(ids) - shift
            for at in range(0, last, STEP_TOKENS):
                rows = slice(at, min(at + STEP_TOKENS, last))
                pos = torch.tensor([at, rows.stop - at], dtype=torch.int32)
                angles.tokens = rows.stop - at
                values = {"pos": pos, "x": self._x[i][rows], "ids": ids[shift:][rows]}
                if "x" not in stage.inputs or "delta" in stage.inputs:
                    values["delta"] = self._delta[i][rows]
                if shift:
                    values["hidden"] = values["x"] + values["delta"]
                given = (angles(pos) if n.startswith("rope.") else values[n] for n in stage.inputs)
                results.append(module(*given))
            if keep:
                x, delta = (torch.cat(part) for part in zip(*results, strict=True))
                self._x[i] = x
                if len(self._delta) > i:
                    self._delta[i] = delta
                else:
                    self._delta.append(delta)
        for cache in stage.states:
            setattr(module, cache, module.get_buffer(cache).to("meta"))

    def _head(self, table: nn.Parameter) -> Head:
        """Quantise the output projection, by the rows that the decoder gives it."""
        if self.calibration.method == "gptq":
            begin = time.perf_counter()
            weight = self._folded.real(NORM)
            moments = Moments(self.config.hidden)
            for x, delta in zip(self._x, self._delta, strict=True):
                moments.add(torch.ops.mimo.add_rms_norm(delta, x, weight, self.config.eps)[0])
            name = EMBED if self.config.tied else HEAD
            self._observed = Observed()
            self._observed.linear["head"] = moments
            self._role, self._gains = {name: ("head", None)}, []
            head = super()._head(table)
            self._observed = None
            self._tell("head", None, time.perf_counter() - begin)
            return head
        return super()._head(table)


def roles(names: Names, spec: LayerSpec) -> dict[str, tuple[str, int | None]]:
    """Return which module's inputs each matrix of a layer sees; experts' matrices have their number too."""
    modules = {
        "attention.qkv": ("q", "k", "v"), "attention.o": ("o",), "feed.gate_up": ("gate", "up"),
        "feed.down": ("down",), "feed.shared_gate_up": ("shared.gate", "shared.up"),
        "feed.shared_down": ("shared.down",), "eh_proj": ("eh_proj",), "w13": ("experts.gate_up",),
        "w2": ("experts.all_down",),
    }  # fmt: skip
    out: dict[str, tuple[str, int | None]] = {
        names[key]: (module, None)
        for module, keys in modules.items()
        for key in keys
        if key in names
    }
    for key, half in (("experts.gate", "w13"), ("experts.up", "w13"), ("experts.down", "w2")):
        if key in names:
            for e in range(spec.experts):
                out[names[key].replace("{e}", str(e))] = (half, e)
    return out


@contextmanager
def _fixed_threads(hidden: int) -> Iterator[None]:
    """Use a number of threads that depends on the model and the machine only: sums then repeat exactly."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if hidden < _SMALL else local_cpu().cores)
    try:
        yield
    finally:
        torch.set_num_threads(before)
