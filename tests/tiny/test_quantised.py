"""Training the built-in model through the product's quantisers: what is trained is what is run."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

torch = pytest.importorskip("torch")

from micro_models import MICRO, untrained

from mimo_compile.frontend.huggingface import load_checkpoint
from mimo_compile.ir.formats import parse_scheme, parse_weight_format
from mimo_compile.ir.ops.numerics import fake_quantize
from mimo_compile.quantize import quantize
from mimo_compile.tiny.checkpoint import export
from mimo_compile.tiny.quantised import StraightThrough, stacks
from mimo_compile.tiny.train import Settings, Trainer
from mimo_compile.tiny.training_model import TinyModel
from mimo_compile.tiny.training_ops import round_straight

pytestmark = pytest.mark.compile

CONFIG = replace(MICRO, max_position_embeddings=64)
SCHEMES = ("w1.58a8", "complex2wla8", "complex2wl2a8")


def trainer(scheme: str) -> Trainer:
    tokens = np.random.default_rng(0).integers(0, 64, 4000).astype(np.uint16)
    settings = Settings(
        minutes=1e-9, length=16, micro_batch=2, accumulate=2, compiled=False, quant=scheme,
        matrix_rate=0.1, decay_from=2.0,
    )  # fmt: skip
    return Trainer(untrained(CONFIG), tokens, tokens, settings)


def matrices(model: TinyModel) -> dict[str, torch.Tensor]:
    return {s.name: torch.cat(s.parts).clone() for s in stacks(model, joined=False)}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_parameters_are_swapped_for_their_quantised_values_and_back(scheme: str) -> None:
    model = untrained(CONFIG)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    through = StraightThrough(model, parse_scheme(scheme))
    joined = parse_scheme(scheme).weight.family == "complex"
    masters = {s.name: torch.cat(s.parts).clone() for s in stacks(model, joined)}
    through.hide()
    for stack in through.stacks:
        q = quantize(masters[stack.name], through.format)
        assert np.array_equal(torch.cat(stack.parts).numpy(), q.dequantize()), stack.name
    hidden = {name: p.detach().clone() for name, p in model.named_parameters()}
    same = {name for name, p in hidden.items() if torch.equal(p, before[name])}
    assert same == {
        n for n in before if "norm" in n or "embed" in n or "router" in n or "sink" in n
    }
    through.hide()  # twice is once
    assert all(torch.equal(p, hidden[name]) for name, p in model.named_parameters())
    through.reveal()
    through.reveal()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_every_matrix_is_quantised_once() -> None:
    model = untrained(CONFIG)
    wanted = sum(
        p.numel()
        for name, p in model.named_parameters()
        if p.ndim > 1 and not {"embed_tokens", "router"} & set(name.split("."))
    )
    for joined in (False, True):
        found = stacks(model, joined)
        assert sum(part.numel() for s in found for part in s.parts) == wanted
        names = [name for s in found for name in s.names]
        assert len(set(names)) == len(names)
        pointers = {part.data_ptr() for s in found for part in s.parts}
        assert len(pointers) == sum(len(s.parts) for s in found)


@pytest.mark.parametrize("name", ["w1.58", "complex2wl2"])
def test_rounded_activations_have_the_gradient_of_floats(name: str) -> None:
    fmt = parse_weight_format(name)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = round_straight(x, fmt)
    assert torch.allclose(y, fake_quantize(x.detach(), fmt, "a8"), rtol=0, atol=1e-6)
    assert not torch.equal(y, x)
    g = torch.randn(5, 16, generator=torch.Generator().manual_seed(2))
    y.backward(g)
    assert torch.equal(x.grad, g)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_was_trained_is_what_the_product_runs(
    scheme: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    run = trainer(scheme)
    start = matrices(run.model)
    losses = [run.step()["loss"] for _ in range(3)]
    assert all(np.isfinite(losses))
    moved = matrices(run.model)
    assert all(not torch.equal(moved[name], start[name]) for name in start), "masters learn"
    export(run.model, tokenizer.to_str(), tmp_path / "m", run.through)
    loaded = load_checkpoint(tmp_path / "m", parse_scheme("none"))
    assert str(loaded.scheme) == "a8", "activations as in training"
    stored = {name for name in loaded.report.dtypes if name not in ("BF16", "F32")}
    assert stored == {parse_scheme(scheme).weight.name}

    ids = np.random.default_rng(3).integers(0, 64, 24)
    run.through.hide()
    rounded = {
        name: p.data.bfloat16().float()
        for name, p in run.model.named_parameters()
        if "embed" in name or "norm" in name or "sink" in name
    }
    run.model.load_state_dict(rounded, strict=False)
    with torch.no_grad():
        trained = run.model.logits(run.model(torch.from_numpy(ids)[None])[0])[0]
    found = loaded.decoder.prefill([int(i) for i in ids])[1]
    error = (found - trained).abs().amax(-1) / trained.abs().amax(-1)
    # a sum in another order may flip an int8 rounding, which moves one code by one
    assert float(error.median()) < 1e-5 and float(error.max()) < 5e-2, error


def test_formats_that_no_checkpoint_holds_are_refused() -> None:
    through = StraightThrough(untrained(CONFIG), parse_scheme("w4g32a8"))
    with pytest.raises(ValueError, match="no checkpoint holds w4g32"):
        through.packed()
    with pytest.raises(ValueError, match="quantises no weights"):
        StraightThrough(untrained(CONFIG), parse_scheme("none"))
