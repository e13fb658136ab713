"""Trained gates: what they are asked, what they say, and that no text depends on it."""

from __future__ import annotations

import expert_samples as samples
import numpy as np
import pytest

from mimo_compile.errors import InputError, UsageError
from mimo_compile.runtime import ExpertMemory, load, tensor_file
from mimo_compile.runtime.foresight import LIKELY, GateForesight, Kept, Rows, in_order
from mimo_compile.runtime.pregate import BEGIN, Gate, PreGates

LABELS = tuple(f"{layer}.experts" for layer in samples.LAYERS)
PAIRS = [(BEGIN, 0), (BEGIN, 1), (0, 1), (0, 2), (1, 2), (1, 0), (2, 0), (2, 1)]
TOKENS = [5, 40, 7, 99, 200, 3, 3, 61, 18]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return samples.experts().save(tmp_path_factory.mktemp("gated") / "experts.mimo")


def gates(seed=1, labels=LABELS, experts=samples.EXPERTS, width=samples.WIDTH):
    rng = np.random.default_rng(seed)
    return PreGates(
        labels,
        {
            pair: Gate(
                rng.standard_normal((experts, width), np.float32),
                rng.standard_normal(experts, np.float32),
            )
            for pair in PAIRS
        },
    )


def states(module):
    session = module.session()
    parts = [part.copy() for part in session.chunks(TOKENS)]
    return np.concatenate([*parts, *(session.append([t]).copy() for t in TOKENS)])


def test_a_file_has_the_gates_that_were_saved(tmp_path):
    made = gates()
    made.save(tmp_path / "g.safetensors")
    found = PreGates.load(tmp_path / "g.safetensors")
    assert found.layers == LABELS and found.gates.keys() == made.gates.keys()
    for pair, gate in made.gates.items():
        assert np.array_equal(gate.weight, found.gates[pair].weight)
        assert np.array_equal(gate.bias, found.gates[pair].bias)


def test_probabilities_are_those_of_logistic_regression():
    rng = np.random.default_rng(3)
    gate = Gate(*(rng.standard_normal(shape, np.float32) for shape in ((6, 32), 6)))
    rows = rng.standard_normal((5, 32), np.float32)
    wide = rows.astype(float) @ gate.weight.T.astype(float) + gate.bias
    # sums of 32 products and one exponential, of numbers around 6
    assert np.abs(gate(rows) - 1 / (1 + np.exp(-wide))).max() < 1e-5
    assert not gate(-1e4 * np.sign(gate.weight[:1]))[0, 0]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t, f: f.update(format="x"), "its format is 'x'"),
        (lambda t, f: t.update({"0.9.weight": t["0.1.weight"]}), "'0.9.weight' is no gate between"),
        (lambda t, f: t.update({"x": t["0.1.weight"]}), "'x' is no gate between two of its 3 layers"),
        (lambda t, f: t.pop("0.1.bias"), "'0.1.weight' has no bias"),
        (lambda t, f: t.pop("0.1.weight"), "a bias without a weight"),
        (lambda t, f: t.clear(), "it has no gates"),
        (lambda t, f: t.update({"0.1.bias": t["0.1.bias"][:-1]}), "no bias of as many rows"),
        (lambda t, f: t.update({"0.1.bias": t["0.1.bias"] + np.inf}), "not of finite float32"),
        (lambda t, f: t.update({"0.1.weight": t["0.1.weight"].astype("f8")}), "not of finite float32"),
    ],
)  # fmt: skip
def test_files_that_are_none_are_refused(tmp_path, change, text):
    path = tmp_path / "g.safetensors"
    gates().save(path)
    tensors, facts = tensor_file.read(path)
    change(tensors, facts)
    tensor_file.write(path, tensors, facts)
    with pytest.raises(InputError, match=text) as found:
        PreGates.load(path)
    assert found.value.where == str(path)


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (gates(labels=("a", "b", "c")), r"experts in 3 layers \(a to c\), the model has them in 3"),
        (gates(experts=5), r"is \[5, 16\], the model needs \[6, 16\]"),
        (gates(width=8), r"is \[6, 8\], the model needs \[6, 16\]"),
    ],
)
def test_gates_of_another_model_are_refused(file, tmp_path, made, text):
    path = tmp_path / "g.safetensors"
    made.save(path)
    with pytest.raises(InputError, match=text):
        load(file, expert_memory=ExpertMemory("1MiB", pre_gates=path))


@pytest.mark.parametrize(
    ("more", "text"),
    [({"pre_gates": 5}, "5, which names no file"), ({"pre_gates": "x", "ahead": 0}, "ahead is 0")],
)
def test_other_arguments_are_refused(file, more, text):
    with pytest.raises(UsageError, match=text):
        load(file, expert_memory=ExpertMemory("1MiB", **more))


@pytest.mark.parametrize("slots", [2, 5, 9, 18])
@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_tokens_do_not_depend_on_gates(file, tmp_path, slots, ahead):
    path = tmp_path / "g.safetensors"
    gates(seed=slots).save(path)
    how = ExpertMemory(slots * 3 * 16 * samples.WIDTH * 4, ahead=ahead, pre_gates=path)
    module = load(file, threads=1, expert_memory=how)
    assert module.experts.facts()["slots"] == slots
    assert (states(module) == states(load(file, threads=1))).all()
    assert slots == 2 or module.experts.facts()["loaded_ahead"] > 0


def test_gates_see_embeddings_and_rows_of_tokens(file, tmp_path, monkeypatch):
    table, path, made = samples.weights("float")[1]["table"], tmp_path / "g.safetensors", gates()
    made.save(path)
    said = []
    own = GateForesight.__call__

    def noted(self):
        said.append((self._gate.weight.tobytes(), own(self)))
        return said[-1][1]

    monkeypatch.setattr(GateForesight, "__call__", noted)
    module = load(file, threads=1, expert_memory=ExpertMemory("1MiB", ahead=1, pre_gates=path))
    session = module.session()
    list(session.chunks(TOKENS))  # nine of sixteen rows
    session.append([77])
    names = {gate.weight.tobytes(): pair for pair, gate in made.gates.items()}
    asked = [names[weight] for weight, _ in said]
    assert asked == 2 * [(BEGIN, 0), (0, 1), (1, 2), (2, 0)]
    for (_, pairs), tokens in ((said[0], TOKENS), (said[4], [77])):
        chances = 1 - np.prod(1 - made.gates[BEGIN, 0](table[tokens]), 0)
        assert {e for (_, e), _ in pairs} == set(np.flatnonzero(chances >= LIKELY).tolist())
        assert [chance for _, chance in pairs] == sorted(chances[chances >= LIKELY], reverse=True)
    assert {layer for (layer, _), _ in said[3][1]} == {0}


def test_what_was_foreseen_of_rows_that_are_gone_is_kept():
    gate = Gate(np.array([[9], [-9]], np.float32), np.zeros(2, np.float32))
    seen = np.ones((1, 1), np.float32)
    kept = Kept(GateForesight(1, gate, seen, None, False))
    assert not kept()  # nothing was asked yet
    said = kept.ask()
    assert [key for key, _ in said] == [(1, 0)]
    seen[:] = -1
    assert kept() == said
    assert [key for key, _ in kept.ask()] == [(1, 1)] == [key for key, _ in kept()]


def test_what_is_sure_comes_first_whatever_its_layer():
    def one():
        return [((1, 4), 0.9), ((1, 2), 0.3)]

    def two():
        return [((2, 0), 0.6), ((2, 1), 0.4)]

    assert in_order([one, two]) == [(1, 4), (2, 0), (1, 2), (2, 1)]


def test_rows_that_count_and_the_order_of_what_is_said():
    table = np.array([[4, 3, -9, -9], [-9, 5, 1, -9], [-9, -9, 9, 7]], np.float32)
    gate = Gate(np.ascontiguousarray(table.T), np.zeros(4, np.float32))
    seen = np.eye(3, dtype=np.float32)
    prompt, batch = Rows(np.array([7, 2], np.int32), 3), Rows(np.array([[0, 1], [0, 0], [4, 1]]), 3)
    for rows in (prompt, batch):
        rows.note()

    def says(rows, following):
        return [e for (_, e), _ in GateForesight(2, gate, seen, rows, following)()]

    assert says(prompt, False) == [1, 0, 2]  # one of two tokens needs them: 0.9997, 0.98, 0.73
    assert says(prompt, True) == [1, 2]
    assert says(batch, False) == says(batch, True) == [2, 3, 0, 1]
    assert says(None, False) == [2, 1, 3, 0]
