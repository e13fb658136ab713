"""The way to TVM: light and full path, torch before or after, threads, aligned memory."""

import gc
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimo_compile import _tvm
from mimo_compile.errors import ArtifactError, EnvironmentMismatch, UsageError


def in_new_process(code: str, *args: object, **environment: str) -> str:
    """Run code in a fresh interpreter that finds no program on PATH; returns what it printed."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("TVM_", "OMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env={**env, "PATH": "", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


LIGHT = """
import sys
from mimo_compile import _tvm
data = open(sys.argv[1], "rb").read()
module = _tvm.load_object(data)
_tvm.set_threads(2)
a, b = _tvm.empty_aligned((64, 16)), _tvm.empty_aligned((64, 16))
a[:] = 3
module["scale"](_tvm.from_numpy(a), _tvm.from_numpy(b))
assert (b == 6).all()
"""


def test_light_path_runs_a_parallel_kernel_without_tvm_or_torch(scale_object: Path) -> None:
    code = LIGHT + "print(sorted({'tvm', 'torch', 'xgboost'} & set(sys.modules)))"
    assert in_new_process(code, scale_object, TVM_NUM_THREADS="2").strip() == "[]"


@pytest.mark.compile
def test_torch_and_the_full_path_may_come_after_the_light_one(scale_object: Path) -> None:
    code = f"""{LIGHT}
import torch
x, y = torch.randn(8, 16), torch.zeros(8, 16)
module["scale"](x, y)
assert torch.equal(y, 2 * x)
assert torch.from_dlpack(_tvm.from_numpy(b)).data_ptr() == b.ctypes.data
tvm = _tvm.compiler()
assert _tvm.runtime() is sys.modules["tvm_ffi"] and tvm is sys.modules["tvm"]
from tvm.relax.frontend.torch import from_exported_program
t = tvm.runtime.tensor(a)
module["scale"](t, _tvm.from_numpy(b))
y.zero_()
module["scale"](x, y)
assert torch.equal(torch.from_dlpack(t), torch.full((64, 16), 3.0)) and torch.equal(y, 2 * x)
"""
    in_new_process(code, scale_object, TVM_NUM_THREADS="2")


@pytest.mark.compile
def test_torch_may_come_first(scale_object: Path) -> None:
    code = f"""
import torch
{LIGHT}
_tvm.compiler()
assert sys.modules["torch"] is torch
x, y = torch.randn(8, 16), torch.zeros(8, 16)
module["scale"](x, y)
assert torch.equal(y, 2 * x)
"""
    in_new_process(code, scale_object, TVM_NUM_THREADS="2")


def test_full_path_leaves_torch_and_the_intrinsics_alone() -> None:
    code = """
import sys, time
from mimo_compile import _tvm
start = time.process_time()
tvm = _tvm.compiler()
import tvm.s_tir.tensor_intrin
from tvm.s_tir import meta_schedule
assert time.process_time() - start < 15, "the intrinsics were parsed after all"
assert not {"torch", "tvm.s_tir.tensor_intrin.cuda"} & set(sys.modules)
import tvm.s_tir.tensor_intrin.dot_product_common as real
assert real.__file__.endswith("dot_product_common.py")
"""
    in_new_process(code)


def test_compiler_refuses_the_runtime_library_alone() -> None:
    code = """
from mimo_compile import _tvm
from mimo_compile.errors import EnvironmentMismatch
try:
    _tvm.compiler()
except EnvironmentMismatch as error:
    print(error)
"""
    assert "Unset TVM_USE_RUNTIME_LIB" in in_new_process(code, TVM_USE_RUNTIME_LIB="1")


@pytest.mark.fault
def test_fork_is_safe_while_no_pool_has_started(scale_object: Path) -> None:
    code = """
import os, sys
from mimo_compile import _tvm
module = _tvm.load_object(open(sys.argv[1], "rb").read())
a, b = _tvm.empty_aligned((64, 16)), _tvm.empty_aligned((64, 16))
a[:] = 3
child = os.fork()
if child == 0:
    import signal
    signal.alarm(20)
    _tvm.set_threads(2)
    module["scale"](a, b)
    os._exit(0 if (b == 6).all() else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    in_new_process(code, scale_object, TVM_NUM_THREADS="2")


def test_code_lives_as_long_as_its_functions(scale_object: Path) -> None:
    function = _tvm.load_object(scale_object.read_bytes())["scale"]
    gc.collect()
    a, b = _tvm.empty_aligned((4, 16)), _tvm.empty_aligned((4, 16))
    a[:] = 1
    function(a, b)
    assert (b == 2).all()


@pytest.mark.parametrize("keep", [0, 3, 64, 1000])
def test_damaged_object_code_is_refused(scale_object: Path, keep: int) -> None:
    with pytest.raises(ArtifactError) as caught:
        _tvm.load_object(scale_object.read_bytes()[:keep])
    assert caught.value.exit_code == 3 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tvm", "ffi", "fits"),
    [
        ("0.27.0.post1", "0.1.14.post0", True),
        ("0.27.0.post1", "0.1.14.post1", True),
        ("0.27.0.post1", "0.1.14.post12+local", True),
        ("0.27.0.post1", "0.1.14", False),
        ("0.27.0.post1", "0.1.15.post2", False),
        ("0.27.0.post1", "0.1.15rc1", False),
        ("0.27.0.post1", None, False),
        ("0.26.0", "0.1.14.post1", False),
        (None, "0.1.14.post1", False),
    ],
)
def test_only_the_right_pair_passes(
    monkeypatch: pytest.MonkeyPatch, tvm: str | None, ffi: str | None, fits: bool
) -> None:
    monkeypatch.setattr(_tvm, "_version", {"apache-tvm": tvm, "apache-tvm-ffi": ffi}.get)
    if fits:
        _tvm.check_versions()
        return
    with pytest.raises(EnvironmentMismatch, match=r"pip install 'apache-tvm==0\.27\.0\.post1'"):
        _tvm.check_versions()


def test_this_environment_has_the_right_pair() -> None:
    _tvm.check_versions()
    assert _tvm._version("no-such-distribution-here") is None


def test_user_settings_of_threads_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVM_NUM_THREADS", "7")
    monkeypatch.delenv("TVM_BIND_THREADS", raising=False)
    _tvm.configure(3)
    assert (os.environ["TVM_NUM_THREADS"], os.environ["TVM_BIND_THREADS"]) == ("7", "0")
    assert _tvm.max_threads() == 7
    monkeypatch.delenv("TVM_NUM_THREADS")
    _tvm.configure()
    assert _tvm.max_threads() == len(os.sched_getaffinity(0))


@pytest.mark.parametrize("count", [0, -1, 10**6])
def test_impossible_thread_counts_are_refused(count: int) -> None:
    with pytest.raises(UsageError, match="threads asked for"):
        _tvm.set_threads(count)


@pytest.mark.parametrize("text", ["", "many", "0", "-2"])
def test_malformed_thread_limit_is_named(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("TVM_NUM_THREADS", text)
    with pytest.raises(UsageError, match="TVM_NUM_THREADS"):
        _tvm.max_threads()


def test_torch_is_hidden_from_the_importing_thread_only() -> None:
    blocker = _tvm._TorchBlocker()
    with pytest.raises(ModuleNotFoundError):
        blocker.find_spec("torch")
    assert blocker.find_spec("numpy") is None
    seen: list[Any] = ["not run"]
    other = threading.Thread(target=lambda: seen.append(blocker.find_spec("torch")))
    other.start()
    other.join()
    assert seen[-1] is None
    with _tvm._without_torch():
        pass
    assert not any(isinstance(finder, _tvm._TorchBlocker) for finder in sys.meta_path)


DTYPES = ["float32", "float16", "int8", "int64", "bool", "bfloat16", "float8_e4m3fn"]


@given(st.lists(st.integers(0, 9), max_size=4), st.sampled_from(DTYPES), st.booleans())
def test_empty_aligned_is_aligned_and_exports(
    shape: list[int], dtype: str, writeable: bool
) -> None:
    array = _tvm.empty_aligned(shape, dtype)
    assert array.shape == tuple(shape) and array.dtype.name == dtype
    assert array.flags.c_contiguous and array.flags.writeable
    assert array.__array_interface__["data"][0] % _tvm.ALIGNMENT == 0
    array.flags.writeable = writeable
    tensor = _tvm.from_numpy(array)
    assert tuple(tensor.shape) == tuple(shape) and str(tensor.dtype) == dtype


def test_as_aligned_copies_only_what_needs_it() -> None:
    array = _tvm.empty_aligned((8, 16))
    array[:] = np.arange(128).reshape(8, 16)
    assert _tvm.as_aligned(array) is array
    for other in (array[:, 1:], array.T, array[1:].ravel()[3:]):
        copy = _tvm.as_aligned(other)
        assert copy is not other and np.array_equal(copy, other)
        _tvm.from_numpy(copy)


def test_from_numpy_shares_memory_and_keeps_it_alive() -> None:
    array = _tvm.empty_aligned(16, "bfloat16")
    array[:] = 1
    array.flags.writeable = False
    memory = weakref.ref(array.base if isinstance(array.base, np.ndarray) else array)
    tensor = _tvm.from_numpy(array)
    address = array.ctypes.data
    del array
    gc.collect()
    assert memory() is not None
    assert tensor.data_ptr() == address
    del tensor
    gc.collect()
    assert memory() is None


def test_from_numpy_refuses_what_kernels_cannot_use() -> None:
    array = _tvm.empty_aligned((8, 16))
    for bad in (array.ravel()[1:], array.T, array[:, :4]):
        with pytest.raises(ValueError, match="empty_aligned"):
            _tvm.from_numpy(bad)
    with pytest.raises(TypeError, match="int4"):
        _tvm.from_numpy(_tvm.empty_aligned(4, "int4"))
