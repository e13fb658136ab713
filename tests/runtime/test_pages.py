"""Pages of a pool: who holds which, and a decoder in miniature over them, whose sums are exact."""

import threading

import msgspec
import numpy as np
import paged_samples
import pytest
import runtime_samples
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_samples import PAGES
from runtime_samples import BATCH, CONTEXT, VOCAB

from mimo_compile.errors import ArtifactError, UsageError
from mimo_compile.runtime import Module, Stats, load
from mimo_compile.runtime.batch import append_each
from mimo_compile.runtime.entry import BoundEntry
from mimo_compile.runtime.pages import PagePool, copier
from mimo_compile.runtime.program import Buffer, Pool, State
from mimo_compile.runtime.session import Session

SLOTS = 4
PROMPT = list(b"def main(argv):\n    return argv[")


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Module:
    file = tmp_path_factory.mktemp("paged") / "paged.mimo"
    return load(paged_samples.decoder().save(file))


@pytest.fixture(scope="module")
def single(decoder_file) -> Module:
    return load(decoder_file)


class Watched:
    """A pool beside the texts that its sequences are to hold, position by position."""

    def __init__(self, page: int, pages: int) -> None:
        self.tables = np.full((SLOTS, 32), -1, np.int32)
        self.cache = np.full((2, pages * page, 3), -1, np.int64)
        pool = Pool(page, pages, (), "")
        self.pool = PagePool(pool, self.tables, copier(pool, [self.cache]))
        self.texts: list[list[int]] = [[] for _ in range(SLOTS)]
        self.next = 0

    def append(self, slot: int, count: int) -> bool:
        text = self.texts[slot]
        want = (slot, len(text), len(text) + count)
        before = self.tables.copy(), self.cache.copy(), self.pool.free
        if self.pool.needed([want]) > self.pool.free:
            with pytest.raises(UsageError, match=r"are free .*held"):
                self.pool.take([want])
            assert np.array_equal(before[0], self.tables) and before[2] == self.pool.free
            assert np.array_equal(before[1], self.cache)
            return False
        needed = self.pool.needed([want])
        self.pool.take([want])
        assert self.pool.free == before[2] - needed
        for _ in range(count):
            page = self.pool.page
            at = self.tables[slot, len(text) // page] * page + len(text) % page
            self.cache[:, at] = self.next
            text.append(self.next)
            self.next += 1
        return True

    def check(self) -> None:
        pool, held = self.pool, [self.pool.held(slot) for slot in range(SLOTS)]
        for slot, text in enumerate(self.texts):
            mine, at = held[slot], np.arange(len(text))
            assert len(mine) == pool.pages_of(len(text)) and len(set(mine)) == len(mine)
            assert self.tables[slot].tolist() == [*mine, *[0] * (32 - len(mine))]
            slots = self.tables[slot, at // pool.page] * pool.page + at % pool.page
            assert (self.cache[:, slots] == np.array(text)[None, :, None]).all()
        distinct = {page for mine in held for page in mine}
        assert pool.free + len(distinct) == pool.pages


@given(data=st.data())
def test_sequences_hold_what_was_written_whoever_shares_it(data):
    page, pages = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 20))
    watched = Watched(page, pages)
    slot, count = st.integers(0, SLOTS - 1), st.integers(1, 3 * page)
    for what in data.draw(st.lists(st.sampled_from("aaaarfe"), max_size=25)):
        mine = data.draw(slot)
        text = watched.texts[mine]
        if what == "a" and len(text) + 3 * page <= 32 * page:
            watched.append(mine, data.draw(count))
        elif what == "r":
            kept = data.draw(st.integers(0, len(text)))
            watched.pool.cut(mine, kept)
            del text[kept:]
        elif what == "f" and (other := data.draw(slot)) != mine:
            watched.pool.share(mine, other, len(text))
            watched.texts[other] = list(text)
        elif what == "e":
            watched.pool.cut(mine, 0)
            text.clear()
        watched.check()
    watched.pool.clear()
    watched.texts = [[] for _ in range(SLOTS)]
    watched.check()


def test_two_that_share_a_page_need_one_copy_between_them():
    watched = Watched(4, 3)
    watched.append(0, 6)  # a page and a half
    watched.pool.share(0, 1, 6)
    assert watched.pool.free == 1
    wants = [(0, 6, 7), (1, 6, 7)]
    assert watched.pool.needed(wants) == 1
    watched.pool.take(wants)
    first, second = (watched.pool.held(slot) for slot in (0, 1))
    assert first[0] == second[0] and first[1] != second[1] and watched.pool.free == 0
    assert np.array_equal(*(watched.cache[:, n * 4 : n * 4 + 2] for n in (first[1], second[1])))


def collected(pairs, count: int) -> list[list[int]]:
    out: list[list[int]] = [[] for _ in range(count)]
    for index, token in pairs:
        out[index].append(token)
    return out


prompts = st.lists(st.integers(0, VOCAB - 2), min_size=1, max_size=CONTEXT)


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 20), prompts), max_size=6), st.integers(0, 30))
def test_texts_that_wait_for_pages_are_what_they_are_alone(module, single, texts, count):
    """Prompts begin alike; the pool holds one context and a third, so texts wait or are read again."""
    texts = [([*PROMPT[:common], *text])[: CONTEXT - count] for common, text in texts]
    for data in module._machine.states.values():
        data[:] = 0xFF  # NaN wherever nothing was written
    module.pool.clear()
    alone = [list(single.generate_ids(text, count, stop_at_eos=False)) for text in texts]
    stats = Stats()
    pairs = module.generate_batch_ids(texts, count, stop_at_eos=False, stats=stats)
    assert collected(pairs, len(texts)) == alone
    assert stats.new_tokens == sum(map(len, alone))
    assert stats.sequences == sum(map(bool, alone))
    assert module.pool.free == PAGES  # all are given back


def test_what_is_newest_makes_room_for_what_is_older(module, single):
    """Three texts of 40 positions need 30 pages of 16."""
    texts = [[1, 2], [3, 4], [5, 6]]
    alone = [list(single.generate_ids(text, 38, stop_at_eos=False)) for text in texts]
    pairs = list(module.generate_batch_ids(texts, 38, stop_at_eos=False))
    assert collected(pairs, 3) == alone
    ends = [max(i for i, (index, _) in enumerate(pairs) if index == n) for n in range(3)]
    assert ends == sorted(ends)
    begun = {index for index, _ in pairs[:10]}
    assert begun == {0, 1, 2}  # each had its turn before one of them was set aside


def test_an_equal_beginning_is_read_and_kept_once(module, single):
    texts = [[*PROMPT[:18], n] for n in range(3)]
    stats = Stats()
    pairs = module.generate_batch_ids(texts, 3, stop_at_eos=False, stats=stats)
    got, used = [[], [], []], []
    for index, token in pairs:
        got[index].append(token)
        used.append(PAGES - module.pool.free)
    assert got == [list(single.generate_ids(t, 3, stop_at_eos=False)) for t in texts]
    assert stats.reused_tokens == 36 and stats.prompt_tokens == 57
    assert max(used) == 4 + 3 * 2  # four whole pages together, and the ends of three texts


def test_sessions_share_until_they_differ(module, single):
    module.reset()
    first = module.session(slot=1)
    first.append(PROMPT[:10])
    second = first.fork(2)
    assert second.tokens == first.tokens and PAGES - module.pool.free == 3
    hidden = append_each(module, [second, first], [7, 9])
    assert PAGES - module.pool.free == 4
    for row, ids in zip(hidden, ([*PROMPT[:10], 7], [*PROMPT[:10], 9]), strict=True):
        session = single.session()
        assert np.array_equal(row, session.append(ids)[0])
    second.rewind(4)
    assert PAGES - module.pool.free == 3
    first.end()
    assert PAGES - module.pool.free == 1
    with pytest.raises(UsageError, match="has ended"):
        first.append([1])
    first.end()  # once more does nothing
    again = single.session()
    assert np.array_equal(second.append([5, 6])[0], again.append([*PROMPT[:4], 5, 6])[0])
    module.session(slot=2)
    assert module.pool.free == PAGES
    with pytest.raises(UsageError, match="has ended"):
        second.fork(0)


def test_what_does_not_fit_is_said_and_changes_nothing(module, single):
    module.reset()
    one, other = module.session(slot=0), module.session(slot=1)
    one.append([1] * 40)
    other.append([2] * 20)
    with pytest.raises(
        UsageError, match=r"5 more pages of 4 positions are needed, 1 of 16 are free"
    ) as found:
        other.append([3] * 20)
    assert "10 by slot 0, 5 by slot 1" in str(found.value) and "--pages" in found.value.remedy
    assert other.position == 20 and module.pool.free == 1
    third = module.session(slot=2)
    third.append([4] * 4)
    with pytest.raises(UsageError, match="2 more pages of 4 positions are needed, 0 of 16"):
        append_each(module, [one, other], [1, 1])
    assert (one.position, other.position) == (40, 20)
    third.end()
    assert append_each(module, [one], [5]).shape == (1, 16)
    with pytest.raises(UsageError, match="slot 1 is that of the sequence itself"):
        other.fork(1)
    with pytest.raises(UsageError, match=r"share nothing.*no pages"):
        single.session().fork(0)
    with pytest.raises(UsageError, match="no sequence 3"):
        other.fork(BATCH)
    with pytest.raises(UsageError, match=r"12 more pages .* 11 of 16 are free .held 5 by slot 1"):
        list(module.generate_batch_ids([[1] * 45], 1))  # who holds pages elsewhere keeps them


@pytest.fixture(scope="module")
def again(tmp_path_factory: pytest.TempPathFactory) -> Module:
    """Like `module`, but every sixth generated token they are all run once more as a prompt."""
    artifact = paged_samples.decoder()
    entries = artifact.programs.entries
    entries["decode_1"] = entries["step_1"]
    decoder = msgspec.structs.replace(artifact.manifest.decoder, decode=(1,), rerun=6)
    artifact.manifest = msgspec.structs.replace(
        artifact.manifest, decoder=decoder, entries=tuple(entries)
    )
    return load(artifact.save(tmp_path_factory.mktemp("again") / "again.mimo"))


@pytest.mark.parametrize("several", [True, False])
def test_pages_of_tokens_that_run_once_more_are_there_before_anything_changes(
    again, single, several
):
    """Two have four pages in common; six tokens lie in two of them, the next token in one."""
    again.reset()
    first = again.session(slot=0)
    text = PROMPT[:10]
    first.append(text)
    for token in (1, 2, 3, 4, 5):
        first.append([token], decode=True)
        text = [*text, token]
    second, other = first.fork(1), again.session(slot=2)
    other.append([7] * 44)
    assert again.pool.free == 1
    before = [again.pool.held(slot) for slot in range(BATCH)]

    def step():
        if several:
            return append_each(again, [first, second], [8, 9])
        return first.append([8], decode=True)

    with pytest.raises(UsageError, match="2 more pages of 4 positions are needed, 1 of 16 are"):
        step()
    assert (first.position, second.position) == (15, 15)
    assert [again.pool.held(slot) for slot in range(BATCH)] == before
    other.rewind(40)
    hidden = step()
    assert again.pool.free == 0 and first.position == 16
    for row, token in zip(hidden, (8, 9), strict=False):
        assert np.array_equal(row, single.session().append([*text, token])[0])


@pytest.mark.parametrize(
    ("pool", "match"),
    [
        ({"pages": 11}, r"11 pages of 4, for 48 positions"),
        ({"page": 0}, "16 pages of 0"),
        ({"table": "own"}, "which is no state int32"),
        ({"table": "nowhere"}, "'nowhere', which is no state"),
        ({"states": ("nothing",)}, r"16 pages of 4 in nothing \[\]"),
        ({"pages": 17}, r"17 pages of 4 in pool \[1, 64, 16\]"),
        ({"pages": 32}, r"32 pages of 4 in pool \[1, 64, 16\]"),
        ({"page": 8}, r"16 pages of 8 in pool \[1, 64, 16\]"),
        ({"page": 1, "pages": 64}, "a table of 16 pages, for 48"),
        ({"page": 1 << 40, "pages": 1}, "1 pages of 1099511627776 in pool"),
        ({"pages": 1 << 40}, "1099511627776 pages of 4 .* more than 3 times 48 positions need"),
        ({"states": ("pool", "own")}, r"16 pages of 4 in own \[1, 48, 16\]"),
        ({"states": ()}, "has no states"),
    ],
)
def test_manifests_whose_pages_do_not_fit_are_refused(tmp_path, pool, match):
    artifact = paged_samples.decoder()
    decoder = artifact.manifest.decoder
    changed = msgspec.structs.replace(decoder, pool=msgspec.structs.replace(decoder.pool, **pool))
    artifact.manifest = msgspec.structs.replace(artifact.manifest, decoder=changed)
    with pytest.raises(ArtifactError, match=match):
        load(artifact.save(tmp_path / "wrong.mimo"))


def test_tables_are_those_of_one_sequence_and_pools_of_several(tmp_path):
    artifact = paged_samples.decoder()
    states = {**artifact.manifest.states, "pages": State((2, 16), "int32")}
    artifact.manifest = msgspec.structs.replace(artifact.manifest, states=states)
    with pytest.raises(ArtifactError, match="which is no state int32"):
        load(artifact.save(tmp_path / "narrow.mimo"))
    for shape, match in (((1, 32), "a table of 32"), ((1, 1 << 40), "a table of 1099511627776")):
        states["pages"] = State(shape, "int32")
        artifact.manifest = msgspec.structs.replace(artifact.manifest, states=states)
        with pytest.raises(ArtifactError, match=f"{match}, more than 3 times 48"):
            load(artifact.save(tmp_path / "wide.mimo"))
    one = runtime_samples.decoder()
    decoder = msgspec.structs.replace(one.manifest.decoder, pool=Pool(4, 16, ("cache",), "pages"))
    one.manifest = msgspec.structs.replace(one.manifest, decoder=decoder)
    with pytest.raises(ArtifactError, match="is there for one sequence"):
        load(one.save(tmp_path / "one.mimo"))


def test_what_works_on_pages_is_not_called_without_a_session(module):
    """Nobody takes pages for it: it would write into those of others."""
    module.reset()
    mine = module.session(slot=1)
    hidden = mine.append(PROMPT[:9])
    mine.rewind(8)
    ids = np.zeros(4, np.int32)
    for name, pos in (("step_4", [0, 4]), (f"batch_{BATCH}", [[0, 1]] * BATCH)):
        into = ids[: BATCH if "batch" in name else 4]
        for method in (module.call, module.profile):
            with pytest.raises(UsageError, match=f"{name} of paged works on pages") as found:
                method(name, into, np.array(pos, np.int32))
            assert "session" in found.value.remedy
    assert np.array_equal(mine.append(PROMPT[8:9]), hidden)
    assert module.call("head_1", hidden).shape == (1, VOCAB)


@pytest.mark.parametrize(
    "pos", [[CONTEXT, 1], [CONTEXT - 3, 4], [-1, 1], [0, 5], [0, -1], [2**31 - 1, 1]]
)
def test_positions_of_calls_are_within_the_context(single, pos):
    ids = np.zeros(4, np.int32)
    with pytest.raises(
        UsageError, match=rf"tokens from position {pos[0]} on.*context of {CONTEXT}"
    ):
        single.call("step_4", ids, np.array(pos, np.int32))
    single.call("step_4", ids, np.array([CONTEXT - 4, 4], np.int32))


@pytest.mark.parametrize("slot", [-1, BATCH, "x", None])
def test_slots_to_vacate_are_among_those_there_are(module, slot):
    last = module.session(slot=BATCH - 1)
    with pytest.raises(UsageError, match=r"no sequence|whole number"):
        module.vacate(slot)
    assert last.append([1]).shape == (1, 16)


def test_a_slot_is_not_vacated_while_a_step_runs(module, monkeypatch):
    """Its pages would be another sequence's before what the step writes is in them."""
    module.reset()
    session = module.session(slot=1)
    held, waits = [], []

    def run(bound):
        thread = threading.Thread(target=module.vacate, args=(1,))
        thread.start()
        thread.join(0.05)
        held.append(module.pool.held(1))
        waits.append(thread)

    monkeypatch.setattr(BoundEntry, "run", run)
    session.append([1, 2, 3])
    waits[0].join()
    assert len(held[0]) == 1 and module.pool.held(1) == ()


@pytest.mark.parametrize("entry", ["step_4", f"batch_{BATCH}"])
def test_entries_that_look_into_no_table_are_refused(tmp_path, entry):
    artifact = paged_samples.decoder()
    wrong = artifact.programs.entries[entry]
    buffers = [
        b if b.source != "pages" else Buffer("arena", b.shape, b.dtype) for b in wrong.buffers
    ]
    artifact.programs.entries[entry] = msgspec.structs.replace(wrong, buffers=tuple(buffers))
    with pytest.raises(ArtifactError, match=f"entry {entry} does not look into the table 'pages'"):
        load(artifact.save(tmp_path / "blind.mimo"))


def test_what_is_abandoned_leaves_no_pages(module):
    """Nobody else could end these sequences; a failure ends them, too."""
    module.reset()
    pairs = module.generate_batch_ids([[1] * 12, [2] * 12, [3] * 12], 10, stop_at_eos=False)
    for _ in range(4):
        next(pairs)
    assert module.pool.free < PAGES
    pairs.close()
    assert module.pool.free == PAGES
    ids = module.generate_ids([1] * 30, 15, stop_at_eos=False)
    next(ids)
    ids.close()
    assert module.pool.free == PAGES
    module.token_logprobs([1] * CONTEXT)
    assert module.pool.free == PAGES
    mine = module.session()
    list(module.generate_ids([1] * 9, 3, stop_at_eos=False, session=mine))
    assert mine.position == 11  # what was begun before goes on
    mine.end()


def test_a_batch_ends_what_was_left_in_its_slots_and_nothing_else(module, single):
    """Pages of a sequence in a slot that it will use are free for it at once; others keep theirs."""
    module.reset()
    left = [module.session(slot=slot) for slot in range(BATCH)]
    left[0].append([5] * 5)
    left[1].append([6] * 36)
    left[2].append([7] * 3)
    texts = [[1, 2], [3, 4]]
    pairs = module.generate_batch_ids(texts, 44, stop_at_eos=False)  # one is set aside in between
    alone = [list(single.generate_ids(text, 44, stop_at_eos=False)) for text in texts]
    assert collected(pairs, 2) == alone
    kept = single.session()
    assert np.array_equal(left[2].append([8])[0], kept.append([7, 7, 7, 8])[0])
    for ended in left[:2]:
        with pytest.raises(UsageError, match="has ended"):
            ended.append([1])


def test_steps_that_fail_keep_no_pages(module, monkeypatch):
    module.reset()
    one, other = module.session(slot=0), module.session(slot=1)
    one.append([1] * 4)
    other.append([2] * 6)
    held = [module.pool.held(slot) for slot in range(BATCH)]

    def run(bound):
        raise RuntimeError("no")

    with monkeypatch.context() as patch:
        patch.setattr(BoundEntry, "run", run)
        for step in (
            lambda: one.append([1] * 16),
            lambda: append_each(module, [one, other], [1, 2]),
        ):
            with pytest.raises(RuntimeError):
                step()
            assert [module.pool.held(slot) for slot in range(BATCH)] == held
        with pytest.raises(RuntimeError):
            list(module.generate_batch_ids([[1] * 9], 1))
        assert module.pool.held(0) == () and module.pool.held(1) == held[1]
    one = module.session(slot=0)
    assert append_each(module, [one, other], [3, 4]).shape == (2, 16)


def test_prompts_that_wait_are_compared_when_others_come_or_go(module, single, monkeypatch):
    """Not for each token of those that go on."""
    module.reset()
    compared = []
    prefix = Session.prefix
    monkeypatch.setattr(Session, "prefix", lambda s, ids: compared.append(1) or prefix(s, ids))
    texts = [[1] * 30, [2] * 10, [3] * 20]  # 8, 3 and 5 pages of 16, and those of new tokens
    pairs = module.generate_batch_ids(texts, 16, stop_at_eos=False)
    alone = [list(single.generate_ids(text, 16, stop_at_eos=False)) for text in texts]
    del compared[:]
    assert collected(pairs, 3) == alone
    assert 0 < len(compared) <= 8


def test_what_is_read_again_is_no_prompt(module, monkeypatch):
    """A text that is set aside counts once as a prompt, in tokens and in seconds."""
    module.reset()
    monkeypatch.setattr("mimo_compile.runtime.batch.time.perf_counter", iter(range(10**6)).__next__)
    stats = Stats()
    list(module.generate_batch_ids([[1, 2], [3, 4], [5, 6]], 38, stop_at_eos=False, stats=stats))
    assert stats.prefill_seconds == 3 and stats.prefill_tokens_per_s == 2
    assert stats.new_tokens == 3 * 38


def test_sequences_with_other_adapters_share_nothing(module, monkeypatch):
    """Their keys are others, however equal the texts are."""
    module.reset()
    decoder = msgspec.structs.replace(module.manifest.decoder, adapters=("a", "b"))
    manifest = msgspec.structs.replace(module.manifest, decoder=decoder)
    monkeypatch.setattr(module, "manifest", manifest)
    for adapters, shared in ((["a", "b"], 0), ([None, "b"], 0), (["a", "a"], 16)):
        stats = Stats()
        how = {"stop_at_eos": False, "stats": stats, "adapter": adapters}
        list(module.generate_batch_ids([PROMPT[:18]] * 2, 2, **how))
        assert stats.reused_tokens in ([0] if not shared else range(shared, 18))
