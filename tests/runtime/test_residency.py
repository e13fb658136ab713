"""Slots that experts take in turn: what stays, what leaves, what comes ahead of need."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import sys
import threading
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.errors import MimoError, UsageError
from mimo_compile.runtime.expert_bank import POLICIES, WINDOW, Bank
from mimo_compile.runtime.expert_calls import waves
from mimo_compile.runtime.residency import Residency

LAYERS, EXPERTS = 3, 5
CALLS = st.lists(
    st.tuples(
        st.integers(0, LAYERS - 1),
        st.dictionaries(st.integers(0, EXPERTS - 1), st.integers(1, 3), min_size=1, max_size=3),
    ),
    max_size=60,
)


class Disk:
    """Counts what is loaded, and remembers which expert each slot was filled with last."""

    def __init__(self):
        self.loads: list[tuple[int, int]] = []
        self.slots: dict[int, tuple[int, int]] = {}

    def __call__(self, key, slot):
        self.loads.append(key)
        self.slots[slot] = key
        return 10


def at_once(load):
    """Make a function that loads an expert one that does so in one piece."""

    def pieces(key, slot):
        yield load(key, slot)

    return pieces


def single(slots: int, policy: str, load=None) -> Residency:
    """One bank that all layers share."""
    return Residency([Bank(slots, policy, LAYERS)], [0] * LAYERS, at_once(load or Disk()))


def simulated(calls, slots: int, policy: str) -> list[tuple[int, int]]:
    """Return what is loaded, by the plainest of means: all that is known is computed anew each time."""
    there: list[tuple[int, int]] = []
    loads, last = [], {}
    past = {layer: [] for layer in range(LAYERS)}  # one choice after the other

    def share(key):
        layer, expert = key
        if policy == "lru":
            return 0.0
        total, age = 0.0, 0
        for tokens in reversed(past[layer]):
            count = sum(tokens.values())
            part = tokens.get(expert, 0) / count
            total += part * (1 - math.exp(-count / WINDOW)) * math.exp(-age / WINDOW)
            age += count
        return total

    for tick, (layer, tokens) in enumerate(calls, 1):
        past[layer].append(tokens)
        keys = [(layer, expert) for expert in tokens]
        last |= dict.fromkeys(keys, tick)
        for key in keys:
            if key in there:
                continue
            loads.append(key)
            if len(there) == slots:
                leaving = [k for k in there if k not in keys]
                held = Counter(k[0] for k in [*there, key])
                # each layer's own who comes counts; sums in another order may differ in their last bits
                leaving.sort(
                    key=lambda k: (held[k[0]] * LAYERS <= slots, round(share(k), 12), last[k], k)
                )
                there.remove(leaving[0])
            there.append(key)
    return loads


@settings(max_examples=25)
@given(CALLS, st.integers(3, 9), st.sampled_from(POLICIES))
def test_what_is_loaded_is_what_a_plain_simulation_loads(calls, slots, policy):
    disk = Disk()
    residency = single(slots, policy, disk)
    for layer, tokens in calls:
        found = residency.acquire(layer, tokens)
        assert len(set(found)) == len(tokens) and set(found) <= set(range(slots))
        assert [disk.slots[slot] for slot in found] == [(layer, expert) for expert in tokens]
    assert disk.loads == simulated(calls, slots, policy)
    traffic = residency.traffic
    assert traffic.misses == len(disk.loads) and traffic.bytes_read == 10 * len(disk.loads)
    assert traffic.needs == sum(len(tokens) for _, tokens in calls)
    assert traffic.late == traffic.ahead == traffic.loaded_ahead == traffic.unused == 0


@settings(max_examples=12, deadline=None)
@given(CALLS, st.integers(3, 9), st.sampled_from(POLICIES), st.randoms(use_true_random=False))
def test_whatever_is_foreseen_each_layer_gets_its_experts(calls, slots, policy, draw):
    disk = Disk()
    residency = single(slots, policy, disk)
    for layer, tokens in calls:
        found = residency.acquire(layer, tokens)
        wished = draw.sample(range(EXPERTS), draw.randint(0, EXPERTS))
        foreseen = draw.randrange(LAYERS)
        residency.foresee([(foreseen, expert) for expert in wished])
        # while others come
        assert [disk.slots[slot] for slot in found] == [(layer, expert) for expert in tokens]
    traffic = residency.traffic
    assert traffic.needs == sum(len(tokens) for _, tokens in calls)
    assert traffic.ahead + traffic.unused <= traffic.loaded_ahead
    assert set(disk.slots) <= set(range(slots))


def wait_for(condition) -> None:
    for _ in range(2000):
        if condition():
            return
        threading.Event().wait(0.001)
    raise AssertionError("it did not happen")


def test_an_expert_that_came_ahead_is_a_hit_and_one_that_nobody_needs_is_counted():
    residency = single(3, "lru")
    residency.acquire(0, {0: 1})
    residency.foresee([(1, 2), (1, 3)])
    wait_for(lambda: len(residency.resident(1, range(EXPERTS))) == 2)
    residency.acquire(1, {2: 1})
    traffic = residency.traffic
    assert (traffic.hits, traffic.ahead, traffic.misses, traffic.loaded_ahead) == (1, 1, 1, 2)
    residency.acquire(1, {2: 1})
    assert (traffic.hits, traffic.ahead) == (2, 1)
    residency.acquire(2, {0: 1})  # layer 1 has two of three slots, and leaves the one for layer 2
    assert residency.resident(1, range(EXPERTS)) == {2} and traffic.unused == 1
    assert residency.resident(0, range(EXPERTS)) == {0}


def test_what_is_on_its_way_is_waited_for_and_not_loaded_twice():
    begun, go, loads = threading.Event(), threading.Event(), []

    def slow(key, slot):
        loads.append(key)
        if key == (1, 4):
            begun.set()
            assert go.wait(20)
        return 1

    residency = single(4, "lru", slow)
    residency.acquire(0, {0: 1})
    residency.foresee([(1, 4)])
    assert begun.wait(20)
    threading.Timer(0.05, go.set).start()
    residency.acquire(1, {4: 1, 3: 1})
    assert loads == [(0, 0), (1, 4), (1, 3)]  # what nobody brings comes meanwhile
    traffic = residency.traffic
    assert (traffic.late, traffic.misses) == (1, 2) and traffic.stall_seconds > 0.02
    residency.acquire(0, {e: 1 for e in range(4)})
    assert traffic.unused == 0  # it was needed when it arrived


class InPieces:
    """Loads each expert in three pieces; those of some, each when it is told to."""

    def __init__(self, *held: tuple[int, int]):
        self.read: list[tuple[int, int]] = []
        self.begun: list[tuple[int, int]] = []
        self.go = {key: threading.Semaphore(0) for key in held}

    def __call__(self, key, slot):
        self.begun.append(key)
        for _ in range(3):
            if key in self.go:
                assert self.go[key].acquire(timeout=20)
            self.read.append(key)
            yield 1


def in_pieces(slots: int, *held: tuple[int, int]) -> tuple[Residency, InPieces]:
    disk = InPieces(*held)
    return Residency([Bank(slots, "load", LAYERS)], [0] * LAYERS, disk), disk


def test_a_load_is_broken_off_once_its_layer_has_said_that_it_needs_others():
    residency, disk = in_pieces(3, (1, 0))
    residency.foresee([(1, 0), (1, 1)])
    disk.go[1, 0].release()
    wait_for(lambda: disk.read == [(1, 0)])
    residency.acquire(1, {2: 1})
    disk.go[1, 0].release()  # the piece that is being read comes
    wait_for(lambda: not residency._busy)
    assert disk.read == [(1, 0), (1, 2), (1, 2), (1, 2), (1, 0)]
    traffic = residency.traffic
    assert (traffic.loaded_ahead, traffic.dropped, traffic.unused) == (1, 1, 0)
    assert traffic.bytes_read == 5 and residency.resident(1, range(EXPERTS)) == {2}
    residency.acquire(0, {0: 1, 1: 1})  # its slot is free again
    assert residency.resident(1, range(EXPERTS)) == {2}


@pytest.mark.parametrize("end", ["another foresight", "the call is broken off"])
def test_a_load_is_broken_off_when_it_is_foreseen_no_longer(end):
    residency, disk = in_pieces(4, (1, 0))
    residency.foresee([(1, 0)])
    disk.go[1, 0].release()
    wait_for(lambda: disk.read == [(1, 0)])
    if end == "another foresight":
        residency.foresee([(2, 3)])
    else:
        residency.forget()
    disk.go[1, 0].release()
    wait_for(lambda: not residency._busy)
    assert disk.read.count((1, 0)) == 2 and residency.traffic.dropped == 1
    assert residency.resident(2, range(EXPERTS)) == ({3} if end == "another foresight" else set())


def test_a_load_ahead_waits_for_what_is_needed_now_and_goes_on_then():
    residency, disk = in_pieces(4, (2, 0), (1, 3))
    residency.foresee([(2, 0)])
    disk.go[2, 0].release()
    wait_for(lambda: disk.read == [(2, 0)])
    layer = threading.Thread(target=residency.acquire, args=(1, {3: 1}))
    layer.start()
    wait_for(lambda: disk.begun == [(2, 0), (1, 3)])
    disk.go[2, 0].release(2)
    wait_for(lambda: disk.read == [(2, 0)] * 2)
    threading.Event().wait(0.02)
    assert disk.read == [(2, 0)] * 2  # it might go on, and waits
    disk.go[1, 3].release(3)
    layer.join(20)
    wait_for(lambda: not residency._busy)
    assert disk.read == [(2, 0)] * 2 + [(1, 3)] * 3 + [(2, 0)]
    assert residency.resident(2, [0]) == {0} and residency.traffic.dropped == 0


def test_what_is_foreseen_to_come_first_passes_what_was_begun_for_later():
    residency, disk = in_pieces(4, (2, 0))
    residency.foresee([(2, 0)])
    disk.go[2, 0].release()
    wait_for(lambda: disk.read == [(2, 0)])
    residency.foresee([(1, 0), (1, 1), (2, 0)])
    disk.go[2, 0].release(2)  # the piece that is being read comes, and the last one might
    wait_for(lambda: not residency._busy)
    assert disk.read == [(2, 0)] * 2 + [(1, 0)] * 3 + [(1, 1)] * 3 + [(2, 0)]
    traffic = residency.traffic
    assert (traffic.loaded_ahead, traffic.dropped, traffic.bytes_read) == (3, 0, 9)


@pytest.mark.parametrize("end", ["needed", "foreseen no longer"])
def test_what_waits_for_earlier_layers_goes_on_or_gives_its_slot_back(end):
    residency, disk = in_pieces(3, (2, 0), (1, 0))
    residency.foresee([(2, 0)])
    disk.go[2, 0].release()
    wait_for(lambda: disk.read == [(2, 0)])
    residency.foresee([(1, 0), (2, 0)])
    disk.go[2, 0].release()
    disk.go[1, 0].release()
    wait_for(lambda: disk.read == [(2, 0)] * 2 + [(1, 0)])
    if end == "needed":
        layer = threading.Thread(target=residency.acquire, args=(2, {0: 1}))
        layer.start()
        disk.go[1, 0].release()  # the piece that is being read comes
        disk.go[2, 0].release()
        layer.join(20)
        assert disk.read == [(2, 0)] * 2 + [(1, 0)] * 2 + [(2, 0)]
        assert residency.resident(2, [0]) == {0} and residency.traffic.late == 1
        disk.go[1, 0].release()
        wait_for(lambda: residency.resident(1, [0]) == {0})
        assert residency.traffic.dropped == 0
    else:
        residency.foresee([(1, 0)])
        disk.go[1, 0].release(2)
        wait_for(lambda: not residency._busy)
        assert residency.traffic.dropped == 1 and residency.resident(1, [0]) == {0}
        assert disk.read == [(2, 0)] * 2 + [(1, 0)] * 3
        residency.acquire(0, {0: 1, 1: 1})  # its slot is free again
        assert residency.resident(1, [0]) == {0}


def test_what_is_needed_does_not_wait_though_it_came_ahead_of_need():
    residency, disk = in_pieces(4, (1, 0), (1, 3))
    residency.foresee([(1, 0)])
    disk.go[1, 0].release()
    wait_for(lambda: disk.read == [(1, 0)])
    layer = threading.Thread(target=residency.acquire, args=(1, {0: 1, 3: 1}))
    layer.start()
    wait_for(lambda: disk.begun == [(1, 0), (1, 3)])
    disk.go[1, 0].release(2)
    wait_for(lambda: residency.resident(1, [0]) == {0})  # beside the other one
    disk.go[1, 3].release(3)
    layer.join(20)
    assert residency.traffic.late == residency.traffic.misses == 1


def test_what_is_loaded_ahead_gives_way_where_there_is_no_room_for_what_is_needed():
    residency, disk = in_pieces(2, (2, 0))
    residency.acquire(0, {0: 1})
    residency.foresee([(2, 0)])
    wait_for(lambda: disk.begun[-1] == (2, 0))
    threading.Timer(0.05, disk.go[2, 0].release).start()
    residency.acquire(1, {0: 1, 1: 1})
    wait_for(lambda: not residency._busy)
    assert residency.traffic.dropped == 1 and disk.read.count((2, 0)) == 1


def test_a_call_that_is_broken_off_at_any_point_lets_the_thread_go_on():
    residency, _ = in_pieces(4)
    residency._urgent = True  # as if an interrupt had come right behind it
    residency.foresee([(1, 0)])
    residency.forget()
    wait_for(lambda: not residency._busy)
    residency.foresee([(1, 1)])
    wait_for(lambda: residency.resident(1, [1]) == {1})


def test_experts_of_the_layer_that_runs_never_leave_for_what_is_foreseen():
    residency = single(4, "lru")
    residency.acquire(2, {4: 1})
    residency.acquire(0, {0: 1, 1: 1, 2: 1})
    # layer 0 has more than its share of the slots: but for the call that runs, one of its own would leave
    residency.foresee([(1, 0), (1, 1)])
    wait_for(lambda: not residency._busy)
    assert residency.resident(0, range(EXPERTS)) == {0, 1, 2}
    assert residency.resident(1, range(EXPERTS)) == {0}
    assert residency.traffic.loaded_ahead == 1


def test_an_expert_that_two_waves_have_is_one_need():
    disk = Disk()
    residency = single(3, "load", disk)
    residency.acquire(0, {0: 2, 1: 1, 2: 1})
    residency.acquire(0, {0: 2, 3: 1, 4: 1}, met={0, 1, 2})
    residency.acquire(0, {1: 1}, met={0, 1, 2, 3, 4})  # it has left, and is read again
    traffic = residency.traffic
    assert (traffic.needs, traffic.misses, traffic.hits) == (5, 5, 0)
    assert len(disk.loads) == 6 and traffic.bytes_read == 60


@pytest.mark.parametrize("error", [MimoError("x"), RuntimeError("x"), ValueError("x")])
def test_loads_ahead_go_on_after_one_that_failed(error):
    loads = []

    def fragile(key, slot):
        loads.append(key)
        if len(loads) == 1:
            raise error
        return 1

    residency = single(6, "load", fragile)
    residency.foresee([(1, 0), (1, 1)])
    wait_for(lambda: not residency._busy)
    residency.foresee([(1, 2)])
    wait_for(lambda: not residency._busy)
    assert loads == [(1, 0), (1, 1), (1, 2)]
    assert residency.traffic.failed_ahead == 1 and residency.traffic.loaded_ahead == 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_loads_ahead_go_on_where_none_could_begin_once(error, monkeypatch):
    residency = single(6, "load")

    def refused(*arguments):
        raise error

    residency.foresee([(1, 0)])
    wait_for(lambda: not residency._busy)
    with monkeypatch.context() as patch:
        patch.setattr(residency._ahead, "submit", refused)
        if error is RuntimeError:
            residency.foresee([(1, 1)])  # whoever needs it loads it
        else:
            with pytest.raises(error):
                residency.foresee([(1, 1)])
    residency.foresee([(1, 2)])
    wait_for(lambda: not residency._busy)
    assert residency.resident(1, range(EXPERTS)) == {0, 2}


def test_loads_ahead_go_on_after_an_interrupt_before_the_thread_is_asked():
    residency = single(6, "load")

    def interrupt(frame, event, _):
        left = event == "return" and frame.f_code.co_name == "__exit__" and frame.f_back
        if left and left.f_code is Residency.foresee.__code__:
            raise KeyboardInterrupt

    before = sys.getprofile()
    sys.setprofile(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            residency.foresee([(1, 0)])
    finally:
        sys.setprofile(before)
    residency.foresee([(1, 1)])
    wait_for(lambda: residency.resident(1, [1]) == {1})


def interrupted_at(step, codes, call):
    """Interrupt a call before instruction number `step` in some functions; returns whether there is one."""
    steps = itertools.count()

    def inside(frame, event, _):
        if event == "opcode" and next(steps) == step:
            raise KeyboardInterrupt
        return inside

    def entered(frame, event, _):
        if frame.f_code not in codes:
            return None
        frame.f_trace_opcodes = True
        return inside

    before = sys.gettrace()
    sys.settrace(entered)
    try:
        call()
    except KeyboardInterrupt:
        return True
    except OSError:
        pass
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("there", [(), (0, 1)])
def test_no_expert_seems_to_be_there_after_an_interrupt_at_any_point(there):
    """A load fails half-way, and its caller is interrupted as it takes a slot or gives it back."""
    codes = {Bank.claim.__code__, Bank.gone.__code__}
    for step in itertools.count():
        held, bad = {}, []

        def load(key, slot, held=held, bad=bad):
            held[slot] = None
            yield 1
            if bad:
                raise OSError
            held[slot] = key

        residency = Residency([Bank(2, "load")], [0], load)
        if there:
            residency.acquire(0, dict.fromkeys(there, 1))
        bad.append(True)
        more = interrupted_at(step, codes, lambda r=residency: r.acquire(0, {2: 1}))
        bad.clear()
        for experts in ((2,), (0, 1), (2, 1)):
            slots = []
            call = threading.Thread(
                target=lambda r=residency, e=experts, s=slots: s.extend(
                    r.acquire(0, dict.fromkeys(e, 1))
                ),
                daemon=True,
            )
            call.start()
            call.join(20)
            assert not call.is_alive(), (step, "it waits for a slot for ever")
            assert [held[slot] for slot in slots] == [(0, e) for e in experts], (step, experts)
        if not more:
            break
    assert step > 50


def test_nothing_more_is_loaded_for_a_call_that_is_broken_off():
    begun, go, loads = threading.Event(), threading.Event(), []

    def slow(key, slot):
        if key == (0, 4):
            raise KeyboardInterrupt
        loads.append(key)
        begun.set()
        assert go.wait(20)
        return 1

    residency = single(6, "load", slow)
    residency.foresee([(1, 0), (1, 1), (1, 2)])
    assert begun.wait(20)
    with pytest.raises(KeyboardInterrupt):
        residency.acquire(0, {4: 1})
    go.set()
    wait_for(lambda: not residency._busy)
    assert loads == [(1, 0)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MimoError])
def test_a_load_that_is_broken_off_leaves_nothing_behind(error):
    broken = []

    def fragile(key, slot):
        if key in broken:
            raise error("x")
        return 1

    residency = single(3, "load", fragile)
    residency.acquire(0, {0: 1, 1: 1})
    for _ in range(5):  # would use up the slots
        broken[:] = [(0, 4)]
        with pytest.raises(error):
            residency.acquire(0, {0: 1, 4: 1, 1: 1})
        broken.clear()
        found = residency.acquire(0, {4: 1, 3: 1, 1: 1})
        assert sorted(found) == [0, 1, 2]
        residency.acquire(0, {0: 1, 2: 1, 1: 1})


def test_a_load_ahead_that_fails_is_tried_again_when_there_is_need():
    broken = [(1, 2)]

    def fragile(key, slot):
        if key in broken:
            raise MimoError("x")
        return 1

    residency = single(3, "lru", fragile)
    residency.acquire(0, {0: 1})
    residency.foresee([(1, 2)])
    wait_for(lambda: residency.traffic.failed_ahead == 1)
    with pytest.raises(MimoError):
        residency.acquire(1, {2: 1})
    broken.clear()
    residency.acquire(1, {2: 1})
    residency.acquire(0, {0: 1})
    assert residency.resident(1, [2]) == {2}


@settings(max_examples=30)
@given(
    st.lists(st.lists(st.integers(0, 11), min_size=0, max_size=4), max_size=24),
    st.integers(4, 8),
    st.sets(st.integers(0, 11), max_size=8),
)
def test_each_row_has_all_its_experts_in_one_wave(rows, room, first):
    plan = waves(rows, room, first)
    assert all(len(set(wave)) == len(wave) <= room for wave in plan)
    assert all(any(set(row) <= set(wave) for wave in plan) for row in rows if row)
    assert {e for wave in plan for e in wave} == {e for row in rows for e in row}
    assert len(plan) <= len(Counter(map(frozenset, rows)))
    assert plan == waves(rows[::-1], room, first)
    if len({e for row in rows for e in row}) <= room:
        assert len(plan) <= 1


def use(residency, answers):
    try:
        residency.check()
        answers.put("it was allowed")
    except UsageError as error:
        answers.put(str(error))


def test_a_forked_process_may_not_use_them():
    residency = single(3, "lru")
    in_child = multiprocessing.get_context("fork")
    answers = in_child.SimpleQueue()
    child = in_child.Process(target=use, args=(residency, answers))
    child.start()
    child.join(20)
    assert "from which this one was forked" in answers.get()
    residency.check()
