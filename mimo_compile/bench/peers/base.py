"""What a peer is: another package that computes the same workload, from weights in its own format.

A peer offers variants, one for each format and kernel of its own that comes near the workload's bits. Each
variant is checked against float64 over the weights that it really stores, so that a kernel which leaves
work out cannot win. What cannot take part is named with the reason, never dropped silently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from mimo_compile.bench.contest import Contestant
from mimo_compile.bench.draws import copies
from mimo_compile.bench.oracle import Oracle, output_of
from mimo_compile.ir.formats import WeightFormat, parse_weight_format
from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.ops.base import Array
from mimo_compile.ir.workload import Workload

if TYPE_CHECKING:
    from mimo_compile.bench.models.entrant import Entrant, ModelAsk

_CHECKED_ROWS, _CHECKED_COLUMNS = 8, 192
"""Elements of y that are compared: float64 over all of a prompt would take longer than the timing."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What a peer is asked to compute, and how it will be timed."""

    workload: Workload
    hardware: Hardware
    inputs: Mapping[str, Array]
    cache: str
    """``hot`` or ``cold``."""
    cold_bytes: int
    """Bytes that the argument sets of a cold run hold together."""
    memory_bytes: int
    """Limit of the argument sets of one contestant."""
    oracle: Oracle | None = None
    """What the result must be, kept by the caller for all peers; computed on demand where None."""
    shared: dict[Any, Any] = field(default_factory=dict)
    """Operands that several peers or variants read; asks of one run may have it in common."""

    @property
    def params(self) -> Mapping[str, Any]:
        """All parameters of the workload."""
        return get_op(self.workload.op).full(self.workload)

    @property
    def shape(self) -> tuple[int, int, int]:
        """M, N and K of a matrix multiplication."""
        p = self.params
        return p["m"], p["n"], p["k"]

    @property
    def format(self) -> WeightFormat:
        """The workload's weight format."""
        return parse_weight_format(self.params["w"])


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Something that cannot take part: a package, or one variant of a peer."""

    impl: str
    reason: str
    remedy: str = ""


@dataclass(slots=True)
class Variant:
    """One way of a peer to compute a workload."""

    label: str
    make: Callable[[], Any]
    """Returns a fresh argument set in memory of its own."""
    call: Callable[[Any], object]
    """Computes once with a set."""
    nbytes: float
    """Bytes of weights and scales of one set."""
    bits: float | None = None
    """Stored bits of one weight, scales and zero points included; of one number of a KV cache."""
    result: Callable[[Any], Array] | None = None
    """Computes once with a set and returns y [M, N], or the op's output; None where nothing is checked."""
    weights: Callable[[npt.NDArray[np.int64]], Array] | None = None
    """Returns the real values of rows of the stored weights, [rows, K]; None: the op's reference holds."""
    error: float = 1e-4
    """Largest relative difference of y (root mean square) that the variant's arithmetic explains."""
    oracle: Oracle | None = None
    """What the op's output is compared with; None: what is asked for."""


class Peer:
    """A package that can be compared with; a subclass names it and offers variants."""

    name: ClassVar[str] = ""
    packages: ClassVar[tuple[str, ...]] = ()
    """Distributions it needs; the first one's version stands in the results."""
    remedy: ClassVar[str] = "pip install 'mimo-compile[peers]'"
    no_models: ClassVar[str] = "runs single kernels, no whole models"
    """Why it takes no part in `bench model`."""

    def missing(self) -> LeftOut | None:
        """Return what is said when a package is not installed, else None."""
        for package in self.packages:
            try:
                version(package)
            except PackageNotFoundError:
                return LeftOut(self.name, f"package {package} is not installed", self.remedy)
        return None

    def prepare(self, ask: Ask) -> Callable[[], None]:
        """Return what sets the number of threads before each turn."""
        return lambda: None

    def variants(self, ask: Ask) -> Iterable[Variant | LeftOut]:
        """Offer every variant near the workload's bits; nothing for ops the peer does not know."""
        raise NotImplementedError

    def models(self, ask: ModelAsk) -> Iterable[Entrant | LeftOut]:
        """Offer ways to run a whole model, or say why there are none."""
        yield LeftOut(self.name, self.no_models)

    def enter(self, ask: Ask) -> tuple[list[Contestant], list[LeftOut]]:
        """Check the variants and return those that take part, and those that cannot."""
        entered: list[Contestant] = []
        out: list[LeftOut] = []
        prepare = self.prepare(ask)
        prepare()
        for variant in self._offered(ask, out):
            try:
                first = variant.make()
                wrong = check(variant, ask, first)
                if not wrong:
                    entered.append(self._contestant(variant, ask, first, prepare))
            except Exception as error:  # whatever another library does on this processor
                wrong = f"fails with {type(error).__name__}: {_first_line(error)}"
            if wrong:
                out.append(LeftOut(f"{self.name} {variant.label}", wrong))
        if not entered and not out:
            out.append(LeftOut(self.name, f"has no kernel for {ask.workload.op}"))
        return entered, out

    def _offered(self, ask: Ask, out: list[LeftOut]) -> Iterator[Variant]:
        for offer in self.variants(ask):
            if isinstance(offer, LeftOut):
                out.append(LeftOut(f"{self.name} {offer.impl}", offer.reason, offer.remedy))
            else:
                yield offer

    def _contestant(
        self, variant: Variant, ask: Ask, first: Any, prepare: Callable[[], None]
    ) -> Contestant:
        wanted = ask.cold_bytes if ask.cache == "cold" else 0
        count = copies(int(variant.nbytes), wanted, ask.memory_bytes)
        op = get_op(ask.workload.op)
        others = sum(
            float(ask.inputs[a.name].nbytes if a.name in ask.inputs else 4 * np.prod(a.shape))
            for a in op.args(ask.workload)
            if a.role in ("input", "output")
        )
        return Contestant(
            op=str(ask.workload),
            impl=" ".join([self.name, variant.label, *map(version, self.packages[:1])]),
            threads=ask.hardware.threads,
            cache=ask.cache,
            call=variant.call,
            sets=[first, *(variant.make() for _ in range(count - 1))],
            bytes=variant.nbytes + others,
            operations=op.counts(ask.workload).flops,
            prepare=prepare,
            peer=self.name,
            bits_per_weight=variant.bits,
        )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else "no message"


def check(variant: Variant, ask: Ask, arguments: Any) -> str:
    """Compare a variant's y with float64 over its own weights; return what is wrong, or nothing."""
    if variant.result is None:
        return ""
    if variant.weights is None:
        return _check_output(variant, ask, variant.result(arguments))
    m, n, k = ask.shape
    y = variant.result(arguments)
    if y.shape != (m, n):
        return f"gives {list(y.shape)} instead of {[m, n]}"
    if not np.isfinite(y).all():
        return "gives values that are not finite"
    rng = np.random.default_rng(n * k + m)
    rows = np.sort(rng.permutation(n)[:_CHECKED_COLUMNS])
    tokens = np.unique(np.linspace(0, m - 1, _CHECKED_ROWS).astype(np.int64))
    x = ask.inputs["x"][tokens].astype(np.float64)
    expected = x @ variant.weights(rows).astype(np.float64).T
    if "bias" in ask.inputs:
        expected += ask.inputs["bias"][rows]
    error = relative(y[tokens][:, rows].astype(np.float64) - expected, expected)
    if error > variant.error:
        return f"is wrong: its result is {error:.2g} from float64, {variant.error:.2g} allowed"
    return ""


def _check_output(variant: Variant, ask: Ask, out: Array) -> str:
    """Compare an op's output ``out`` with its reference; return what is wrong, or nothing."""
    shape = output_of(ask.workload).shape
    if out.shape != shape:
        return f"gives {list(out.shape)} instead of {list(shape)}"
    if not np.isfinite(out).all():
        return "gives values that are not finite"
    oracle = variant.oracle or ask.oracle or Oracle(ask.workload, ask.inputs)
    error = oracle.distance(out)
    if error > variant.error:
        return f"is wrong: its result is {error:.2g} from float64, {variant.error:.2g} allowed"
    return ""


def relative(difference: Array, whole: Array) -> float:
    """Return the root mean square of a difference relative to that of the whole."""
    return float(np.linalg.norm(difference) / max(float(np.linalg.norm(whole)), 1e-300))


def int8_error(x: Array, block: int | None, steps: int = 127) -> float:
    """Return the relative error allowed for activations in 8 bits, one scale for ``block`` columns.

    Args:
        x: [M, K].
        block: Columns with one scale; 0: one for each row; None: one for all, with an offset.
        steps: Codes on each side of zero.

    Rounding to a step leaves an error of step / sqrt(12), at most step / 2; twice the former is allowed, and
    1 % for scales and results that a peer keeps in half precision.
    """
    m, k = x.shape
    if block is None:
        step = np.full((1, 1), (max(float(x.max()), 0) - min(float(x.min()), 0)) / steps)
    else:
        size = min(block or k, k)
        padded = np.pad(np.abs(x), ((0, 0), (0, -k % size)))
        step = padded.reshape(m, -1, size).max(axis=2) / steps
    return 2 * float(np.sqrt((step.astype(np.float64) ** 2).mean() / 12)) / rms(x) + 0.01


def rms(x: Array) -> float:
    """Return the root mean square of an array."""
    return float(np.sqrt((x.astype(np.float64) ** 2).mean())) or 1.0


@lru_cache(maxsize=1)
def random_weights(n: int, k: int) -> npt.NDArray[np.float32]:
    """Return the weights [N, K] that every peer quantises: normal, as those of a linear layer are."""
    w = np.random.default_rng(n + k).standard_normal((n, k), dtype=np.float32)
    w *= np.float32(0.02)
    w.setflags(write=False)
    return w


_PACKED: dict[tuple[str, int, int], Any] = {}


def packed(label: str, n: int, k: int, make: Callable[[], Any]) -> Any:
    """Return what ``make`` gives, kept while the same weights are asked for again (other M, cold)."""
    for key in [key for key in _PACKED if key[1:] != (n, k)]:
        del _PACKED[key]
    if (label, n, k) not in _PACKED:
        _PACKED[label, n, k] = make()
    return _PACKED[label, n, k]


def quantise(n: int, k: int, bits: int, group: int) -> tuple[Array, Array]:
    """Quantise `random_weights` symmetrically: codes uint8 [N, K] around 2**(bits-1), scales f32 [N, G].

    A group that is not full at the end of a row has a scale of its own.
    """

    def make() -> tuple[Array, Array]:
        codes = np.empty((n, k), np.uint8)
        groups = -(-k // group)
        scale = np.empty((n, groups), np.float32)
        zero = 1 << (bits - 1)
        for at in range(0, n, 512):
            w = random_weights(n, k)[at : at + 512]
            w = np.pad(w, ((0, 0), (0, groups * group - k))).reshape(len(w), groups, group)
            top = np.abs(w).max(axis=2) / (zero - 0.5)
            top = np.maximum(top.astype(np.float16), np.float16(1e-6)).astype(np.float32)
            q = np.clip(np.rint(w / top[:, :, None]) + zero, 0, 2 * zero - 1)
            codes[at : at + 512] = q.astype(np.uint8).reshape(len(w), -1)[:, :k]
            scale[at : at + 512] = top
        return codes, scale

    made: tuple[Array, Array] = packed(f"codes {bits} {group}", n, k, make)
    return made


def dequantise(codes: Array, scale: Array, bits: int, group: int) -> Array:
    """Return the real values of codes [rows, K] of `quantise`."""
    wide = np.repeat(scale.astype(np.float64), group, axis=1)[:, : codes.shape[1]]
    return wide * (codes.astype(np.float64) - (1 << (bits - 1)))


def nearest_bits(fmt: WeightFormat, offered: tuple[int, ...]) -> int | None:
    """Return the fewest offered bits that can hold a format's codes; None for float formats."""
    if fmt.is_float:
        return None
    return next((b for b in sorted(offered) if b >= fmt.bits_per_weight), max(offered))


def groups_of(fmt: WeightFormat, offered: tuple[int, ...]) -> list[int]:
    """Return the group sizes to compare with: the workload's own where it is offered, and all others."""
    return sorted(offered, key=lambda g: (g != fmt.group, g))
