"""Files that lie about themselves: one error, at once, and no memory to speak of."""

import struct
import time
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mimo_compile.errors import InputError, MimoError
from mimo_compile.frontend.weights.gguf.checkpoint import Gguf
from mimo_compile.frontend.weights.gguf.reader import GgufFile

pytestmark = pytest.mark.compile
HUGE = (1 << 63, (1 << 64) - 1, 1 << 40, 1 << 32, 1 << 31)


def header(tensors=0, keys=0, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def text(raw):
    return struct.pack("<Q", len(raw)) + raw


def tensor(name=b"t", dims=(32,), kind=0, offset=0, count=None):
    out = text(name) + struct.pack("<I", len(dims) if count is None else count)
    return out + struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", kind, offset)


def key(name, kind, raw):
    return text(name) + struct.pack("<I", kind) + raw


def refused(path, data, match=""):
    """Open a file; it must be refused within a second of work and a few MB."""
    path.write_bytes(data)
    tracemalloc.start()
    start = time.thread_time()
    with pytest.raises(InputError, match=match) as caught:
        Gguf(path, {})
    spent = time.thread_time() - start
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert spent < 1 and peak < 8 << 20
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("huge", HUGE)
def test_counts_beyond_the_file(tmp_path, huge):
    path, count = tmp_path / "m.gguf", struct.pack("<Q", huge)
    fifty_one = header(1, huge)[:51].ljust(51, b"\0")
    refused(path, fifty_one, "do not fit into 51 bytes")
    refused(path, header(huge, 1).ljust(51, b"\0"), "do not fit into 51 bytes")
    refused(path, header(0, 1) + count + b"\0" * 40, "a name of|ends within")
    refused(
        path, header(0, 1) + text(b"k") + struct.pack("<I", 8) + count + b"\0" * 40, "ends within"
    )
    for inner in (0, 4, 7, 8, 12):
        array = key(b"k", 9, struct.pack("<I", inner) + count) + b"\0" * 64
        refused(path, header(0, 1) + array, "do not fit")
    refused(path, header(1) + tensor(dims=(huge, huge)) + b"\0" * 64, "extents")
    refused(path, header(1) + tensor(dims=(32, huge // 32)) + b"\0" * 640, "extents|cut off")
    refused(path, header(1) + tensor(offset=huge & ~31) + b"\0" * 64, "begins at")


def test_what_else_is_refused(tmp_path):
    path = tmp_path / "m.gguf"
    room = b"\0" * 512
    refused(path, b"GGUX" + room, "no GGUF file")
    refused(path, b"GGUF", "no GGUF file")
    refused(path, b"", "cannot be read")
    refused(path, header(version=1) + room, "version 1 is not read")
    refused(path, b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + room, "big-endian version 3")
    refused(path, header(1) + tensor(count=0) + room, "0 dimensions")
    refused(path, header(1) + tensor(count=1 << 31) + room, "dimensions")
    refused(path, header(1) + tensor(dims=(0,)) + room, "extents")
    refused(path, header(1) + tensor(name=b"") + room, "no text")
    refused(path, header(1) + tensor(name=b"\xff\xfe") + room, "no text")
    refused(path, header(2) + tensor() * 2 + room, "occurs twice")
    refused(path, header(2) + tensor() + tensor(b"u", offset=32) + room, "overlaps")
    refused(path, header(1) + tensor(offset=4) + room, "not aligned")
    refused(path, header(1) + tensor(kind=99) + room, "number 99, which is not read")
    refused(path, header(1) + tensor(kind=4) + room, "number 4, which is not read")
    refused(path, header(0, 2) + key(b"k", 4, b"\0" * 4) * 2 + room, "occurs twice")
    refused(path, header(0, 1) + key(b"k", 7, b"\2") + room, "no boolean")
    refused(path, header(0, 1) + key(b"k", 77, b"\0" * 8) + room, "unknown type 77")
    nested = struct.pack("<IQ", 9, 1) * 100
    refused(path, header(0, 1) + key(b"k", 9, nested) + room, "array of the type 9")
    for align in (0, 3, 1 << 31):
        aligned = key(b"general.alignment", 4, struct.pack("<I", align))
        refused(path, header(0, 1) + aligned + room, "no power of two")
    minus = key(b"general.alignment", 5, struct.pack("<i", -32))
    refused(path, header(0, 1) + minus + room, "no power of two")


@pytest.fixture(scope="module")
def good(kit, tmp_path_factory):
    """The bytes of a small good file with a tokenizer, and how long its header is."""
    path = tmp_path_factory.mktemp("good") / "m.gguf"
    import torch

    pieces = ["<unk>", "<s>", "</s>", "▁", "a", "b", "ab", "▁ab"]
    metadata = kit.gguf_metadata(**{
        "llama.block_count": 1, "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -1.0, -2.0, -3.0, -4.0, -5.0],
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1, 1], "tokenizer.ggml.bos_token_id": 1,
        "llama.embedding_length": 32, "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1, "llama.feed_forward_length": 32,
        "llama.rope.dimension_count": 16,
    })  # fmt: skip
    tensors = {
        "token_embd.weight": kit.floats_of(torch.randn(8, 32)),
        "output_norm.weight": kit.floats_of(torch.ones(32)),
    }
    for part, rows in (("attn_q", 32), ("attn_k", 16), ("attn_v", 16), ("attn_output", 32)):
        tensors[f"blk.0.{part}.weight"] = ((rows, 32), 8, b"\x11" * 34 * rows)
    for part in ("ffn_gate", "ffn_up", "ffn_down"):
        tensors[f"blk.0.{part}.weight"] = ((32, 32), 2, b"\x11" * 18 * 32)
    for part in ("attn_norm", "ffn_norm"):
        tensors[f"blk.0.{part}.weight"] = kit.floats_of(torch.ones(32))
    kit.write_gguf(path, metadata, tensors)
    data = path.read_bytes()
    return data, len(data) - sum(len(raw) + -len(raw) % 32 for *_, raw in tensors.values())


def load(path):
    """Do all that loading does with a file: configuration, shapes, every tensor, the tokenizer."""
    from mimo_compile.frontend.huggingface import load_checkpoint
    from mimo_compile.ir.formats import parse_scheme

    return load_checkpoint(path, parse_scheme("none"))


def test_the_good_file_is_good(good, tmp_path):
    (tmp_path / "m.gguf").write_bytes(good[0])
    loaded = load(tmp_path / "m.gguf")
    assert loaded.tokenizer is not None and loaded.report.notes == ()


@given(data=st.data())
@settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutations_of_a_good_file(good, tmp_path, data):
    """Bytes, numbers and cuts anywhere, most of them in the header: an error of ours, or a model."""
    raw, length = good
    out = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, length + 64 if data.draw(st.booleans()) else len(raw) - 1))
        kind = data.draw(st.sampled_from(["byte", "u64", "u32", "cut", "insert", "delete"]))
        at = min(at, max(0, len(out) - 1))
        if kind == "byte":
            out[at : at + 1] = data.draw(st.binary(min_size=1, max_size=1))
        elif kind == "u64":
            out[at : at + 8] = struct.pack("<Q", data.draw(st.sampled_from([0, 1, *HUGE[1:]])))
        elif kind == "u32":
            out[at : at + 4] = struct.pack("<I", data.draw(st.integers(0, (1 << 32) - 1)))
        elif kind == "cut":
            del out[at:]
        elif kind == "insert":
            out[at:at] = data.draw(st.binary(max_size=16))
        else:
            del out[at : at + data.draw(st.integers(1, 16))]
    path = tmp_path / "m.gguf"
    path.write_bytes(out)
    start = time.thread_time()
    try:
        load(path)
    except MimoError as error:
        assert "\n" not in str(error)
    assert time.thread_time() - start < 1


@given(raw=st.binary(max_size=200))
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_noise_after_the_magic(tmp_path, raw):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF\3\0\0\0" + raw)
    try:
        GgufFile(path)
    except InputError as error:
        assert "\n" not in str(error)
