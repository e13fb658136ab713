"""GPTQ: every width, both versions, any order of columns; whole models, eager and compiled."""

import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mimo_compile.errors import CheckpointWarning, InputError
from mimo_compile.frontend.huggingface import load_checkpoint
from mimo_compile.frontend.weights import open_checkpoint
from mimo_compile.frontend.weights.gptq import unpack
from mimo_compile.ir.formats import parse_scheme

pytestmark = pytest.mark.compile
Q = "model.layers.1.self_attn.q_proj"


def groups_of(k, group, index):
    return [i // group for i in range(k)] if index is None else index


def pack(kit, codes, zeros, scale, bits, *, version, index=None):
    """Return the tensors of one matrix; codes [N, K], zeros and scale [groups, N]."""
    down = [kit.words_of(row, bits) for row in codes.tolist()]
    mask = (1 << bits) - 1
    less = 1 if version == "gptq" else 0
    across = [kit.words_of([(z - less) & mask for z in row], bits) for row in zeros.tolist()]
    out = {
        ".qweight": torch.tensor(down, dtype=torch.int32).T,
        ".qzeros": torch.tensor(across, dtype=torch.int32),
        ".scales": torch.from_numpy(scale).to(torch.float16),
    }
    if index is not None:
        out[".g_idx"] = torch.tensor(index, dtype=torch.int32)
    return out


def draw(kit, rng, n, k, group, bits, sym):
    count = -(-k // group)
    codes = rng.integers(0, 1 << bits, (n, k))
    middle = 1 << (bits - 1)
    zeros = np.full((count, n), middle) if sym else rng.integers(1, 1 << bits, (count, n))
    return codes, zeros, kit.halves(rng, (count, n), -0.06 / (1 << bits))


def real_of(codes, zeros, scale, index):
    """Compute weights [N, K] in float64, one by one."""
    n, k = codes.shape
    out = np.empty((n, k))
    for j in range(k):
        g = index[j]
        out[:, j] = scale[g].astype(np.float64) * (codes[:, j] - zeros[g].astype(np.float64))
    return out.astype(np.float32)


def model(kit, rng, folder, bits=4, group=64, *, version="gptq", sym=False, order="none", **more):
    """Write a whole model; returns its real weights and its float tensors."""
    plain, real, stored = kit.plain_tensors(rng), {}, {}
    orders = {}
    for name, (n, k) in kit.matrix_shapes().items():
        size = k if group == -1 else group
        codes, zeros, scale = draw(kit, rng, n, k, size, bits, sym)
        index = None
        if order != "none":
            shared = name.rsplit(".", 3)[0], k if order == "shared" else name
            if shared not in orders:
                orders[shared] = rng.permutation(groups_of(k, size, None)).tolist()
            index = orders[shared]
        parts = pack(kit, codes, zeros, scale, bits, version=version, index=index)
        stem = name.removesuffix(".weight")
        stored |= {stem + part: t for part, t in parts.items()}
        real[name] = real_of(codes, zeros, scale, groups_of(k, size, index))
    kit.write_folder(
        folder, {**plain, **stored}, quant_method="gptq", bits=bits, group_size=group, sym=sym,
        desc_act=order != "none", checkpoint_format=version, **more,
    )  # fmt: skip
    return real, plain


def test_three_bit_codes_run_across_words():
    # 0 to 7 are the 24 bits 0xFAC688; four times in a row they fill three words
    words = np.array([[0x88FAC688, 0xC688FAC6, 0xFAC688FA]], np.uint32).view(np.int32)
    assert unpack(words, 3).tolist() == [[*range(8)] * 4]


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    rows=st.integers(1, 5),
    words=st.integers(1, 4),
    data=st.data(),
)
@settings(max_examples=25)
def test_streams_of_codes(kit, bits, rows, words, data):
    count = words * 32  # 3 bits fill whole words after 32 codes
    numbers = st.lists(st.integers(0, (1 << bits) - 1), min_size=count, max_size=count)
    codes = [data.draw(numbers) for _ in range(rows)]
    packed = np.array([kit.words_of(row, bits) for row in codes], np.int32)
    assert unpack(packed, bits).tolist() == codes


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_canonical_form_is_exact(kit, tmp_path, bits, version):
    rng = np.random.default_rng(bits)
    for sym, group, order in ((True, 32, "none"), (False, -1, "shared"), (False, 128, "own")):
        folder = tmp_path / f"{sym}{group}"
        real, _ = model(kit, rng, folder, bits, group, version=version, sym=sym, order=order)
        checkpoint = open_checkpoint(folder)
        for name, weight in real.items():
            found = checkpoint.quantised(name)
            assert found.fmt.has_zero == (not sym) and found.fmt.bits == bits
            assert np.array_equal(found.dequantize(), weight)
            trivial = found.perm is None
            assert trivial == (order == "none" or group == -1)
            assert torch.equal(checkpoint.tensor(name), torch.from_numpy(weight))


def test_wide_and_odd_groups(kit, tmp_path):
    rng = np.random.default_rng(0)
    for group, fmt in ((96, "w4zg32"), (512, "w4zgrow"), (100, "F32"), (48, "w4zg16")):
        real, _ = model(kit, rng, tmp_path / str(group), group=group)
        checkpoint = open_checkpoint(tmp_path / str(group))
        for name, weight in real.items():
            assert np.array_equal(checkpoint.tensor(name).numpy(), weight)
        assert checkpoint.entries["model.layers.0.mlp.down_proj.weight"].dtype == fmt


def test_groups_of_unequal_size_give_real_values(kit, tmp_path):
    rng = np.random.default_rng(1)
    model(kit, rng, tmp_path / "m")

    tensors = load_file(tmp_path / "m" / "model.safetensors")
    index = [0] * 100 + [3] * 100 + [1] * 56
    tensors[f"{Q}.g_idx"] = torch.tensor(index, dtype=torch.int32)
    codes, zeros, scale = draw(kit, rng, 256, 256, 64, 4, False)
    parts = pack(kit, codes, zeros, scale, 4, version="gptq")
    tensors |= {Q + part: t.contiguous() for part, t in parts.items()}
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path / "m")
    assert checkpoint.entries[f"{Q}.weight"].fmt is None
    assert np.array_equal(
        checkpoint.tensor(f"{Q}.weight").numpy(), real_of(codes, zeros, scale, index)
    )


@pytest.mark.parametrize(
    ("bits", "order", "tolerance"),
    [(4, "none", 0.0), (4, "shared", 1e-5), (3, "own", 1e-5), (8, "none", 0.0)],
)
def test_whole_models_equal_their_floats(kit, tmp_path, bits, order, tolerance):
    rng = np.random.default_rng(7)
    real, plain = model(kit, rng, tmp_path / "m", bits, order=order, sym=bits == 8)
    loaded = kit.same_model(tmp_path / "m", real, plain, tmp_path, tolerance)
    assert loaded.report.unused == () and loaded.report.notes == ()
    name = f"w{bits}" + ("g64" if bits == 8 else "zg64")
    assert set(loaded.report.dtypes) == {"F32", name}


@pytest.mark.parametrize(
    ("quant", "order"),
    [("a8", "shared"), pytest.param("w4zg64a16", "none", marks=pytest.mark.slow)],
)
def test_compiled_tokens(kit, tmp_path, quant, order):
    model(kit, np.random.default_rng(3), tmp_path / "m", order=order)
    artifact = kit.same_tokens(tmp_path / "m", tmp_path, quant)
    assert artifact.manifest.quant == quant


@pytest.mark.slow
def test_scales_beyond_float16_compile(kit, tmp_path):
    model(kit, np.random.default_rng(4), tmp_path / "m", sym=True)

    tensors = load_file(tmp_path / "m" / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(".scales"):
            tensors[name] = tensor.float() * 1.0001
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    kit.same_tokens(tmp_path / "m", tmp_path, "a8")


def test_first_version_wraps_zero_points(kit, tmp_path):
    rng = np.random.default_rng(5)
    model(kit, rng, tmp_path / "m")

    tensors = load_file(tmp_path / "m" / "model.safetensors")
    codes, zeros, scale = draw(kit, rng, 256, 256, 64, 4, False)
    zeros[0, 0] = 16  # a writer that stores 0 - 1 in four bits
    parts = pack(kit, codes, zeros, scale, 4, version="gptq")
    tensors |= {Q + part: t.contiguous() for part, t in parts.items()}
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path / "m")
    assert checkpoint.quantised(f"{Q}.weight").zero[0, 0] == 16
    assert "1 zero points are 16" in checkpoint.notes[0] and Q in checkpoint.notes[0]
    with pytest.warns(CheckpointWarning, match="1 zero points are 16"):
        report = load_checkpoint(tmp_path / "m", parse_scheme("none")).report
    assert report.notes == tuple(checkpoint.notes)


def test_refusals(kit, tmp_path):
    rng, folder = np.random.default_rng(6), tmp_path / "m"

    model(kit, rng, folder, sym=True)
    good = load_file(folder / "model.safetensors")

    def refused(match, settings=None, **changes):
        change = {f"{Q}{part.replace('_dot_', '.')}": t for part, t in changes.items()}
        tensors = {n: t for n, t in {**good, **change}.items() if t is not None}
        base = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True}
        base["checkpoint_format"] = "gptq"
        kit.write_folder(folder, tensors, **{**base, **(settings or {})})
        with pytest.raises(InputError, match=match) as caught:
            load_checkpoint(folder, parse_scheme("none"))
        assert "\n" not in str(caught.value)

    index = torch.arange(256, dtype=torch.int32) // 64
    refused("g_idx names groups outside 0 to 3", _dot_g_idx=index + 1)
    refused("g_idx names groups outside 0 to 3", _dot_g_idx=index - 1)
    refused(r"g_idx I32 \[5\] is no index of 256", _dot_g_idx=index[:5].clone())
    refused(r"scales \[3, 256\].*groups of 64", _dot_scales=torch.ones(3, 256))
    refused("a scale is not finite", _dot_scales=torch.full((4, 256), float("nan")))
    refused(r"tensor .*qzeros is missing", _dot_qzeros=None)
    refused("stored as", _dot_qweight=good[f"{Q}.qweight"].float())
    refused("must be matrices", _dot_qweight=good[f"{Q}.qweight"].flatten())
    refused('differ from 8 though.*"sym": false', _dot_qzeros=good[f"{Q}.qzeros"] + 1)
    refused("are no 3-bit codes", settings={"bits": 3})
    refused("bits=5 is not read", settings={"bits": 5})
    refused("packing 'marlin' are not read", settings={"checkpoint_format": "marlin"})
    refused("group_size=0", settings={"group_size": 0})
    refused("do not fit", settings={"group_size": 10**30})
    refused("dynamic", settings={"dynamic": {"+:.*": {"bits": 8}}})
    refused("does not have", _dot_bias=torch.ones(256))
    kit.write_folder(
        folder, {**good, f"{Q}.bias": torch.zeros(256)}, quant_method="gptq", bits=4, group_size=64
    )
    assert load_checkpoint(folder, parse_scheme("none")).report.unused == (f"{Q}.bias",)


@pytest.mark.parametrize(("case", "group"), [("mixtral", -1), ("mixtral", 64), ("qwen2_moe", 32)])
def test_experts_keep_their_codes(kit, saved, tools, tmp_path, case, group):
    """As such files are published, routers and the gate of a shared expert are floats; a group may be all of
    one matrix's columns and a part of the other's."""
    rng, source = np.random.default_rng(3), saved(case)[1]
    floats, stored = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        layers, gate = name.startswith("model.layers."), name.endswith("gate.weight")
        if tensor.dim() < 2 or gate or not layers:
            floats[name] = stored[name] = tensor
            continue
        n, k = tensor.shape
        size = min(group, k) if group > 0 else k
        codes, zeros, scale = draw(kit, rng, n, k, size, 4, sym=False)
        floats[name] = torch.from_numpy(real_of(codes, zeros, scale, groups_of(k, size, None)))
        parts = pack(kit, codes, zeros, scale, 4, version="gptq")
        stored |= {name.removesuffix(".weight") + part: t for part, t in parts.items()}
    settings = {"quant_method": "gptq", "bits": 4, "group_size": group, "checkpoint_format": "gptq"}
    found = []
    for what, tensors in (("floats", floats), ("stored", stored)):
        folder = shutil.copytree(source, tmp_path / what)
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
        quantised = {"quantization_config": {**settings, "sym": False, "desc_act": False}}
        tools.edit_json(folder / "config.json", **(quantised if what == "stored" else {}))
        found.append(load_checkpoint(folder, parse_scheme("none")).decoder)
    assert found[1].stage("layers.1").module.feed.experts.w == (
        f"w4zg{group}" if group > 0 else "w4zgrow"
    )
    want, got = (decoder.prefill(tools.prompt(20))[1] for decoder in found)
    assert want.std() > 0.1 and float((want - got).abs().max() / want.abs().max()) < 1e-5


@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe"])
def test_experts_in_orders_of_their_own_are_floats_and_said_to_be(
    kit, saved, tools, tmp_path, case
):
    """Of qwen2_moe's second matrices all columns are one group, whose order says nothing."""
    rng, source = np.random.default_rng(3), saved(case)[1]
    real, stored = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if ".experts." not in name:
            stored[name] = tensor
            continue
        n, k = tensor.shape
        codes, zeros, scale = draw(kit, rng, n, k, min(32, k), 4, sym=False)
        index = rng.permutation(groups_of(k, 32, None)).tolist()
        real[name] = torch.from_numpy(real_of(codes, zeros, scale, index))
        parts = pack(kit, codes, zeros, scale, 4, version="gptq", index=index)
        stored |= {name.removesuffix(".weight") + part: t for part, t in parts.items()}
    folder = shutil.copytree(source, tmp_path / "m")
    save_file({k: v.contiguous() for k, v in stored.items()}, folder / "model.safetensors")
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq"}
    quantised = {"quantization_config": {**settings, "sym": False, "desc_act": True}}
    tools.edit_json(folder / "config.json", **quantised)
    with pytest.warns(CheckpointWarning, match="orders of their own .*read as float32") as caught:
        decoder = load_checkpoint(folder, parse_scheme("none")).decoder
    assert len(caught) == 1
    experts = decoder.stage("layers.1").module.feed.experts
    assert experts.w == "f32"
    down = "block_sparse_moe.experts.2.w2" if case == "mixtral" else "mlp.experts.2.down_proj"
    assert torch.equal(experts.w2[2], real[f"model.layers.1.{down}.weight"])
