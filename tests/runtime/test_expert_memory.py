"""Experts that stay in the file: whatever is in memory, tokens are the same bits."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import shutil
import threading
from functools import cache
from pathlib import Path

import expert_samples as samples
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.errors import ArtifactError, UsageError
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.runtime import ExpertMemory, load, weights
from mimo_compile.runtime.batch import append_each
from mimo_compile.runtime.container import open_artifact
from mimo_compile.runtime.expert_bank import POLICIES
from mimo_compile.runtime.expert_calls import ExpertCall
from mimo_compile.runtime.expert_memory import APART, Experts, experts_of, share_banks
from mimo_compile.runtime.foresight import Foresight, Rows
from mimo_compile.runtime.memory import Zeroed
from mimo_compile.runtime.routing import recording
from mimo_compile.schedules import SCHEDULES, get_schedule
from mimo_compile.schedules.base import Schedule
from mimo_compile.schedules.emit.bf16 import NEEDS

ALL = len(samples.LAYERS) * samples.EXPERTS
PAIRS = pytest.mark.skipif(not local_cpu().features >= NEEDS, reason="the CPU has no bfloat16 dots")

DOTS = pytest.mark.skipif(
    not get_schedule("moe.x86_vnni").supports(samples.workload(1, "int8"), local_cpu()),
    reason="the CPU has no dots of bytes",
)


CHUNK = 4096
"""Bytes of a hash of large files: experts begin and end within them."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    return cache(lambda kind: samples.experts(kind).save(folder / f"{kind}.mimo"))


@pytest.fixture(scope="module")
def large_file(tmp_path_factory):
    """Experts of 384 KiB; not to be run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "CHUNK", CHUNK)
        return samples.experts(inner=2048).save(tmp_path_factory.mktemp("large") / "large.mimo")


@pytest.fixture
def large(large_file, monkeypatch):
    monkeypatch.setattr(weights, "CHUNK", CHUNK)
    return large_file


@pytest.fixture(scope="module")
def wanted(files):
    """Hidden states and logits of a prompt, with all experts mapped."""

    def get(kind, length):
        tokens = np.random.default_rng(length).integers(0, 250, length).tolist()
        return tokens, hidden_of(load(files(kind), threads=1), tokens)

    return cache(get)


def hidden_of(module, tokens):
    session = module.session()
    parts = [h.copy() for h in session.chunks(tokens)]
    return np.concatenate([*parts, *(session.append([t]) for t in (7, 40, 7, 99))])


def bytes_of_expert(path):
    return experts_of(open_artifact(path), 1 << 30).stacks[0].shape.bytes


@pytest.mark.parametrize(
    "kind",
    [
        "float",
        pytest.param("pairs", marks=[PAIRS, pytest.mark.slow]),
        pytest.param("int8", marks=[DOTS, pytest.mark.slow]),
    ],
)
@settings(max_examples=12, deadline=None)
@given(
    st.integers(2, ALL), st.sampled_from([1, 3, 16, 21]), st.sampled_from(POLICIES),
    st.sampled_from(["none", "router", "wrong", "drawn"]), st.randoms(use_true_random=False),
)  # fmt: skip
def test_tokens_do_not_depend_on_what_is_in_memory(
    files, wanted, kind, slots, length, policy, foresight, draw
):
    own = Foresight.__call__

    def foreseen(self):
        right = own(self)
        if foresight == "router":
            return right
        every = [((self.layer, e), 1.0) for e in range(samples.EXPERTS)]
        others = [key for key in every if key not in right]
        return others if foresight == "wrong" else draw.sample(every, 3)

    tokens, expected = wanted(kind, length)
    size = slots * bytes_of_expert(files(kind))
    how = ExpertMemory(size, policy, ahead=0 if foresight == "none" else draw.randint(1, 2))
    module = load(files(kind), threads=1, expert_memory=how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Foresight, "__call__", foreseen)
        assert (hidden_of(module, tokens) == expected).all()
    facts = module.experts.facts()
    assert facts["slots"] == slots and facts["slot_bytes"] == size
    assert facts["needs"] == facts["hits"] + facts["late"] + facts["misses"] > 0
    assert (foresight == "none") <= (facts["loaded_ahead"] == 0)
    assert facts["bytes_read"] > 0
    if slots == ALL and foresight == "none":  # each expert is read once at most
        assert facts["misses"] <= ALL


def test_a_prompt_whose_experts_have_no_room_together_runs_in_waves(files, wanted):
    tokens, expected = wanted("float", 16)
    size = 2 * bytes_of_expert(files("float"))
    module = load(files("float"), threads=1, expert_memory=size)
    assert (hidden_of(module, tokens) == expected).all()
    facts = module.experts.facts()
    assert facts["slots"] == 2 and facts["waves"] > 3 and facts["misses"] > 20


def test_rows_of_padding_have_no_experts(files, wanted):
    """A prompt of three in a step of 16 needs what three tokens need, whatever the others' routers say."""
    tokens, expected = wanted("float", 3)
    how = ExpertMemory("1MiB", ahead=1)
    module = load(files("float"), threads=1, expert_memory=how)
    with recording(module) as recorder:
        (hidden,) = list(module.session().chunks(tokens))
    assert (hidden == expected[:3]).all()
    chosen = [set(layer.ravel().tolist()) for layer in recorder.log().ids.swapaxes(0, 1)]
    facts = module.experts.facts()
    assert facts["needs"] == sum(map(len, chosen)) < ALL
    calls = [made for made, _ in module.bind("step_16").calls if hasattr(made, "_ahead")]
    for call, experts in zip(calls, chosen, strict=True):
        assert set(call._ids[3:].ravel()) == {-1} and set(call._ids[:3].ravel()) == experts
        for foresight in call._ahead:
            said = {expert for (_, expert), _ in foresight()}
            assert said == set(foresight._ids[:3].ravel().tolist())
    room = max(map(len, chosen)) * bytes_of_expert(files("float"))
    few = load(files("float"), threads=1, expert_memory=room)
    list(few.session().chunks(tokens))
    assert few.experts.facts()["waves"] == 0  # there is room for what counts


def test_sequences_that_rest_have_no_experts(files):
    tokens, states = [[5, 9, 30, 77], [200, 3, 3, 61]], []
    size = 4 * bytes_of_expert(files("float"))
    for memory in (None, ExpertMemory(size, ahead=1)):
        module = load(files("float"), threads=1, expert_memory=memory)
        sessions = [module.session(slot=slot) for slot in (0, 2)]
        with recording(module) as recorder:
            states.append(
                [append_each(module, sessions, pair) for pair in zip(*tokens, strict=True)]
            )
    assert np.array_equal(*states)
    steps = recorder.log().ids.reshape(4, 2, len(samples.LAYERS), samples.CHOSEN)
    needs = sum(len(set(step[:, layer].ravel())) for step in steps for layer in range(3))
    facts = module.experts.facts()
    assert facts["needs"] == needs and facts["waves"] == 0


def test_rows_count_as_pos_said_before_the_first_call():
    pos = np.array([[5, 1], [0, 0], [9, 1]], np.int32)
    rows = Rows(pos, 3)
    rows.then(lambda: pos.fill(0))  # others take its place in the arena
    assert rows.others.tolist() == [False, True, False]
    prompt = Rows(np.array([40, 2], np.int32), 4)
    prompt.note()
    assert prompt.others.tolist() == [False, False, True, True]


def test_rows_are_told_apart_where_schedules_promise_an_order():
    promised = {
        name for name in SCHEDULES["moe"] if type(get_schedule(name)).order is not Schedule.order
    }
    assert promised == APART


def test_experts_that_are_not_in_a_wave_have_no_slots(files, monkeypatch):
    """What a kernel is given: were a number left from the wave before, it would read another's weights."""
    waves, own = [], ExpertCall._have

    def watched(self, tokens, met):
        own(self, tokens, met)
        waves.append(len(tokens))
        there = np.isin(self._ids, list(tokens))
        assert (self._slots[~there] == -1).all() and (self._slots[there] >= 0).all()

    monkeypatch.setattr(ExpertCall, "_have", watched)
    size = 2 * bytes_of_expert(files("float"))
    module = load(files("float"), threads=1, expert_memory=size)
    hidden_of(module, list(range(16)))
    assert module.experts.facts()["waves"] > 3 and max(waves) == 2


def test_the_next_layers_routers_are_asked_with_the_rows_of_this_one(files, monkeypatch):
    module = load(files("float"), threads=1, expert_memory=ExpertMemory("1MiB", ahead=2))
    calls = [made for made, _ in module.bind("step_16").calls if hasattr(made, "_ahead")]
    assert [[f.layer for f in call._ahead] for call in calls] == [[1, 2], [2], []]
    others = samples.weights("float")[1]
    tokens = [*range(0, 240, 15)]
    rows = others["table"][tokens]  # what the first layer sees is the embedding alone
    logits = rows @ others["layers.2.gate"].T
    best = np.argsort(-logits, -1, kind="stable")[:, : samples.CHOSEN]
    seen = []
    own = Foresight.__call__

    def noted(self):
        seen.append(own(self))
        return seen[-1]

    monkeypatch.setattr(Foresight, "__call__", noted)
    module.session().append(tokens)
    assert [{layer for (layer, _), _ in pairs} for pairs in seen] == [{1}, {2}, {2}]
    first = [expert for (_, expert), _ in seen[0]]
    assert sorted(first) == sorted(set(best.ravel().tolist()))
    counts = [int((best == expert).sum()) for expert in first]
    assert counts == sorted(counts, reverse=True)


def test_logs_have_the_experts_and_not_their_slots(files):
    logs = []
    for memory in (None, 3 * bytes_of_expert(files("float"))):
        module = load(files("float"), threads=1, expert_memory=memory)
        with recording(module) as recorder:
            hidden_of(module, [1, 2, 3, 4, 5])
        logs.append(recorder.log())
    assert (logs[0].ids == logs[1].ids).all() and len(logs[0].ids) == 9


def resident(data) -> int:
    """Return how many bytes of a mapping are in memory."""
    pages = np.zeros(-(-data.nbytes // mmap.PAGESIZE), np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    address, length = ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(data.nbytes)
    assert libc.mincore(address, length, ctypes.c_void_p(pages.ctypes.data)) == 0
    return mmap.PAGESIZE * int((pages & 1).sum())


def file_pages() -> int:
    """Bytes of mapped files that this process has in memory."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssFile:\s+(\d+) kB", text)[1])


def test_experts_take_no_more_memory_than_they_may(large):
    parts = open_artifact(large)
    each = 3 * 16 * 2048 * 4
    experts = experts_of(parts, 5 * each + each // 2)
    assert experts.slots == 5 and experts.slot_bytes == 5 * each <= experts.budget
    rng, before = np.random.default_rng(1), file_pages()
    for at in range(12):
        layer = at % 3
        chosen = {int(e): 1 for e in rng.choice(6, 2, replace=False)}
        slots = experts.residency.acquire(layer, chosen)
        for slot in slots:
            for source in experts.stacks[layer].sources:
                held = experts.place(source)[0][slot]
                spot = parts.weights.spots[source]
                assert held.nbytes == (spot.end - spot.begin) // 6
        experts.residency.foresee([((layer + 1) % 3, int(e)) for e in rng.permutation(6)[:2]])
        parts_of = {id(slots): slots.memory for slots in experts.memory}
        taken = sum(resident(part.bytes) for memory in parts_of.values() for part in memory)
        assert taken <= experts.slot_bytes
    assert experts.facts()["bytes_read"] > 6 * each
    assert file_pages() - before < 2 * each


def test_slots_hold_the_bytes_of_the_file(large):
    parts = open_artifact(large)
    experts = experts_of(parts, "1MiB")
    packed, _ = samples.weights("float", 2048)
    for layer, expert in [(0, 1), (2, 5), (1, 0), (0, 3), (0, 1)]:
        (slot,) = experts.residency.acquire(layer, {expert: 1})
        for source in experts.stacks[layer].sources:
            assert (experts.place(source)[0][slot] == packed[source][expert]).all()


def test_a_file_that_became_shorter_is_told_with_layer_and_expert(large, tmp_path):
    path = Path(shutil.copy(large, tmp_path / "cut.mimo"))
    experts = experts_of(open_artifact(path), "1MiB")
    whole = path.read_bytes()
    last = max(
        (spot.end, source)
        for source, spot in open_artifact(path).weights.spots.items()
        if experts.holds(source)
    )[1]
    layer = next(i for i, s in enumerate(experts.stacks) if last in s.sources)
    at = whole.index(samples.weights("float", 2048)[0][last][5].tobytes())
    os.truncate(path, at + 100)
    name = re.escape(experts.stacks[layer].label)
    with pytest.raises(
        ArtifactError, match=rf"expert 5 of {name} cannot be loaded: .*it ends at byte {at + 100}"
    ):
        experts.residency.acquire(layer, {0: 1, 5: 1})
    with path.open("r+b") as file:
        file.write(whole)
    assert len(experts.residency.acquire(layer, {0: 1, 5: 1})) == 2


def test_damage_is_found_before_an_expert_is_used(large, tmp_path):
    path = Path(shutil.copy(large, tmp_path / "damaged.mimo"))
    data = bytearray(path.read_bytes())
    source = experts_of(open_artifact(path), "1MiB").stacks[1].sources[0]
    tensor = samples.weights("float", 2048)[0][source]
    at = bytes(data).index(tensor[4].tobytes()) + tensor[4].nbytes // 2
    data[at] ^= 1
    path.write_bytes(data)
    experts = experts_of(open_artifact(path), "1MiB")
    for _ in range(2):
        with pytest.raises(
            ArtifactError, match=r"expert 4 of layers.2.experts .* differs from its hash"
        ):
            experts.residency.acquire(1, {4: 1})
    assert experts.residency.acquire(1, {3: 1}) and experts.residency.acquire(0, {4: 1})


def test_damage_after_a_good_load_is_found(large, tmp_path):
    path = Path(shutil.copy(large, tmp_path / "written.mimo"))
    each = 3 * 16 * 2048 * 4
    experts = experts_of(open_artifact(path), ExpertMemory(2 * each, ahead=0))
    source = experts.stacks[0].sources[0]
    tensor = samples.weights("float", 2048)[0][source]
    for expert in range(6):  # the first have left
        experts.residency.acquire(0, {expert: 1})
    before, data = path.stat(), path.read_bytes()
    at = data.index(tensor[1].tobytes()) + tensor[1].nbytes // 2
    with path.open("r+b") as file:
        file.seek(at)
        file.write(bytes([data[at] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as copying tools do
    for _ in range(2):
        with pytest.raises(ArtifactError, match=r"expert 1 of layers.1.experts .* its hash"):
            experts.residency.acquire(0, {1: 1})
    experts.residency.acquire(0, {2: 1, 3: 1})
    path.write_bytes(data)
    (slot,) = experts.residency.acquire(0, {1: 1})
    assert (experts.place(source)[0][slot] == tensor[1]).all()
    for _ in range(2):
        before = experts.facts()
        for expert in range(6):
            experts.residency.acquire(0, {expert: 1})
        after = experts.facts()
    # nothing was written since the first round: in the second one nothing is hashed again
    assert after["bytes_read"] - before["bytes_read"] == each * (after["misses"] - before["misses"])


def test_bytes_that_changed_while_two_threads_read_are_found(large, tmp_path, monkeypatch):
    """One thread has hashed a chunk, somebody writes into it, another thread notices, the first goes on."""
    path = Path(shutil.copy(large, tmp_path / "written.mimo"))
    parts = open_artifact(path)
    source = experts_of(parts, "1MiB").stacks[0].sources[0]
    tensor = samples.weights("float", 2048)[0][source]
    data = path.read_bytes()
    at, each = data.index(tensor[1].tobytes()), tensor[1].nbytes
    first, going, take = threading.current_thread(), [], parts.weights._take

    def taken(chunk, *more):
        if threading.current_thread() is first and not going:
            going.append(chunk)
            with path.open("r+b") as file:
                file.seek(at + CHUNK)
                file.write(bytes(byte ^ 1 for byte in data[at + CHUNK : at + CHUNK + 64]))
            other = threading.Thread(
                target=parts.weights.read, args=(source, 5 * each, np.empty(each, np.uint8))
            )
            other.start()
            other.join(20)
            assert not other.is_alive()
        take(chunk, *more)

    monkeypatch.setattr(parts.weights, "_take", taken)
    with pytest.raises(ArtifactError, match="differs from its hash"):
        parts.weights.read(source, each + CHUNK, np.empty(64, np.uint8))
    assert going


def test_hashing_everything_brings_no_pages_into_memory(large):
    before = file_pages()
    parts = open_artifact(large, verify="full")
    assert file_pages() - before < ALL * 3 * 16 * 2048  # a quarter of the experts' bytes
    assert all(parts.weights._good)


def test_no_huge_page_reaches_beyond_the_slots():
    memory = Zeroed(64 << 20, used=(3 << 20) + 5)
    at = memory.bytes.ctypes.data
    flags, here = {}, None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            here = [int(n, 16) for n in span.groups()]
        elif line.startswith("VmFlags:"):
            flags[tuple(here)] = line.split()[1:]

    def of(address):
        return next(held for (low, high), held in flags.items() if low <= address < high)

    assert "nh" not in of(at) and "nh" not in of(at + (3 << 20))
    assert "nh" in of(at + (3 << 20) + mmap.PAGESIZE) and "nh" in of(at + (64 << 20) - 1)


def test_reads_can_be_slowed_down(large):
    each = 3 * 16 * 2048 * 4
    how = ExpertMemory(2 * each, ahead=0, bytes_per_s=20.0 * each)
    experts = experts_of(open_artifact(large), how)
    for expert in range(6):
        experts.residency.acquire(0, {expert: 1})
    facts = experts.facts()
    assert facts["stall_seconds"] >= 0.95 * facts["bytes_read"] / (20.0 * each) > 0.25


@settings(max_examples=100)
@given(st.integers(1, 12), st.integers(1, 9), st.data())
def test_slots_are_shared_by_number_of_layers(layers, experts, data):
    least = data.draw(st.integers(1, experts))
    slots = data.draw(st.integers(least, layers * experts))
    banks = share_banks(layers, experts, slots, least)
    assert least <= min(banks) <= max(banks) <= experts and len(banks) <= layers
    assert slots - sum(banks) < least or sum(banks) == slots
    if slots == layers * experts:
        assert banks == [experts] * layers
    # with more layers to it a bank has no fewer slots
    assert banks == sorted(banks, reverse=True)


@pytest.mark.parametrize(
    "size", [0, -5, "2", "many", "2 GiB", "GiB", True, 1.5, "", "0KiB", b"1MiB"]
)
def test_what_is_no_size_is_refused(files, size):
    with pytest.raises(UsageError, match=r"--expert-memory \(expert_memory\): .* is no size"):
        load(files("float"), expert_memory=size)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"policy": "random"}, "no policy 'random'"),
        ({"ahead": -1}, "-1 is no number of layers"),
        ({"ahead": 0.5}, "0.5 is no number of layers"),
        ({"bytes_per_s": 0}, "are no rate"),
        ({"bytes_per_s": float("nan")}, "are no rate"),
        ({"bytes_per_s": "1"}, "'1' bytes per second are no rate"),
        ({"bytes_per_s": True}, "are no rate"),
        ({"ahead": True}, "True is no number of layers"),
    ],
)
def test_other_fields_are_checked(files, more, text):
    with pytest.raises(UsageError, match=text):
        load(files("float"), expert_memory=ExpertMemory("1MiB", **more))


def test_too_little_memory_is_refused_and_the_remedy_is_enough(files, wanted):
    path = files("float")
    with pytest.raises(UsageError, match="is too little") as refused:
        load(path, threads=1, expert_memory=2 * bytes_of_expert(path) - 1)
    least = re.search(r"Give (\d+KiB)", str(refused.value))[1]
    tokens, expected = wanted("float", 21)
    assert (hidden_of(load(path, threads=1, expert_memory=least), tokens) == expected).all()


def test_artifacts_without_experts_or_without_a_file_are_refused(decoder_file):
    with pytest.raises(UsageError, match="decoder has no experts"):
        load(decoder_file, expert_memory="1MiB")
    with pytest.raises(UsageError, match="not saved"):
        parts = open_artifact(decoder_file)
        experts_of(type(parts)(**{**vars(parts), "weights": object()}), "1MiB")


def test_figures_are_those_of_the_layers(large):
    found = experts_of(open_artifact(large), "64MiB")
    assert isinstance(found, Experts) and found.experts == found.slots == ALL
    assert found.bytes == found.slot_bytes == ALL * 3 * 16 * 2048 * 4
