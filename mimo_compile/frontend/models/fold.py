"""Scale the inputs of a layer's matrices (AWQ) and divide what makes them: norms, value and up projections.

Nothing but rounding to float32 changes what the float layer computes: a norm's weights, the rows of ``v``
(through attention's weighted sums) or those of ``up`` (through ``silu(gate) * up``) pass a factor of a
channel on as it is. Grouped queries share the scales of the value head that they read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from mimo_compile.frontend.models.decoder import LayerSpec
from mimo_compile.frontend.models.family import Names
from mimo_compile.frontend.weights.checkpoint import Checkpoint
from mimo_compile.ir.formats import GROUP_TENSOR, QuantTensor, WeightFormat
from mimo_compile.quantize.awq import Part, search_scales
from mimo_compile.quantize.gptq import Gain
from mimo_compile.quantize.moments import Moments

if TYPE_CHECKING:
    from mimo_compile.frontend.models.calibrated import Observed


class Folded(Checkpoint):
    """A checkpoint some of whose tensors are replaced, in float32."""

    name = "folded"

    def __init__(self, base: Checkpoint) -> None:
        """Start with all tensors as they are stored."""
        super().__init__(base.source, base.config)
        self._base = base
        self.entries = base.entries
        self._changed: dict[str, Tensor] = {}

    def read(self, name: str) -> Tensor | QuantTensor:
        """Return a tensor, the replaced one if there is one."""
        found = self._changed.get(name)
        return self._base.read(name) if found is None else found

    def change(self, name: str, tensor: Tensor) -> None:
        """Replace a tensor."""
        self._changed[name] = tensor

    def forget(self) -> None:
        """Drop the replacements: their layer is built."""
        self._changed.clear()


def fold_layer(
    folded: Folded, names: Names, spec: LayerSpec, observed: Observed, fmt: WeightFormat,
    joined: tuple[str, str] = ("enorm", "hnorm"),
) -> list[Gain]:  # fmt: skip
    """Choose and fold the scales of one layer; returns what each place gains.

    ``joined`` are the norms before a draft layer's joining projection, in the order of its columns.
    With one scale for a whole tensor, factors on the rows of ``v`` and ``up`` would widen its range:
    only norms are folded into then.
    """
    layer = _Layer(folded, names, spec, observed, fmt)
    layer.into_norm("attention.qkv", ("q", "k", "v"), ("attn_norm",))
    if spec.mlp == "dense":
        layer.into_norm("feed.gate_up", ("gate", "up"), ("mlp_norm",))
    else:
        layer.experts_into_norm()
    if "eh_proj" in names:
        layer.into_norm("eh_proj", ("eh_proj",), joined)
    if fmt.group != GROUP_TENSOR:
        if not spec.clip_qkv:  # a limit of values does not pass factors on
            layer.into_values()
        if spec.mlp == "dense":
            layer.into_up()
        else:
            layer.experts_into_up()
            if spec.shared_ffn:
                layer.into_up("shared.", "feed.shared_")
    return layer.gains


class _Layer:
    def __init__(
        self, folded: Folded, names: Names, spec: LayerSpec, observed: Observed, fmt: WeightFormat
    ) -> None:
        self.folded, self.names, self.spec = folded, names, spec
        self.observed, self.fmt = observed, fmt
        self.gains: list[Gain] = []

    def real(self, key: str) -> Tensor:
        return self.folded.real(self.names[key])

    def scale(self, key: str, by: Callable[[Tensor], Tensor]) -> None:
        self.folded.change(self.names[key], by(self.real(key)))

    def search(
        self, parts: Callable[[], Iterator[Part]], magnitude: Tensor,
        tie: Callable[[Tensor], Tensor] = lambda scale: scale,
    ) -> Tensor:  # fmt: skip
        scale, gain = search_scales(parts, magnitude, self.fmt, tie)
        self.gains.append(gain)
        return scale

    def parts(self, keys: tuple[str, ...], moments: Moments) -> Iterator[Part]:
        for key in keys:
            yield Part(self.real(key), moments, self.names[key])

    def into_norm(self, module: str, keys: tuple[str, ...], norms: tuple[str, ...]) -> None:
        moments = self.observed.linear[module]
        s = self.search(lambda: self.parts(keys, moments), moments.magnitude)
        for key in keys:
            self.scale(key, lambda w: w * s)
        for norm, piece in zip(norms, s.chunk(len(norms)), strict=True):
            self.scale(norm, lambda w, piece=piece: w / piece)  # type: ignore[misc]

    def into_values(self) -> None:
        spec, moments = self.spec, self.observed.linear["attention.o"]
        repeats = spec.heads // spec.kv_heads

        def heads(scale: Tensor) -> Tensor:  # geometric mean over the query heads of a value head
            shared = scale.reshape(spec.kv_heads, repeats, spec.dv).log().mean(1).exp()
            return shared.repeat_interleave(repeats, 0).flatten()

        s = self.search(lambda: self.parts(("o",), moments), moments.magnitude, heads)
        rows = s.reshape(spec.kv_heads, repeats, spec.dv)[:, 0].flatten()
        self.scale("o", lambda w: w * s)
        self.scale("v", lambda w: w / rows[:, None])
        if "v_bias" in self.names:
            self.scale("v_bias", lambda w: w / rows)

    def into_up(self, key: str = "", module: str = "feed.") -> None:
        moments, down = self.observed.linear[f"{module}down"], f"{key}down"
        s = self.search(lambda: self.parts((down,), moments), moments.magnitude)
        self.scale(down, lambda w: w * s)
        self.scale(f"{key}up", lambda w: w / s[:, None])

    # -- experts: one tensor for each, or one for all ------------------------------------------

    def expert(self, key: str, e: int) -> Tensor:
        fused = {"experts.gate": 0, "experts.up": 1}
        if key in self.names:
            return self.folded.real(self.names[key].replace("{e}", str(e)))
        if key == "experts.down":
            return self.real("experts.all_down")[e]
        return self.real("experts.gate_up")[e].chunk(2)[fused[key]]

    def put(self, key: str, e: int, weight: Tensor) -> None:
        if key in self.names:
            self.folded.change(self.names[key].replace("{e}", str(e)), weight)
            return
        name = self.names["experts.all_down" if key == "experts.down" else "experts.gate_up"]
        whole = self.folded.real(name)
        if name not in self.folded._changed:
            whole = whole.clone()
            self.folded.change(name, whole)
        half = {"experts.gate": 0, "experts.up": 1}.get(key)
        (whole[e] if half is None else whole[e].chunk(2)[half]).copy_(weight)

    def experts_into_norm(self) -> None:
        pair = ("experts.gate", "experts.up")
        shared = ("shared.gate", "shared.up") if self.spec.shared_ffn else ()

        def parts() -> Iterator[Part]:
            if shared:
                yield from self.parts(shared, self.observed.linear["feed.shared_gate_up"])
            for e in range(self.spec.experts):
                moments = self.observed.expert("w13", e)
                for key in pair:
                    yield Part(self.expert(key, e), moments, f"{self.names['mlp_norm']} expert {e}")

        s = self.search(parts, self.observed.average("w13").magnitude)
        for e in range(self.spec.experts):
            for key in pair:
                self.put(key, e, self.expert(key, e) * s)
        for key in ("router", *shared, *(("shared_gate",) if self.spec.shared_gate else ())):
            self.scale(key, lambda w: w * s)
        self.scale("mlp_norm", lambda w: w / s)

    def experts_into_up(self) -> None:
        for e in range(self.spec.experts):
            moments = self.observed.expert("w2", e)
            part = Part(self.expert("experts.down", e), moments, f"down projection of expert {e}")
            s = self.search(lambda part=part: iter([part]), moments.magnitude)  # type: ignore[misc]
            self.put("experts.down", e, self.expert("experts.down", e) * s)
            self.put("experts.up", e, self.expert("experts.up", e) / s[:, None])


__all__ = ["Folded", "fold_layer"]
