"""Writing artifacts: same bytes for same contents, whole files or none."""

import errno
import hashlib
import itertools
import os
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "runtime"))

import runtime_samples

from mimo_compile import artifact as artifact_module
from mimo_compile.artifact import Artifact, Deferred
from mimo_compile.errors import ArtifactError, MimoError
from mimo_compile.runtime import load
from mimo_compile.runtime import weights as weights_module
from mimo_compile.runtime.container import open_artifact
from mimo_compile.runtime.program import Manifest


def small() -> Artifact:
    """An artifact to look at; its code is none."""
    return runtime_samples.plain(b"\x7fELF and so on")


def test_same_contents_give_same_bytes(tmp_path: Path) -> None:
    first = small().save(tmp_path / "first.mimo").read_bytes()
    (tmp_path / "elsewhere").mkdir()
    assert small().save(str(tmp_path / "elsewhere" / "b.mimo")).read_bytes() == first
    again = Artifact.load(tmp_path / "first.mimo").save(tmp_path / "third.mimo")
    assert again.read_bytes() == first


def test_reading_gives_back_what_was_written(tmp_path: Path) -> None:
    wrote = runtime_samples.decoder()
    found = Artifact.load(wrote.save(tmp_path / "a.mimo"))
    assert found.programs == wrote.programs
    assert (found.code, found.config) == (wrote.code, wrote.config)
    assert (found.tokenizer, found.records) == (wrote.tokenizer, wrote.records)
    assert msgspec.structs.replace(found.manifest, members={}) == wrote.manifest
    assert list(found.weights) == list(wrote.weights)
    for name, value in found.weights.items():
        assert isinstance(value, Deferred)
        assert np.array_equal(value.make(), wrote.weights[name])


def test_ordinary_tools_read_it_and_tensors_lie_on_boundaries(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    artifact = small()
    artifact.weights = {
        "bytes": np.arange(7, dtype=np.uint8),
        "none": np.zeros((0, 3), np.float32),
        "scalar": np.array(2.5),
        "half": np.arange(33, dtype=np.float16).reshape(3, 11),
        "flags": np.array([True, False]),
        **artifact.weights,
    }
    path = artifact.save(tmp_path / "a.mimo")
    with zipfile.ZipFile(path) as zip_:
        assert zip_.testzip() is None
        assert [i.filename for i in zip_.infolist()] == [
            "manifest.json", "code.o", "programs.json", "weights.safetensors",
        ]  # fmt: skip
        assert {i.date_time for i in zip_.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert {i.compress_type for i in zip_.infolist()} == {zipfile.ZIP_STORED}
        assert stat.S_IMODE(zip_.infolist()[0].external_attr >> 16) == 0o644
        data = zip_.read("weights.safetensors")
        manifest = msgspec.json.decode(zip_.read("manifest.json"), type=Manifest)
    member = manifest.members["weights.safetensors"]
    assert member.sha256 == hashlib.sha256(data).hexdigest()
    assert member.chunks == (member.sha256,)
    found = safetensors.load(data)
    whole = path.read_bytes()
    for name, value in artifact.weights.items():
        assert isinstance(value, np.ndarray)
        assert np.array_equal(found[name], value)
        assert found[name].dtype == value.dtype
        if value.size > 4:
            assert whole.index(value.tobytes()) % 64 == 0
    assert all(name in artifact.weights or name.startswith("~pad.") for name in found)


def test_chunks_and_pieces_meet_at_every_boundary(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(artifact_module, "_PIECE", 700_001)
    rng = np.random.default_rng(0)
    artifact = small()
    for megabytes in (1, 2.5, 3):
        size = int(megabytes * (1 << 20))
        artifact.weights = {"bias": np.zeros(64, np.float32), "w": rng.bytes(size)}
        artifact.weights["w"] = np.frombuffer(artifact.weights["w"], np.uint8)
        path = artifact.save(tmp_path / "a.mimo")
        with zipfile.ZipFile(path) as zip_:
            data = zip_.read("weights.safetensors")
        facts = open_artifact(path, verify="full").manifest.members["weights.safetensors"]
        assert facts.chunk_bytes == 1 << 20
        assert facts.chunks == tuple(
            hashlib.sha256(data[i : i + (1 << 20)]).hexdigest()
            for i in range(0, len(data), 1 << 20)
        )


def test_large_weights_have_larger_chunks(tmp_path: Path, monkeypatch: Any) -> None:
    """So that the hashes of a model of any size fit the manifest."""
    assert [weights_module.chunk_bytes(n << 30) >> 20 for n in (0, 4, 5, 100)] == [1, 1, 2, 32]
    monkeypatch.setattr(weights_module, "MOST_CHUNKS", 2)
    artifact = small()
    data = np.random.default_rng(0).integers(0, 256, 5 << 20, dtype=np.uint8)
    artifact.weights = {"bias": np.zeros(64, np.float32), "w": data}
    path = artifact.save(tmp_path / "a.mimo")
    facts = open_artifact(path, verify="full").manifest.members["weights.safetensors"]
    assert facts.chunk_bytes == 4 << 20 and len(facts.chunks) == 2
    bytes_ = bytearray(path.read_bytes())
    bytes_[-500_000] ^= 1
    path.write_bytes(bytes_)
    with pytest.raises(ArtifactError, match="what follows byte 4194304 differs"):
        open_artifact(path, verify="full")


def test_deferred_weights_are_made_one_after_the_other(tmp_path: Path) -> None:
    made: list[str] = []

    def weight(name: str) -> Deferred:
        def make() -> np.ndarray:
            made.append(name)
            return np.full((512, 64), len(made), np.float32)[:, ::-1]  # not contiguous

        return Deferred("float32", (512, 64), make)

    artifact = small()
    artifact.weights = {"bias": np.arange(64, dtype=np.float32), **{n: weight(n) for n in "ba"}}
    found = Artifact.load(artifact.save(tmp_path / "a.mimo"))
    assert made == ["b", "a"]
    assert found.weights["a"].make()[0, 0] == 2
    assert not found.weights["a"].make().flags.writeable


def test_what_cannot_be_stored_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    bias = np.zeros(64, np.float32)

    def wrong(match: str, **changes: Any) -> None:
        artifact = small()
        for name, value in changes.items():
            setattr(artifact, name, value)
        with pytest.raises(MimoError, match=match):
            artifact.save(tmp_path / "a.mimo")
        assert os.listdir(tmp_path) == []

    wrong("announced as int32", weights={"bias": Deferred("int32", (64,), lambda: bias)})
    wrong(r"made as float32\[64\]", weights={"bias": Deferred("float32", (8, 8), lambda: bias)})
    wrong("complex64 cannot be stored", weights={"bias": np.zeros(3, np.complex64)})
    wrong("'~pad.1' of float32", weights={"~pad.1": bias})
    wrong("does not exist", weights={})
    manifest = small().manifest
    wrong("at most 1048576", manifest=msgspec.structs.replace(manifest, name="x" * (1 << 20)))

    def fails() -> np.ndarray:
        raise RuntimeError("out of ideas")

    with pytest.raises(RuntimeError, match="out of ideas"):
        broken = small()
        broken.weights = {"bias": bias, "b": Deferred("int8", (1,), fails)}
        broken.save(tmp_path / "a.mimo")
    assert os.listdir(tmp_path) == []


class Nth:
    """Counts system calls and makes one of them fail."""

    NAMES = ("open", "write", "pwrite", "fsync", "replace")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail: int, error: int | None) -> None:
        self.count = itertools.count(1)
        self.failed = ""
        for name in self.NAMES:
            monkeypatch.setattr(os, name, self.wrap(name, getattr(os, name), fail, error))

    def wrap(self, name: str, real: Callable[..., Any], fail: int, error: int | None) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(self.count) != fail:
                return real(*args, **kwargs)
            self.failed = name
            if error is not None:
                raise OSError(error, os.strerror(error))
            if name in ("write", "pwrite"):  # a short write is no error
                return real(args[0], args[1][: len(args[1]) // 2 or 1], *args[2:])
            return real(*args, **kwargs)

        return call


@pytest.mark.fault
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EACCES, None])
@pytest.mark.parametrize("existing", [True, False])
def test_each_failing_system_call_leaves_the_old_or_the_new_file(
    error: int | None, existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = small().save(tmp_path / "new.mimo").read_bytes()
    (tmp_path / "new.mimo").unlink()
    target, old = tmp_path / "a.mimo", b"what was here before" if existing else None
    seen = set()
    for n in itertools.count(1):
        if old is not None:
            target.write_bytes(old)
        else:
            target.unlink(missing_ok=True)
        with monkeypatch.context() as patch:
            calls = Nth(patch, n, error)
            try:
                small().save(target)
                failed = False
            except MimoError as caught:
                failed = True
                assert error is not None
                assert errno.errorcode[error] in str(caught)
                assert str(target) in str(caught)
        found = target.read_bytes() if target.exists() else None
        assert found == new if not failed else found in (old, new)
        assert os.listdir(tmp_path) in ([], ["a.mimo"])
        if not calls.failed:
            break
        seen.add(calls.failed)
        assert failed == (error is not None)
    assert seen == set(Nth.NAMES)


@pytest.mark.fault
def test_a_full_disk_is_named(tmp_path: Path) -> None:
    code = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_artifact as t
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    t.small().save({str(tmp_path / "a.mimo")!r})
except t.MimoError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "File too large (EFBIG)" in done.stdout
    assert os.listdir(tmp_path) == []


@pytest.mark.fault
def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_artifact as t
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
t.small().save({str(tmp_path / "a[1].mimo")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    left = os.listdir(tmp_path)
    assert len(left) == 1
    assert left[0].startswith(".a[1].mimo.tmp-")
    mine = tmp_path / ".b.mimo.tmp-1-0"
    mine.touch()
    small().save(tmp_path / "a[1].mimo")
    assert sorted(os.listdir(tmp_path)) == [mine.name, "a[1].mimo"]


def test_two_writers_at_a_time_do_not_disturb_each_other(tmp_path: Path) -> None:
    target = tmp_path / "a.mimo"

    def outer() -> np.ndarray:  # while this one writes, another comes and goes
        small().save(target)
        assert open_artifact(target).manifest.name == "plain"
        return np.zeros(1, np.int8)

    artifact = small()
    artifact.weights = {**artifact.weights, "late": Deferred("int8", (1,), outer)}
    artifact.save(target)
    assert os.listdir(tmp_path) == ["a.mimo"]
    assert "late" in Artifact.load(target).weights


def test_folders_and_missing_folders_are_named(tmp_path: Path) -> None:
    for target, match in ((tmp_path, "EISDIR"), (tmp_path / "no" / "a.mimo", "ENOENT")):
        with pytest.raises(MimoError, match=match) as caught:
            small().save(target)
        assert caught.value.exit_code == 1
    assert os.listdir(tmp_path) == []


def test_a_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mimo")
    with pytest.raises(MimoError, match="not a regular file"):
        small().save(tmp_path / "pipe.mimo")
    assert (tmp_path / "pipe.mimo").is_fifo()


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = small().save(tmp_path / "a.mimo")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_an_artifact_runs_from_memory_as_from_its_file(tmp_path: Path) -> None:
    artifact = runtime_samples.plain()
    x = np.linspace(-1, 1, 64, dtype=np.float32)
    from_file = load(artifact.save(tmp_path / "a.mimo"))
    assert np.array_equal(artifact.module()(x), from_file(x))
    decoder = runtime_samples.decoder()
    assert list(decoder.module().generate_ids("abc", 5)) == list(
        load(decoder.save(tmp_path / "d.mimo")).generate_ids("abc", 5)
    )
    artifact.weights = {}
    with pytest.raises(ArtifactError, match="'bias', which does not exist"):
        artifact.module()


@pytest.mark.slow
def test_sizes_beyond_four_gigabytes(tmp_path: Path) -> None:
    """Zip64 fields: written, read back, and understood by another zip reader."""
    size = (4 << 30) + 5
    artifact = small()
    artifact.weights = {
        "huge": Deferred("uint8", (size,), lambda: np.zeros(size, np.uint8)),
        "bias": np.arange(64, dtype=np.float32),
    }
    path = artifact.save(tmp_path / "huge.mimo")
    found = Artifact.load(path)
    assert np.array_equal(found.weights["bias"].make(), artifact.weights["bias"])
    with zipfile.ZipFile(path) as zip_:
        assert zip_.infolist()[-1].file_size > size
        assert zip_.read("programs.json") == msgspec.json.encode(artifact.programs)
    with path.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        byte = file.read(1)
        file.seek(-100, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ArtifactError):
        open_artifact(path)
    path.unlink()


LOOK = """
import sys
from mimo_compile.artifact import Artifact

def executable():
    with open("/proc/self/maps") as maps:
        return {line.split()[-1] for line in maps if "x" in line.split()[1]}

def look():
    return sum(value.make().nbytes for value in Artifact.load(sys.argv[1]).weights.values())

look()  # imports what is imported on first use
before, events = executable(), []
bad = ("socket.", "subprocess.", "os.exec", "os.posix_spawn", "os.fork", "os.system",
       "ctypes.dlopen", "pickle.", "marshal.load", "exec")
sys.addaudithook(lambda name, args: events.append((name, args)))
total = look()
seen = [e for e in events if e[0].startswith(bad)]
opened = {str(args[0]) for name, args in events if name == "open"}
assert total and not seen, seen
assert executable() == before
assert sys.argv[1] in opened
assert all(mode == "r" or not (flags & 3) for n, (_, mode, flags) in
           [e for e in events if e[0] == "open"])
print("harmless")
"""


def test_looking_at_an_artifact_executes_maps_and_writes_nothing(tmp_path: Path) -> None:
    path = runtime_samples.plain().save(tmp_path / "a.mimo")
    done = subprocess.run(
        [sys.executable, "-c", LOOK, path], capture_output=True, text=True, check=False
    )
    assert done.stdout == "harmless\n", done.stderr
