"""GGUF: every type against exact values, whole models, configuration; what is refused."""

import json
import random
from fractions import Fraction

import gguf_blocks as blocks
import numpy as np
import pytest
import torch

from mimo_compile.errors import InputError
from mimo_compile.frontend.huggingface import load_checkpoint, resolve_source
from mimo_compile.frontend.weights import open_checkpoint
from mimo_compile.frontend.weights.gguf.blocks import BLOCKS, canonical
from mimo_compile.ir.formats import parse_scheme

pytestmark = pytest.mark.compile
NONE = parse_scheme("none")
FORMATS = {
    "Q4_0": "w4g32", "Q4_1": "w4zg32", "Q5_0": "w5g32", "Q5_1": "w5zg32", "Q8_0": "w8g32",
    "Q2_K": "w2zg16", "Q3_K": "w3g16", "Q4_K": "w4zg32", "Q5_K": "w5zg32", "Q6_K": "w6g16",
    "TQ1_0": "w1.58g256", "TQ2_0": "w1.58g256",
}  # fmt: skip


def as_real(values):
    return np.array([[float(v) for v in row] for row in values], np.float32)


@pytest.mark.parametrize("kind", FORMATS)
def test_blocks_stand_for_these_values(kind):
    """Exactly; with minimums up to half a unit in the last place of the minimum."""
    number, rows, values, least = blocks.matrix(kind, 6, 512, seed=1)
    raw = np.frombuffer(b"".join(rows), np.uint8)
    layout = BLOCKS[number].layout
    found = canonical(BLOCKS[number], raw.reshape(6, 512 // layout.columns, layout.size))
    assert (found.fmt.name, layout.name) == (FORMATS[kind], kind)
    group, z = found.fmt.group, found.zero
    for r in range(6):
        for c in range(512):
            zero = found.fmt.fixed_zero if z is None else float(z[r, c // group])
            got = Fraction(float(found.scale[r, c // group])) * (
                int(found.codes[r, c]) - Fraction(zero)
            )
            assert abs(got - values[r][c]) <= least / 2**24, (r, c)
    if least == 0:
        assert np.array_equal(found.dequantize(), as_real(values))


@pytest.mark.parametrize("count", [5, 4])
def test_all_bytes_of_trits(count):
    """All 243 combinations of five digits, all 81 of four, in the order of TQ1_0."""
    for number in range(3**count):
        trits = [number // 3**i % 3 for i in range(count)]
        byte = blocks.trit_byte(trits)
        assert 0 <= byte < 256
        block = bytearray(54)
        block[0 if count == 5 else 48] = byte
        block[52:] = blocks.half(1.0)[0]
        codes = canonical(BLOCKS[34], np.frombuffer(block, np.uint8).reshape(1, 1, 54)).codes[0]
        first, step = (0, 32) if count == 5 else (240, 4)
        assert [int(codes[first + step * n]) for n in range(count)] == trits


def test_blocks_equal_those_of_the_gguf_package():
    """An independent reading, where the package is installed."""
    quants = pytest.importorskip("gguf.quants")
    from gguf.constants import GGMLQuantizationType

    for kind, (number, columns, _) in blocks.TYPES.items():
        _, rows, _, least = blocks.matrix(kind, 4, 512, seed=9)
        raw = np.frombuffer(b"".join(rows), np.uint8).reshape(4, -1)
        theirs = quants.dequantize(raw, GGMLQuantizationType(number))
        ours = canonical(BLOCKS[number], raw.reshape(4, 512 // columns, -1)).dequantize()
        rounding = float(np.abs(theirs).max() + float(least)) * 2**-23 if least else 0
        assert np.abs(ours - theirs).max() <= rounding, kind


def model(kit, path, kinds, *, metadata=None, seed=0, drop=(), **tensors):
    """Write a whole file; ``kinds`` by part of a name, last the default. Real weights and floats."""
    rng = np.random.default_rng(seed)
    plain, real, stored = kit.plain_tensors(rng), {}, {}
    names = [*kit.matrix_shapes().items(), ("lm_head.weight", (kit.VOCAB, kit.HIDDEN))]
    names.append(("model.embed_tokens.weight", (kit.VOCAB, kit.HIDDEN)))
    for i, (name, (n, k)) in enumerate(names):
        kind = next((v for part, v in kinds.items() if part in name), kinds[""])
        if kind == "F32":
            continue
        number, rows, values, _ = blocks.matrix(kind, n, k, seed=100 * seed + i)
        weight = as_real(values)
        heads = {"q_proj": kit.HEADS, "k_proj": kit.KV}.get(name.split(".")[-2], 0)
        if heads:
            rows = kit.paired_rows(rows, heads)
        real[name] = weight
        stored[kit.gguf_name(name)] = ((n, k), number, b"".join(rows))
    floats = {kit.gguf_name(n): kit.floats_of(t) for n, t in plain.items() if n not in real}
    everything = {**floats, **stored, **tensors}
    for name in drop:
        del everything[name]
    kit.write_gguf(path, kit.gguf_metadata(**(metadata or {})), everything)
    return real, {n: t for n, t in plain.items() if n not in real}


@pytest.mark.parametrize(
    "kinds",
    [
        {"embed": "F32", "lm_head": "F32", "": "Q4_0"},
        {"embed": "Q8_0", "lm_head": "Q6_K", "": "Q8_0"},
        {"embed": "F32", "v_proj": "Q6_K", "down": "Q3_K", "lm_head": "Q6_K", "": "Q5_0"},
        {"embed": "F32", "lm_head": "F32", "": "TQ1_0"},
    ],
    ids=lambda kinds: kinds[""],
)
def test_whole_models_equal_their_floats(kit, tmp_path, kinds):
    path = tmp_path / "model.gguf"
    real, plain = model(kit, path, kinds)
    assert resolve_source(path) == path
    checkpoint = open_checkpoint(path)
    for name, weight in real.items():
        assert np.array_equal(checkpoint.tensor(name).numpy(), weight), name
    loaded = kit.same_model(path, real, plain, tmp_path)
    config = json.loads(loaded.config)
    assert config["model_type"] == "llama" and config["head_dim"] == kit.WIDTH
    assert loaded.tokenizer is None and loaded.report.unused == ()


@pytest.mark.parametrize("kind", ["Q4_K", "Q2_K"])
def test_types_with_minimums(kit, tmp_path, kind):
    kinds = {"embed": "F32", "v_proj": "Q6_K", "lm_head": "F32", "": kind}
    real, plain = model(kit, tmp_path / "m.gguf", kinds)
    loaded = kit.same_model(tmp_path / "m.gguf", real, plain, tmp_path, 1e-5)
    qkv = loaded.decoder.stage("layers.0").module.attention.qkv
    # queries and keys join values in a format that holds both
    assert qkv.w == "w6zg16" and qkv.s == "f32"


def test_a_tied_table_is_shared(kit, tmp_path):
    path = tmp_path / "m.gguf"
    model(kit, path, {"": "Q8_0"}, drop=["output.weight"])
    loaded = load_checkpoint(path, NONE)
    assert loaded.decoder.config.tied and "lm_head.weight" not in open_checkpoint(path).entries
    head = loaded.decoder.stage("head").module.lm_head
    assert head.w == "w8g32"


@pytest.mark.parametrize("kind", ["Q4_0", pytest.param("TQ2_0", marks=pytest.mark.slow)])
def test_compiled_tokens(kit, tmp_path, kind):
    model(kit, tmp_path / "m.gguf", {"embed": "F32", "lm_head": "Q8_0", "": kind})
    kit.same_tokens(tmp_path / "m.gguf", tmp_path, "a8")


@pytest.mark.slow
def test_compiled_tokens_of_types_with_minimums(kit, tmp_path):
    model(kit, tmp_path / "m.gguf", {"embed": "F32", "v_proj": "Q6_K", "": "Q4_K"})
    kit.same_tokens(tmp_path / "m.gguf", tmp_path, "a8")


def llama3_factors(kit, factor, original=8192):
    out = []
    for i in range(kit.WIDTH // 2):
        inverse = 10000.0 ** (-2 * i / kit.WIDTH)
        wave = 2 * np.pi / inverse
        if wave < original / 4:
            out.append(1.0)
        elif wave > original / 1:
            out.append(factor)
        else:
            keep = (original / wave - 1) / (4 - 1)
            out.append(1 / ((1 - keep) / factor + keep))
    return torch.tensor(out)


def test_scaling_of_rotary_angles(kit, tmp_path):
    kinds, path = {"": "F32"}, tmp_path / "m.gguf"
    factors, layers = llama3_factors(kit, 32.0), matrices(kit)
    model(kit, path, kinds, **{"rope_freqs.weight": kit.floats_of(factors)}, **layers)
    loaded = load_checkpoint(path, NONE)
    scaling = json.loads(loaded.config)["rope_scaling"]
    assert scaling["rope_type"] == "llama3" and scaling["factor"] == 32
    inverse = loaded.decoder.stage("rope.0").module.inv_freq
    plain = 1 / 10000.0 ** (torch.arange(0, kit.WIDTH, 2) / kit.WIDTH)
    torch.testing.assert_close(inverse, plain / factors)
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    model(kit, path, kinds, metadata=linear, **layers)
    inverse = load_checkpoint(path, NONE).decoder.stage("rope.0").module.inv_freq
    torch.testing.assert_close(inverse, plain / 4)
    wrong = kit.floats_of(factors * torch.linspace(1, 1.1, len(factors)))
    model(kit, path, kinds, **{"rope_freqs.weight": wrong}, **layers)
    with pytest.raises(InputError, match="no scaling of Llama 3"):
        load_checkpoint(path, NONE)


def test_qwen2_keeps_its_rows_and_biases(kit, tmp_path):
    rng, path = np.random.default_rng(4), tmp_path / "m.gguf"
    plain = kit.plain_tensors(rng)
    for name, (n, k) in kit.matrix_shapes().items():
        plain[name] = torch.from_numpy(rng.standard_normal((n, k)).astype(np.float32) / k**0.5)
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            plain[name.replace("weight", "bias")] = torch.from_numpy(
                rng.standard_normal(n).astype(np.float32)
            )
    metadata = {
        k.replace("llama", "qwen2"): v.replace("llama", "qwen2") if isinstance(v, str) else v
        for k, v in kit.gguf_metadata().items()
    }
    half = {
        kit.gguf_name(n): (tuple(t.shape), 1, t.numpy().astype("<f2").tobytes())
        if t.dim() == 2 else kit.floats_of(t)
        for n, t in plain.items()
    }  # fmt: skip
    kit.write_gguf(path, metadata, half)
    twin = kit.write_folder(
        tmp_path / "twin", {n: t.half() if t.dim() == 2 else t for n, t in plain.items()}
    )
    (twin / "config.json").write_text(json.dumps({**kit.CONFIG, "model_type": "qwen2"}))
    assert torch.equal(kit.logits(path)[0], kit.logits(twin)[0])


def test_brain_floats_stay(kit, tmp_path):
    path = tmp_path / "m.gguf"
    table = torch.randn(kit.VOCAB, kit.HIDDEN).to(torch.bfloat16)
    raw = table.view(torch.int16).numpy().tobytes()
    model(
        kit, path, {"": "F32"},
        **{"token_embd.weight": (tuple(table.shape), 30, raw)}, **matrices(kit),
    )  # fmt: skip
    checkpoint = open_checkpoint(path)
    assert torch.equal(checkpoint.tensor("model.embed_tokens.weight"), table)
    assert load_checkpoint(path, NONE).decoder.config.dtype == "bf16"


def matrices(kit):
    """Return float matrices of the layers, by name in the file."""
    rng = np.random.default_rng(11)
    return {
        kit.gguf_name(name): kit.floats_of(
            torch.from_numpy(rng.standard_normal(shape).astype(np.float32) / shape[1] ** 0.5)
        )
        for name, shape in kit.matrix_shapes().items()
    }


def test_models_that_are_refused(kit, tmp_path):
    path, layers = tmp_path / "m.gguf", matrices(kit)

    def refused(match, metadata=None, **more):
        model(kit, path, {"": "F32"}, metadata=metadata, **{**layers, **more})
        with pytest.raises(InputError, match=match) as caught:
            load_checkpoint(path, NONE)
        assert "\n" not in str(caught.value) and "m.gguf" in str(caught.value)

    refused("'bitnet-b1.58' is not read from GGUF.*qwen3", {"general.architecture": "bitnet-b1.58"})
    refused("expert_count is not supported", {"llama.expert_count": 8})
    refused("one part of several", {"split.count": 3})
    refused("rope scaling 'yarn'", {"llama.rope.scaling.type": "yarn"})
    refused("different width", {"llama.attention.value_length": 32})
    refused("a part of each head", {"llama.rope.dimension_count": 32})
    refused("differs between layers", {"llama.attention.head_count": [4, 2]})
    refused("head_count is 0", {"llama.attention.head_count": 0})
    refused("layers in .* tensors", {"llama.block_count": 4_000_000_000 >> 2})
    refused("is missing", drop=["blk.1.ffn_up.weight"])
    refused("does not have: extra", **{"extra": kit.floats_of(torch.ones(3))})
    refused("head_count is", {"llama.attention.head_count": 3.0})
    wide = ((kit.FFN, kit.HIDDEN), 24, b"\0" * (kit.FFN * kit.HIDDEN))
    refused("the type I8, which is not read.*TQ2_0", **{"blk.0.ffn_up.weight": wide})
    ternary = ((kit.FFN, kit.HIDDEN), 36, b"\0" * (kit.FFN * kit.HIDDEN // 4 + 32))
    refused("number 36.*I2_S of bitnet.cpp", **{"blk.0.ffn_up.weight": ternary})
    refused("no whole blocks of Q4_0", **{"x": ((2, 31), 2, b"\0" * 64)})
    refused("and no matrix", **{"output_norm.weight": ((256,), 8, b"\0" * 272)})
    name, shape = "blk.0.ffn_down.weight", (kit.HIDDEN, kit.FFN)
    block = blocks.TYPES["Q8_0"][2](random.Random(0))[0]
    raw = b"\0\x7c" + (block * (kit.HIDDEN * kit.FFN // 32))[2:]
    refused("a scale is not finite", **{name: (shape, 8, raw)})
    code = (b"\xff" * 64 + blocks.half(1.0)[0]) * (kit.HIDDEN * kit.FFN // 256)
    refused("code 3 stands for no", **{name: (shape, 35, code)})
