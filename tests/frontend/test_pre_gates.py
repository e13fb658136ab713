"""`compile --pre-gates`: experts that the layer before chooses, against transformers led to do the same."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import mimo_compile as mc
from mimo_compile.errors import InputError, UsageError
from mimo_compile.frontend.huggingface import load_checkpoint
from mimo_compile.frontend.models.early import PreGate
from mimo_compile.frontend.models.stages import QuantLinear
from mimo_compile.frontend.trained import gate_record
from mimo_compile.ir.formats import parse_scheme
from mimo_compile.pipeline.source import open_source
from mimo_compile.runtime import ExpertMemory
from mimo_compile.runtime.expert_calls import ExpertCall
from mimo_compile.runtime.routing import recording
from mimo_compile.verify import check_gates, verify_artifact

pytestmark = pytest.mark.compile
NONE = parse_scheme("none")
CONTEXT = 96


def name_of(layer, part="weight"):
    return f"model.layers.{layer}.mlp.pre_gate.{part}"


def drawn(model, layers=None, seed=0):
    """Return random gates before the layers with experts (None: all that have a layer before them)."""
    gen = torch.Generator().manual_seed(seed)
    out = {}
    for i, layer in enumerate(model.model.layers):
        if i and hasattr(layer.mlp, "gate") and (layers is None or i in layers):
            out[name_of(i - 1)] = torch.randn(layer.mlp.gate.weight.shape, generator=gen) * 0.3
    assert out
    return out


def written(gates, folder):
    path = folder / "pre-gates.safetensors"
    save_file(gates, path)
    return path


class Early:
    """While it is on, routers of a transformers model read what the block before theirs reads, by gates."""

    def __init__(self, model, gates):
        self.model, self.gates = model, gates

    def __enter__(self):
        self.hooks, self.kept, self.seen = [], [], {}
        layers = self.model.model.layers
        for i, layer in enumerate(layers):
            self.hooks.append(layer.mlp.register_forward_pre_hook(self.note(i)))
            if name_of(i) in self.gates:
                router = layers[i + 1].mlp.gate
                self.kept.append((router, router.weight.data))
                router.weight.data = self.gates[name_of(i)].float()
                self.hooks.append(router.register_forward_pre_hook(self.led(i)))

    def note(self, i):
        def hook(module, args):
            self.seen[i] = args[0]

        return hook

    def led(self, i):
        return lambda module, args: (self.seen[i].reshape(args[0].shape), *args[1:])

    def __exit__(self, *failure):
        for hook in self.hooks:
            hook.remove()
        for router, weight in self.kept:
            router.weight.data = weight


@pytest.mark.parametrize(
    ("case", "layers"),
    [
        ("mimo_v2_flash", None),
        ("mimo_v2_flash-groups", {2}),
        ("qwen3_moe", None),
        ("qwen2_moe", None),
        ("dots1", None),
    ],
)
def test_logits_and_tokens_equal_transformers(case, layers, saved, tools, tmp_path):
    model, folder = saved(case)
    gates = drawn(model, layers)
    decoder = load_checkpoint(folder, NONE, pre_gate_file=written(gates, tmp_path)).decoder
    ids = tools.prompt(60)
    with Early(model, gates):
        want, text = tools.logits_of(model, ids), tools.greedy(model, ids[:20], 12)
    found = decoder.prefill(ids)[1]
    assert float((found - want).abs().max() / want.abs().max()) < 1e-4
    assert decoder.generate_greedy(ids[:20], 12) == text
    usual = tools.logits_of(model, ids)
    assert float((found - usual).abs().max() / want.abs().max()) > 0.01
    early = {int(name.split(".")[2]) + 1 for name in gates}
    for i, spec in enumerate(decoder.config.layers):
        feed = decoder.stage(f"layers.{i}").module.feed
        assert hasattr(feed, "router") == (spec.mlp == "moe" and i not in early)


def test_a_bias_is_added_to_logits_and_decides_weights_too(saved, tmp_path):
    spec = load_checkpoint(saved("mimo_v2_flash")[1], NONE).decoder.config.layers[1]
    gen = torch.Generator().manual_seed(0)
    x, w, b, choice = (torch.randn(s, generator=gen) for s in ((5, 64), (8, 64), (8,), (8,)))
    ids, weights = PreGate(spec, QuantLinear(w, b), choice)(x)
    scores = torch.sigmoid(x.double() @ w.T.double() + b.double())
    want = torch.topk(scores + choice, spec.top_k).indices
    assert torch.equal(ids.long(), want)
    shares = scores.gather(1, want)
    assert torch.allclose(weights.double(), shares / shares.sum(1, keepdim=True), atol=1e-6)


def test_files_that_do_not_fit_are_refused(saved, tmp_path):
    model, folder = saved("mimo_v2_flash")
    good = drawn(model)

    def refused(gates, message):
        with pytest.raises(InputError, match=message) as caught:
            load_checkpoint(folder, NONE, pre_gate_file=written(gates, tmp_path))
        assert "pre-gates.safetensors" in str(caught.value)

    first = name_of(0)
    refused({**good, "model.layers.0.mlp.gate.weight": good[first].clone()}, "is no pre-gate")
    refused({**good, name_of(3): good[first].clone()}, "layer 4, which is not there")
    refused(
        {**good, first: good[first][:7].clone()}, r"has shape \[7, 64\], this model needs \[8, 64\]"
    )
    refused({**good, first: good[first].int()}, "not as floats")
    refused({**good, name_of(0, "bias"): torch.zeros(7)}, r"needs \[8\]")
    refused({name_of(0, "bias"): torch.zeros(8)}, r"0.mlp.pre_gate.weight is missing")
    refused({**good, first: good[first] * float("nan")}, "no finite number")
    refused({}, "holds no pre-gates")
    dense = saved("qwen2")[1]
    with pytest.raises(InputError, match="layer 1, which has no experts"):
        load_checkpoint(dense, NONE, pre_gate_file=written({first: good[first]}, tmp_path))
    with pytest.raises(InputError, match="missing"):
        load_checkpoint(folder, NONE, pre_gate_file=tmp_path / "missing.safetensors")


def test_options_that_do_not_go_with_it_are_refused(saved, tmp_path):
    from mimo_compile.quantize.calibration import parse_calibration

    model, folder = saved("mimo_v2_flash")
    file = written(drawn(model), tmp_path)
    with pytest.raises(UsageError, match="--pre-gates needs weights"):
        open_source(folder, pre_gates=file, shapes_only=True)
    with pytest.raises(UsageError, match="model folders"):
        open_source(torch.nn.Linear(2, 2), example_inputs=(torch.zeros(1, 2),), pre_gates=file)
    with pytest.raises(UsageError, match="one by one"):
        load_checkpoint(
            folder, parse_scheme("w4g32"), CONTEXT, parse_calibration("gptq", seed=0),
            pre_gate_file=file,
        )  # fmt: skip


@pytest.fixture(scope="module")
def compiled(saved, tmp_path_factory):
    """Artifact of a model whose first layer is dense, for three texts at once, and its gates."""
    folder = tmp_path_factory.mktemp("early")
    model, source = saved("mimo_v2_flash")
    gates = written(drawn(model), folder)
    artifact = mc.compile(
        source, db=folder / "r.db", max_context=CONTEXT, threads=1, batch=3, pre_gates=gates
    )
    return artifact.save(folder / "early.mimo"), gates, source


@pytest.mark.slow
def test_an_artifact_equals_the_eager_model(compiled, tmp_path):
    path, gates, source = compiled
    assert verify_artifact(path, source=source, threads=1, pre_gates=gates).ok
    manifest = mc.load(path).manifest
    assert manifest.pre_gates == gate_record(gates) and manifest.gates is None
    assert [layer.chosen_by for layer in manifest.decoder.layers] == [
        "", "layers.0", "layers.1", "layers.2"
    ]  # fmt: skip
    with pytest.raises(UsageError, match="--pre-gates path/to/pre-gates"):
        check_gates(manifest, None)
    other = tmp_path / "other.safetensors"
    other.write_bytes(gates.read_bytes() + b" ")
    with pytest.raises(InputError, match="not the pre-gates"):
        check_gates(manifest, None, other)


@pytest.mark.slow
def test_logs_name_the_layer_that_is_chosen_for(compiled, tools):
    module = mc.load(compiled[0], threads=1)
    with recording(module) as recorder:
        list(module.generate_ids(tools.prompt(20), 5, stop_at_eos=False))
    assert recorder.log().layers == ("layers.1", "layers.2", "layers.3")


def texts(module, tools):
    """Greedy texts one by one and side by side, and a prompt's hidden states."""
    prompts = [tools.prompt(n, seed=n) for n in (30, 5, 17)]
    one = [list(module.generate_ids(p, 12, stop_at_eos=False)) for p in prompts]
    both = list(module.generate_batch_ids(prompts, 12, stop_at_eos=False))
    states = np.concatenate([part.copy() for part in module.session().chunks(tools.prompt(40))])
    return one, sorted(both), states


@pytest.mark.slow
@pytest.mark.parametrize("experts", [2, 5, 24])
def test_texts_do_not_depend_on_memory(compiled, tools, experts):
    want = texts(mc.load(compiled[0], threads=1), tools)
    size = experts * 3 * 64 * 32 * 4
    for ahead in (0, 1, 2):
        how = ExpertMemory(size, ahead=ahead)
        got = texts(mc.load(compiled[0], threads=1, expert_memory=how), tools)
        assert got[:2] == want[:2] and np.array_equal(got[2], want[2])


@pytest.mark.slow
def test_what_is_foreseen_is_what_is_needed(compiled, tools):
    """Every layer's need, of all its rows, is told before: the first one's by the dense layer."""
    module = mc.load(compiled[0], threads=1, expert_memory=ExpertMemory(1 << 30))
    residency, events = module.experts.residency, []
    acquire, foresee = residency.acquire, residency.foresee

    def needed(layer, tokens, met=frozenset()):
        events.append({(layer, e) for e in tokens})
        return acquire(layer, tokens, met)

    def told(keys):
        events.append(list(keys))
        foresee(keys)

    residency.acquire, residency.foresee = needed, told
    texts(module, tools)
    needs = [event for event in events if isinstance(event, set)]
    for before, event in itertools.pairwise(events):
        if isinstance(event, set):
            assert isinstance(before, list) and set(before) == event
    assert {layer for need in needs for layer, _ in need} == {0, 1, 2}
    facts = module.experts.facts()
    assert facts["dropped"] == facts["unused"] == 0
    calls = [made for made, _ in module.bind("step_1").calls if isinstance(made, ExpertCall)]
    assert [len(call._ahead) for call in calls] == [1, 1, 0]
