"""What an attention policy says, as data: it names no kernel, and no kernel knows a policy.

A policy answers where scores come from (`Score`), how blocks are chosen by them (`Select`), what each layer
does (`LayerRole`) and what it needs from the model. `workloads` turns the answers into workloads of the ops
``score_*``, `select_blocks`, `sparse_attention`, `cached_attention`.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import isnan
from typing import Any, ClassVar, Literal

from mimo_compile.errors import UsageError
from mimo_compile.ir.workload import Value, Workload

Kind = Literal["full", "window", "select", "reuse", "quantised"]
"""full: sees everything, chooses nothing; window: the last positions (and sinks); select: makes a list;
reuse: follows an earlier layer's list; quantised: sees everything in a low-bit cache."""
ARITHMETIC = ("float", "int8", "int8half")
MOST = 1 << 28
"""Greatest value of an argument: longer than any context, and sums of some fit 32 bits."""


def arg(
    default: Value,
    doc: str,
    *,
    low: float = 0,
    high: float = MOST,
    choices: tuple[str, ...] = (),
) -> Any:
    """Declare an argument of a policy: default, meaning, least and greatest value or allowed words."""
    limits = {"low": low, "high": high, "choices": choices}
    return field(default=default, metadata={"doc": doc, **limits})


@dataclass(frozen=True, slots=True)
class Score:
    """Where scores come from."""

    op: str
    """Op that computes them."""
    source: str
    """Its ``kind``."""
    per: Literal["head", "group", "all"]
    """Lists for each query head, for each KV head, or one for all."""
    agg: str = "none"
    """How the heads that share a list are brought together."""
    options: tuple[tuple[str, Value], ...] = ()
    """Further parameters of the op."""


@dataclass(frozen=True, slots=True)
class Select:
    """How blocks are chosen; the parameters of `select_blocks`."""

    rule: str = "topk"
    k: int = 0
    share: float = 0.0
    value: float = 0.0
    """Threshold or mass, where one number holds for every head."""
    first: int = 0
    last: int = 1
    merge: str = "none"
    positive: bool = False


@dataclass(frozen=True, slots=True)
class LayerRole:
    """What one layer does."""

    kind: Kind
    dense: bool
    """It attends to everything that is causal (a select layer may, too)."""
    list_of: int | None
    """Layer whose list it follows; None without a list."""
    cache_of: int
    """Layer whose keys and values it reads by that list."""
    window: int = 0
    """Positions of a window branch of its own; 0: none."""
    hidden_of: int | None = None
    """Layer whose input its keys and values are projected from, if not its own."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """Extents of one layer's attention in one call."""

    t: int
    h: int
    kv: int
    d: int
    dv: int
    cap: int
    length: int = 0
    """KV length; 0: cap."""
    sink: int = 0
    """1 if the model has learned sink logits."""
    c: str = "f32"
    """Format of the KV caches."""


@dataclass(frozen=True, slots=True)
class Steps:
    """The workloads of one sparse layer; a layer that reuses a list has only the last two."""

    score: Workload | None
    select: Workload | None
    attend: Workload
    beside: tuple[Workload, ...] = ()
    """Other branches, each with a softmax and, where it is a window, a cache of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPolicy(ABC):
    """One system; its fields that are declared by `arg` are its arguments."""

    name: ClassVar[str]
    phases: ClassVar[tuple[str, ...]] = ("prefill", "decode")
    """Where it is sparse; elsewhere attention is dense."""
    needs: ClassVar[tuple[str, ...]] = ()
    """What a model must have been trained with (or given): gates, indexer ..."""
    branches: ClassVar[tuple[str, ...]] = ("listed",)
    """Attention outputs that a sparse layer adds up, by gates if there are several."""
    alone: ClassVar[bool] = True
    """Every layer decides for itself, so layers with a window of the model's own can stay as they are."""

    trained: ClassVar[tuple[str, ...]] = ()
    """Arguments that, unless given, are what the model or its gates were trained with."""

    given: tuple[str, ...] = field(default=(), compare=False)
    """Those of `trained` that the text named, be it with their default."""
    arithmetic: str = "float"
    """Of q.k and P.V: `float`, `int8` or `int8half` (only q.k)."""

    def __post_init__(self) -> None:
        """Check what parsing cannot."""
        if self.arithmetic not in ARITHMETIC:
            raise UsageError(f"--attention: no arithmetic {self.arithmetic!r}")
        for f in fields(self):
            value, low = getattr(self, f.name), f.metadata.get("low")
            choices = f.metadata.get("choices")
            if choices and value not in choices:
                raise UsageError(
                    f"--attention {self.name}: {f.name}={value} is unknown",
                    remedy=f"choose from {', '.join(choices)}",
                )
            if low is None or isinstance(value, str):
                continue
            high = f.metadata["high"]
            if not low <= value <= high:  # written so that nan is refused
                side = f"above {high:.12g}" if value > high else f"below {low:g}"
                side = "no number" if isnan(value) else side
                raise UsageError(f"--attention {self.name}: {f.name}={value} is {side}")
        if problem := self.problem():
            raise UsageError(f"--attention {self.name}: {problem}")

    def problem(self) -> str:
        """Return what does not fit together; empty if all does."""
        return ""

    # -- to be answered by each system ---------------------------------------------------------

    @property
    def block(self) -> int:
        """Positions in a block of selection."""
        return 1

    @property
    def rows(self) -> int:
        """Tokens that share a list."""
        return 1

    @property
    def score(self) -> Score | None:
        """Where scores come from; None: nothing is scored."""
        return None

    @property
    def select(self) -> Select | None:
        """How blocks are chosen; None: the set is fixed."""
        return None

    @property
    def kept_window(self) -> int:
        """Last positions that the listed branch always sees."""
        return 0

    @property
    def sees_all(self) -> int:
        """Most tokens of which nothing is left out; a little too many where blocks are cut off."""
        chosen = self.select
        if chosen is None:
            return self.kept_window
        return MOST if chosen.share >= 1 else chosen.k * self.block + self.kept_window

    @property
    def quantised_cache(self) -> str:
        """Format of the caches of layers whose role is ``quantised``; empty: there are no such layers."""
        return ""

    def spread(self, layer: int) -> float:
        """Return how much of a layer's attention a calibration found outside of its best keys; 0: nothing."""
        return 0.0

    @property
    def branch_window(self) -> int:
        """Positions of the window branch with a cache of its own; 0: there is none."""
        return 0

    def roles(self, layers: int) -> tuple[LayerRole, ...]:
        """Return each layer's role, for a model whose layers are all global."""
        return tuple(self.role_alone(i) for i in range(layers))

    def role_alone(self, layer: int) -> LayerRole:
        """Return the role of a layer that decides for itself."""
        if self.select is None:
            return LayerRole("full", True, None, layer)
        return LayerRole("select", False, layer, layer, self.branch_window)

    def rectified(self, steps: int, start: int) -> tuple[int, int] | None:
        """Return the positions that must run again, densely, after a decoding step; None: none.

        Args:
            steps: Tokens whose keys and values were written since the prompt, this step's included.
            start: Length of the prompt.
        """
        return None

    @property
    def rerun(self) -> int:
        """Tokens after which `rectified` gives positions; 0: it never does."""
        return 0

    # -- what follows ----------------------------------------------------------------------------

    def plan(self, layers: int, windows: Sequence[int] = ()) -> tuple[LayerRole, ...]:
        """Return what each layer does.

        Args:
            layers: Number of layers.
            windows: The model's own window of each layer (0: global); such layers keep it.

        Raises:
            UsageError: no layers, or the policy shares lists across layers and some have windows.
        """
        if layers < 1 or len(windows) not in (0, layers):
            raise UsageError(f"--attention {self.name}: a plan needs layers, one window for each")
        if any(windows) and not self.alone:
            raise UsageError(
                f"--attention {self.name}: its layers share lists, so all must be global; "
                f"layer {next(i for i, w in enumerate(windows) if w)} of this model has a window",
                remedy="choose model, full, stream, quest, seer, moba, resa, sale, tailorkv or dsa",
            )
        roles = self.roles(layers)
        if not windows:
            return roles
        return tuple(
            LayerRole("window", False, None, i, w) if w else role
            for i, (role, w) in enumerate(zip(roles, windows, strict=True))
        )

    def workloads(self, g: Geometry) -> Steps:
        """Return the workloads of a sparse layer (a dense one: `cached_attention` alone)."""
        from mimo_compile.ir.ops import get_op

        select, op = self.select, {"cap": g.cap, "block": self.block, "len": g.length}
        shape: dict[str, Value] = {"t": g.t, "h": g.h, "kv": g.kv, "d": g.d, "dv": g.dv, "c": g.c}
        if select is None:
            if self.kept_window:
                return Steps(None, None, self._ring(g, shape, self.kept_window))
            dense = get_op("cached_attention").workload(
                **shape, cap=g.cap, sink=g.sink, len=g.length
            )
            return Steps(None, None, dense)
        source = self.score
        assert source is not None
        scored = get_op(source.op)
        hs = {"head": g.h, "group": g.kv, "all": 1}[source.per]
        known = {p.name for p in scored.params}
        given: dict[str, Value] = {**shape, **op, "rows": self.rows, "agg": source.agg}
        given |= {"kind": source.source, **dict(source.options)}
        score = scored.workload(**{k: v for k, v in given.items() if k in known})
        chooser = get_op("select_blocks")
        choice = chooser.workload(
            t=g.t, hs=g.h if select.merge == "rank" else hs, k=select.k, rule=select.rule,
            share=select.share, rows=self.rows, first=select.first, last=select.last,
            merge=select.merge, positive=int(select.positive), **op,
        )  # fmt: skip
        kmax = next(a.shape[2] for a in chooser.args(choice) if a.name == "idx")
        attend = get_op("sparse_attention").workload(
            **shape, hs=hs, kmax=kmax, rows=self.rows, window=self.kept_window, sink=g.sink, **op
        )
        beside: tuple[Workload, ...] = ()
        if self.branch_window:
            beside = (self._ring(g, shape, self.branch_window),)
        return Steps(score, choice, attend, beside)

    def _ring(self, g: Geometry, shape: Mapping[str, Value], window: int) -> Workload:
        """Return attention over a ring of the last positions."""
        from mimo_compile.ir.ops import get_op

        return get_op("cached_attention").workload(
            **shape, cap=window + g.t - 1, window=window, sink=g.sink, len=g.length or g.cap
        )

    def __str__(self) -> str:
        """Return the ``--attention`` text: no arguments that equal their default, unless in `given`."""
        given = [
            f"{f.name}={getattr(self, f.name)}"
            for f in fields(self)
            if f.metadata and (getattr(self, f.name) != f.default or f.name in self.given)
        ]
        suffix = "" if self.arithmetic == "float" else f"+{self.arithmetic}"
        return self.name + (":" + ",".join(given) if given else "") + suffix
