"""What an artifact says about itself: the manifest and the flat programs of its entry points.

These structures are the contract between the pipeline (which writes them) and the runtime (which reads
them); both are plain JSON, strictly decoded.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import msgspec

SCHEMA = 1
"""Version of the artifact's schema; a newer one is refused.

What is at its default is not written in manifests, choices and decoders. So a new field there need not raise
the schema if whoever does not know the field acts as its default says; anything else raises it.
"""


class Buffer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor that a program's calls see.

    ``kind``: ``arena`` (scratch at byte ``offset`` of the entry's arena), ``weight`` (``source`` names a
    tensor of the weights member), ``state`` (``source`` names a state of the manifest; lives across calls).
    Several buffers may view the same bytes with other shapes. Offsets and tensors are 64-byte aligned,
    unless the pipeline proved that the reader accepts less.
    """

    kind: Literal["arena", "weight", "state"]
    shape: tuple[int, ...]
    dtype: str
    offset: int = 0
    source: str = ""


class Call(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One kernel call: symbol and the indices of its argument buffers."""

    kernel: str
    args: tuple[int, ...]
    label: str = ""
    """Where it comes from, e.g. ``layers.3.mlp.down`` (for profiles and errors)."""


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One entry point: a flat call sequence over a preplanned arena.

    Inputs are copied into their arena buffers before the calls, outputs are read from theirs.
    """

    arena_bytes: int
    buffers: tuple[Buffer, ...]
    calls: tuple[Call, ...]
    inputs: dict[str, int]
    """Input name to buffer index, in the order of the call's positional arguments."""
    outputs: dict[str, int]


class State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tensor that lives across calls (a KV cache), in the layout its kernels chose; zero at start.

    It is that of one sequence. Where several may be in progress, their tensors follow one another in memory.
    """

    shape: tuple[int, ...]
    dtype: str


class Layer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What one layer attends to, and what it keeps between calls."""

    name: str
    """Of its stage: ``layers.3``, ``mtp.0``."""
    role: str = "full"
    """``full``; ``window``; ``select`` (chooses positions, and may be dense itself); ``reuse`` (follows);
    ``quantised`` (dense, over a cache of few bits by its policy's choice)."""
    window: int = 0
    """Last positions that it sees, its own included; 0: no limit."""
    slots: int = 0
    """Positions that its caches hold; fewer than the context in a ring."""
    format: str = "f32"
    """Of its caches."""
    follows: str = ""
    """Layer whose lists it follows."""
    states: tuple[str, ...] = ()
    """Names of the states that it owns."""
    thresholds: tuple[float, ...] = ()
    """Of its query heads, where a calibration found those that blocks are chosen by; 0: the head is dense."""
    group: int = 0
    """Positions that are quantised together; 0: each by itself."""
    tail: int = 0
    """Newest positions that it keeps as they were, besides, where positions are quantised in groups."""
    first: int = 0
    """Leading positions that a ring keeps, in slots of their own before those of the others."""
    outside: float = 0.0
    """Mean attention mass outside of the best 5 % of the keys, where a calibration said by it which layers
    are quantised."""
    chosen_by: str = ""
    """Layer whose pre-gate chooses its experts; empty: its own router does, or it has none."""


class Pool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Pages that the sequences in progress take from one pool, instead of caches of their own.

    Position j of a sequence is in slot ``table[j // page] * page + j % page`` of each of the ``states``. The
    second extent of these is that of the slots, one page after the other.
    """

    page: int
    """Positions in a page."""
    pages: int
    states: tuple[str, ...]
    """Names of the states that all sequences have together."""
    table: str
    """Name of the state int32 ``[1, width]`` that says where a sequence's pages are; the caller keeps it."""


class Decoder(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How to generate text with the entry points.

    ``step_T(ids int32 [T], pos int32 [2]) -> hidden float32 [T, D]`` (and, with draft heads, ``prenorm``)
    appends T tokens (``pos = [start, valid]``; padding beyond ``valid``); ``head_T(hidden [T, D]) ->
    logits float32 [T, V]``; ``mtp{s}_T(prenorm [T, D], ids int32 [T], pos) -> hidden [T, D]`` is draft head
    s, finished by the same ``head_T``.
    """

    steps: tuple[int, ...]
    """Token counts T that have a ``step_T`` entry, ascending, the first is 1."""
    heads: tuple[int, ...]
    """Token counts T that have a ``head_T`` entry; contains 1."""
    hidden: int
    vocab: int
    max_context: int
    eos: tuple[int, ...] = ()
    bos: int | None = None
    """First token of an empty prompt; with others the tokenizer decides."""
    mtp: int = 0
    """Number of draft heads."""
    mtp_steps: tuple[int, ...] = ()
    adapters: tuple[str, ...] = ()
    """Names of low-rank adapters. With any, ``step_T`` takes ``adapter int32 [T]`` too: for each token the
    index of one, or -1 for none."""
    decode: tuple[int, ...] = ()
    """Token counts T that have a ``decode_T`` entry, ascending: like ``step_T``, for tokens that were
    generated, where these attend to less than those of a prompt; empty: ``step_T`` is for both."""
    rerun: int = 0
    """After so many tokens of ``decode_T`` these run again by ``step_T``, which makes their keys exact."""
    layers: tuple[Layer, ...] = ()
    """All layers in running order, draft heads last; empty in artifacts from before it was noted."""
    batch: int = 1
    """Sequences that may be in progress at once. Of more than one there is an entry ``batch_B``: like
    ``step_1`` for one token of each of B sequences, with ``ids int32 [B]`` and ``pos int32 [B, 2]``."""
    alike: tuple[int, ...] = ()
    """Token counts T, ascending, whose ``step_T`` and ``head_T`` add up in one order: a token's logits are
    the same bits in each."""
    unlike: tuple[str, ...] = ()
    """Workloads that kept entry points from adding up in one order."""
    order_costs: dict[str, float] = {}
    """Of the entry points that add up in one order: their time in kernels over that of kernels that were free
    to differ, less one, by the times behind the plan; without those of which not all was measured."""
    pool: Pool | None = None
    """Pages of the caches of whole contexts; None: each sequence has caches of its own."""


class Member(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Size and SHA-256 of one member of the artifact."""

    bytes: int
    sha256: str
    chunks: tuple[str, ...] = ()
    """SHA-256 of each run of ``chunk_bytes`` (weights only), checked before its first use."""
    chunk_bytes: int = 1 << 20


class Choice(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Why one workload got its kernel."""

    workload: str
    schedule: str
    config: dict[str, int | float | str | bool]
    kernel: str
    source: Literal["measured", "modelled", "default"]
    latency_us: float | None = None
    energy_mj: float | None = None
    energy_source: str | None = None
    """Name of the meter that measured the energy (``nvml``, ``rapl``, ...), or ``modelled``."""
    calls: dict[str, int] = {}
    """Entry name to number of calls."""
    schedule_version: int | None = None
    """Of the schedule that made the kernel and packed its weights; None for functions that no schedule
    supports (``generic.x86_tir``), and in artifacts that were made before it was noted."""


class Target(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the code was built for; ``features`` must all be present to load it."""

    kind: str
    name: str
    features: tuple[str, ...]
    threads: int


class Calibrated(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the codes of quantised weights were chosen, enough to choose them again."""

    method: str
    """``gptq`` or ``awq``."""
    text: str
    """Name of the file of calibration text; empty: standard-library sources that are not held out."""
    sequences: int
    length: int
    """Tokens of a sequence."""
    seed: int
    sha256: str
    """Of the calibration tokens, int32 little-endian."""


class GateFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file that gates came from: of an attention policy, or such as choose experts."""

    file: str
    """Its name."""
    sha256: str


def decoding_entry(entries: Collection[str]) -> str:
    """Return the name of the entry point that decodes one token, of those that an artifact has."""
    return "decode_1" if "decode_1" in entries else "step_1"


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The first member of an artifact (``manifest.json``), read and checked before any other byte."""

    schema: int
    name: str
    target: Target
    versions: dict[str, str]
    """mimo_compile, apache-tvm, apache-tvm-ffi (builder's versions)."""
    quant: str
    objective: str
    entries: tuple[str, ...]
    """Names; the programs are in ``programs.json``."""
    members: dict[str, Member]
    states: dict[str, State]
    plan: tuple[Choice, ...]
    decoder: Decoder | None = None
    modelled: bool = False
    """True if any choice rests on a modelled rather than a measured number."""
    calibrated: Calibrated | None = None
    """None: weights are stored as they were, or rounded to the nearest."""
    attention: str = "model"
    """Policy that the layers follow, as ``--attention`` spells it."""
    gates: GateFile | None = None
    """None: the policy has no gates, or they came with the model."""
    shapes_only: bool = False
    """True if no weights were read (``--shapes-only``): all tensors are zeros."""
    pre_gates: GateFile | None = None
    """Gates that choose the experts of the layer after theirs; None: there are none."""


class Programs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``programs.json``: the entry points by name."""

    entries: dict[str, Entry]
