"""Checkpoint or module -> artifact -> the same results as the eager model."""

from pathlib import Path

import numpy as np
import pytest
import torch

import mimo_compile as mc
from mimo_compile.errors import InputError, UsageError
from mimo_compile.frontend.huggingface import load_checkpoint
from mimo_compile.ir.formats import parse_scheme
from mimo_compile.ir.ops import parse_workload
from mimo_compile.pipeline.choose import shared_tensors, tunable, weigh
from mimo_compile.pipeline.source import open_source

IDS = [5, 7, 9, 11, 20, 33, 100, 2, 3, 44, 6]


@pytest.mark.compile
@pytest.mark.parametrize("quant", ["none", "w4g64a8"])
def test_decoder_equals_eager_and_survives_a_file(
    llama_folder: Path, tmp_path: Path, quant: str
) -> None:
    db = tmp_path / "records.db"
    artifact = mc.compile(llama_folder, quant=quant, db=db, max_context=32)
    decoder = load_checkpoint(llama_folder, parse_scheme(quant)).decoder
    wanted = decoder.generate_greedy(IDS, 12, stop=())
    module = mc.load(artifact.save(tmp_path / "model.mimo"))
    assert list(module.generate_ids(IDS, 12, stop_at_eos=False)) == wanted
    logprobs = torch.log_softmax(decoder.prefill(IDS)[1].double(), -1)
    expected = logprobs[range(len(IDS) - 1), IDS[1:]].numpy()
    np.testing.assert_allclose(module.token_logprobs(IDS), expected, atol=2e-5)
    manifest = module.manifest
    assert {"step_1", "step_16", "head_1"} <= set(manifest.entries)
    assert manifest.quant == str(parse_scheme(quant))
    assert all(c.calls and c.kernel for c in manifest.plan)


@pytest.mark.compile
def test_same_input_gives_the_same_bytes(llama_folder: Path, tmp_path: Path) -> None:
    paths = [
        mc.compile(llama_folder, quant="w8a8", db=tmp_path / "db", max_context=4).save(
            tmp_path / f"{i}.mimo"
        )
        for i in range(2)
    ]
    assert paths[0].read_bytes() == paths[1].read_bytes()


class _Net(torch.nn.Module):
    """Convolution, normalisation, attention-like softmax and linears."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.bn = torch.nn.BatchNorm2d(8)
        self.norm = torch.nn.LayerNorm(8)
        self.out = torch.nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.nn.functional.gelu(self.bn(self.conv(x))).flatten(2).transpose(1, 2)
        h = self.norm(h)
        scores = torch.softmax(h @ h.transpose(1, 2), dim=-1)
        return self.out(scores @ h).mean(1)


@pytest.mark.compile
def test_module_equals_eager(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = _Net().eval()
    x = torch.randn(2, 3, 10, 10)
    module = mc.compile(net, example_inputs=(x,), db=tmp_path / "db").module()
    with torch.no_grad():
        wanted = net(x).numpy()
    np.testing.assert_allclose(module(x), wanted, atol=1e-5)
    with pytest.raises(UsageError, match="float32"):
        module(torch.randn(1, 3, 10, 10))


@pytest.mark.compile
def test_saved_export_equals_eager(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)).eval()
    x = torch.randn(4, 6)
    torch.export.save(torch.export.export(net, (x,), strict=False), tmp_path / "net.pt2")
    module = mc.compile(tmp_path / "net.pt2", db=tmp_path / "db").module()
    np.testing.assert_allclose(module(x), net(x).detach().numpy(), atol=1e-5)


@pytest.mark.compile
def test_torch_compile_backend() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.GELU(), torch.nn.Linear(7, 3)).eval()
    compiled = torch.compile(net, backend="mimo")
    for rows in (4, 2):
        x = torch.randn(rows, 6)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), net(x), atol=1e-5, rtol=1e-5)


def test_token_counts_of_one_matrix_share_its_layout(llama_folder: Path) -> None:
    graphs = open_source(llama_folder, quant="w4g64a8").graphs
    groups = shared_tensors(graphs)
    qkv = [g for g in groups if any("n=256,k=64" in str(w) for w, _ in g)]
    assert any({w.integer("m") for w, _ in g} == {1, 4, 16, 64, 256} for g in qkv)
    caches = [g for g in groups if any(name == "k_cache" for _, name in g)]
    assert all({w.op for w, _ in g} == {"kv_append", "cached_attention"} for g in caches)
    weights = tunable(graphs)
    assert list(weights.values()) == sorted(weights.values(), reverse=True)


def test_workloads_weigh_by_the_tokens_that_need_them() -> None:
    dense, listed, head = (parse_workload(f"rms_norm:t={t},d=8") for t in (1, 2, 3))
    steps = {dense: {"step_1": 2, "step_64": 2}, head: {"head_1": 1, "mtp0_4": 2}}
    assert weigh(steps) == {dense: 2 + 2 / 64, head: 1 + 2 / 4 / 2}
    apart = {**steps, listed: {"decode_1": 2}}
    assert weigh(apart) == {dense: 2 / 64 + 2 / 64, head: 1.25, listed: 2}


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"source": "no/such/folder"}, InputError),
        ({"source": 3}, UsageError),
        ({"source": "tiny", "quant": "w9"}, UsageError),
        ({"source": "tiny", "attention": "seer"}, UsageError),
        ({"source": "tiny", "quant": "w4kv3"}, UsageError),
        ({"source": "tiny", "target": "sim:roma"}, UsageError),
        ({"source": "tiny", "threads": 0}, UsageError),
        ({"source": torch.nn.Linear(2, 2)}, UsageError),
        ({"source": torch.nn.Linear(2, 2), "quant": "w4"}, UsageError),
    ],
)
def test_bad_requests_are_refused(options: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        mc.compile(**options)  # type: ignore[arg-type]
