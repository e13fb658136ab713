"""Artifacts for GPUs through the driver's library; one in its place has the host's memory for a device's."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import os
import shutil
import subprocess
from pathlib import Path

import msgspec
import numpy as np
import pytest
from gpu_samples import decoder_gpu, inputs, kernels, made, plain_gpu
from runtime_samples import BATCH, N, reference_logits

from mimo_compile import _cuda
from mimo_compile.artifact import Artifact
from mimo_compile.errors import DeviceLost, EnvironmentMismatch, MimoError, UsageError
from mimo_compile.runtime import load
from mimo_compile.runtime.batch import append_each
from mimo_compile.runtime.program import Call, Programs
from mimo_compile.runtime.routers import tapped

ROOTS = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")), Path("/usr/local/cuda")]
HEADERS = next((p / "include" for p in ROOTS if (p / "include" / "cuda.h").is_file()), None)
pytestmark = pytest.mark.skipif(
    HEADERS is None or shutil.which("gcc") is None, reason="cuda.h or gcc is not installed"
)


class Fake:
    """The stand-in's own words."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.fake_told.restype = ctypes.c_char_p
        self.library.fake_machine.argtypes = [ctypes.c_int] * 3 + [ctypes.c_longlong]

    def told(self) -> list[str]:
        """What it was asked since it was last asked for it."""
        return self.library.fake_told().decode().split()

    def machine(self, capability=90, version=13000, devices=1, room=1 << 40) -> None:
        self.library.fake_machine(capability, version, devices, room)

    @property
    def held(self) -> int:
        """Things that were not given back."""
        return int(self.library.fake_held())


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("driver") / "libfake.so"
    source = Path(__file__).parents[1] / "schedules" / "fake_driver.c"
    flags = ["-O1", "-shared", "-fPIC", "-Wall", "-Werror", f"-I{HEADERS}"]
    subprocess.run(["gcc", *flags, source, "-o", path, "-lm"], check=True)
    return path


@pytest.fixture
def fake(library, monkeypatch) -> Fake:
    """The driver of this machine is the stand-in."""
    found = Fake(library)
    if found.held:
        gc.collect()  # modules of other tests
    found.machine()
    found.told()
    monkeypatch.setattr(_cuda, "LIBRARY", str(library))
    _cuda.driver.cache_clear()
    yield found
    _cuda.driver.cache_clear()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Artifacts of all samples."""
    folder = tmp_path_factory.mktemp("gpu")
    samples = {"plain": plain_gpu(), "decoder": decoder_gpu(), "batch": decoder_gpu(BATCH),
               "pages": decoder_gpu(BATCH, pages=True)}  # fmt: skip
    return {name: made.save(folder / f"{name}.mimo") for name, made in samples.items()}


def test_entries_run_and_become_graphs(fake, files) -> None:
    module = load(files["plain"])
    x = inputs()
    expected = 2 * (2 * x + np.arange(N))
    begin = ["in", "twice", "plus", "plus", "twice", "out"]
    for replays in range(3):
        assert np.array_equal(module(x + replays).ravel(), expected + 4 * replays)
        # the bias comes first; then once kernel by kernel, and the graph is made; then the graph alone
        wanted = ["in", *begin, "graph"] if not replays else ["replay", *begin[1:-1]]
        assert fake.told() == wanted
    total = np.zeros(N, np.float32)
    for turn in range(1, 4):
        total += x * turn
        found, same = module.call("accumulate", x * turn)
        assert np.array_equal(found, total) and np.array_equal(same, x * turn)
    module.reset()
    assert np.array_equal(module.call("accumulate", x)[0], x)
    del module, found, same
    gc.collect()
    assert fake.held == 0


def test_without_graphs_each_kernel_is_waited_for(fake, files, monkeypatch) -> None:
    monkeypatch.setenv("MIMO_CUDA_GRAPHS", "0")
    module = load(files["plain"])
    for _ in range(2):
        module(inputs())
    assert fake.told().count("twice") == 4 and "graph" not in fake.told()


def test_times_of_kernels_come_from_events(fake, files) -> None:
    timings = load(files["plain"]).profile("main", inputs(), repeat=3)
    assert [(t.label, t.kernel, t.seconds) for t in timings] == [
        ("first", "double", 0.25e-3), ("bias", "add", 0.25e-3), ("second", "double", 0.25e-3),
    ]  # fmt: skip


def test_texts_and_sessions(fake, files) -> None:
    gpu = load(files["decoder"])
    prompt = list(range(40, 61))
    text = list(gpu.generate_ids(prompt, 12, stop_at_eos=False))
    for count, token in enumerate(text):
        assert token == int(np.argmax(reference_logits([*prompt, *text[:count]])[-1]))
    session = gpu.session()
    session.append(prompt)
    session.rewind(5)
    ids = [*prompt[:5], 7, 8, 9]
    (logits,) = session.logits(session.append(ids[5:]))
    assert np.array_equal(logits[0], reference_logits(ids)[-1])
    logits = reference_logits(prompt[:-1])
    scores = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert np.allclose(gpu.token_logprobs(prompt), scores[np.arange(len(scores)), prompt[1:]])


@pytest.mark.parametrize("name", ["batch", "pages"])
def test_sequences_in_progress_together(fake, files, name) -> None:
    module = load(files[name])
    prompts = [[1, 2, 3], [9, 8], [5] * 20]
    texts: dict[int, list[int]] = {}
    for index, token in module.generate_batch_ids(prompts, 6, stop_at_eos=False):
        texts.setdefault(index, []).append(token)
    for index, prompt in enumerate(prompts):
        for count in range(6):
            logits = reference_logits(prompt + texts[index][:count])[-1]
            assert texts[index][count] == int(np.argmax(logits))


def test_pages_are_shared_and_copied(fake, files) -> None:
    module = load(files["pages"])
    prompt = list(range(100, 120))  # a page, and a part of the next
    first = module.session(slot=0)
    first.append(prompt)
    second = first.fork(2)
    assert module.pool.held(0) == module.pool.held(2) and module.pool.free == 3
    for session, token in ((first, 3), (second, 4)):
        (logits,) = session.logits(session.append([token]))
        assert np.array_equal(logits[0], reference_logits([*prompt, token])[-1])
    assert module.pool.held(0)[0] == module.pool.held(2)[0] and module.pool.free == 2
    rows = append_each(module, [first, second], [11, 12])
    for session, hidden, ids in zip((first, second), rows, ((3, 11), (4, 12)), strict=True):
        (logits,) = session.logits(hidden[None])
        assert np.array_equal(logits[0], reference_logits([*prompt, *ids])[-1])


def test_unsaved_artifacts_run_and_experts_or_threads_are_refused(fake, files) -> None:
    x = inputs()
    assert np.array_equal(plain_gpu().module()(x), load(files["plain"])(x))
    with pytest.raises(UsageError, match="--threads means nothing to cuda:sm_90a"):
        load(files["plain"], threads=2)
    with pytest.raises(UsageError, match="--expert-memory: the artifact is for cuda:sm_90a"):
        load(files["plain"], expert_memory="1GiB")
    with pytest.raises(UsageError, match="--kv-store"):
        load(files["plain"], kv_store="/tmp")
    bound = load(files["plain"]).bind("main")
    for look in (lambda: bound.calls, lambda: bound.array(0)):
        with pytest.raises(UsageError, match="not looked at on a GPU"):
            look()


def with_kernel(symbol: str) -> Artifact:
    """`plain_gpu` whose second call launches another function."""
    add = kernels()["add"].kernel
    launch = dataclasses.replace(add.launches[0], symbol=symbol, operands=())
    code = made(symbol, list(add.args), ())
    code = dataclasses.replace(
        code, kernel=msgspec.structs.replace(code.kernel, launches=(launch,))
    )
    return plain_gpu(add=code)


def test_a_kernel_that_fails_is_named(fake, tmp_path) -> None:
    module = load(with_kernel("wild").save(tmp_path / "wild.mimo"))
    with pytest.raises(DeviceLost) as error:
        module(inputs())
    text = str(error.value)
    assert error.value.exit_code == 6 and "CUDA_ERROR_ILLEGAL_ADDRESS (700)" in text
    assert "kernel add failed" in text and "bias, call 1 of entry main of " in text
    assert "start another one" in text
    module = load(with_kernel("tired").save(tmp_path / "tired.mimo"))
    module(inputs())
    with pytest.raises(DeviceLost, match=r"entry main failed.*MIMO_CUDA_GRAPHS=0"):
        module(inputs())
    with pytest.raises(
        MimoError, match=r"kernel add failed: .*cuModuleGetFunction.*500.*bias, call 1"
    ):
        load(with_kernel("absent").save(tmp_path / "absent.mimo"))(inputs())


def test_memory_that_does_not_suffice_is_told(fake, files) -> None:
    for room, what in (
        (256, "the weights of plain"),
        (1600, "temporary arrays of kernels of plain"),
    ):
        fake.machine(room=room)
        with pytest.raises(
            MimoError, match=f"{what} take 0.00 GiB, and 0.00 of 0.00 GiB of Stand-in"
        ):
            load(files["plain"])
        gc.collect()
        assert fake.held == 0
    fake.machine()


MISFITS = (
    ({"capability": 80}, "has Stand-in, of compute capability 8.0", "capability 9.0 .H100, H200"),
    (
        {"version": 12080},
        "driver of CUDA 12.8; its code was made by CUDA 13.0",
        "driver of CUDA 13",
    ),
    ({"devices": 0}, "finds no GPU", "--target cpu"),
)


@pytest.mark.parametrize(("facts", "what", "remedy"), MISFITS, ids=["arch", "driver", "none"])
def test_machines_that_do_not_fit_are_refused(fake, files, facts, what, remedy) -> None:
    fake.machine(**facts)
    with pytest.raises(EnvironmentMismatch, match=f"is for cuda:sm_90a.*{what}.*{remedy}") as error:
        load(files["plain"])
    assert error.value.exit_code == 3
    assert fake.held == 0


def test_a_machine_without_driver_is_refused(files, monkeypatch) -> None:
    monkeypatch.setattr(_cuda, "LIBRARY", "libcuda-that-is-not-there.so")
    _cuda.driver.cache_clear()
    with pytest.raises(
        EnvironmentMismatch, match="no GPU that can be used: there is no NVIDIA driver"
    ):
        load(files["plain"])
    assert Artifact.load(files["plain"]).manifest.target.kind == "cuda"  # to look at it


def test_a_fork_is_refused(fake, files) -> None:
    module = load(files["plain"])
    module(inputs())
    child = os.fork()
    if child == 0:
        try:
            module(inputs())
        except MimoError as error:
            os._exit(7 * ("was forked" in str(error)))
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_routing_is_not_looked_at(fake, files) -> None:
    """A model without experts has no routers, so there is nothing to refuse."""
    with tapped(load(files["decoder"]), [0], lambda router: None) as routers:
        assert routers == ()


def test_calls_must_fit_their_kernels(files) -> None:
    artifact = Artifact.load(files["plain"])
    entry = artifact.programs.entries["main"]
    for call, text in (
        (Call("add", (0, 1)), "kernel add takes"),
        (Call("sub", (0, 1, 2)), "missing"),
    ):
        wrong = msgspec.structs.replace(entry, calls=(call, *entry.calls[1:]))
        bad = dataclasses.replace(
            artifact, programs=Programs({**artifact.programs.entries, "main": wrong})
        )
        with pytest.raises(MimoError, match=f"{text}.*call 0 of entry main"):
            bad.module()
