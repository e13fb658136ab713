"""Storage formats: what a folder or file is, groups of tensors that make one matrix, files of their own."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mimo_compile import plugins
from mimo_compile.errors import EnvironmentMismatch, InputError, UsageError
from mimo_compile.frontend.huggingface import load_checkpoint, resolve_source
from mimo_compile.frontend.weights import (
    WEIGHT_FORMATS,
    get_weight_format,
    open_checkpoint,
    weight_format_names,
)
from mimo_compile.frontend.weights.checkpoint import Checkpoint, Entry
from mimo_compile.frontend.weights.grouped import GroupedCheckpoint
from mimo_compile.frontend.weights.plain import Safetensors
from mimo_compile.ir.formats import QuantTensor, WeightFormat, parse_scheme, parse_weight_format
from mimo_compile.quantize import quantize

pytestmark = pytest.mark.compile
NONE = parse_scheme("none")
LAYER = "model.layers.1."


class Nibbles(GroupedCheckpoint):
    """Four-bit codes, two to a byte; zero points; columns in another order where there is an index."""

    name = "nibbles"
    methods = ("nibbles",)
    parts = (".packed", ".scales", ".zeros", ".order")
    optional = (".order",)

    def describe(
        self, name: str, parts: Mapping[str, Entry]
    ) -> tuple[tuple[int, ...], WeightFormat | None]:
        (n, half), scales = parts[".packed"].shape, parts[".scales"].shape
        fmt = parse_weight_format(f"w4zg{self.settings['group_size']}")
        if scales != (n, fmt.groups(2 * half)):
            raise self.fail(name, f"scales {list(scales)} do not fit {n} rows of {2 * half}")
        return (n, 2 * half), None if ".order" in parts else fmt

    def decode(self, name: str, parts: Mapping[str, Tensor]) -> QuantTensor | Tensor:
        packed = parts[".packed"].numpy()
        codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
        scale, zero = (parts[p].float().numpy() for p in (".scales", ".zeros"))
        if zero.min() < 0 or zero.max() > 15:
            raise self.fail(name, "a zero point is no code")
        fmt = parse_weight_format(f"w4zg{self.settings['group_size']}")
        found = QuantTensor(fmt, codes, scale, zero)
        if (order := parts.get(".order")) is None:
            return found
        return torch.from_numpy(found.dequantize())[:, order.long().argsort()].contiguous()


ROWS = 20


class Blocks(GroupedCheckpoint):
    """Signed bytes with a scale for each block of 20 rows and 32 columns; last blocks may be short."""

    name = "blocks"
    methods = ("blocks",)
    parts = (".weight_scale_inv", ".weight")

    def describe(
        self, name: str, parts: Mapping[str, Entry]
    ) -> tuple[tuple[int, ...], WeightFormat | None]:
        n, k = parts[".weight"].shape
        if parts[".weight_scale_inv"].shape != (-(-n // ROWS), -(-k // 32)):
            raise self.fail(name, "blocks do not fit")
        return (n, k), parse_weight_format("w8g32")

    def decode(self, name: str, parts: Mapping[str, Tensor]) -> QuantTensor:
        codes = (parts[".weight"].to(torch.int16) + 128).to(torch.uint8)
        scale = parts[".weight_scale_inv"].repeat_interleave(ROWS, 0)[: len(codes)].contiguous()
        return QuantTensor(parse_weight_format("w8g32"), codes.numpy(), scale.numpy())


class OneFile(Checkpoint):
    """A whole model in one file: its own configuration (other names), tokenizer and tensors."""

    name = "onefile"

    @classmethod
    def detect(cls, source: Path, config: Mapping[str, Any]) -> bool:
        return source.is_file() and source.suffix == ".one"

    def __init__(self, source: Path, config: Mapping[str, Any]) -> None:
        super().__init__(source, config)
        try:
            with np.load(source, allow_pickle=False) as file:
                self._arrays = dict(file)
            own = json.loads(bytes(self._arrays.pop("about")))
            self._tokenizer = bytes(self._arrays.pop("words"))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise InputError(f"{source.name} is damaged: {error}", file=source) from error
        self.config = {"model_type": own.pop("kind"), **own}
        for name, array in self._arrays.items():
            fmt = parse_weight_format("w8") if array.dtype == np.int8 else None
            if not name.endswith(":scale"):
                self.entries[name] = Entry(source, array.shape, "F32" if fmt is None else "w8", fmt)

    def read(self, name: str) -> Tensor | QuantTensor:
        array = self._arrays[name]
        if (fmt := self.entries[name].fmt) is None:
            return torch.from_numpy(array)
        codes = (array.astype(np.int16) + 128).astype(np.uint8)
        return QuantTensor(fmt, codes, self._arrays[f"{name}:scale"])

    def tokenizer_json(self) -> bytes:
        return self._tokenizer


@pytest.fixture(autouse=True)
def formats(monkeypatch):
    """Register the formats of this file."""
    for cls in (Nibbles, Blocks, OneFile):
        monkeypatch.setitem(WEIGHT_FORMATS, cls.name, cls)


@pytest.fixture
def folder(saved, tmp_path):
    """A private copy of a good folder."""
    return Path(shutil.copytree(saved("llama")[1], tmp_path / "model"))


def matrices(tensors):
    return [n for n, t in tensors.items() if t.dim() == 2 and "layers" in n and "router" not in n]


def set_method(folder, tools, **settings):
    tools.edit_json(folder / "config.json", quantization_config=settings)


def pack_nibbles(folder, tools, order=()):
    """Store a plain folder's matrices as nibbles; return them in canonical form."""
    tensors, kept = load_file(folder / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(3)
    for name in matrices(tensors):
        weight, stem = tensors.pop(name), name.removesuffix(".weight")
        shuffled = any(part in name for part in order)
        columns = torch.arange(weight.shape[1])
        if shuffled:
            columns = torch.randperm(weight.shape[1], generator=generator)
            tensors[f"{stem}.order"] = columns.to(torch.int32)
        q = quantize(weight[:, columns], parse_weight_format("w4zg32"))
        pairs = torch.from_numpy(q.codes).reshape(len(weight), -1, 2)
        tensors[f"{stem}.packed"] = pairs[..., 0] | pairs[..., 1] << 4
        tensors[f"{stem}.scales"] = torch.from_numpy(q.scale).half()
        tensors[f"{stem}.zeros"] = torch.from_numpy(q.zero).to(torch.uint8)
        kept[name] = q
        if shuffled:
            kept[name] = torch.from_numpy(q.dequantize())[:, columns.argsort()]
    save_file(tensors, folder / "model.safetensors")
    set_method(folder, tools, quant_method="nibbles", group_size=32)
    return kept


def plain_twin(folder, kept, to):
    """Store the same real values as floats."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    config.pop("quantization_config", None)
    (to / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    rest = {
        n: t for n, t in tensors.items() if n in ("lm_head.weight",) or n.endswith("norm.weight")
    }
    rest["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
    real = {
        n: torch.from_numpy(q.dequantize()) if isinstance(q, QuantTensor) else q.contiguous()
        for n, q in kept.items()
    }
    save_file({**rest, **real}, to / "model.safetensors")
    return to


def close(a, b):
    return float((a - b).abs().max()) <= 2e-3 * float(b.abs().max())


@pytest.mark.parametrize("order", [(), ("o_proj", "down_proj")])
def test_groups_of_tensors(folder, tools, tmp_path, order):
    kept = pack_nibbles(folder, tools, order)
    checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint, Nibbles)
    for name, q in kept.items():
        entry = checkpoint.entries[name]
        if isinstance(q, QuantTensor):
            found = checkpoint.quantised(name)
            assert entry.fmt == q.fmt and entry.dtype == "w4zg32"
            assert np.array_equal(found.codes, q.codes) and np.array_equal(found.zero, q.zero)
            assert np.array_equal(found.scale, q.scale)
            assert np.array_equal(checkpoint.tensor(name).numpy(), q.dequantize())
        else:
            assert entry.fmt is None and torch.equal(checkpoint.tensor(name), q)
    loaded = load_checkpoint(folder, NONE)
    assert loaded.report.unused == () and {"w4zg32", "F32"} == set(loaded.report.dtypes)
    ids = tools.prompt(12)
    expected = load_checkpoint(plain_twin(folder, kept, tmp_path / "twin"), NONE).decoder
    assert close(loaded.decoder.prefill(ids)[1], expected.prefill(ids)[1])


def test_the_stored_format_may_be_named_and_no_other(folder, tools):
    pack_nibbles(folder, tools)
    ids = tools.prompt(9)
    plain, a8 = (load_checkpoint(folder, parse_scheme(s)).decoder for s in ("none", "w4zg32a8"))
    difference = (plain.prefill(ids)[1] - a8.prefill(ids)[1]).abs().max()
    assert 0 < difference < 0.5 * plain.prefill(ids)[1].abs().max()
    with pytest.raises(
        UsageError, match=r"already quantised, as w4zg32\. Use --quant none.*w4zg32a8"
    ):
        load_checkpoint(folder, parse_scheme("w8"))


def test_block_scales_of_keys_and_values_with_other_heights(saved, tools, tmp_path):
    """Queries, keys and values are quantised in blocks each for itself, though multiplied as one."""
    folder = Path(shutil.copytree(saved("mimo_v2_flash")[1], tmp_path / "flash"))
    tensors, kept = load_file(folder / "model.safetensors"), {}
    for name in [
        n for n in tensors if n.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
    ]:
        weight = tensors[name]
        n, k = weight.shape
        padded = torch.zeros(-(-n // ROWS) * ROWS, -(-k // 32) * 32)
        padded[:n, :k] = weight
        tiles = padded.reshape(-(-n // ROWS), ROWS, -(-k // 32), 32)
        scale = tiles.abs().amax(dim=(1, 3)) / 127
        codes = (tiles / scale[:, None, :, None]).round().reshape(padded.shape)[:n, :k]
        tensors[name] = codes.to(torch.int8)
        tensors[name.removesuffix(".weight") + ".weight_scale_inv"] = scale
        kept[name] = codes * scale.repeat_interleave(ROWS, 0)[:n].repeat_interleave(32, 1)[:, :k]
    heights = {kept[f"{LAYER}self_attn.{p}_proj.weight"].shape[0] for p in "qkv"}
    assert len(heights) == 3 and any(h % ROWS for h in heights)
    save_file(tensors, folder / "model.safetensors")
    set_method(folder, tools, quant_method="blocks")
    twin = Path(shutil.copytree(saved("mimo_v2_flash")[1], tmp_path / "twin"))
    whole = load_file(twin / "model.safetensors")
    save_file({**whole, **kept}, twin / "model.safetensors")
    ids = tools.prompt(20)
    found = load_checkpoint(folder, NONE)
    assert found.report.dtypes["w8g32"] == sum(w.numel() for w in kept.values())
    assert close(found.decoder.prefill(ids)[1], load_checkpoint(twin, NONE).decoder.prefill(ids)[1])


def one_file(folder, path, tools, **about):
    tensors = load_file(folder / "model.safetensors")
    arrays, kept = {n: t.numpy() for n, t in tensors.items()}, {}
    for name in matrices(tensors):
        q = kept[name] = quantize(tensors[name], parse_weight_format("w8"))
        arrays[name] = (q.codes.astype(np.int16) - 128).astype(np.int8)
        arrays[f"{name}:scale"] = q.scale
    config = json.loads((folder / "config.json").read_text())
    config["kind"] = config.pop("model_type")
    texts = {"about": json.dumps({**config, **about}).encode(), "words": b'{"tokens": 1}'}
    with path.open("wb") as file:
        np.savez(file, **arrays, **{n: np.frombuffer(t, np.uint8) for n, t in texts.items()})
    return kept


def test_a_file_that_holds_a_whole_model(folder, tools, tmp_path):
    path = tmp_path / "model.one"
    kept = one_file(folder, path, tools)
    assert resolve_source(path) == path
    loaded = load_checkpoint(path, NONE)
    assert (
        json.loads(loaded.config)["model_type"] == "llama" and loaded.tokenizer == b'{"tokens": 1}'
    )
    assert loaded.source == path and loaded.generation == {}
    ids = tools.prompt(10)
    expected = load_checkpoint(plain_twin(folder, kept, tmp_path / "twin"), NONE).decoder
    assert close(loaded.decoder.prefill(ids)[1], expected.prefill(ids)[1])
    one_file(folder, path, tools, kind="mamba")
    with pytest.raises(InputError, match=r"unknown architecture.*model\.one"):
        load_checkpoint(path, NONE)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"model\.one is damaged"):
        load_checkpoint(path, NONE)
    other = tmp_path / "model.two"
    other.write_bytes(b"2")
    with pytest.raises(InputError, match="is a file"):
        resolve_source(other)
    with pytest.raises(InputError, match=r"none of the formats that hold a whole model.*onefile"):
        open_checkpoint(other)


def test_refusals_name_place_and_remedy(folder, tools):
    def refused(match):
        with pytest.raises(InputError, match=match) as caught:
            load_checkpoint(folder, NONE)
        assert "\n" not in str(caught.value) and caught.value.where

    def change(edit):
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors")

    set_method(folder, tools, quant_method="squeeze")
    refused(r"'squeeze'.*config\.json.*bfloat16.*quantised by awq, .*blocks, .*nibbles")
    tools.edit_json(folder / "config.json", quantization_config=["odd"])
    refused(r"\['odd'\]")
    pack_nibbles(folder, tools)
    q = f"{LAYER}self_attn.q_proj"
    good = load_file(folder / "model.safetensors")
    change(lambda t: t.pop(f"{q}.zeros"))
    refused(rf"tensor {q}\.zeros is missing, which belongs to {q}\.packed")
    save_file({**good, f"{q}.scales": torch.ones(3, 2)}, folder / "model.safetensors")
    refused(rf"{q}\.weight: scales \[3, 2\] do not fit 64 rows of 64")
    save_file({**good, f"{q}.zeros": good[f"{q}.zeros"] + 16}, folder / "model.safetensors")
    refused(rf"{q}\.weight: a zero point is no code")
    save_file({**good, f"{q}.bias": torch.ones(64)}, folder / "model.safetensors")
    refused(rf"does not have: {q}\.bias")
    rest = {n: t for n, t in good.items() if not n.startswith(q)}
    save_file({**rest, f"{q}.weight": torch.ones(64, 64)}, folder / "model.safetensors")
    refused(rf"different formats: {q}\.weight F32, .*k_proj\.weight w4zg32")


def test_what_is_read_must_fit_what_was_promised(folder, tools, monkeypatch):
    pack_nibbles(folder, tools)
    name = f"{LAYER}self_attn.q_proj.weight"
    checkpoint = open_checkpoint(folder)
    good = checkpoint.quantised(name)
    for wrong, words in (
        (QuantTensor(good.fmt, good.codes[:5], good.scale, good.zero), "do not fit w4zg32"),
        (QuantTensor(parse_weight_format("w4g32"), good.codes, good.scale), "not stored as w4zg32"),
        (torch.ones(64, 64), "not stored as w4zg32"),
    ):
        monkeypatch.setattr(Nibbles, "decode", lambda *_, wrong=wrong: wrong)
        with pytest.raises(InputError, match=words):
            checkpoint.quantised(name)


PLUGIN = """
from mimo_compile.frontend.weights.plain import Safetensors

class Renamed(Safetensors):
    name = "renamed"

    @classmethod
    def detect(cls, source, config):
        return (source / "weights.mine").exists()

    def __init__(self, source, config):
        (source / "model.safetensors").unlink(missing_ok=True)
        (source / "model.safetensors").symlink_to(source / "weights.mine")
        super().__init__(source, config)
"""


def test_formats_of_others(folder, site):
    entries = "[mimo_compile.weight_formats]\nrenamed = mine:Renamed\n"
    site.install(entries, mine=PLUGIN)
    assert weight_format_names() == [*WEIGHT_FORMATS, "renamed"]
    assert isinstance(open_checkpoint(folder), Safetensors)
    (folder / "model.safetensors").rename(folder / "weights.mine")
    assert type(open_checkpoint(folder)).__name__ == "Renamed"
    assert load_checkpoint(folder, NONE).report.unused == ()
    broken = "[mimo_compile.weight_formats]\nsad = pathlib:Path\n"
    site.install(broken, name="sad")
    site.install("[mimo_compile.weight_formats]\nworse = no_such:Thing\n", name="worse")
    for known in (plugins._all_entries, plugins._grouped):
        known.cache_clear()  # which is kept for as long as the path is the same
    with pytest.raises(EnvironmentMismatch, match=r"weight format plug-in 'sad'.*is no Checkpoint"):
        get_weight_format("sad")
    with pytest.raises(EnvironmentMismatch, match=r"plug-in 'worse'.*no_such:Thing of worse"):
        get_weight_format("worse")
