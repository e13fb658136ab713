"""On a real Ray cluster of this machine: a whole search, workers killed in the middle, nodes that join."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mimo_compile.errors import MimoError, UsageError
from mimo_compile.ir.hardware import local_cpu
from mimo_compile.ir.ops import parse_workload
from mimo_compile.search.database import Database
from mimo_compile.search.farm.measurer import FarmMeasurer
from mimo_compile.search.farm.roles import LABEL
from mimo_compile.search.farm.tuning import Membership, open_farm
from mimo_compile.search.farm_runs import load
from mimo_compile.search.measure import Limits, Timing
from mimo_compile.search.records import Verdict
from mimo_compile.search.space import JointSpace

pytest.importorskip("ray", reason="needs the [ray] extra")
pytestmark = [
    pytest.mark.compile,
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.timeout(280),
]
QUICK = Timing(warm_up_s=0.001, batches=3, batch_s=0.001, budget_s=0.05, repeats=0)
LIMITS = Limits(build_s=60, run_s=4, time_s=10, memory_bytes=24 << 30)
WORKLOAD = parse_workload("embed:t=4,v=24,d=32")
ZOO = os.pathsep.join([str(Path(__file__).parents[1] / "zoo"), os.environ.get("PYTHONPATH", "")])


@pytest.fixture(scope="module")
def paths() -> Iterator[None]:
    """Let the cluster's workers find the zoo."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = ZOO
    yield
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="class")
def farm(paths: None) -> Iterator[FarmMeasurer]:
    with open_farm(
        "ray", local_cpu(), limits=LIMITS, timing=QUICK, calibrate=False, cpus=2
    ) as opened:
        yield opened


def hosts_of(farm: FarmMeasurer) -> list[Any]:
    executor = farm.farm.executor
    idle = [h for hs in executor._idle.values() for h in hs]
    return [*idle, *(h for _, h in executor._running.values())]


def search(db: Database, farm: FarmMeasurer, trials: int, **more: Any) -> Any:
    from zoo_schedules import Many

    from mimo_compile.search import tune_workloads

    return tune_workloads(
        {WORKLOAD: 1.0}, local_cpu(), trials=trials, db=db, schedules=[Many()], strategy="random",
        warm_start=False, **farm.how(), **more,
    )  # fmt: skip


class TestOneNode:
    def test_verdicts_are_those_of_a_search_at_home(self, farm: FarmMeasurer) -> None:
        from zoo_schedules import Zoo, ZooConfig

        faults = ["honest", "half", "lower_raises", "aborts", "honest_parallel"]
        space = JointSpace(WORKLOAD, local_cpu(), [Zoo()])
        some = [space.candidate("embed.zoo", ZooConfig(f)) for f in faults]
        found = {str(m.candidate.config["fault"]): m for m in farm.measure(space, some, 5)}
        assert {k: m.verdict for k, m in found.items()} == {
            "honest": Verdict.OK, "half": Verdict.WRONG, "lower_raises": Verdict.BUILD_FAILED,
            "aborts": Verdict.CRASH, "honest_parallel": Verdict.OK,
        }  # fmt: skip
        compared = list(farm.confirm(space, [some[0], some[4]], 6))
        assert [m.verdict for m in compared] == [Verdict.OK] * 2 and compared[0].latency_us > 0
        assert farm.farm.statistics.overlapped == 0  # one node: no build beside a clock

    @pytest.mark.fault
    def test_workers_killed_in_the_middle_cost_no_record(
        self, farm: FarmMeasurer, tmp_path: Path
    ) -> None:
        """kill -9 of Ray's workers, one of each kind and then some, while the search goes on."""
        import ray

        stored: list[str] = []
        killed: list[int] = []

        def show(event: Any) -> None:
            if event.record is not None:
                stored.append(event.record.key)
                if len(stored) in (6, 12, 18, 24):  # the search's own thread: it may ask Ray
                    hosts = hosts_of(farm)
                    host = hosts[len(killed) % len(hosts)]
                    pid = ray.get(host.actor.pid.remote(), timeout=60)
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)

        with Database(tmp_path / "r.db") as db:
            result = search(db, farm, 32, progress=show)
            assert len(killed) == 4 and len(set(killed)) == 4
            assert result.stopped == "trials" and result.trials == 32
            assert Counter(stored) == Counter(r.key for r in db)
            assert not [r for r in db if r.verdict is not Verdict.OK]
        assert not any(Path(f"/proc/{pid}").exists() for pid in killed)

    @pytest.mark.fault
    def test_workers_killed_while_they_work(self, farm: FarmMeasurer, tmp_path: Path) -> None:
        """The action that a worker was at is run again; what kills its worker twice is a crash."""
        from zoo_schedules import Zoo, ZooConfig

        space = JointSpace(WORKLOAD, local_cpu(), [Zoo()])
        good = space.candidate("embed.zoo", ZooConfig("honest"))
        list(farm.measure(space, [good], 1))
        import ray

        pids = [ray.get(h.actor.pid.remote()) for h in hosts_of(farm)]

        def kill() -> None:
            time.sleep(0.7)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)

        thread = threading.Thread(target=kill)
        thread.start()
        before = farm.farm.statistics.rerun
        slow = [space.candidate("embed.zoo", ZooConfig(f)) for f in ("hangs", "honest_parallel")]
        found = {str(m.candidate.config["fault"]): m for m in farm.measure(space, slow, 2)}
        thread.join()
        assert found["honest_parallel"].verdict is Verdict.OK
        assert found["hangs"].verdict is Verdict.TIMEOUT
        assert farm.farm.statistics.rerun > before


def test_builders_elsewhere_work_while_the_device_measures(paths: None, tmp_path: Path) -> None:
    """Two nodes: the second joins while the search runs, takes the builds over, and leaves again."""
    import ray
    from ray.cluster_utils import Cluster as TestCluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    cluster = TestCluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "include_dashboard": False,
            "object_store_memory": 100 << 20,
        },
    )
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=cluster.address, log_to_driver=False, namespace="mimo-compile")
        _joined_and_left(cluster, tmp_path)
    finally:
        ray.shutdown()
        cluster.shutdown()
        signal.signal(signal.SIGTERM, before)  # Ray's own would end this process


def _joined_and_left(cluster: Any, tmp_path: Path) -> None:
    added: list[Any] = []
    seen: Counter[str] = Counter()
    with (
        open_farm(
            f"ray:{cluster.address}", local_cpu(), limits=LIMITS, timing=QUICK, calibrate=False
        ) as farm,
        Database(tmp_path / "r.db") as db,
    ):
        assert not farm.overlaps

        def show(event: Any) -> None:
            if event.record is None:
                return
            seen["stored"] += 1
            if seen["stored"] == 4:
                added.append(
                    cluster.add_node(
                        num_cpus=1, object_store_memory=100 << 20, labels={LABEL: "second"}
                    )
                )
                end = time.monotonic() + 60
                while not farm.overlaps and time.monotonic() < end:
                    time.sleep(0.2)
                    farm.farm._look()
            if farm.overlaps:
                seen["overlapping"] += 1
            if seen["overlapping"] == 16 and added:
                cluster.remove_node(added.pop(), allow_graceful=False)

        result = search(db, farm, 56, progress=show)
        assert result.stopped == "trials" and result.trials == 56
        assert seen["overlapping"] >= 16 and not added
        assert farm.farm.statistics.overlapped >= 1
        assert len({r.key for r in db}) == 56
        assert not [r for r in db if r.verdict is not Verdict.OK]
        first, second = sorted(farm.workers(), key=lambda w: w.name == "second")
        assert second.name == "second" and second.compiled and not second.measured
        assert {r.worker for r in db if not r.twin} == {f"{first.name}/cpu"}
        assert first.measured == sum(not r.twin for r in db)
        assert first.name == farm.farm.executor.home[:8] and second.seconds == first.seconds
        assert second.busy_s + second.idle_s < first.busy_s + first.idle_s  # it came and went


def test_a_cluster_that_is_not_the_target_is_refused(paths: None) -> None:
    from dataclasses import replace

    from mimo_compile.search.farm.ray_cluster import Cluster

    other = replace(local_cpu(), name="Another CPU")
    cluster = Cluster(cpus=1)
    try:
        with pytest.raises(UsageError, match="no node of the cluster can measure for Another CPU"):
            Membership(cluster, other).settled()
        assert list(Membership(cluster, local_cpu()).settled()) == [cluster.home]
    finally:
        cluster.close()


JOIN = """
import os, sys
from mimo_compile.errors import UsageError
from mimo_compile.search.farm.ray_cluster import Cluster
before = {k: v for k, v in os.environ.items() if k.startswith("RAY_A")}
for address in (sys.argv[1], None, sys.argv[1]):  # joined, started here, joined again
    cluster = Cluster(address, cpus=1)
    assert cluster.home in cluster.nodes()
    for other in (None, "10.255.0.1:9"):
        try:
            Cluster(other)
        except UsageError as error:
            assert "connected to the Ray cluster at" in str(error), error
        else:
            raise AssertionError(other)
    cluster.close()
    assert {k: v for k, v in os.environ.items() if k.startswith("RAY_A")} == before
print("well")
"""


def test_a_cluster_with_a_token_is_joined(tmp_path: Path) -> None:
    """`ray start` turns tokens on where it finds one; our environment is as before in the end."""
    import tempfile

    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0123456789abcdef" * 2)
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env |= {"HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"}
    address = f"127.0.0.1:{free_port()}"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as short:  # for names of sockets
        head = subprocess.Popen(
            [
                str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--port",
                address.rpartition(":")[2], "--num-cpus", "1", "--include-dashboard", "false",
                "--object-store-memory", str(100 << 20), "--temp-dir", short,
            ],
            env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            end = time.monotonic() + 60
            while time.monotonic() < end and not answers(address):
                time.sleep(0.2)
            done = subprocess.run(
                [sys.executable, "-c", JOIN, address],
                env=env, capture_output=True, text=True, timeout=120,
            )  # fmt: skip
        finally:
            head.terminate()
            head.wait(60)
    assert done.stdout == "well\n", done.stderr


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1):
        return True
    return False


def test_the_command_line(tmp_path: Path) -> None:
    """`tune --on ray` from the shell, interrupted by Ctrl-C: what was measured is kept, nothing is left."""
    db = tmp_path / "r.db"
    command = [
        sys.executable, "-m", "mimo_compile.cli", "tune", "--op", "rms_norm:t=4,d=256", "--on", "ray",
        "--time", "10m", "--db", str(db), "--json",
    ]  # fmt: skip
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "MIMO_TEST_MARK": str(tmp_path)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
        start_new_session=True,
    )  # fmt: skip
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        if db.exists():
            with Database(db) as opened:
                if len(opened) >= 3:
                    break
        time.sleep(0.5)
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    answer = json.loads(out)
    assert process.returncode in (0, 130), err
    with Database(db) as opened:
        assert answer["new_trials"] == len({r.key for r in opened}) >= 3
        assert {r.worker for r in opened if not r.twin} <= {"local", "local/cpu"}
        (told,), (kept,) = answer["workers"], load(opened)
    assert told["name"] == kept.name == "local" and told["measured"] == kept.measured >= 3
    assert 0 < told["used"] <= 1
    assert told["busy_s"] + told["idle_s"] == pytest.approx(told["seconds"], rel=0.1)
    end = time.monotonic() + 10  # Ray's own end a moment after the search
    while (left := left_of(str(tmp_path))) and time.monotonic() < end:
        time.sleep(0.2)
    assert not left


def left_of(mark: str) -> list[str]:
    """Return the command lines of processes that were started below a marked one and live."""
    found = [p for p in Path("/proc").iterdir() if p.name.isdigit() and marked(p, mark)]
    return [f"{p.name}: {command_line(p)}" for p in found]


def command_line(folder: Path) -> str:
    try:
        return (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return "gone by now"


def marked(folder: Path, mark: str) -> bool:
    try:
        return f"MIMO_TEST_MARK={mark}".encode() in (folder / "environ").read_bytes()
    except OSError:
        return False


def test_no_cluster_at_an_address() -> None:
    with pytest.raises(MimoError, match="no Ray cluster answers"):
        open_farm("ray:127.0.0.1:9", local_cpu())
