"""Weights of `models/tiny-4k` and its deltas: small, with a card, able to look up what stands far back."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from tokenizers import Tokenizer

from mimo_compile.tiny import long_context as long
from mimo_compile.tiny.checkpoint import load
from mimo_compile.tiny.gates import load_gates
from mimo_compile.tiny.hysparse import load_hysparse
from mimo_compile.tiny.indexers import load_indexers

pytestmark = pytest.mark.compile

MODELS = Path(__file__).resolve().parents[2] / "models"
FOLDER = MODELS / "tiny-4k"


def test_weights_outside_the_wheel_stay_small() -> None:
    assert {"README.md", "config.json", "model.safetensors"} <= {f.name for f in FOLDER.iterdir()}
    deltas = {"README.md", "gates.safetensors", "hysparse.safetensors", "indexers.safetensors"}
    assert deltas == {f.name for f in (MODELS / "tiny-4k-deltas").iterdir()}
    assert sum(f.stat().st_size for f in MODELS.glob("tiny-4k*/*")) < 25_000_000


def test_deltas_belong_to_these_weights() -> None:
    base, deltas = load(FOLDER), MODELS / "tiny-4k-deltas"
    assert sorted(load_gates(base.config, deltas / "gates.safetensors")) == [0, 5]
    assert sorted(load_indexers(base.config, deltas / "indexers.safetensors")) == [0, 5]
    model = load_hysparse(base, deltas / "hysparse.safetensors")
    assert (model.shape.block, model.shape.budget) == (32, 256)


@pytest.mark.slow
def test_what_stands_thousands_of_tokens_back_is_found() -> None:
    """Of code with notes strewn into it, chance would find none of 16 answers."""
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    _, held_out = long.writers(tokenizer)
    sample = held_out(11).needles(4096, 16, at_end=True, separator=1)
    assert max(a.distance for a in sample.answers) > 3000
    model = load(FOLDER)
    (right,) = long.recall(model, [sample])
    assert sum(right) >= 14
