"""Damaged and hostile artifacts: refused before any code of them is linked."""

import hashlib
import json
import os
import random
import re
import struct
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import runtime_samples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mimo_compile import _tvm
from mimo_compile.errors import ArtifactError, EnvironmentMismatch, InputError, MimoError
from mimo_compile.runtime import cpu, load, zipform
from mimo_compile.runtime.container import open_artifact

pytestmark = pytest.mark.fuzz


@pytest.fixture
def no_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test as soon as code would be linked."""

    def linked(data: bytes) -> None:
        raise AssertionError("code was linked")

    monkeypatch.setattr(_tvm, "load_object", linked)


def members_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as zip_:
        return {name: zip_.read(name) for name in zip_.namelist()}


def pack(members: dict[str, bytes]) -> bytes:
    """Put members together as an artifact, whatever they hold and are called."""
    names = zipform.member_order(list(members))
    slots = [zipform.Slot(n, len(members[n]), zlib.crc32(members[n])) for n in names]
    out = b""
    for slot in slots:
        out += zipform.local_header(slot, len(out)) + members[slot.name]
    return out + zipform.directory(slots, hashlib.sha256(members["manifest.json"]).hexdigest())


def repack(path: Path, **changed: bytes | None) -> bytes:
    """Replace members (`.` is `_` in the keyword) and state their new hashes in the manifest."""
    members = members_of(path)
    for key, data in changed.items():
        name = key.replace("_", ".")
        members.pop(name, None)
        if data is not None:
            members[name] = data
    if "manifest_json" not in changed:
        manifest = json.loads(members["manifest.json"])
        manifest["members"] = {
            name: {
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
                "chunks": [
                    hashlib.sha256(data[i : i + (1 << 20)]).hexdigest()
                    for i in range(0, len(data), 1 << 20)
                ]
                if name == "weights.safetensors"
                else [],
            }
            for name, data in members.items()
            if name != "manifest.json"
        }
        members["manifest.json"] = json.dumps(manifest).encode()
    return pack(members)


def edit_manifest(path: Path, edit: Callable[[dict], object]) -> bytes:
    manifest = json.loads(members_of(path)["manifest.json"])
    edit(manifest)
    return repack(path, manifest_json=json.dumps(manifest).encode())


def refused(
    data: bytes, folder: Path, match: str | None = None, kind: type = ArtifactError
) -> MimoError:
    bad = folder / "bad.mimo"
    bad.write_bytes(data)
    with pytest.raises(kind, match=match) as caught:
        load(bad, verify="full")
    assert "bad.mimo" in str(caught.value)
    return caught.value


def test_the_helpers_make_loadable_files(plain_file: Path, tmp_path: Path) -> None:
    assert pack(members_of(plain_file)) == plain_file.read_bytes()
    (tmp_path / "same.mimo").write_bytes(repack(plain_file))
    x = np.ones(64, np.float32)
    assert np.array_equal(load(tmp_path / "same.mimo")(x), load(plain_file)(x))


@pytest.mark.usefixtures("no_link")
def test_every_prefix_is_refused(tmp_path: Path) -> None:
    bad = runtime_samples.plain(b"\x7fELF").save(tmp_path / "bad.mimo")
    data = bad.read_bytes()
    for length in reversed(range(len(data))):
        os.truncate(bad, length)
        with pytest.raises(ArtifactError):
            load(bad)
    refused(data + b"\0", tmp_path)


def flips(start: int, stop: int, count: int) -> list[tuple[int, int]]:
    rng = random.Random(stop)
    places = range(start, stop) if stop - start <= count else rng.sample(range(start, stop), count)
    return [(at, 1 << rng.randrange(8)) for at in places]


@pytest.mark.usefixtures("no_link")
def test_flipped_bits_are_refused_in_manifest_members_and_headers(
    decoder_file: Path, tmp_path: Path
) -> None:
    data = bytearray(decoder_file.read_bytes())
    with zipfile.ZipFile(decoder_file) as zip_:
        infos = zip_.infolist()
        end_of_data = zip_.start_dir
    slots, starts, _ = zipform.read(memoryview(data), "x")
    cases: list[tuple[int, int]] = []
    for slot, start, info in zip(slots, starts, infos, strict=True):
        manifest = slot.name == "manifest.json"
        cases += flips(start, start + slot.size, slot.size if manifest else 150)
        cases += flips(info.header_offset, start, 200)
    cases += flips(end_of_data, len(data), 10_000)  # the directory, all of it
    bad = tmp_path / "bad.mimo"
    bad.write_bytes(data)
    with bad.open("r+b", buffering=0) as file:
        for at, bit in cases:
            file.seek(at)
            file.write(bytes([data[at] ^ bit]))
            with pytest.raises(ArtifactError):
                load(bad, verify="full")
            file.seek(at)
            file.write(data[at : at + 1])
    assert open_artifact(bad, verify="full").manifest.name == "decoder"


def test_a_flip_in_a_later_chunk_is_found_when_it_is_needed(tmp_path: Path) -> None:
    artifact = runtime_samples.plain()
    artifact.weights = {"big": np.zeros(3 << 20, np.uint8), **artifact.weights}
    path = artifact.save(tmp_path / "big.mimo")
    with path.open("r+b") as file:
        data = file.read()
        bias = np.arange(64, dtype=np.float32).tobytes()
        file.seek(data.index(bias) + 80)
        file.write(b"\x7f")
    module = load(path)
    for _ in range(2):  # and found again: a chunk that failed never counts as checked
        with pytest.raises(ArtifactError, match="what follows byte 3145728 differs"):
            module(np.ones(64, np.float32))
    assert module.call("accumulate", np.ones(64, np.float32))[0][0] == 1  # needs no weights
    with pytest.raises(ArtifactError, match="what follows byte 3145728 differs"):
        load(path, verify="full")


HOSTILE = [
    "../evil", "/etc/passwd", "a/../../b", "weights.safetensors/", "MANIFEST.JSON", "Code.o",
    "code.o\0", "code.o ", " code.o", "x" * 300, "code.so", "a.py", "config.pkl", ".", "..", "",
    "C:\\x", "con", "manifest.json.", "extra", "tokenizer.json~", "-rf", "*", "%2e%2e",
]  # fmt: skip


@pytest.mark.usefixtures("no_link")
@pytest.mark.parametrize("name", HOSTILE, ids=repr)
def test_hostile_names_are_refused(name: str, plain_file: Path, tmp_path: Path) -> None:
    members = members_of(plain_file)
    refused(pack({**members, name: b"x"}), tmp_path, "does not belong in an artifact")
    assert os.listdir(tmp_path) == ["bad.mimo"]


@pytest.mark.usefixtures("no_link")
@pytest.mark.parametrize("name", ["code\u202eo.", "cod\u00e9.o", "\U0001f600"])
def test_names_beyond_ascii_are_refused(name: str, plain_file: Path, tmp_path: Path) -> None:
    refused(foreign_zip(plain_file, {name: b"x"}), tmp_path, "does not belong in an artifact")


def foreign_zip(path: Path, extra: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """What another zip writer makes of the members, with the comment that artifacts have."""
    made = path.with_suffix(".foreign")
    members = members_of(path)
    with zipfile.ZipFile(made, "w", method) as zip_:
        for name, data in (*members.items(), *extra.items()):
            zip_.writestr(name, data)
        zip_.comment = b"sha256:" + hashlib.sha256(members["manifest.json"]).hexdigest().encode()
    return made.read_bytes()


@pytest.mark.usefixtures("no_link")
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_other_zips_are_refused(plain_file: Path, tmp_path: Path) -> None:
    deflated = foreign_zip(plain_file, {}, zipfile.ZIP_DEFLATED)
    assert "Use the original" in str(refused(deflated, tmp_path, "compressed .method 8."))
    refused(foreign_zip(plain_file, {}), tmp_path, "packed by another program")
    refused(foreign_zip(plain_file, {"code.o": b"x"}), tmp_path, "code.o occurs twice")
    encrypted = bytearray(plain_file.read_bytes())
    with zipfile.ZipFile(plain_file) as zip_:
        struct.pack_into("<H", encrypted, zip_.start_dir + 8, 1)
    refused(bytes(encrypted), tmp_path, "manifest.json is encrypted")
    refused(b"hello", tmp_path, "not a whole artifact")
    refused(b"", tmp_path, "empty")
    for gone in sorted(zipform.REQUIRED - {"manifest.json"}):
        members = members_of(plain_file)
        del members[gone]
        refused(pack(members), tmp_path, f"{gone} is missing")
    members = members_of(plain_file)
    code = members.pop("code.o")
    refused(pack(members), tmp_path, "must have one of code.o, code.cuda")
    refused(pack({**members, "code.o": code, "code.cuda": code}), tmp_path, "must have one of")


@pytest.mark.usefixtures("no_link")
def test_members_in_front_and_behind_are_refused(plain_file: Path, tmp_path: Path) -> None:
    data = plain_file.read_bytes()
    refused(b"#!/bin/sh\n" + data, tmp_path)
    with zipfile.ZipFile(plain_file) as zip_:
        start = zip_.start_dir
    refused(data[:start] + b"hidden" + data[start:], tmp_path)


@pytest.mark.usefixtures("no_link")
def test_bombs_are_refused_at_once(plain_file: Path, tmp_path: Path) -> None:
    data = plain_file.read_bytes()
    with zipfile.ZipFile(plain_file) as zip_:
        start = zip_.start_dir
    begin = time.perf_counter()
    for size in (0xFFFFFFFE, 0xFFFFFFFF, len(data)):
        bomb = bytearray(data)
        struct.pack_into("<2I", bomb, start + 20, size, size)
        refused(bytes(bomb), tmp_path)
    many = bytearray(data)
    struct.pack_into("<2H", many, len(data) - 71 - 22 + 8, 60000, 60000)
    refused(bytes(many), tmp_path, "60000 members")
    refused(edit_manifest(plain_file, lambda m: m.update(name="x" * (1 << 20))), tmp_path, "longer")
    deep = b'{"schema": 1, "name": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    refused(repack(plain_file, manifest_json=deep), tmp_path, "malformed JSON")
    digits = b'{"schema": ' + b"9" * 500_000 + b"}"
    refused(repack(plain_file, manifest_json=digits), tmp_path)
    assert time.perf_counter() - begin < 20  # a hang, not a slow machine


@pytest.mark.usefixtures("no_link")
def test_a_sparse_file_of_terabytes_is_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.mimo"
    bad.touch()
    os.truncate(bad, 1 << 40)
    with pytest.raises(ArtifactError, match="not a whole artifact"):
        load(bad)


@pytest.mark.usefixtures("no_link")
def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, match in (
        (tmp_path / "missing.mimo", "No such file"),
        (tmp_path, "not a regular file"),
        (tmp_path / "pipe", "not a regular file"),
        ("nul\0", "embedded null"),
    ):
        with pytest.raises(InputError, match=match):
            load(path)


@pytest.mark.usefixtures("no_link")
def test_manifests_are_read_strictly(plain_file: Path, tmp_path: Path) -> None:
    text = members_of(plain_file)["manifest.json"]

    def raw(data: bytes, match: str) -> MimoError:
        return refused(repack(plain_file, manifest_json=data), tmp_path, match)

    raw(text.replace(b'"name":', b'"quant":"w8","name":', 1), "'quant' occurs twice")
    raw(text.replace(b'"schema":1', b'"schema":1,"pickle":0', 1), "pickle")
    raw(text.replace(b'"threads":2', b'"threads":NaN', 1), "NaN")
    raw(text.replace(b'"threads":2', b'"threads":"2"', 1), "threads")
    raw(b"[]", "states no schema")
    raw(b"\xff\xfe", "malformed JSON")
    raw(text.replace(b'"schema":1', b'"schema":true', 1), "states no schema")
    newer = raw(text.replace(b'"schema":1', b'"schema":7,"later":{}', 1), "schema 7.*up to 1")
    assert "pip install --upgrade mimo-compile" in str(newer)
    assert newer.exit_code == 3
    refused(edit_manifest(plain_file, lambda m: m["members"].pop("code.o")), tmp_path, "not those")
    refused(
        edit_manifest(plain_file, lambda m: m["members"]["weights.safetensors"].update(chunks=[])),
        tmp_path,
        "0 hashes of chunks",
    )


@pytest.mark.usefixtures("no_link")
def test_another_machine_is_named_with_the_remedy(plain_file: Path, tmp_path: Path) -> None:
    def wrong(edit: Callable[[dict], object], match: str) -> str:
        return str(refused(edit_manifest(plain_file, edit), tmp_path, match, EnvironmentMismatch))

    text = wrong(
        lambda m: m["target"].update(features=["avx512quantum", "sse2", "amx-warp"]),
        "lacks amx-warp, avx512quantum",
    )
    assert "mimo-compile compile SRC --target cpu" in text
    assert "sse2" not in text
    wrong(
        lambda m: (
            m["target"].update(kind="cuda", name="cuda:sm_90a"), m["versions"].update(cuda="13.0")
        ),
        "is for cuda:sm_90a",
    )  # fmt: skip
    wrong(lambda m: m["versions"].update({"apache-tvm": "0.31.2"}), "built with apache-tvm 0.31.2")
    wrong(lambda m: m["versions"].pop("apache-tvm-ffi"), "apache-tvm-ffi of unknown version")
    # only running it needs the machine; looking at it does not
    assert open_artifact(tmp_path / "bad.mimo", for_this_machine=False).manifest.name == "plain"


def test_features_of_a_superset_are_enough(
    plain_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "features", lambda: frozenset({"a", "b", "c"}))
    path = tmp_path / "ab.mimo"
    path.write_bytes(edit_manifest(plain_file, lambda m: m["target"].update(features=["a", "b"])))
    assert load(path).manifest.target.features == ("a", "b")


def test_code_for_another_architecture_is_refused(
    plain_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = bytearray(members_of(plain_file)["code.o"])
    code[18:20] = b"\xb7\0"  # EM_AARCH64
    monkeypatch.setattr(cpu.platform, "machine", lambda: "x86_64")
    refused(repack(plain_file, code_o=bytes(code)), tmp_path, "built for aarch64, this machine is")
    refused(repack(plain_file, code_o=b"\x7fELF"), tmp_path, "another architecture")


def test_cpuinfo_is_spelled_as_llvm_spells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = "flags\t\t: fpu pni sse4_1 abm avx512_vnni avx_vnni amx_int8 avx512f sha_ni\n"
    monkeypatch.setattr(cpu.Path, "read_text", lambda *_, **__: "processor : 0\n" + flags)
    cpu.features.cache_clear()
    try:
        assert cpu.features() == {
            "fpu", "sse3", "sse4.1", "lzcnt", "avx512vnni", "avxvnni", "amx-int8", "avx512f", "sha",
        }  # fmt: skip
    finally:
        cpu.features.cache_clear()


def weights_with(header: object, data: bytes = bytes(256)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text + data


def tensor(dtype: str = "F32", shape: object = (64,), begin: object = 0, end: object = 256):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BAD_WEIGHTS = {
    "no object": (weights_with([]), "not a JSON object"),
    "hole": (weights_with({"bias": tensor(), "b": tensor("U8", [64], 320, 384)}, bytes(384)), "not begin"),
    "overlap": (weights_with({"bias": tensor(), "b": tensor("U8", [64], 192, 256)}), "not begin"),
    "behind": (weights_with({"bias": tensor()}, bytes(300)), "44 bytes follow"),
    "outside": (weights_with({"bias": tensor(shape=[128], end=512)}), "outside"),
    "length": (weights_with({"bias": tensor(shape=[63])}), "as long as its shape"),
    "negative": (weights_with({"bias": tensor(shape=[-64])}), "whole numbers"),
    "float": (weights_with({"bias": tensor(shape=[64.0])}), "whole numbers"),
    "bool": (weights_with({"bias": tensor(shape=[True])}), "whole numbers"),
    "overflow": (weights_with({"bias": tensor(shape=[1 << 62, 4])}), "whole numbers"),
    "wraps": (weights_with({"bias": tensor(shape=[1 << 40, 1 << 40])}), "as long as its shape"),
    "dtype": (weights_with({"bias": tensor("F7")}), "unknown dtype"),
    "dtype kind": (weights_with({"bias": tensor([])}), "unknown dtype"),  # type: ignore[arg-type]
    "keys": (weights_with({"bias": {**tensor(), "file": "x"}}), "exactly"),
    "no tensor": (weights_with({"bias": 3}), "exactly"),
    "twice": (weights_with(b'{"bias":1,"bias":2}'), "occurs twice"),
    "boundary": (
        weights_with({"a": tensor("U8", [4], 0, 4), "bias": tensor(begin=4, end=260)}, bytes(260)),
        "boundary",
    ),
    "no header": (b"", "too short"),
    "cut header": ((1 << 40).to_bytes(8, "little") + bytes(64), "header states"),
    "unpadded": ((2).to_bytes(8, "little") + b"{}", "boundary"),
    "missing": (weights_with({"other": tensor()}), "'bias', which does not exist"),
    "short": (weights_with({"bias": tensor("U8", [64], 0, 64)}, bytes(64)), "ends beyond the 64"),
}  # fmt: skip


@pytest.mark.usefixtures("no_link")
@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_malformed_weights_are_refused(case: str, plain_file: Path, tmp_path: Path) -> None:
    weights, match = BAD_WEIGHTS[case]
    refused(repack(plain_file, weights_safetensors=weights), tmp_path, match)


@pytest.mark.usefixtures("no_link")
def test_the_fields_of_large_files_are_checked_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if 3,000 bytes were 4 GiB; real sizes have a slow test beside the writer's tests."""
    monkeypatch.setattr(zipform, "_FULL", 3000)
    artifact = runtime_samples.plain(b"\x7fELF" * 1000)
    path = artifact.save(tmp_path / "bad.mimo")
    data = path.read_bytes()
    assert b"PK\6\6" in data
    assert open_artifact(path, verify="full").code == artifact.code
    start = data.index(b"PK\1\2")
    for at, bit in flips(start, len(data), 10_000):
        refused(data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :], tmp_path)
    refused(data[:start] + data[-22 - 71 :], tmp_path)
    refused(data[-22 - 71 :], tmp_path)


@pytest.mark.usefixtures("no_link")
def test_entries_and_states_must_be_sound(plain_file: Path, tmp_path: Path) -> None:
    missing = edit_manifest(plain_file, lambda m: m.update(entries=["main", "other"]))
    refused(missing, tmp_path, r"lists the entries \['main', 'other'\]")
    shape = edit_manifest(plain_file, lambda m: m["states"]["sum"].update(shape=[-1]))
    refused(shape, tmp_path, "state 'sum' has no sound shape")


@pytest.mark.parametrize("answer", [0, -1])
def test_tile_registers_are_asked_for(answer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []

    def syscall(*args: int) -> int:
        asked.append(args)
        return answer

    libc = SimpleNamespace(syscall=syscall)
    monkeypatch.setattr(_tvm.ctypes, "CDLL", lambda *_, **__: libc)
    _tvm.request_tiles.cache_clear()
    try:
        if answer:
            with pytest.raises(EnvironmentMismatch, match="refuses the AMX tile registers"):
                cpu.permit_amx()
        else:
            cpu.permit_amx()
    finally:
        _tvm.request_tiles.cache_clear()
    assert asked == [(158, 0x1023, 18)]


@pytest.mark.usefixtures("no_link")
@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        ("entries/main/buffers/0/offset", 300, "ends beyond the 512"),
        ("entries/main/buffers/0/offset", -4, "off the boundary"),
        ("entries/main/buffers/0/offset", 2, "off the boundary"),
        ("entries/main/buffers/0/shape", [1 << 40], "ends beyond"),
        ("entries/main/buffers/0/shape", [-1], "sound shape"),
        ("entries/main/buffers/0/dtype", "float31", "sound shape"),
        ("entries/main/buffers/0/kind", "file", "malformed programs"),
        ("entries/main/buffers/2/source", "nowhere", "does not exist"),
        ("entries/main/arena_bytes", 8, "ends beyond the 8"),
        ("entries/main/calls/1/args", [0, 9], "beyond the 4"),
        ("entries/main/calls/1/args", [0, -1], "beyond the 4"),
        ("entries/main/inputs", {"x": 7}, "'x' is buffer 7"),
        ("entries/main/inputs", {"x": 2}, "would overwrite a weight"),
        ("entries/main", None, "malformed programs"),
    ],
)
def test_programs_that_point_outside_are_refused(
    path: str, value: object, match: str, plain_file: Path, tmp_path: Path
) -> None:
    programs = json.loads(members_of(plain_file)["programs.json"])
    *way, last = path.split("/")
    at = programs
    for key in way:
        at = at[int(key)] if key.isdigit() else at[key]
    at[last] = value
    data = repack(plain_file, programs_json=json.dumps(programs).encode())
    refused(data, tmp_path, match)


@pytest.mark.usefixtures("no_link")
def test_decoders_that_lack_entries_are_refused(decoder_file: Path, tmp_path: Path) -> None:
    def wrong(match: str, **changed: object) -> None:
        edit = edit_manifest(decoder_file, lambda m: m["decoder"].update(changed))
        refused(edit, tmp_path, match)

    wrong("step_8 is missing", steps=[1, 4, 8])
    wrong("do not ascend from 1", steps=[4, 1])
    wrong("do not ascend from 1", heads=[])
    wrong(re.escape("head_1 maps (float32[1, 16]) to (float32[1, 257])"), vocab=258)


@pytest.mark.usefixtures("no_link")
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"role": "nonsense"}, "role 'nonsense'"),
        ({"format": "zz"}, "caches of 'zz'"),
        ({"name": "layers.x"}, "'layers.x' is no name of a layer"),
        ({"name": "layers"}, "'layers' is no name of a layer"),
        ({"role": "window", "window": 5, "slots": 1}, "sees 5 positions of 1"),
        ({"slots": 1}, "sees 0 positions of 1"),
        ({"window": -1}, "sees -1 positions"),
        ({"role": "reuse"}, "role reuse and follows ''"),
        ({"follows": "layers.0"}, "role full and follows 'layers.0'"),
        ({"role": "reuse", "follows": "layers.2"}, "follows layers.2, which is none before it"),
        ({"name": "layers.0"}, "two layers have one name"),
    ],
)
def test_layers_that_cannot_be_are_refused(
    change: dict[str, object], match: str, decoder_file: Path, tmp_path: Path
) -> None:
    context = json.loads(members_of(decoder_file)["manifest.json"])["decoder"]["max_context"]

    def layers(**changed: object) -> list[dict[str, object]]:
        both = [{"name": f"layers.{i}", "role": "full", "slots": context} for i in range(2)]
        return [both[0], {**both[1], **changed}]

    def edit(**changed: object) -> bytes:
        return edit_manifest(decoder_file, lambda m: m["decoder"].update(layers=layers(**changed)))

    refused(edit(**change), tmp_path, re.escape(match))
    good = tmp_path / "good.mimo"
    good.write_bytes(edit(role="window", window=2, slots=2))
    open_artifact(good, verify="full")


def test_the_runtime_knows_every_cache_format() -> None:
    from typing import get_args

    from mimo_compile.ir.caches import FORMATS, GROUPED, SCALED
    from mimo_compile.ir.policies.base import Kind
    from mimo_compile.runtime import check, rollback

    assert set(check.FORMATS) == {*FORMATS, *SCALED, *GROUPED}
    assert set(rollback.FREE) == {*FORMATS, *SCALED}
    assert set(check.ROLES) == set(get_args(Kind))


@pytest.mark.usefixtures("no_link")
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_edit_of_bytes_is_refused(
    data: st.DataObject, plain_file: Path, tmp_path: Path
) -> None:
    good = plain_file.read_bytes()
    bad = good
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(bad)))
        gone = data.draw(st.integers(0, 64))
        bad = bad[:at] + data.draw(st.binary(max_size=64)) + bad[at + gone :]
    (tmp_path / "bad.mimo").write_bytes(bad)
    if bad != good:
        with pytest.raises(ArtifactError):
            load(tmp_path / "bad.mimo", verify="full")


def test_builder_and_runtime_spell_features_alike() -> None:
    from mimo_compile.ir import hardware

    assert hardware.local_cpu().features <= cpu.features()
    for word, name in hardware._CPUINFO.items():
        assert cpu._spell(word) == name
