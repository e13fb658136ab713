"""Generation with a decoder in miniature whose logits numpy computes exactly."""

import copy
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest
import runtime_samples
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime_samples import CONTEXT, EOS, VOCAB, reference_logits

from mimo_compile.errors import UsageError
from mimo_compile.runtime import Module, Stats, load
from mimo_compile.runtime.sampling import Sampling, sample
from mimo_compile.runtime.steps import plan_steps

PROMPT = list(b"def main(argv):")


@pytest.fixture(scope="module")
def module(decoder_file: Path) -> Module:
    return load(decoder_file)


def greedy(prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(np.argmax(reference_logits(ids)[-1])))
    return ids[len(prompt) :]


@pytest.mark.parametrize("length", [1, 3, 4, 5, 15, 16, 17, 31])
def test_greedy_generation_equals_the_reference(module: Module, length: int) -> None:
    prompt = [(7 * i) % 256 for i in range(length)]
    stats = Stats()
    found = list(module.generate_ids(prompt, 12, stop_at_eos=False, stats=stats))
    assert found == greedy(prompt, 12)
    assert (stats.prompt_tokens, stats.new_tokens, stats.stopped) == (length, 12, "length")
    assert stats.prefill_tokens_per_s is not None
    assert stats.decode_tokens_per_s is not None
    # measured, or absent with the reason; never made up
    assert (stats.joules_per_token is None) == bool(stats.joules_reason)
    assert (stats.joules_source is None) == (stats.joules_per_token is None)


def test_sampling_uses_logits_and_position_of_each_token(module: Module) -> None:
    kind = Sampling(temperature=40.0, top_k=50, top_p=0.9, seed=11)
    ids = list(PROMPT)
    for _ in range(10):
        ids.append(sample(reference_logits(ids)[-1], kind, len(ids)))
    options = {"temperature": 40.0, "top_k": 50, "top_p": 0.9, "stop_at_eos": False}
    assert list(module.generate_ids(PROMPT, 10, seed=11, **options)) == ids[len(PROMPT) :]
    assert list(module.generate_ids(PROMPT, 10, seed=12, **options)) != ids[len(PROMPT) :]


def test_text_is_the_decoded_ids(module: Module) -> None:
    prompt = "grüße, 世界 "
    pieces = list(module.generate(prompt, 15, temperature=30.0, stop_at_eos=False))
    ids = list(module.generate_ids(prompt, 15, temperature=30.0, stop_at_eos=False))
    whole = module.tokenizer.decode(ids)
    assert "".join(pieces) == whole.rstrip("\ufffd")
    assert all(pieces)


def test_generation_stops_before_the_end_of_text() -> None:
    artifact = runtime_samples.decoder()
    head = artifact.weights["head"].copy()
    prompt = artifact.module().tokenizer.encode("b").ids
    head[EOS] = artifact.weights["embed"][prompt[0]] * 100
    artifact.weights = {**artifact.weights, "head": head}
    module = artifact.module()
    stats = Stats()
    assert list(module.generate_ids(prompt, 9, stats=stats)) == []
    assert (stats.new_tokens, stats.stopped) == (0, "eos")
    assert next(module.generate_ids(prompt, 2, stop_at_eos=False)) == EOS
    assert "".join(module.generate("b", 9)) == ""


def test_an_empty_text_begins_with_the_first_token() -> None:
    artifact = runtime_samples.decoder()
    decoder = msgspec.structs.replace(artifact.manifest.decoder, bos=3)
    artifact.manifest = msgspec.structs.replace(artifact.manifest, decoder=decoder)
    module = artifact.module()
    assert list(module.generate_ids("", 3)) == list(module.generate_ids([3], 3))
    ids = module.tokenizer.encode("ab").ids  # the tokenizer adds none, so none is added
    assert list(module.generate_ids("ab", 3)) == list(module.generate_ids(ids, 3))
    with pytest.raises(UsageError, match="the prompt is empty"):
        module.generate_ids([], 3)


def test_the_context_is_used_to_its_end_and_not_beyond(module: Module) -> None:
    prompt = [1] * (CONTEXT - 3)
    everything = list(module.generate_ids(prompt, stop_at_eos=False))
    assert everything == greedy(prompt, 4)  # the last one needs no place
    assert len(list(module.generate_ids([1] * CONTEXT, 1, stop_at_eos=False))) == 1
    for ids, count in ((prompt, 5), ([1] * (CONTEXT + 1), None), ([1] * (CONTEXT + 1), 0)):
        with pytest.raises(UsageError, match=f"do not fit the context of {CONTEXT}"):
            module.generate_ids(ids, count)


def test_wrong_arguments_are_refused_at_once(module: Module, plain_file: Path) -> None:
    for match, options in (
        ("temperature is -1", {"temperature": -1}),
        ("temperature is nan", {"temperature": float("nan")}),
        ("top_p is 0", {"top_p": 0}),
        ("top_k is -2", {"top_k": -2}),
        ("seed is 0.5", {"seed": 0.5}),
        ("max_new_tokens is -1", {"max_new_tokens": -1}),
    ):
        with pytest.raises(UsageError, match=match):
            module.generate(PROMPT, **options)
    for match, prompt in (
        ("the prompt is empty", ""),
        ("the prompt is empty", []),
        (f"token id {VOCAB} is outside of the vocabulary of {VOCAB}", [1, VOCAB]),
        ("token id -1 is outside", [-1]),
        ("flat sequence", [[1]]),
        ("flat sequence", [0.5]),
    ):
        with pytest.raises(UsageError, match=match):
            module.generate_ids(prompt, 1)
    with pytest.raises(UsageError, match="plain is not a decoder"):
        load(plain_file).generate("x")
    bare = runtime_samples.decoder()
    bare.tokenizer = None
    with pytest.raises(UsageError, match=r"has no tokenizer\. Pass token ids"):
        bare.module().generate("x")
    assert list(module.generate_ids(PROMPT, 0)) == []


def test_a_second_sequence_ends_the_first(module: Module) -> None:
    first = module.generate_ids(PROMPT, 5, stop_at_eos=False)
    next(first)
    second = module.generate_ids(PROMPT, 5, stop_at_eos=False)
    next(first)  # nothing was asked of the second so far
    next(second)
    with pytest.raises(UsageError, match="this sequence has ended"):
        next(first)
    assert len(list(second)) == 4


def test_stopping_early_leaves_true_counts(module: Module) -> None:
    stats = Stats()
    tokens = module.generate_ids(PROMPT, 9, stop_at_eos=False, stats=stats)
    next(tokens)
    next(tokens)
    tokens.close()
    assert (stats.new_tokens, stats.stopped) == (2, "")
    assert stats.joules_reason or stats.joules_per_token


@pytest.mark.parametrize("length", [2, 5, 16, 17, CONTEXT])
def test_scores_are_the_log_softmax_of_the_reference(module: Module, length: int) -> None:
    ids = [(11 * i) % 250 for i in range(length)]
    logits = reference_logits(ids)[:-1]
    shifted = logits - logits.max(1, keepdims=True)
    table = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    found = module.token_logprobs(ids)
    assert found.dtype == np.float64
    assert np.allclose(found, table[np.arange(length - 1), ids[1:]], rtol=1e-12, atol=1e-12)
    for wrong in ([1], [0] * (CONTEXT + 1)):
        with pytest.raises(UsageError):
            module.token_logprobs(wrong)


@given(
    count=st.integers(0, 400),
    more=st.lists(st.sampled_from([2, 3, 4, 8, 16, 64, 100]), unique=True),
    slack=st.integers(0, 120),
)
@settings(max_examples=200)
def test_steps_cover_all_tokens_within_the_context(count: int, more: list[int], slack: int) -> None:
    steps = (1, *sorted(more))
    plan = plan_steps(count, steps, slack)
    over = sum(plan) - count
    assert set(plan) <= set(steps)
    assert 0 <= over <= slack
    assert not plan or over < plan[-1]  # only the last step is padded
    assert sum(8 + step for step in plan) <= 9 * count or not count


@pytest.mark.parametrize(
    ("count", "slack", "plan"),
    [(1, 99, (1,)), (3, 99, (4,)), (3, 0, (1, 1, 1)), (5, 99, (4, 1)), (15, 99, (16,)),
     (33, 99, (16, 16, 1)), (30, 99, (16, 16))],
)  # fmt: skip
def test_padding_is_chosen_where_it_is_cheaper(
    count: int, slack: int, plan: tuple[int, ...]
) -> None:
    assert plan_steps(count, (1, 4, 16), slack) == plan


def test_threads_that_share_a_module_end_or_are_right(module: Module) -> None:
    prompts = [[(7 * i + n) % 256 for i in range(17)] for n in range(4)]
    wanted = [greedy(prompt, 12) for prompt in prompts]
    wrong: list[list[int]] = []
    done = threading.Event()

    def work(n: int) -> None:
        while not done.is_set():
            try:
                found = list(module.generate_ids(prompts[n], 12, stop_at_eos=False))
            except UsageError as error:
                assert "another one began" in str(error)
                continue
            if found != wanted[n]:
                wrong.append(found)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        done.wait(0.5)
    finally:
        done.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert not wrong


@pytest.mark.parametrize("take", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_module_is_neither_pickled_nor_copied(module: Module, take) -> None:
    with pytest.raises(TypeError, match=r"load .*decoder\.mimo once more"):
        take(module)


FORK = """
import os, sys
from mimo_compile.errors import MimoError
from mimo_compile.runtime import load

module = load(sys.argv[1], threads=2)
before = sys.argv[2] == "before"
if not before:
    list(module.generate_ids([1], 2))
child = os.fork()
if not child:
    try:
        list(module.generate_ids([1], 2))
        os._exit(0)
    except MimoError as error:
        os._exit(7 if "was forked after" in str(error) else 8)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize(("when", "code"), [("before", 0), ("after", 7)])
def test_a_fork_that_lost_the_kernels_threads_says_so(
    decoder_file: Path, when: str, code: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK, str(decoder_file), when],
        capture_output=True, text=True, timeout=60, env={**os.environ, "TVM_NUM_THREADS": "2"},
    )  # fmt: skip
    assert done.stdout.split() == [str(code)], done.stderr
