"""A checkpoint is read tensor by tensor: what is quantised does not lie in memory as it is stored."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mimo_compile.errors import InputError
from mimo_compile.frontend.huggingface import load_checkpoint
from mimo_compile.frontend.weights import open_checkpoint
from mimo_compile.frontend.weights.plain import Safetensors
from mimo_compile.ir.formats import parse_scheme
from mimo_compile.pipeline.source import open_source

pytestmark = pytest.mark.compile
PAGE = 4096


def mapped(folder):
    """Bytes of a folder's files that are mapped into this process, and how many mappings."""
    sizes = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, path = line.split(maxsplit=5) if len(line.split()) > 5 else (line, "")
        if path.startswith(str(folder)):
            begin, end = (int(n, 16) for n in span.split("-"))
            sizes.append(end - begin)
    return sum(sizes), len(sizes)


def test_no_more_is_mapped_than_what_is_in_work(tools, tmp_path, monkeypatch):
    tools.make_model("mixtral", hidden_size=128, intermediate_size=192).save_pretrained(
        tmp_path, max_shard_size="400KB"
    )
    shards = list(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 4
    seen, read = [], Safetensors.read

    def watched(self, name):
        seen.append(mapped(tmp_path)[0])
        return read(self, name)

    monkeypatch.setattr(Safetensors, "read", watched)
    loaded = load_checkpoint(tmp_path, parse_scheme("w4g32"))
    kept, count = mapped(tmp_path)
    entries = open_checkpoint(tmp_path).entries.values()
    largest = max(4 * int(np.prod(entry.shape)) for entry in entries)
    assert max(seen) <= kept + largest + 2 * PAGE
    floats = sum(
        t.numel() * t.element_size()
        for stage in loaded.decoder.stages()
        for t in stage.module.state_dict().values()
        if t.dtype == torch.float32 and not t.is_meta
    )
    assert kept <= floats + 2 * PAGE * count
    assert max(seen) < 0.3 * sum(shard.stat().st_size for shard in shards)
    del loaded
    assert mapped(tmp_path) == (0, 0)


def test_every_type_is_read_as_it_was_written(tmp_path):
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (3, 5, 8), dtype=torch.uint8, generator=generator)
    kinds = (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
        torch.float8_e5m2, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
    )  # fmt: skip
    tensors = {str(kind): raw.view(kind).clone() for kind in kinds}
    tensors |= {"bool": raw > 99, "scalar": torch.tensor(2.5), "none": torch.zeros(0, 4)}
    tensors["odd"] = raw[0, 0, :3].clone()  # what comes behind it begins anywhere
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.entries) == set(tensors)
    for name, want in tensors.items():
        found = checkpoint.read(name)
        assert found.dtype == want.dtype and found.shape == want.shape, name
        assert torch.equal(found.reshape(-1).view(torch.uint8), want.reshape(-1).view(torch.uint8))


def header(folder, change):
    """Rewrite the header of a file in place of its own, padded to the same length."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    content = json.loads(data[8 : 8 + length])
    change(content)
    text = json.dumps(content, separators=(",", ":")).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda h: h["b"].update(data_offsets=[16, 48]), "its data begin at 16"),
        (lambda h: h["b"].update(data_offsets=[40, 64]), "its data begin at 40"),
        (lambda h: h["b"].update(shape=[4, 3]), "cannot have 32 bytes"),
        (lambda h: h["b"].update(shape=[-4, -2]), "cannot have 32 bytes"),
        (lambda h: h["a"].update(dtype="F16"), "cannot have 32 bytes"),
        (lambda h: h["b"].update(data_offsets=[32]), "damaged at 'b'"),
        (lambda h: h.update(b=7), "damaged"),
        (lambda h: h["b"].update(shape=["4", "2"]), "damaged at 'b': .*lists of integers"),
        (lambda h: h["b"].update(shape=[4.9, 2]), "damaged at 'b': .*lists of integers"),
        (lambda h: h["b"].update(shape={"4": 1, "2": 1}), "damaged at 'b': .*lists of integers"),
        (lambda h: h["b"].update(shape=[4, True]), "damaged at 'b': .*lists of integers"),
        (lambda h: h["b"].update(data_offsets=[32.5, 64.5]), "damaged at 'b': .*lists of integers"),
        (lambda h: h["b"].update(dtype=["F32"]), "damaged at 'b': its type must be a name"),
        (lambda h: h.update(__metadata__=[1]), "__metadata__ must hold texts"),
        (lambda h: h.update(__metadata__={"a": 1}), "__metadata__ must hold texts"),
    ],
)
def test_headers_whose_tensors_do_not_fill_the_file_are_refused(tmp_path, change, match):
    save_file({"a": torch.ones(8), "b": torch.ones(4, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == {"a", "b"}
    header(tmp_path, change)
    with pytest.raises(InputError, match=match) as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_header_in_another_encoding_is_refused(tmp_path):
    save_file({"a": torch.ones(8)}, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].decode().encode("utf-16")
    whole = len(text).to_bytes(8, "little") + text + data[8 + length :]
    (tmp_path / "model.safetensors").write_bytes(whole)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"header of model\.safetensors is damaged"):
        open_checkpoint(tmp_path)


def test_a_file_that_is_replaced_meanwhile_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2000)}, path)
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.read("a").sum() == 2000
    checkpoint.require_unchanged()
    save_file({"a": torch.zeros(2000)}, tmp_path / "new")
    os.replace(tmp_path / "new", path)
    for look in (lambda: checkpoint.read("a"), checkpoint.require_unchanged):
        with pytest.raises(InputError, match=r"model\.safetensors changed while") as caught:
            look()
        assert caught.value.where == str(path)
    path.unlink()
    with pytest.raises(InputError, match=r"model\.safetensors changed while"):
        checkpoint.require_unchanged()


@pytest.mark.slow
def test_floats_that_change_before_they_are_packed_are_refused(tools, tmp_path):
    tools.make_model("llama", num_hidden_layers=1).save_pretrained(tmp_path)
    source = open_source(tmp_path, max_context=16)
    make = next(iter(source.graphs.tensors.values()))
    make()
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    with pytest.raises(InputError, match=r"model\.safetensors changed while the model was read"):
        make()


def test_a_file_that_shrinks_meanwhile_is_named(tmp_path):
    save_file({"a": torch.ones(2000)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match="a cannot be read") as caught:
        checkpoint.read("a")
    assert caught.value.where == str(path)


CHILD = """
import resource, sys
import mimo_compile as mc

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

small, large, out, quant = sys.argv[1:]
mc.compile(small, db=f"{out}.db", quant=quant, max_context=16, threads=1).save(f"{out}.small")
before = peak()
mc.compile(large, db=f"{out}.db", quant=quant, max_context=16, threads=1).save(out)
print(before, peak())
"""


@pytest.mark.slow
def test_compiling_many_shards_takes_a_share_of_their_size(tools, tmp_path):
    """Beside codes of a byte for each weight and the embedding nothing of the model lies in memory."""
    shape = {"hidden_size": 512, "intermediate_size": 1536, "max_position_embeddings": 64}
    for name, layers in (("small", 1), ("large", 16)):
        model = tools.make_model("llama", num_hidden_layers=layers, **shape)
        model.save_pretrained(tmp_path / name, max_shard_size="20MB")
    shards = list((tmp_path / "large").glob("model-*.safetensors"))
    size = sum(shard.stat().st_size for shard in shards)
    assert len(shards) > 8 and size > 200e6
    del model
    places = [str(tmp_path / name) for name in ("small", "large", "out.mimo")]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *places, "w4g64"],
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    before, after = (int(n) for n in done.stdout.split()[-2:])
    assert after - before < 0.45 * size, f"{(after - before) / size:.2f} of {size} bytes"
