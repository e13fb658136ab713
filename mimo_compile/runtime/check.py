"""Checks of a manifest and its programs: everything they point at exists and fits."""

from __future__ import annotations

import re
from collections.abc import Mapping

from mimo_compile.errors import ArtifactError
from mimo_compile.runtime import device_code, dtypes
from mimo_compile.runtime.pages import page_extent
from mimo_compile.runtime.program import (
    Buffer,
    Decoder,
    Entry,
    Manifest,
    Pool,
    Programs,
    State,
)
from mimo_compile.runtime.weights import ALIGNMENT, Spot
from mimo_compile.runtime.zipform import CODES

ROLES = ("full", "window", "select", "reuse", "quantised")
"""What a layer may be, as `program.Layer` says."""
MOST_SLOTS = 4096
"""Sequences that an artifact may have in progress."""
FORMATS = ("f32", "bf16", "e4m3", "i8", "i4", "i2", "i1")
"""Formats of KV caches that can be in an artifact."""
_LANES = 16
"""Tables are whole vectors of so many entries, and so are blocks of keys."""


def check_programs(
    manifest: Manifest, programs: Programs, weights: Mapping[str, Spot], where: str
) -> None:
    """Check that programs stay inside of arenas, weights and states, and hold what is promised.

    Raises:
        ArtifactError: They do not; the message names the entry and the buffer or call.
    """
    if sorted(programs.entries) != sorted(manifest.entries):
        raise ArtifactError(
            f"the manifest lists the entries {sorted(manifest.entries)}, the programs hold "
            f"{sorted(programs.entries)}",
            where=where,
        )
    for name, state in manifest.states.items():
        if not _sound(state.dtype, state.shape):
            raise ArtifactError(f"state {name!r} has no sound shape and dtype", where=where)
    held = {name: dtypes.size(s.dtype, s.shape) for name, s in manifest.states.items()}
    batch = 1 if manifest.decoder is None else manifest.decoder.batch
    if not 1 <= batch <= MOST_SLOTS:
        raise ArtifactError(f"batch {batch} is no number of sequences", where=where)
    if batch > 1 and any(size % ALIGNMENT for size in held.values()):
        raise ArtifactError(
            f"a state of one of {batch} sequences does not end on a {ALIGNMENT}-byte boundary",
            where=where,
        )
    pooled = _check_pool(manifest, where)
    sizes = {"weight": {name: spot.end - spot.begin for name, spot in weights.items()}}
    for name, entry in programs.entries.items():
        sequences = batch if name == f"batch_{batch}" else 1
        sizes["state"] = {
            state: size * (1 if state in pooled else sequences) for state, size in held.items()
        }
        _check_entry(entry, sizes, f"entry {name} of {where}")
    if manifest.decoder is not None:
        _check_decoder(manifest.decoder, programs.entries, where)
        _check_layers(manifest.decoder, manifest.states, where)
        if manifest.decoder.pool is not None:
            _check_tables(manifest.decoder.pool, programs.entries, where)


def check_code(manifest: Manifest, programs: Programs, code: bytes, where: str) -> None:
    """Check that code of GPU kernels is whole, and takes what calls give; object code says nothing of it.

    Raises:
        ArtifactError: It does not, or is for another architecture than the manifest says.
    """
    target = manifest.target
    if target.kind != "cuda":
        return
    found = device_code.decode(code, f"{CODES[target.kind]} of {where}")
    if found.table.arch != device_code.arch_of(target.features):
        raise ArtifactError(
            f"its kernels are for {found.table.arch}, the manifest says {target.name}", where=where
        )
    device_code.check_calls(found, programs, where)


def _check_pool(manifest: Manifest, where: str) -> frozenset[str]:
    """Check that pages and tables fit each other; returns the states that all sequences have together."""
    decoder, states = manifest.decoder, manifest.states
    pool = None if decoder is None else decoder.pool
    if decoder is None or pool is None:
        return frozenset()
    problem = ""
    table = states.get(pool.table)
    most = -(-decoder.max_context // max(pool.page, 1))
    if pool.page < 1 or pool.pages < 1 or pool.page * pool.pages < decoder.max_context:
        problem = f"has {pool.pages} pages of {pool.page}, for {decoder.max_context} positions"
    elif decoder.batch < 2:
        problem = "is there for one sequence"
    elif table is None or table.dtype != "int32" or len(table.shape) != 2 or table.shape[0] != 1:
        problem = f"has the table {pool.table!r}, which is no state int32 [1, width]"
    elif table.shape[1] * pool.page < decoder.max_context or pool.table in pool.states:
        problem = f"has a table of {table.shape[1]} pages, for {decoder.max_context} positions"
    elif table.shape[1] > -(-most // _LANES) * _LANES or pool.pages > decoder.batch * most:
        problem = (
            f"has {pool.pages} pages of {pool.page} and a table of {table.shape[1]}, more than "
            f"{decoder.batch} times {decoder.max_context} positions need"
        )
    elif not pool.states:
        problem = "has no states"
    for name in () if problem else pool.states:
        shape = states[name].shape if name in states else ()
        whole = len(shape) in (3, 4, 5) and min(shape) > 0
        entries = shape[page_extent(manifest.target.kind, shape)] if whole else 0
        fits = entries and not entries % pool.pages
        if not fits or pool.page * pool.pages not in [
            entries * n for n in _together(manifest, name, states[name], pool)
        ]:
            problem = f"has {pool.pages} pages of {pool.page} in {name} {list(shape)}"
    if problem:
        raise ArtifactError(f"the pool of pages {problem}", where=where)
    return frozenset(pool.states)


def _together(manifest: Manifest, name: str, state: State, pool: Pool) -> tuple[int, ...]:
    """Return for how many slots one entry of a pool's state, in the extent of the pages, may be.

    Keys stand in blocks ``[heads, slots / 16, D, lanes]``, values in rows of float32, in pairs of 16 bits or
    in blocks of bytes; in caches that keep each by itself, both in rows. What describes the keys of a page
    lies together, ``[heads, pages, parts, D, lanes]``. On GPUs each slot is an entry, but that groups
    (codes and scales) and descriptors of a page share its slots; 8-bit floats have no pages there.
    """
    page = pool.page
    if manifest.target.kind == "cuda":
        if not page_extent("cuda", state.shape):
            return (page // max(state.shape[0] // pool.pages, 1),)
        if state.dtype not in ("uint8", "float16"):
            return (1,)
        layers = manifest.decoder.layers if manifest.decoder else ()
        return tuple({layer.group for layer in layers if name in layer.states})
    if len(state.shape) == 5 or state.dtype == "float16":  # scales
        return (page,)
    size = dtypes.itemsize(state.dtype)
    return (_LANES,) if len(state.shape) == 4 or size == 1 else (1, 4 // min(size, 4))


def _check_tables(pool: Pool, entries: Mapping[str, Entry], where: str) -> None:
    """Check that what appends to sequences, or sees pages, is given the table that says which are whose."""
    for name, entry in entries.items():
        seen = {entry.buffers[i] for call in entry.calls for i in call.args}
        states = {buffer.source for buffer in seen if buffer.kind == "state"}
        appends = name.startswith(("step_", "decode_", "batch_"))
        if (appends or states.intersection(pool.states)) and pool.table not in states:
            raise ArtifactError(
                f"entry {name} does not look into the table {pool.table!r}", where=where
            )


def _sound(dtype: str, shape: tuple[int, ...]) -> bool:
    return dtypes.known(dtype) and all(0 <= n < 1 << 48 for n in shape)


def _check_entry(entry: Entry, sizes: dict[str, dict[str, int]], where: str) -> None:
    for index, buffer in enumerate(entry.buffers):
        problem = _problem(buffer, entry.arena_bytes, sizes)
        if problem:
            raise ArtifactError(f"buffer {index} {problem}", where=where)
    count = len(entry.buffers)
    for call in entry.calls:
        if not all(0 <= index < count for index in call.args):
            raise ArtifactError(
                f"call {call.label or call.kernel} names buffers beyond the {count} there are",
                where=where,
            )
    for name, index in (*entry.inputs.items(), *entry.outputs.items()):
        if not 0 <= index < count:
            raise ArtifactError(f"{name!r} is buffer {index} of {count}", where=where)
    for name, index in entry.inputs.items():
        if entry.buffers[index].kind == "weight":
            raise ArtifactError(f"input {name!r} would overwrite a weight", where=where)


def _problem(buffer: Buffer, arena_bytes: int, sizes: dict[str, dict[str, int]]) -> str:
    if not _sound(buffer.dtype, buffer.shape):
        return f"has no sound shape and dtype: {buffer.dtype}{list(buffer.shape)}"
    if buffer.kind == "arena":
        room = arena_bytes
    elif buffer.source in sizes[buffer.kind]:
        room = sizes[buffer.kind][buffer.source]
    else:
        return f"is {buffer.kind} {buffer.source!r}, which does not exist"
    if buffer.offset < 0 or buffer.offset % dtypes.itemsize(buffer.dtype):
        return f"lies at byte {buffer.offset}, off the boundary of its elements"
    if buffer.offset + dtypes.size(buffer.dtype, buffer.shape) > room:
        return (
            f"({dtypes.spell(buffer.dtype, buffer.shape)} at byte {buffer.offset}) ends beyond "
            f"the {room} bytes of its {buffer.kind} {buffer.source}".rstrip()
        )
    return ""


def _check_decoder(decoder: Decoder, entries: Mapping[str, Entry], where: str) -> None:
    for what, counts in (("steps", decoder.steps), ("heads", decoder.heads)):
        if not counts or counts[0] != 1 or list(counts) != sorted(set(counts)):
            raise ArtifactError(f"{what} {list(counts)} do not ascend from 1", where=where)
    if len(set(decoder.adapters)) != len(decoder.adapters):
        raise ArtifactError("two adapters have one name", where=where)
    if list(decoder.decode) != sorted(set(decoder.decode)) or decoder.decode[:1] not in ((), (1,)):
        raise ArtifactError(f"decode {list(decoder.decode)} does not ascend from 1", where=where)
    if decoder.rerun < 0 or (decoder.rerun and not decoder.decode):
        raise ArtifactError(f"rerun {decoder.rerun} without decode entries", where=where)
    tokens = [(f"step_{t}", t) for t in decoder.steps]
    tokens += [(f"decode_{t}", t) for t in decoder.decode]
    tokens += [(f"batch_{decoder.batch}", decoder.batch)] if decoder.batch > 1 else []
    for entry, count in tokens:
        hidden = ("float32", (count, decoder.hidden))
        outputs = {"hidden": hidden} | ({"prenorm": hidden} if decoder.mtp else {})
        pos = (count, 2) if entry.startswith("batch_") else (2,)
        inputs: list[tuple[str, tuple[int, ...]]] = [("int32", (count,)), ("int32", pos)]
        if decoder.adapters:
            inputs.append(("int32", (count,)))
        _check_shapes(entries, entry, inputs, outputs, where)
    for count in decoder.heads:
        hidden = ("float32", (count, decoder.hidden))
        logits = ("float32", (count, decoder.vocab))
        _check_shapes(entries, f"head_{count}", [hidden], {"logits": logits}, where)
    for head in range(decoder.mtp):
        for count in decoder.mtp_steps:
            hidden = ("float32", (count, decoder.hidden))
            inputs = [hidden, ("int32", (count,)), ("int32", (2,))]
            _check_shapes(entries, f"mtp{head}_{count}", inputs, {"hidden": hidden}, where)


def _check_layers(decoder: Decoder, states: Mapping[str, State], where: str) -> None:
    layers = decoder.layers
    names = {layer.name for layer in layers}
    if len(names) != len(layers):
        raise ArtifactError("two layers have one name", where=where)
    owned: set[str] = set()
    before: set[str] = set()
    for layer in layers:
        what = f"layer {layer.name}"
        if not re.fullmatch(r"[a-z]+\.[0-9]{1,9}", layer.name):
            raise ArtifactError(f"{layer.name!r} is no name of a layer", where=where)
        if layer.role not in ROLES or layer.format not in FORMATS:
            raise ArtifactError(
                f"{what} has role {layer.role!r} and caches of {layer.format!r}", where=where
            )
        ring = layer.slots < decoder.max_context
        if layer.window < 0 or layer.slots < 1 or (ring and not 0 < layer.window <= layer.slots):
            raise ArtifactError(
                f"{what} sees {layer.window} positions of {layer.slots}", where=where
            )
        grouped = bool(layer.group or layer.tail)
        whole = 0 < layer.group <= layer.tail <= layer.slots and not layer.tail % layer.group
        if grouped and not (whole and not layer.window):
            raise ArtifactError(
                f"{what} keeps {layer.tail} of {layer.slots} positions beside groups of {layer.group}, and "
                f"sees {layer.window or 'all'}",
                where=where,
            )
        behind = layer.slots - layer.first
        if layer.first and not (layer.first > 0 and 0 < layer.window <= behind):
            raise ArtifactError(
                f"{what} keeps {layer.first} positions before a ring of {behind}",
                where=where,
            )
        if (layer.role == "reuse") != bool(layer.follows):
            raise ArtifactError(
                f"{what} has role {layer.role} and follows {layer.follows!r}", where=where
            )
        if layer.follows and layer.follows not in before:
            raise ArtifactError(
                f"{what} follows {layer.follows}, which is none before it", where=where
            )
        if layer.chosen_by and layer.chosen_by not in before:
            raise ArtifactError(
                f"{what} has its experts chosen by {layer.chosen_by}, which is none before it",
                where=where,
            )
        before.add(layer.name)
        for name in layer.states:
            if name not in states or name in owned:
                problem = "does not exist" if name not in states else "belongs to two layers"
                raise ArtifactError(f"{what}: state {name} {problem}", where=where)
            owned.add(name)


def _check_shapes(
    entries: Mapping[str, Entry],
    name: str,
    inputs: list[tuple[str, tuple[int, ...]]],
    outputs: Mapping[str, tuple[str, tuple[int, ...]]],
    where: str,
) -> None:
    entry = entries.get(name)
    if entry is None:
        raise ArtifactError(f"the decoder's entry {name} is missing", where=where)
    found = [
        [(entry.buffers[i].dtype, entry.buffers[i].shape) for i in side.values()]
        for side in (entry.inputs, entry.outputs)
    ]
    if found != [inputs, list(outputs.values())]:
        raise ArtifactError(
            f"{name} maps {_spell(found[0])} to {_spell(found[1])} instead of {_spell(inputs)} to "
            f"{_spell(list(outputs.values()))}",
            where=where,
        )
    if list(entry.outputs) != list(outputs):
        raise ArtifactError(
            f"{name} gives {', '.join(entry.outputs)} instead of {', '.join(outputs)}", where=where
        )


def _spell(types: list[tuple[str, tuple[int, ...]]]) -> str:
    return "(" + ", ".join(dtypes.spell(*one) for one in types) + ")"
