"""Artifacts for GPUs through the driver's library; one in its place has the host's memory for a device's."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import os
import shutil
import subprocess
import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest
from gpu_samples import COLUMNS, PAGE, PAGES, decoder_gpu, inputs, kernels, made, plain_gpu
from runtime_samples import BATCH, N, reference_logits

from mimo_compile import _cuda
from mimo_compile.artifact import Artifact
from mimo_compile.errors import (
    ArtifactError,
    DeviceLost,
    EnvironmentMismatch,
    MimoError,
    UsageError,
)
from mimo_compile.runtime import gpu_device, load
from mimo_compile.runtime.batch import append_each
from mimo_compile.runtime.program import Buffer, Call, Programs, State
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

    def refuse(self, what: int) -> None:
        """Of a graph the begin (1), the end (2), to make it (3) or to upload it (4); or pinned memory (5)."""
        self.library.fake_refuse(what)

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
    found.refuse(0)
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
    module = load(files["plain"])
    fake.told()
    timings = module.profile("main", inputs(), repeat=3)
    told = fake.told()
    assert (
        told.count("graph") == 3 and told.count("replay") == 9
    )  # no time to queue launches one by one
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


@pytest.mark.parametrize("what", [1, 2, 3, 4], ids=["begin", "end", "make", "upload"])
def test_a_graph_that_cannot_be_made_costs_no_run(fake, files, what) -> None:
    module, x = load(files["plain"]), inputs()
    fake.refuse(what)
    with pytest.warns(
        RuntimeWarning, match=r"entry accumulate of .*plain.mimo still runs kernel by"
    ):
        found, _ = module.call("accumulate", x)
    assert np.array_equal(found, x)
    fake.refuse(0)
    for turn in (2, 3):
        assert np.array_equal(module.call("accumulate", x)[0], turn * x)
    assert "replay" in fake.told()
    del module
    gc.collect()
    assert fake.held == 0


def test_recording_bears_what_others_do(fake) -> None:
    """Another device's memory goes, and the default stream is used, while one records."""
    on = _cuda.driver()
    others = [gpu_device.CudaDevice(on), gpu_device.CudaDevice(on)]
    for other in others:
        other.enter()
    del other
    second = others[0].allocate(64, "a test")
    others[1].allocate(64, "a test")
    device = gpu_device.CudaDevice(on)
    device.enter()
    place, data, back = device.allocate(64, "a test"), device.host(64), device.host(64)
    data[:] = 7
    back[:] = 0
    before = fake.held

    def work() -> None:
        device.write(place, data)
        del others[1]
        gc.collect()
        on("cuMemcpyHtoD_v2", second, data.ctypes.data, 64)
        device.read(place, back)

    replay = device.record(work)
    assert fake.held == before - 2 + 1  # memory and stream of the other one; the graph
    assert not back.any()
    replay()
    device.wait()
    assert (back == 7).all()


def test_memory_goes_with_the_module(fake, files) -> None:
    gc.disable()
    try:
        for name in ("plain", "pages"):
            module = load(files[name])
            if name == "plain":
                module(inputs())
            else:
                module.session(slot=0).append([1, 2, 3])
            del module
            assert fake.held == 0
        for power in range(8, 24):  # enough for one, not for two
            fake.machine(room=1 << power)
            try:
                one = [load(files["plain"])]
                break
            except MimoError:
                continue
        one.append(one)
        del one
        assert fake.held
        load(files["plain"])(inputs())  # the collector is asked before memory is said to be short
    finally:
        gc.enable()


def test_inputs_live_as_long_as_somebody_looks(fake, files) -> None:
    bound = load(files["plain"]).bind("main")
    kept = [*bound.inputs.values(), *bound.outputs.values()]
    del bound
    gc.collect()
    assert fake.held == 2
    thread = threading.Thread(target=kept.clear)
    thread.start()
    thread.join()
    assert fake.held == 0
    module = load(files["plain"])
    fake.refuse(5)
    with pytest.raises(MimoError, match=r"MiB of this machine's memory are not to be had.*--batch"):
        module(inputs())


def test_pages_and_states_are_copied_whole(fake, tmp_path) -> None:
    """Of caches with several heads, of descriptors, and of what each sequence keeps by itself."""
    artifact = decoder_gpu(BATCH, pages=True)
    manifest = artifact.manifest
    more = {"two": State((2, PAGES * PAGE, 4), "float32"), "own": State((1, 64), "int32"),
            "described": State((4 * PAGES, 2, 2, 8), "bfloat16")}  # fmt: skip
    pool = msgspec.structs.replace(manifest.decoder.pool, states=("cache", "described", "two"))
    decoder = msgspec.structs.replace(manifest.decoder, pool=pool)
    manifest = msgspec.structs.replace(
        manifest, decoder=decoder, states={**manifest.states, **more}
    )
    module = load(dataclasses.replace(artifact, manifest=manifest).save(tmp_path / "more.mimo"))
    machine, rng = module._machine, np.random.default_rng(0)
    wanted = {}
    for name in more:
        at, size = machine._states[name]
        wanted[name] = rng.integers(0, 256, size, np.uint8)
        machine.device.write(at, wanted[name])
    machine.device.wait()
    module.pool.take([(0, 0, PAGE + 4)])
    module.pool.share(0, 2, PAGE + 4)
    source = module.pool.held(0)[1]
    errors = []

    def take() -> None:  # in a thread that has not used the GPU
        try:
            module.pool.take([(2, PAGE + 4, PAGE + 5)])
        except MimoError as error:
            errors.append(error)

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    page = module.pool.held(2)[1]
    assert not errors and page != source
    wanted["two"].reshape(2, PAGES, -1)[:, page] = wanted["two"].reshape(2, PAGES, -1)[:, source]
    wanted["described"].reshape(PAGES, -1)[page] = wanted["described"].reshape(PAGES, -1)[source]
    wanted["own"].reshape(BATCH, -1)[2] = wanted["own"].reshape(BATCH, -1)[0]
    for name, expected in wanted.items():
        found = np.zeros_like(expected)
        machine.device.read(machine._states[name][0], found)
        machine.device.wait()
        assert np.array_equal(found, expected), name
    row = machine.table(Buffer("state", (1, COLUMNS - 1), "int32", 4, "table"), 2)
    assert row.view(np.int32)[0] == page
    assert machine.table(Buffer("weight", (1, COLUMNS), "int32", 0, "table"), 0) is None
    for entries in (PAGES, 16 * PAGES, 3 * PAGES, 32 * PAGES, PAGES + 1):
        states = manifest.states | {"described": State((entries, 2, 2, 8), "bfloat16")}
        bad = dataclasses.replace(
            artifact, manifest=msgspec.structs.replace(manifest, states=states)
        )
        if PAGE % (entries / PAGES):
            with pytest.raises(ArtifactError, match="pages of 16 in described"):
                bad.module()
        else:
            bad.module()


def test_sequences_fork_in_other_threads(fake, files) -> None:
    session = load(files["pages"]).session(slot=0)
    session.append(list(range(100, 120)))
    forked = []
    thread = threading.Thread(target=lambda: forked.append(session.fork(2)))
    thread.start()
    thread.join()
    (logits,) = forked[0].logits(forked[0].append([4]))
    assert np.array_equal(logits[0], reference_logits([*range(100, 120), 4])[-1])


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


def test_a_lost_gpu_stays_lost(fake, files, tmp_path) -> None:
    module = load(with_kernel("sticky").save(tmp_path / "sticky.mimo"))
    for work in (lambda: module(inputs()), module.reset, lambda: load(files["plain"])):
        with pytest.raises(DeviceLost, match=r"\(700\).*start another one"):
            work()


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


@pytest.mark.parametrize("release", ["x", "13", "", None])
def test_a_release_of_cuda_must_be_one(fake, tmp_path, release) -> None:
    artifact = plain_gpu()
    versions = {k: v for k, v in artifact.manifest.versions.items() if k != "cuda"}
    versions |= {} if release is None else {"cuda": release}
    manifest = msgspec.structs.replace(artifact.manifest, versions=versions)
    path = dataclasses.replace(artifact, manifest=manifest).save(tmp_path / "bad.mimo")
    with pytest.raises(ArtifactError, match=f"made by CUDA '{release or ''}', which is no release"):
        load(path)


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
    for work in (lambda: module(inputs()), lambda: load(files["plain"])):
        child = os.fork()
        if child == 0:
            try:
                work()
            except MimoError as error:
                os._exit(7 * ("was forked" in str(error) and "by spawn" in str(error)))
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
