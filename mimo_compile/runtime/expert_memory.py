"""Experts that stay in the artifact's file, and come into memory of a given size as layers need them.

An expert kernel takes the packed weights of all E experts of its layer as arrays whose first extent is E,
and looks an expert up by its number. Here such an array has memory behind its first *slots* alone, and the
kernel is given the slots of a token's experts in place of their numbers. It runs as it is compiled, and says
the same bits: which tokens an expert gets, and in which order a token adds up its experts, does not depend on
numbers.

Layers whose experts are of one shape share *banks* of at most E slots, so that a prompt's layer may have all
of its experts while a generated token's layers have a few each.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING, Any

from mimo_compile.errors import UsageError
from mimo_compile.runtime import routers
from mimo_compile.runtime.expert_bank import POLICIES, Bank
from mimo_compile.runtime.expert_calls import limited
from mimo_compile.runtime.expert_file import ExpertFile, Shape, Slots, Stack, Throttle
from mimo_compile.runtime.foresight import Ahead
from mimo_compile.runtime.pregate import Gate, Pair, PreGates
from mimo_compile.runtime.residency import Residency
from mimo_compile.runtime.sizes import parse_size, spell_size
from mimo_compile.runtime.weights import MappedWeights

if TYPE_CHECKING:
    from mimo_compile.runtime.container import Parts
    from mimo_compile.runtime.entry import Array, BoundEntry
    from mimo_compile.runtime.program import Buffer, Call, Entry, Manifest


MOST_AHEAD = 8
"""Layers to look ahead: what their routers say of rows that far away is hardly right."""

APART = frozenset(
    f"moe.x86_{name}"
    for name in (
        "float", "planes", "trits", "strits", "lut", "lut2", "lut_shuffle", "tl1", "tl2", "codebook",
        "complex", "vnni",
    )
)  # fmt: skip
"""Schedules that promise an order of sums: a row's result has the same bits whatever other rows there are."""


@dataclass(frozen=True, slots=True)
class ExpertMemory:
    """How much memory experts may take, and how it is used."""

    size: int | str
    """Bytes, or text such as ``2GiB``."""
    policy: str = "load"
    """What leaves first: ``load``, the expert with the least recent load; ``lru``, the one that was needed
    longest ago."""
    ahead: int = 1
    """Load what so many of the next layers will probably need while one runs; 0: nothing."""
    bytes_per_s: float | None = None
    """Read no faster than that from the file, to see what a slower one would do; None: as fast as it goes."""
    pre_gates: str | os.PathLike[str] | None = None
    """File of trained gates (see `PreGates`) that say what layers will need; None: their routers say it."""

    @property
    def budget(self) -> int:
        """Return the size in bytes.

        Raises:
            UsageError: It is none.
        """
        size = self.size
        if isinstance(size, str):
            count = parse_size(size) or 0
        else:
            try:
                count = 0 if isinstance(size, bool) else index(size)
            except TypeError:
                count = 0
        if count < 1:
            raise UsageError(
                f"--expert-memory (expert_memory): {size!r} is no size",
                remedy="give memory such as 512MiB or 2GiB, or in Python a number of bytes",
            )
        return count

    def check(self) -> None:
        """Check the other fields.

        Raises:
            UsageError: The policy is not known, or a number is out of range.
        """
        if self.policy not in POLICIES:
            raise UsageError(
                f"expert_memory: there is no policy {self.policy!r}",
                remedy=f"choose one of {', '.join(POLICIES)}",
            )
        if type(self.ahead) is not int or not 0 <= self.ahead <= MOST_AHEAD:
            raise UsageError(
                f"expert_memory: {self.ahead!r} is no number of layers to look ahead",
                remedy=f"give 0 to {MOST_AHEAD}",
            )
        rate = self.bytes_per_s
        real = isinstance(rate, int | float) and not isinstance(rate, bool)
        if rate is not None and not (real and 0 < rate < float("inf")):
            raise UsageError(
                f"expert_memory: {rate!r} bytes per second are no rate",
                remedy="give a positive number, or None",
            )
        if self.pre_gates is None:
            return
        if not isinstance(self.pre_gates, str | os.PathLike):
            raise UsageError(
                f"expert_memory: pre_gates is {self.pre_gates!r}, which names no file",
                remedy="give the path of a file, or None",
            )
        if not self.ahead:
            raise UsageError(
                "expert_memory: pre_gates say what comes ahead of need, and ahead is 0",
                remedy="leave pre_gates out, or look ahead 1 layer or more",
            )


def rules_of(manifest: Manifest) -> dict[str, tuple[int, int]]:
    """Return E and k of each kernel of a plan that runs experts."""
    out = {}
    for choice in manifest.plan:
        op, _, text = choice.workload.partition(":")
        if op == "moe":
            given = dict(item.split("=", 1) for item in text.split(","))
            out[choice.kernel] = int(given["e"]), int(given["k"])
    return out


def apart_of(manifest: Manifest) -> frozenset[str]:
    """Return the kernels of a plan in which only rows that count need have experts (`APART`).

    None of a model that is no decoder: all of its rows count.
    """
    plan = manifest.plan if manifest.decoder is not None else ()
    return frozenset(choice.kernel for choice in plan if choice.schedule in APART)


def stacks_of(manifest: Manifest, programs: Mapping[str, Entry]) -> list[Stack]:
    """Return the experts of all layers, in the order in which entry points run them.

    Arrays that are not of one expert after the other, or that other kernels read as well, are left out with
    their layers: these stay as they are.
    """
    rules = rules_of(manifest)
    found: dict[tuple[str, ...], Stack] = {}
    readers: dict[str, set[tuple[str, ...]]] = defaultdict(set)  # by what else they read
    for entry in programs.values():
        for call in entry.calls:
            weights = [entry.buffers[i] for i in call.args if entry.buffers[i].kind == "weight"]
            sources = packed(call, entry.buffers)
            experts, chosen = rules.get(call.kernel, (-1, 0))
            whole = weights and all(buffer.shape[:1] == (experts,) for buffer in weights)
            for source in sources:
                readers[source].add(sources if whole else ())
            if whole:
                shape = Shape(experts, tuple((b.dtype, b.shape[1:]) for b in weights))
                found.setdefault(sources, Stack(call.label, sources, shape, chosen))
    return [
        stack
        for stack in found.values()
        if all(readers[s] == {stack.sources} for s in stack.sources)
    ]


def packed(call: Call, buffers: Sequence[Buffer]) -> tuple[str, ...]:
    """Return the names of the weights among a call's arguments, in their order."""
    return tuple(buffers[i].source for i in call.args if buffers[i].kind == "weight")


def share_slots(stacks: Sequence[Stack], budget: int) -> dict[Shape, int]:
    """Divide a number of bytes into slots for the experts of each shape.

    Each shape gets what one token needs of it, and then a part of the rest like its part of all experts.

    Raises:
        UsageError: The bytes are fewer than what a token needs.
    """
    need: dict[Shape, int] = defaultdict(int)
    total: dict[Shape, int] = defaultdict(int)
    for stack in stacks:
        need[stack.shape] = max(need[stack.shape], stack.chosen)
        total[stack.shape] += stack.shape.experts
    least = sum(count * shape.bytes for shape, count in need.items())
    if budget < least:
        raise UsageError(
            f"--expert-memory {spell_size(budget)} is too little: the experts that a layer of one token "
            f"needs take {least} bytes",
            remedy=f"Give {-(-least // 1024)}KiB or more; more than one layer's experts save reading.",
        )
    left = budget - least
    everything = sum(count * shape.bytes for shape, count in total.items())
    return {
        shape: min(need[shape] + left * count // everything, count)
        for shape, count in total.items()
    }


def share_banks(layers: int, experts: int, slots: int, least: int) -> list[int]:
    """Return the slots of each bank that so many layers share, ``least`` to ``experts``, by number of layers.

    Layer i belongs to bank i modulo their number, so that neighbours are in different ones. Slots are left
    over where there is no bank to put them.
    """
    count = min(layers, -(-slots // experts), slots // least)
    out = [least] * count
    served = [len(range(bank, layers, count)) for bank in range(count)]
    for _ in range(min(slots, count * experts) - count * least):
        free = [bank for bank in range(count) if out[bank] < experts]
        out[min(free, key=lambda bank: ((out[bank] + 1) / served[bank], bank))] += 1
    return out


class Experts:
    """The experts of a module: where its kernels find them, and how they come there."""

    def __init__(
        self, manifest: Manifest, programs: Mapping[str, Entry], weights: MappedWeights,
        how: ExpertMemory, where: str,
    ) -> None:  # fmt: skip
        """Share the memory among layers; nothing is read yet.

        Args:
            manifest: Says which kernels run experts.
            programs: The entry points.
            weights: Of the artifact.
            how: How much memory there is, and what is done with it.
            where: Path of the artifact, for messages.

        Raises:
            UsageError: The artifact has no experts, or the memory is less than a token needs.
            InputError: The file of gates cannot be read, or is of another model.
        """
        how.check()
        self.how = how
        self.budget = how.budget
        self.stacks = stacks_of(manifest, programs)
        if not self.stacks:
            raise UsageError(
                f"--expert-memory: {manifest.name} has no experts", remedy="leave it out"
            )
        self.slots = self.slot_bytes = 0
        """Experts that can be in memory at once, and the bytes of all slots: all that experts ever take."""
        banks: list[Bank] = []
        bank_of = [0] * len(self.stacks)
        for shape, slots in share_slots(self.stacks, self.budget).items():
            layers = [i for i, stack in enumerate(self.stacks) if stack.shape == shape]
            chosen = max(self.stacks[i].chosen for i in layers)
            sizes = share_banks(len(layers), shape.experts, slots, chosen)
            for number, layer in enumerate(layers):
                bank_of[layer] = len(banks) + number % len(sizes)
            banks += [
                Bank(size, how.policy, len(range(number, len(layers), len(sizes))), chosen)
                for number, size in enumerate(sizes)
            ]
            self.slots += sum(sizes)
            self.slot_bytes += sum(sizes) * shape.bytes
        shape_of = {bank: stack.shape for bank, stack in zip(bank_of, self.stacks, strict=True)}
        held = {bank: Slots(shape, banks[bank].slots) for bank, shape in shape_of.items()}
        self.memory = [held[bank] for bank in bank_of]
        """The slots of each layer; those of a bank are the same."""
        file = ExpertFile(self.stacks, self.memory, weights, Throttle(how.bytes_per_s), where)
        self.residency = Residency(banks, bank_of, file)
        self._places = {
            source: (layer, part)
            for layer, stack in enumerate(self.stacks)
            for part, source in enumerate(stack.sources)
        }
        self._layer_of = {stack.sources: layer for layer, stack in enumerate(self.stacks)}
        gates = _gates(how, self.stacks, programs)
        self._ahead = Ahead(how.ahead, frozenset(routers.rules_of(manifest)), gates)
        self._apart = apart_of(manifest)

    @property
    def experts(self) -> int:
        """How many there are in all layers."""
        return sum(stack.shape.experts for stack in self.stacks)

    @property
    def bytes(self) -> int:
        """Bytes of all of them."""
        return sum(stack.shape.experts * stack.shape.bytes for stack in self.stacks)

    def holds(self, source: str) -> bool:
        """Whether a tensor of the weights is of experts that come and go."""
        return source in self._places

    def place(self, source: str) -> tuple[Array, Any]:
        """Return the array that kernels take instead of a tensor, and the same as their argument."""
        layer, part = self._places[source]
        return self.memory[layer].argument(part)

    def limit(self, bound: BoundEntry) -> None:
        """Make an entry point, whose arrays are of `place`, have its experts before it runs them."""
        layers = {
            at: self._layer_of[sources]
            for at, call in enumerate(bound.program.calls)
            if (sources := packed(call, bound.program.buffers)) in self._layer_of
        }
        experts = {layer: self.stacks[layer].shape.experts for layer in layers.values()}
        limited(bound, layers, experts, self.residency, self._ahead, self._apart)

    def check(self) -> None:
        """Check that this process may use them.

        Raises:
            UsageError: It was forked from the one that loaded the module.
        """
        self.residency.check()

    def facts(self) -> dict[str, int | float]:
        """Return sizes and counts, for people and ``--json``."""
        traffic = self.residency.traffic
        return {
            "budget_bytes": self.budget, "slot_bytes": self.slot_bytes, "slots": self.slots,
            "experts": self.experts, "expert_bytes": self.bytes, "needs": traffic.needs,
            "hits": traffic.hits, "ahead": traffic.ahead, "late": traffic.late,
            "misses": traffic.misses, "loaded_ahead": traffic.loaded_ahead, "unused": traffic.unused,
            "dropped": traffic.dropped, "failed_ahead": traffic.failed_ahead, "waves": traffic.waves,
            "bytes_read": traffic.bytes_read, "stall_seconds": traffic.stall_seconds,
        }  # fmt: skip


def _gates(
    how: ExpertMemory, stacks: Sequence[Stack], programs: Mapping[str, Entry]
) -> Mapping[Pair, Gate]:
    """Return the trained gates that are asked for; none where none are.

    Raises:
        InputError: Their file cannot be read, or is of another model.
    """
    if how.pre_gates is None:
        return {}
    known = {stack.sources for stack in stacks}
    widths = {
        entry.buffers[call.args[0]].shape[-1]
        for entry in programs.values()
        for call in entry.calls
        if packed(call, entry.buffers) in known
    }
    gates = PreGates.load(how.pre_gates)
    gates.check(stacks, widths)
    return gates.gates


def experts_of(parts: Parts, asked: int | str | ExpertMemory) -> Experts:
    """Return the experts of an artifact, whose memory is limited as a caller asks.

    Raises:
        UsageError: What is asked for is no memory, or not possible for this artifact.
    """
    how = asked if isinstance(asked, ExpertMemory) else ExpertMemory(asked)
    if not isinstance(parts.weights, MappedWeights):
        raise UsageError("expert_memory: an artifact that is not saved is in memory already")
    return Experts(parts.manifest, parts.programs.entries, parts.weights, how, parts.where)
