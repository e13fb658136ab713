"""Larger models made of the built-in one compute what it does."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from mimo_compile.frontend.huggingface import load_checkpoint, resolve_source
from mimo_compile.ir.formats import parse_scheme

pytestmark = pytest.mark.compile
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TOKENS, HIDDEN, WORDS = 40, 256, 4096


@pytest.fixture(scope="module")
def wide() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("wide")


def run(folder: Path) -> tuple[Any, torch.Tensor, list[torch.Tensor]]:
    """Return the decoder, its hidden states, and logits: its own and those of the draft heads."""
    decoder = load_checkpoint(folder, parse_scheme("none"), 64).decoder
    ids = torch.randint(0, WORDS, (TOKENS,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden, logits = decoder.forward_step(ids, 0)
        drafts = [
            decoder.draft(head, hidden[: -1 - head], ids[1 + head :], 0)
            for head in range(len(decoder.config.mtp))
        ]
    return decoder, hidden, [logits, *drafts]


@pytest.fixture(scope="module")
def small() -> Any:
    return run(resolve_source("tiny"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "widths",
    [
        {"hidden": 4, "layers": 2, "inner": 600, "experts": 2, "vocab": 2, "drafts": 3},
        {"hidden": 16, "experts": 3},
        {"layers": 3, "inner": 1024, "vocab": 3},
    ],
)
def test_larger_models_compute_the_same(wide, small, widths, tmp_path):
    """Sums have other orders, which float32 notes in the last of its 24 bits; layers add that up."""
    decoder, hidden, logits = run(wide.widened(tmp_path, wide.Widths(**widths)))
    assert len(decoder.config.layers) == 6 + widths.get("layers", 0)
    assert hidden.shape[1] == HIDDEN * widths.get("hidden", 1)
    assert not hidden[:, HIDDEN:].any()
    near = {"rtol": 0, "atol": 2**-12 * float(small[1].abs().max())}
    torch.testing.assert_close(hidden[:, :HIDDEN], small[1], **near)
    for mine, own in zip(logits, small[2], strict=True):
        assert mine.shape[1] == WORDS * widths.get("vocab", 1)
        near["atol"] = 2**-12 * float(own.abs().max())
        for copy in mine.split(WORDS, 1):
            torch.testing.assert_close(copy, own, **near)
        assert torch.equal(mine.argmax(1) % WORDS, own.argmax(1))


@pytest.mark.parametrize("shape", ["dense", "experts"])
def test_shapes_are_of_a_published_models_proportions(wide, shape):
    """Of the weights that a dense token reads, table and draft heads are MiMo-7B's part within 15 %."""
    widths = wide.SHAPES[shape]
    config = json.loads((resolve_source("tiny") / "config.json").read_text())
    stream = config["hidden_size"] * widths.hidden
    expert = 3 * stream * config["moe_intermediate_size"] * widths.experts
    layers = 3 * stream * widths.inner * (1 + widths.layers) + 5 * 2 * expert
    table = stream * config["vocab_size"] * widths.vocab
    draft = 2 * stream**2 + 3 * stream * config["mtp_intermediate_size"] * widths.drafts
    assert layers > 100e6
    if shape == "dense":
        assert 36 * table / layers == pytest.approx(3.5, rel=0.15)
        assert 36 * draft / layers == pytest.approx(1.19, rel=0.15)
    else:
        assert (table + draft) / layers < 0.08


@pytest.mark.parametrize("widths", [{"hidden": 2}, {"hidden": 9}, {"vocab": 0}, {"drafts": -1}])
def test_what_would_not_say_the_same_is_refused(wide, widths):
    with pytest.raises(SystemExit, match=f"^{next(iter(widths))}="):
        wide.Widths(**widths)


def test_fewer_rows_than_there_are_are_refused(wide, tmp_path):
    with pytest.raises(SystemExit, match="512 rows already"):
        wide.widened(tmp_path, wide.Widths(inner=256))
