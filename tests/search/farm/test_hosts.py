"""What runs on nodes: the device's lock, builds and measurements in this process, who may do what."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mimo_compile.errors import MimoError, MissingExtra, UsageError
from mimo_compile.ir.hardware import PRESETS, Hardware, local_cpu
from mimo_compile.ir.ops import parse_workload
from mimo_compile.search.farm import ray_cluster, tuning
from mimo_compile.search.farm.hosts import (
    BuildHost,
    BuildOrder,
    DeviceLock,
    Facts,
    MeasureHost,
    MeasureOrder,
    Setup,
    facts,
    reference,
)
from mimo_compile.search.farm.ray_cluster import parse_on
from mimo_compile.search.farm.roles import Member, assign, problems
from mimo_compile.search.farm.tuning import check_on
from mimo_compile.search.measure import Limits, Timing
from mimo_compile.search.measure.build_worker import find_schedule
from mimo_compile.search.records import Verdict
from mimo_compile.search.space import JointSpace

QUICK = Timing(warm_up_s=0.001, batches=3, batch_s=0.001, budget_s=0.05, repeats=0)
HOLD = """
import fcntl, os, sys, time
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(fd, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


# -- the lock ------------------------------------------------------------------------------------


@pytest.mark.fault
def test_a_device_is_locked_between_processes_and_never_for_good(tmp_path: Path) -> None:
    lock = DeviceLock("cpu", tmp_path)
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock.path)], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    with pytest.raises(MimoError, match=r"in use for 0\.05 s .*fuser"), lock.held(0.05):
        pass
    other.send_signal(signal.SIGKILL)
    other.wait()
    other.stdout.close()
    with lock.held(5):
        pass
    with DeviceLock("gpu0", tmp_path).held(), lock.held(0.05):
        pass  # devices have locks of their own


def test_holders_of_a_lock_take_turns(tmp_path: Path) -> None:
    inside, most = [0], [0]

    def work() -> None:
        for _ in range(3):
            with DeviceLock("cpu", tmp_path).held(20):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.002)
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert most == [1]


# -- hosts ---------------------------------------------------------------------------------------


@pytest.mark.compile
def test_a_building_host_sends_the_code_and_keeps_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from toy_schedules import Tiled

    from mimo_compile.search.measure import builder
    from mimo_compile.search.measure.worker import Reply

    class Compiler:
        def __init__(self, limits: Limits, scratch: Any, parallel: int) -> None:
            self.scratch, self.forgotten = scratch, []

        def build(self, space: JointSpace, candidates: list[Any]) -> list[Reply]:
            (c,) = candidates
            assert c in list(space)
            if c.config["rows"] == 32:
                return [Reply("error", {}, "no such tile", "ValueError")]
            builder.code_path(self.scratch, c).write_bytes(c.key.encode())
            return [Reply("ok", {})]

        def forget(self, key: str) -> None:
            self.forgotten.append(key)

    monkeypatch.setattr(builder, "Builder", Compiler)
    space = JointSpace(parse_workload("swiglu:t=8,f=512"), PRESETS["x86-64-v3"], [Tiled()])
    host, some = BuildHost(Limits()), list(space)[:40]
    for c in some:
        order = BuildOrder(str(space.workload), reference(Tiled()), c, space.hardware)
        status, built, _ = host.run(order)
        fine = c.config["rows"] != 32
        assert status == "ok" and built.code == (c.key.encode() if fine else b"")
    assert host._builder.forgotten == [c.key for c in some]
    host._scratch.close()


@pytest.mark.compile
@pytest.mark.slow
def test_code_built_in_one_place_is_measured_in_another(tmp_path: Path) -> None:
    from zoo_schedules import Zoo, ZooConfig

    hardware = local_cpu()
    limits = Limits(build_s=60, run_s=4, time_s=10, memory_bytes=24 << 30)
    space = JointSpace(parse_workload("embed:t=4,v=24,d=32"), hardware, [Zoo()])
    good, bad, broken = (
        space.candidate("embed.zoo", ZooConfig(f)) for f in ("honest", "half", "lower_raises")
    )
    name = reference(space.schedules["embed.zoo"])
    assert type(find_schedule(name)) is Zoo
    builder = BuildHost(limits)
    device = MeasureHost(
        Setup(hardware, limits, QUICK, "modelled", calibrate=False, locks=tmp_path)
    )
    try:
        assert device.pid() == builder.pid() == os.getpid()
        status, (rates, meter), _ = device.ready()
        assert status == "ok" and meter == "" and rates.ops_per_s
        built = []
        for c in (good, bad, broken):
            status, one, seconds = builder.run(BuildOrder(str(space.workload), name, c, hardware))
            assert status == "ok" and seconds > 0
            built.append(one)
        assert [b.reply.status for b in built] == ["ok", "ok", "error"]
        assert built[0].code.startswith(b"\x7fELF") and not built[2].code
        order = MeasureOrder(str(space.workload), (name,), (good, bad), tuple(built[:2]), 7)
        status, found, _ = device.run(order)
        assert status == "ok" and [m.verdict for m in found] == [Verdict.OK, Verdict.WRONG]
        assert found[0].latency_us > 0 and found[0].seed == 7
        status, found, _ = device.run(
            replace(order, candidates=(good,), built=(built[0],), compare=True)
        )
        assert status == "ok" and found[0].verdict is Verdict.OK
    finally:
        builder.close()
        device.close()


def test_a_node_that_cannot_run_the_target_says_so(tmp_path: Path) -> None:
    strange = replace(local_cpu(), features=local_cpu().features | {"no-such-thing"})
    device = MeasureHost(Setup(strange, calibrate=False, locks=tmp_path))
    status, error, _ = device.ready()
    assert status == "broken" and "cannot run there" in str(error)
    device.close()
    missing = MeasureHost(Setup(local_cpu(), calibrate=False, locks=tmp_path / "none"))
    status, error, _ = missing.ready()
    assert status == "broken" and "lock cannot be opened" in str(error)


# -- roles ---------------------------------------------------------------------------------------

HW = Hardware("A CPU", "cpu", frozenset({"avx2", "fma"}), 8, 8)
OTHER = replace(HW, name="B CPU", features=frozenset({"avx2"}))
OWN = Facts("here", HW, {"mimo-compile": "1", "apache-tvm": "2"})


def member(name: str, hardware: Hardware = HW, cpus: int = 8, **more) -> Member:
    return Member(name, cpus, facts=replace(OWN, host=name, hardware=hardware), **more)


def roles(*members: Member, home: str = "a", before: tuple[str, ...] = ()) -> dict[str, str]:
    nodes = assign(members, HW, OWN, home, before)
    out = {}
    for name, node in nodes.items():
        kinds = sorted(node.kinds or ["all"])
        out[name] = f"{node.units} {' '.join(kinds)}{' +' if node.devices else ''}"
    return out


def test_roles_of_nodes() -> None:
    assert roles(member("a")) == {"a": "4 all +"}
    measures = "4 measure +"
    assert roles(member("a"), member("b")) == {"a": measures, "b": "8 build"}
    assert roles(member("a"), member("b"), home="b") == {"b": measures, "a": "8 build"}
    assert roles(member("a"), member("b"), home="x", before=("b",)) == {
        "b": measures,
        "a": "8 build",
    }
    marked = roles(member("a"), member("b", marked=True), member("c", marked=True))
    assert marked == {"a": "8 build", "b": measures, "c": measures}
    assert roles(member("a", OTHER), member("b", marked=True)) == {"a": "8 build", "b": measures}
    assert roles(member("a", cpus=0)) == {"a": "1 all +"}
    silent = Member("s", 8)
    assert roles(member("a"), silent) == {"a": "4 all +"}
    assert roles(member("a"), member("z", cpus=0)) == {"a": "4 all +"}
    old = replace(
        member("o"), facts=replace(OWN, versions={"mimo-compile": "0", "apache-tvm": "2"})
    )
    assert roles(member("a"), old) == {"a": "4 all +"}
    assert roles(member("a", OTHER)) == {"a": "8 build"}  # and no node can measure


def test_nodes_that_are_not_the_target_are_named() -> None:
    few = replace(HW, cores=4, threads=4)
    said = problems(
        [
            member("fine", marked=True), member("weak", OTHER, marked=True),
            member("small", few, marked=True), member("unmarked", OTHER), Member("silent", 4),
            replace(member("old"), facts=replace(OWN, host="old", versions={"mimo-compile": "0"})),
            member("more", replace(HW, features=HW.features | {"amx-int8"}), marked=True),
        ],
        HW, OWN,
    )  # fmt: skip
    assert set(said) == {"weak", "small", "old", "more"}
    assert "not the target: B CPU lacks fma" in said["weak"] and "4 cores for 8" in said["small"]
    assert "mimo-compile 0 instead of 1" in said["old"] and "apache-tvm absent" in said["old"]
    assert "amx-int8" in said["more"]
    preset = PRESETS["x86-64-v3"].with_threads(2)
    strong = replace(OWN, hardware=replace(HW, features=preset.features | {"amx-int8"}))
    nodes = assign([Member("a", 8, facts=strong)], preset, strong, "a")
    assert nodes["a"].devices == ("cpu",)


def test_a_node_describes_itself() -> None:
    own = facts()
    assert own.hardware == local_cpu() and "mimo-compile" in own.versions
    assert "apache-tvm" in own.versions


class Warming:
    """A cluster and an executor whose hosts answer what their nodes' names say."""

    exceptions = SimpleNamespace(RayError=ConnectionError)

    def __init__(self) -> None:
        self.ray = self
        self.adopted: list[str] = []

    def spawn(self, node: str, role: str) -> Any:
        ready = SimpleNamespace(remote=lambda: node)
        return SimpleNamespace(node=node, actor=SimpleNamespace(ready=ready))

    def get(self, node: str) -> Any:
        if node.startswith("dead"):
            raise ConnectionError("gone")
        if node.startswith("full"):
            return "broken", MimoError("no space left"), 0.0
        return "ok", (f"rates of {node}", node.partition(" ")[2]), 0.0

    def kill(self, actor: Any) -> None:
        pass

    def adopt(self, host: Any) -> None:
        self.adopted.append(host.node)


@pytest.mark.fault
def test_nodes_that_fail_to_warm_up_or_read_another_meter_do_not_measure() -> None:
    warm: Any = Warming()
    found, broken = tuning._warm(warm, warm, ["full", "a", "b rapl", "c rapl", "d nvml", "dead"])
    assert found == ("rates of b rapl", "rapl") and warm.adopted == ["b rapl", "c rapl"]
    assert set(broken) == {"full", "a", "d nvml", "dead"}
    assert "no space" in str(broken["full"]) and "nvml, others with rapl" in str(broken["d nvml"])
    assert tuning._warm(warm, warm, ["x", "y"]) == (("rates of x", ""), {})
    with pytest.raises(MimoError, match="no space left"):
        tuning._warm(warm, warm, ["full", "dead"])


@pytest.mark.fault
def test_nodes_that_are_left_out_are_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    members = [member("a"), replace(member("b"), facts=replace(OWN, host="b", versions={}))]
    membership = tuning.Membership.__new__(tuning.Membership)
    membership.__dict__.update(
        _hardware=HW, own=OWN, _cluster=SimpleNamespace(home="a"), _measuring=[], _told=set(),
        failures={"c": "no such module"}, members=lambda: members,
    )  # fmt: skip
    assert list(membership()) == list(membership()) == ["a"]
    assert len(caplog.records) == 2
    assert "no such module" in caplog.text and "mimo-compile absent" in caplog.text


# -- words ---------------------------------------------------------------------------------------


def test_where_to_run() -> None:
    assert parse_on("ray") is None and parse_on("ray:10.0.0.1:6379") == "10.0.0.1:6379"
    assert parse_on("ray:[::1]:6379") == "[::1]:6379"
    for wrong in (
        "",
        "slurm",
        "ray:",
        "ray:host",
        "ray:host:x",
        "ray::6379",
        "ray:h:99999",
        "ray:h:٦٣٧٩",
    ):
        with pytest.raises(UsageError, match="ray:HOST:PORT"):
            parse_on(wrong)


def test_what_no_farm_can_do_is_refused_early(monkeypatch: pytest.MonkeyPatch) -> None:
    from mimo_compile.ir.hardware import SIMULATED

    hw = local_cpu()
    with pytest.raises(UsageError, match="simulated"):
        check_on("ray", SIMULATED["sim:roma"], "latency", None, "auto")
    with pytest.raises(UsageError, match="budget in joules"):
        check_on("ray", hw, "latency", 5.0, "auto")
    monkeypatch.setattr(ray_cluster, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'mimo-compile\[ray\]'"):
        check_on("ray", hw, "latency", None, "auto")
    monkeypatch.setattr(ray_cluster, "find_spec", lambda name: object())
    assert check_on("ray", hw, "latency", None, "auto") == "modelled"
    assert check_on("ray", hw, "energy", None, "auto") == "auto"
    assert check_on("ray", hw, "latency", None, "rapl") == "rapl"


def test_an_address_that_does_not_answer() -> None:
    with pytest.raises(MimoError, match=r"no Ray cluster answers: .*\(127\.0\.0\.1:9\).*ray start"):
        ray_cluster._check_answers("127.0.0.1:9")
    for host in ("a..b", "x" * 70):  # what no host can be called
        with pytest.raises(MimoError, match="no Ray cluster answers"):
            ray_cluster._check_answers(f"{host}:6379")


def test_a_token_that_is_there_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`ray start` asks for a token where it finds one: who joins has to send it."""
    for name in [k for k in os.environ if k.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "RAY_AUTH_MODE" not in ray_cluster._variables(own=False)
    own = ray_cluster._variables(own=True)
    assert own["RAY_AUTH_MODE"] == "token" and len(own["RAY_AUTH_TOKEN"]) == 64
    joining = {"RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"}
    assert set(ray_cluster._variables(own=False)) == joining
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0" * 32)
    assert ray_cluster._variables(own=False)["RAY_AUTH_MODE"] == "token"
    monkeypatch.setenv("HOME", str(tmp_path / "other"))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "1" * 32)
    assert set(ray_cluster._variables(own=False)) == {*joining, "RAY_AUTH_MODE"}
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert "RAY_AUTH_MODE" not in ray_cluster._variables(own=True)


@pytest.mark.compile
def test_no_cluster_is_opened_for_a_database_that_cannot_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from mimo_compile import api

    monkeypatch.setattr(ray_cluster, "find_spec", lambda name: object())
    monkeypatch.setattr(tuning, "open_farm", lambda *a, **k: pytest.fail("a cluster was opened"))
    (tmp_path / "file").write_text("")
    with pytest.raises(MimoError, match="file"):
        api.tune("swiglu:t=8,f=512", on="ray", trials=1, db=tmp_path / "file" / "r.db")
