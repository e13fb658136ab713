"""Whole models: a process for each, failures named, and GGUF files that compute what the checkpoint does."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.bench.model import ModelRow, compare_models, find_entrants
from mimo_compile.bench.models.compiled import batch_entrant
from mimo_compile.bench.models.eager import EagerRunner, entrants
from mimo_compile.bench.models.entrant import Entrant, ModelAsk
from mimo_compile.bench.models.gguf_file import Export, make_files, paired
from mimo_compile.bench.models.llama import LlamaRunner, kinds_near
from mimo_compile.bench.models.worker import Worker, memory
from mimo_compile.bench.peers import LeftOut, get_peer
from mimo_compile.cli import main
from mimo_compile.errors import MimoError, UsageError
from mimo_compile.runtime import load

RUNNER = """
import os, sys, time

class Fake:
    def __init__(self, fault=""):
        self.fault, self.runs = fault, 0
        if fault == "import":
            raise ModuleNotFoundError("no such library")
    def load(self):
        print("libraries talk")
        os.system("echo and their children too")
        if self.fault == "load":
            raise ValueError("damaged\\nfile")
        return {"load_s": 0.5}
    def run(self, *arguments):
        self.runs += 1
        if self.fault == "hang":
            time.sleep(600)
        if self.fault == "die" and self.runs == 2:
            sys.stderr.write("out of cheese\\n")
            sys.stderr.flush()
            os.kill(os.getpid(), 9)
        if not arguments:
            return {"gb_per_s": 7.0}
        prompt, new = arguments
        return {"prefill": float(len(prompt) * self.runs), "decode": float(new) if new > 1 else None}
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return what makes entrants whose process does what ``fault`` says."""
    (tmp_path / "bench_fake_runner.py").write_text(RUNNER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))

    def make(impl: str, fault: str = "") -> Entrant:
        return Entrant(impl, "bench_fake_runner:Fake", {"fault": fault}, 11, "fake")

    return make


def test_all_take_turns_and_whoever_fails_is_left_out_with_the_reason(fake) -> None:
    row = ModelRow("mimo", 1, weight_bytes=1e9)
    peers = [fake("good"), fake("broken", "load"), fake("absent", "import"), fake("fragile", "die")]
    prompt = np.arange(5)
    said: list[str] = []
    found = compare_models((row, fake("mimo")), peers, prompt, 3, 2, said.append, roof=fake("roof"))
    assert [r.impl for r in found.rows] == ["mimo", "good"]
    for each in found.rows:
        figures = each.json()
        assert each.prefill == [10.0, 15.0]  # the first round only warms up
        assert each.decode == [3.0, 3.0]
        assert figures["load_s"] == 0.5
        assert figures["file_bytes"] == 11
        assert figures["rss_bytes"] >= figures["anonymous_bytes"] > 1e6
        assert figures["rss_bytes"] == figures["anonymous_bytes"] + figures["mapped_bytes"]
        assert figures["peak_bytes"] >= figures["base_bytes"] > 1e6
    assert row.roof_gb_per_s == [7.0, 7.0]
    assert row.json()["decode_roof_share"] == pytest.approx(3 / 7)
    assert {o.impl: o.reason for o in found.left_out} == {
        "broken": "fails to load: ValueError: damaged",
        "absent": "fails to load: ModuleNotFoundError: no such library",
        "fragile": "fails: its process ended with signal 9: out of cheese",
    }
    assert said[-1] == "round 2 of 2"


def test_one_new_token_has_no_decoding_rate(fake) -> None:
    row = ModelRow("mimo", 1)
    found = compare_models((row, fake("mimo")), [], np.arange(4), 1, 1, lambda text: None)
    assert found.rows[0].json()["decode_tokens_per_s"] is None
    assert found.rows[0].json()["decode_spread"] is None


def test_ours_must_not_fail(fake) -> None:
    with pytest.raises(MimoError, match="signal 9"):
        compare_models(
            (ModelRow("mimo", 1), fake("mimo", "die")), [], np.arange(4), 2, 3, lambda text: None
        )


def test_a_process_ends_with_its_worker(fake) -> None:
    with Worker(fake("mimo")) as worker:
        assert worker.ask("load") == {"load_s": 0.5}
        process = worker._process
    assert process.returncode == 0


def test_a_process_that_hangs_is_ended(fake, monkeypatch: pytest.MonkeyPatch) -> None:
    with Worker(fake("slow", "hang")) as worker:
        worker.ask("load")
        monkeypatch.setattr("mimo_compile.bench.models.worker.ANSWER_S", 0.2)
        with pytest.raises(MimoError, match="no answer to 'run'"):
            worker.ask("run", [1], 1)
    assert worker._process.returncode == -9


def test_texts_together_take_part_by_themselves(tmp_path: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))
    import runtime_samples

    path = runtime_samples.decoder(runtime_samples.BATCH).save(tmp_path / "b.mimo")
    one = batch_entrant(path, load(path, threads=1))
    assert one.impl.endswith(", 3 together") and not one.peer
    with Worker(one) as worker:
        worker.ask("load")
        figures = worker.ask("run", [1, 2, 3], 4)
    assert figures["prefill"] > 0 and figures["decode"] > 0


def test_memory_is_measured_in_bytes() -> None:
    before = memory()["anonymous_bytes"]
    block = np.ones(1 << 24, np.uint8)
    assert 0.9 * block.nbytes < memory()["anonymous_bytes"] - before < 2 * block.nbytes


def asked(source: Path | None, quant: str = "w4g64a8", scratch: Path = Path()) -> ModelAsk:
    return ModelAsk(source, quant, 1, 64, scratch)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_peers_without_whole_models_say_so(name: str) -> None:
    (out,) = get_peer(name).models(asked(None))
    assert isinstance(out, LeftOut)
    assert out.impl == name
    assert "whole model" in out.reason


def test_peers_that_only_plug_in_kernels_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Kernels:
        def missing(self) -> None:
            return None

    monkeypatch.setattr("mimo_compile.bench.model.get_peer", lambda name: Kernels())
    field, (out,) = find_entrants(["abacus"], asked(None))
    assert field == []
    assert out == LeftOut("abacus", "runs single kernels, no whole models")


def test_models_that_llama_cpp_does_not_know_are_named() -> None:
    from mimo_compile.frontend.huggingface import resolve_source

    with pytest.raises(UsageError, match="runs no mimo_v2_flash model"):
        Export(resolve_source("tiny"))


def test_storage_types_hold_our_bits() -> None:
    assert kinds_near("w8a8") == ("Q8_0",)
    assert kinds_near("w4g64a8") == kinds_near("w4zg128a16") == ("Q4_0", "Q4_K")
    assert kinds_near("w2g64a8") == ("TQ2_0", "TQ2_0+Q8_0", "Q2_K")
    assert kinds_near("w1.58a8") == ("TQ1_0", "TQ2_0", "TQ2_0+Q8_0")
    assert kinds_near("none") == ("BF16", "F16")


@settings(max_examples=20)
@given(
    heads=st.integers(1, 4), half=st.integers(1, 6), position=st.integers(0, 50), seed=st.integers(0, 99)
)  # fmt: skip
def test_rotating_neighbours_of_reordered_rows_is_rotating_halves(
    heads: int, half: int, position: int, seed: int
) -> None:
    """Scores, the only thing that sees the order of a head's dimensions, stay what they are."""
    rng = np.random.default_rng(seed)
    wq, wk = (torch.from_numpy(rng.standard_normal((heads * 2 * half, 3))) for _ in range(2))
    x, y = (torch.from_numpy(rng.standard_normal(3)) for _ in range(2))
    angle = torch.from_numpy(position * 10.0 ** -np.arange(half))
    turn = torch.polar(torch.ones_like(angle), angle)

    def halves(w: torch.Tensor, v: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        a, b = (w @ v).view(heads, 2, half).unbind(1)
        out = torch.complex(a, b) * by
        return torch.cat([out.real, out.imag], 1)

    def neighbours(w: torch.Tensor, v: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        out = torch.view_as_complex((paired(w, heads) @ v).view(heads, half, 2)) * by
        return torch.view_as_real(out).flatten(1)

    one = torch.ones_like(turn)
    ours = (halves(wq, x, turn) * halves(wk, y, one)).sum(1)
    theirs = (neighbours(wq, x, turn) * neighbours(wk, y, one)).sum(1)
    torch.testing.assert_close(ours, theirs)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory) -> tuple[Path, Any]:
    """Return a random checkpoint in bfloat16 and transformers' model of it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        request.param, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=2, head_dim=32, vocab_size=300,
        max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    with torch.no_grad():
        for weight in model.parameters():
            scale = 1.5 * weight.shape[-1] ** -0.5 if weight.ndim == 2 else 0.2
            weight.copy_((weight.ndim == 1) + scale * torch.randn_like(weight))
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return folder, model.to(torch.float32).eval()


def test_llama_cpp_computes_the_checkpoint(checkpoint, tmp_path: Path) -> None:
    for package in ("gguf", "llama_cpp"):
        if find_spec(package) is None:
            pytest.skip(f"package {package} is not installed")
    folder, model = checkpoint
    kinds = ["BF16", "F16", "Q8_0", "Q2_K", "TQ2_0", "TQ2_0+Q8_0"]
    ids = np.random.default_rng(0).integers(0, 300, 48).tolist()
    with torch.inference_mode():
        expected = model(torch.tensor(ids)[None]).logits[0].numpy()
    paths = make_files(Export(folder), kinds, tmp_path, 1)
    size = {kind: path.stat().st_size for kind, path in paths.items()}
    assert size["Q2_K"] < 0.6 * size["Q8_0"] < 0.6 * size["F16"]
    head = 300 * 256  # weights: 8.5 bits each in place of 2.0625
    wider = size["TQ2_0+Q8_0"] - size["TQ2_0"]
    assert wider == pytest.approx(head * (8.5 - 2.0625) / 8, abs=256)
    for kind, allowed in (("BF16", 0.05), ("F16", 0.05), ("Q8_0", 0.15)):
        runner = LlamaRunner(str(paths[kind]), 1, 64)
        runner.load()
        found = runner.logits(ids)
        assert np.linalg.norm(found - expected) < allowed * np.linalg.norm(expected), kind
        assert (found.argmax(1) == expected.argmax(1)).mean() > 0.8, kind
        rates = runner.run(ids, 4)
        assert min(rates.values()) > 0


def test_a_tied_output_projection_is_wider_too_and_kept_files_stay(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for package in ("gguf", "llama_cpp"):
        if find_spec(package) is None:
            pytest.skip(f"package {package} is not installed")
    config = transformers.AutoConfig.for_model(
        "llama", hidden_size=256, intermediate_size=256, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, vocab_size=300, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(
        tmp_path
    )
    files = tmp_path / "files"
    export = Export(tmp_path)
    plain = make_files(export, ["BF16"], files, 1)["BF16"]
    paths = make_files(export, ["TQ2_0", "TQ2_0+Q8_0"], files, 1)
    wider = paths["TQ2_0+Q8_0"].stat().st_size - paths["TQ2_0"].stat().st_size
    assert wider == pytest.approx(300 * 256 * (8.5 - 2.0625) / 8, abs=256)
    assert set(files.iterdir()) == {plain, *paths.values()}
    runner = LlamaRunner(str(paths["TQ2_0+Q8_0"]), 1, 64)
    runner.load()
    assert min(runner.run([1, 2, 3], 3).values()) > 0


def test_a_file_that_cannot_be_written_leaves_nothing(
    checkpoint, tmp_path: Path, monkeypatch
) -> None:
    if find_spec("gguf") is None:
        pytest.skip("package gguf is not installed")

    def broken(self: Export):
        raise OSError("no space left")
        yield

    monkeypatch.setattr(Export, "_data", broken)
    with pytest.raises(OSError, match="no space"):
        make_files(Export(checkpoint[0]), ["Q8_0"], tmp_path / "files", 1)
    assert list((tmp_path / "files").iterdir()) == []


def test_eager_models_are_left_out_where_memory_does_not_hold_them(checkpoint) -> None:
    folder, model = checkpoint
    numbers = sum(p.numel() for p in model.parameters())
    wide, narrow = entrants(asked(folder), 6 * numbers)  # half of it may be used
    assert isinstance(wide, LeftOut)
    assert "GB" in wide.reason
    assert isinstance(narrow, Entrant)
    assert narrow.arguments["dtype"] == "bfloat16"
    assert narrow.file_bytes >= 2 * numbers
    runner = EagerRunner(**narrow.arguments)
    assert runner.load()["load_s"] > 0
    assert min(runner.run([1, 2, 3], 3).values()) > 0


def test_peers_of_an_artifact_of_unknown_origin_say_what_they_need() -> None:
    (out,) = entrants(asked(None), 1 << 40)
    assert isinstance(out, LeftOut)
    assert "--source" in out.remedy


def test_options_of_models_are_refused_elsewhere(capsys) -> None:
    assert main(["bench", "mpgemm", "--keep", "x"]) == 2
    assert "--keep" in capsys.readouterr().err
    assert main(["bench", "model", "tiny", "--source", "x", "--peers", "none"]) == 2
    assert "--source" in capsys.readouterr().err
