"""What tests of every room share: object code to run, and skipping what needs a GPU."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    # before numpy, torch or TVM: threads that wait for each other spin, on cores that other tests need
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // workers)))
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "0")

from mimo_compile import _tvm

# before anything loads TVM or torch: the default pool has half of the CPUs and pins them
_tvm.configure()

# no test asserts how long anything takes; one commit has one verdict in CI, elsewhere examples are new
hypothesis.settings.register_profile("timeless", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("timeless")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no NVIDIA device."""
    if Path("/dev/nvidiactl").exists():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session")
def scale_object(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Object code of a parallel kernel `scale(a, b)`: b = 2 * a on `[n, 16]` f32."""
    tvm = _tvm.compiler()
    from tvm.script import tirx as T

    @T.prim_func(s_tir=True)
    def scale(a: T.handle, b: T.handle):
        n = T.int64()
        A = T.match_buffer(a, (n, 16), "float32")
        B = T.match_buffer(b, (n, 16), "float32")
        for i in T.parallel(n):
            for j in T.vectorized(16):
                with T.sblock("B"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    B[vi, vj] = A[vi, vj] * T.float32(2)

    target = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v2"})
    path = tmp_path_factory.mktemp("objects") / "scale.o"
    tvm.compile(scale, target=target).mod.write_to_file(str(path))
    return path


class Site:
    """A folder on the path into which distributions can be installed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def install(self, entries: str, *, name: str = "addition", **modules: str) -> None:
        """Lay out what pip writes for a distribution with these entry points and modules."""
        for module, text in modules.items():
            (self.path / f"{module}.py").write_text(text)
        facts = self.path / f"{name}-1.0.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (facts / "entry_points.txt").write_text(entries)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A new folder on the path; modules that are imported from it are forgotten afterwards."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    yield Site(folder)
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(folder)):
            del sys.modules[name]
