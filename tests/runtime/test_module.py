"""Calling loaded artifacts: inputs, outputs, states, threads, errors."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest
import runtime_samples

from mimo_compile.errors import ArtifactError, MimoError, UsageError
from mimo_compile.runtime import Module, load
from mimo_compile.runtime.memory import Zeroed
from mimo_compile.runtime.program import Buffer, Call, Entry, Programs


@pytest.fixture
def module(plain_file: Path) -> Module:
    return load(plain_file)


X = np.linspace(-4, 4, 64, dtype=np.float32)
BIAS = np.arange(64, dtype=np.float32)


def test_main_computes_on_a_reused_arena(module: Module) -> None:
    y = module(X)
    assert y.shape == (8, 8)
    assert np.array_equal(y.ravel(), 2 * (2 * X + BIAS))
    kept = y.copy()
    y[:] = 0  # the caller's own memory
    assert np.array_equal(module(X), kept)
    assert str(module.entries["main"]) == "(x float32[64]) -> (y float32[8, 8])"
    assert repr(module) == "<Module plain: main, accumulate>"


def test_states_live_across_calls_until_reset(module: Module) -> None:
    for n in (1, 2, 3):
        total, x = module.call("accumulate", X)
        assert np.array_equal(total, n * X)
        assert np.array_equal(x, X)
    module.reset()
    assert np.array_equal(module.call("accumulate", X)[0], X)
    assert np.array_equal(total, 3 * X)  # what was given out before stays


def test_two_modules_of_one_file_have_states_of_their_own(plain_file: Path) -> None:
    first, second = load(plain_file), load(plain_file)
    first.call("accumulate", X)
    assert np.array_equal(second.call("accumulate", X)[0], X)


def test_inputs_of_any_kind_are_taken(module: Module) -> None:
    expected = 2 * (2 * X + BIAS)
    spread = np.zeros(128, np.float32)[::2]
    spread[:] = X
    off = np.zeros(65, np.float32)[1:]  # not on a 64-byte boundary
    off[:] = X
    frozen = X.copy()
    frozen.flags.writeable = False
    for x in (X, spread, off, frozen, X.tolist()):
        assert np.array_equal(module(x).ravel(), expected)


@pytest.mark.compile
def test_tensors_of_torch_are_taken(module: Module) -> None:
    torch = pytest.importorskip("torch")
    expected = 2 * (2 * X + BIAS)
    assert np.array_equal(module(torch.from_numpy(X.copy())).ravel(), expected)
    with pytest.raises(UsageError, match=r"input x of entry main.*detach"):
        module(torch.zeros(64, requires_grad=True))
    with pytest.raises(UsageError, match=r"must be float32\[64\], this is float64\[64\]"):
        module(torch.zeros(64, dtype=torch.float64))
    with pytest.raises(UsageError, match=r"cannot be taken as float32\[64\]"):
        module(torch.zeros(64, device="meta"))


def entry(dtype: str, kernels: bool = False) -> Entry:
    buffer = Buffer("arena", (4, 4), dtype, 0)
    calls = (Call("double", (0, 0), "layers.3.mlp.down"),) if kernels else ()
    return Entry(64, (buffer,), calls, {"x": 0}, {"y": 0})


def with_entry(one: Entry) -> Module:
    artifact = runtime_samples.plain()
    artifact.programs = Programs({"main": one})
    artifact.manifest = msgspec.structs.replace(artifact.manifest, entries=("main",))
    return artifact.module()


@pytest.mark.compile
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "bool", "int8", "float8_e4m3fn"])
def test_small_element_types_pass_through(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    module = with_entry(entry(dtype))
    kind = module.bind("main").inputs["x"].dtype
    ones = np.eye(4).astype(kind)
    assert np.array_equal(module(ones), ones)
    assert module(ones).dtype == kind
    tensor = torch.eye(4).to(getattr(torch, dtype))
    assert np.array_equal(module(tensor), ones)
    with pytest.raises(UsageError, match=dtype):
        module(torch.eye(4, dtype=torch.int64))


def test_wrong_inputs_are_named(module: Module) -> None:
    for inputs, match in (
        ((), r"takes 1 inputs, 0 are given: main\(x float32\[64\]\) -> "),
        ((X, X), "takes 1 inputs, 2 are given"),
        ((X[:63],), r"input x of entry main must be float32\[64\], this is float32\[63\]"),
        ((X.astype(np.float64),), r"must be float32\[64\], this is float64\[64\]"),
        (([1, [2]],), r"cannot be taken as float32\[64\]"),
        (("text",), r"cannot be taken as float32\[64\]"),
    ):
        with pytest.raises(UsageError, match=match):
            module(*inputs)
    with pytest.raises(UsageError, match="has no entry 'train'; it has main, accumulate"):
        module.call("train", X)


def test_a_failing_kernel_names_its_call() -> None:
    module = with_entry(entry("float32", kernels=True))  # double wants [64]
    with pytest.raises(MimoError) as caught:
        module(np.zeros((4, 4), np.float32))
    text = str(caught.value)
    assert text.startswith("kernel double failed: Mismatched")
    assert "layers.3.mlp.down, call 0 of entry main of plain" in text
    assert "\n" not in text


def test_a_missing_kernel_is_named() -> None:
    broken = msgspec.structs.replace(entry("float32"), calls=(Call("triple", (0, 0)),))
    with pytest.raises(ArtifactError, match="kernel triple is missing"):
        with_entry(broken)(np.zeros((4, 4), np.float32))


def test_a_module_without_main_says_what_it_has(decoder_file: Path) -> None:
    with pytest.raises(UsageError, match=r"has no entry main; it has step_1.*Use generate"):
        load(decoder_file)(X)


def test_threads_are_bounded(plain_file: Path) -> None:
    assert load(plain_file, threads=1).threads == 1
    assert np.array_equal(load(plain_file, threads=1)(X), load(plain_file)(X))
    for threads in (0, 1000):
        with pytest.raises(UsageError, match=f"{threads} threads asked for"):
            load(plain_file, threads=threads)
    with pytest.raises(UsageError, match="verify='none'"):
        load(plain_file, verify="none")  # type: ignore[arg-type]


def test_calls_from_several_threads_wait_for_each_other(module: Module) -> None:
    wrong: list[int] = []

    def work(n: int) -> None:
        for _ in range(200):
            if not np.array_equal(module(X + n).ravel(), 2 * (2 * (X + n) + BIAS)):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_profile_gives_each_call_and_repeats_the_same_work(module: Module) -> None:
    times = module.profile("main", X, repeat=3)
    assert [(t.label, t.kernel) for t in times] == [
        ("first", "double"), ("bias", "add"), ("second", "double"),
    ]  # fmt: skip
    assert all(t.seconds > 0 for t in times)
    out = module.bind("main").outputs["y"].ravel()
    assert np.array_equal(out, 2 * (2 * X + BIAS))  # not computed from results of the run before


def test_zeroed_memory_costs_nothing_until_touched_and_clears() -> None:
    memory = Zeroed(1 << 36)  # more than most machines have
    assert memory.bytes.ctypes.data % 64 == 0
    memory.bytes[1 << 35] = 7
    memory.clear()
    assert memory.bytes[1 << 35] == 0
    assert Zeroed(0).bytes.size == 0


def test_replacing_the_file_does_not_disturb_a_loaded_module(tmp_path: Path) -> None:
    path = runtime_samples.plain().save(tmp_path / "a.mimo")
    module = load(path)
    other = runtime_samples.plain()
    other.weights = {**other.weights, "bias": np.zeros(64, np.float32)}
    other.save(path)
    assert np.array_equal(module(X).ravel(), 2 * (2 * X + BIAS))
    assert np.array_equal(load(path)(X).ravel(), 4 * X)


CHILD = """
import sys, time
sys.modules["torch"] = None
before = time.perf_counter()
import numpy as np
import mimo_compile
from mimo_compile import _tvm
module = mimo_compile.load(sys.argv[1])
x = np.arange(64, dtype=np.float32)
assert (module(x).ravel() == 2 * (2 * x + x)).all()
decoder = mimo_compile.load(sys.argv[2])
print("".join(decoder.generate("def ", 4)).encode())
bad = {"tvm", "torch", "xgboost", "scipy", "networkx"} & set(sys.modules)
print(sorted(name for name in bad if sys.modules[name] is not None))
"""


def test_a_process_without_torch_compiler_and_path_runs_artifacts(
    plain_file: Path, decoder_file: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, plain_file, decoder_file],
        env={k: v for k, v in os.environ.items() if not k.startswith("TVM_")} | {"PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    text, imported = done.stdout.splitlines()
    assert imported == "[]"
    assert text == str("".join(load(decoder_file).generate("def ", 4)).encode())


RACE = """
import sys, threading
from mimo_compile import load
import numpy as np
x = np.ones(64, np.float32)
def work():
    for _ in range(20):
        assert load(sys.argv[1]).call("accumulate", x)[0][0] == 1
threads = [threading.Thread(target=work) for _ in range(8)]
for t in threads: t.start()
for t in threads: t.join()
print("fine")
"""


@pytest.mark.fault
def test_loading_from_many_threads(plain_file: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-W", "error", "-c", RACE, plain_file],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout == "fine\n", done.stderr


@pytest.mark.slow
def test_a_million_calls_do_not_grow(module: Module) -> None:
    def rss() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    for _ in range(10_000):
        module(X)
    before = rss()
    for _ in range(500_000):
        module(X)
    assert rss() - before < before // 100 + 64
