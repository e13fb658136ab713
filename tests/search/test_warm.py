"""Warm start: from the user's records, from a packaged model, and from neither when they do not fit."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import msgspec
import pytest

from mimo_compile.cost_models.analytic import DeviceModel
from mimo_compile.cost_models.features import ANALYTIC
from mimo_compile.cost_models.learned import PRIOR, LatencyModel
from mimo_compile.errors import InputError
from mimo_compile.ir.hardware import Hardware, local_cpu
from mimo_compile.ir.ops import parse_workload
from mimo_compile.search import train as training
from mimo_compile.search import warm
from mimo_compile.search.database import Database
from mimo_compile.search.learner import Learner, Prior
from mimo_compile.search.measure.replay import ReplayMeasurer
from mimo_compile.search.objective import parse_objective
from mimo_compile.search.records import Record, Verdict, encode, record_key, versions
from mimo_compile.search.space import JointSpace

pytestmark = pytest.mark.compile

HERE = local_cpu().with_threads(1)
OTHER = parse_workload("swiglu:t=4,f=1024")
WANTED = parse_workload("swiglu:t=8,f=2048")


def records(
    workload=OTHER, hardware: Hardware = HERE, repeat: int = 1, factor: float = 3.0
) -> list[Record]:
    """Records of a real schedule whose kernels take some multiple of the roofline."""
    space, device = JointSpace(workload, hardware), DeviceModel.guess(hardware)
    out = []
    for c in space:
        schedule = space.schedules[c.schedule]
        work = schedule.work(workload, space.config(c), hardware)
        us = (
            factor
            * device.latency_us(work, hardware)
            * (1.0 + 0.1 * len(str(sorted(c.config.items()))) % 3)
        )
        for i in range(repeat):
            key = record_key(
                str(workload), c.schedule, schedule.version, c.config, hardware, "cold", {}
            )
            out.append(
                Record(
                    key=f"{key}{i}", workload=str(workload), schedule=c.schedule,
                    schedule_version=schedule.version, config=c.config, hardware=hardware.id,
                    features=tuple(sorted(hardware.features)), threads=hardware.threads, cache="cold",
                    versions=versions(), verdict=Verdict.OK, latency_us=us * (1 + 0.001 * i),
                    ops=dict(work.ops), bytes=dict(work.bytes), modelled_mj=1.0, time=float(i + 1),
                )
            )  # fmt: skip
    return out


def many(**more) -> list[Record]:
    """Enough of them for a model of their own."""
    one = records(**more)
    return records(repeat=-(-warm.LEAST // len(one)), **more)


def test_a_model_of_the_users_records_of_other_shapes(tmp_path: Path) -> None:
    with Database(tmp_path / "a.db") as db:
        rows = many()
        db.add(*rows)
        prior = warm.find_prior(HERE, [WANTED], db, "cold")
        assert prior is not None and "records of other workloads" in prior.origin
        assert prior.schedules == {r.schedule for r in rows}
        space = JointSpace(WANTED, HERE)
        assert prior.knows(space)
        # what a search sees of it: the roofline times what others took
        learner = Learner(
            HERE, DeviceModel.guess(HERE), ReplayMeasurer(records(WANTED)), parse_objective("latency"),
            seed=0, meter="modelled", prior=prior,
        )  # fmt: skip
        scores = learner.predict(space, list(space), float("inf"))
        assert scores is not None and not learner.latency.trained
        plain = dataclasses.replace(prior, schedules=frozenset())
        cold = Learner(
            HERE, DeviceModel.guess(HERE), ReplayMeasurer(records(WANTED)), parse_objective("latency"),
            seed=0, meter="modelled", prior=plain,
        ).predict(space, list(space), float("inf"))  # fmt: skip
        measured = {
            r.schedule + str(sorted(r.config.items())): r.latency_us for r in records(WANTED)
        }
        true = [measured[c.schedule + str(sorted(c.config.items()))] for c in space]
        if cold is not None:
            assert all(1.5 * c < s for s, c in zip(scores, cold, strict=True))
        assert all(abs(s / t - 1) < 0.35 for s, t in zip(scores, true, strict=True))
        # its own records are no records of other shapes
        assert not warm.samples_of([])[0]
        own = warm.find_prior(HERE, [OTHER], db, "cold")
        assert own is None or "records" not in own.origin


@pytest.mark.parametrize("change", ["versions", "cache", "features", "schedule", "failed", "few"])
def test_records_that_do_not_fit_train_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    monkeypatch.setattr(warm, "shipped", lambda: iter(()))
    replace = msgspec.structs.replace
    changes = {
        "versions": {"versions": {"apache-tvm": "0.1"}},
        "cache": {"cache": "hot"},
        "features": {"features": ("sse3",)},
        "schedule": {"schedule_version": 999},
        "failed": {"verdict": Verdict.WRONG, "latency_us": None},
        "few": {},
    }
    rows = [replace(r, **changes[change]) for r in many()]
    with Database(tmp_path / "a.db") as db:
        db.add(*(rows[: warm.LEAST // 2] if change == "few" else rows))
        assert warm.find_prior(HERE, [WANTED], db, "cold") is None


def test_no_more_records_are_read_than_a_model_is_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest of other workloads, however many there are, and whatever was stored of the own one."""
    trained: list[list[Record]] = []
    train, decoded = warm.train, 0
    monkeypatch.setattr(warm, "train", lambda rows: (trained.append(rows), train(rows))[1])
    check = Database._checked

    def counted(self, *row):
        nonlocal decoded
        decoded += 1
        return check(self, *row)

    monkeypatch.setattr(Database, "_checked", counted)
    replace = msgspec.structs.replace
    rows = [replace(r, time=float(i)) for i, r in enumerate(many()[:96])]
    hot = [replace(r, cache="hot", time=100.0 + i) for i, r in enumerate(rows[:20])]
    own = [replace(r, time=200.0 + i) for i, r in enumerate(many(workload=WANTED)[:96])]
    for name, most in (("LEAST", 3), ("MOST", 8), ("LOOK", 30)):
        monkeypatch.setattr(warm, name, most)
    with Database(tmp_path / "a.db") as db:
        db.add(*rows, *hot, *own)
        warm.find_prior(HERE, [WANTED], db, "cold")
        assert [r.time for r in trained[0]] == [float(i) for i in range(88, 96)]
        assert decoded == 28
        monkeypatch.setattr(warm, "LOOK", 10)
        warm.find_prior(HERE, [WANTED], db, "cold")
        assert len(trained) == 1 and decoded == 38
        assert [r.time for r in db.newest(OTHER.op)] == [
            *(float(i) for i in range(295, 199, -1)), *(float(i) for i in range(119, 99, -1)),
            *(float(i) for i in range(95, -1, -1)),
        ]  # fmt: skip


def packaged_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **meta) -> Path:
    """Put a model into the package's place."""
    model = warm.train(many())
    assert model.trained and model.meta["hardware"] == [HERE.id]
    model.meta |= meta
    path = tmp_path / "machine.json"
    model.save(path)
    monkeypatch.setattr(warm, "shipped", lambda: iter([path]))
    return path


def test_a_packaged_model_is_used_where_it_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = packaged_model(tmp_path, monkeypatch)
    with Database(tmp_path / "a.db") as db, caplog.at_level(logging.INFO):
        prior = warm.find_prior(HERE, [WANTED], db, "cold")
        assert prior is not None and prior.origin == path.name and path.name in caplog.text
        near = dataclasses.replace(HERE, name="another", cores=HERE.cores + 2)
        assert warm.find_prior(near, [WANTED], db, "cold") is not None
        far = dataclasses.replace(HERE, features=HERE.features - {"avx2", "avx512f"})
        if far.features != HERE.features:
            assert warm.find_prior(far, [WANTED], db, "cold") is None
        assert warm.find_prior(HERE, [WANTED], db, "hot") is None


@pytest.mark.parametrize(
    "meta", [{"versions": {"apache-tvm": "0.1"}}, {"schedules": {"swiglu.x86": 999}}]
)
def test_a_packaged_model_of_other_versions_is_left_alone_and_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, meta
) -> None:
    packaged_model(tmp_path, monkeypatch, **meta)
    with Database(tmp_path / "a.db") as db:
        assert warm.find_prior(HERE, [WANTED], db, "cold") is None
    assert "is not used" in caplog.text and "mimo_compile.search.train" in caplog.text


def test_a_damaged_packaged_model_ends_no_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = packaged_model(tmp_path, monkeypatch)
    path.write_text(path.read_text()[:-40])
    with Database(tmp_path / "a.db") as db:
        assert warm.find_prior(HERE, [WANTED], db, "cold") is None
    assert "is not used" in caplog.text


def test_a_prior_says_nothing_of_algorithms_it_has_not_seen() -> None:
    prior = Prior(LatencyModel(), frozenset({"mpgemm.x86_vnni"}), "test")
    space = JointSpace(WANTED, HERE)
    assert not prior.knows(space)
    device = DeviceModel.guess(HERE)
    learner = Learner(
        HERE, device, ReplayMeasurer([]), parse_objective("latency"), seed=0, meter="modelled",
        prior=prior,
    )  # fmt: skip
    row = records(WANTED)[0]
    candidate = space.adopt(row.schedule, row.config)
    assert candidate is not None
    learner.note(space, candidate, row)
    (work,) = learner._works.values()
    assert PRIOR not in work.row and ANALYTIC in work.row


def test_what_ships_is_sound() -> None:
    """Each packaged model can be read, and says where it comes from."""
    for path in warm.shipped():
        model = LatencyModel.load(path)
        assert model.samples >= 100 and path.stem in model.meta["hardware"]
        assert {"isa", "threads", "cache", "versions", "schedules"} <= set(model.meta)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = tmp_path / "some.jsonl"
    lines.write_text("".join(encode(r) + "\n" for r in many()))
    out = tmp_path / "model.json"
    assert training.main([str(lines), "-o", str(out)]) == 0
    assert "candidates of 1 workloads" in capsys.readouterr().out
    assert LatencyModel.load(out).meta["hardware"] == [HERE.id]
    assert training.main([str(tmp_path / "absent.jsonl"), "-o", str(out)]) == 1
    assert "no such file" in capsys.readouterr().err
    lines.write_text("{}")
    with pytest.raises(InputError, match="checksum"):
        list(training.read_records(lines))
    for suffix in (".gz", ".xz"):
        bad = tmp_path / f"bad.jsonl{suffix}"
        bad.write_bytes(b"not packed")
        with pytest.raises(InputError, match="cannot be read"):
            list(training.read_records(bad))


def test_what_the_command_cannot_do_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, out = tmp_path / "some.jsonl", tmp_path / "model.json"
    rows, replace = many(), msgspec.structs.replace

    def train(*more: str, **changes) -> str:
        lines.write_text("".join(encode(replace(r, **changes)) + "\n" for r in rows))
        assert training.main([str(lines), *more]) != 0
        return capsys.readouterr().err

    hot = train("-o", str(out), cache="hot")
    assert f"{len(rows)} are of hot caches" in hot and "simulated" not in hot
    lines.write_text("")
    assert training.main([str(lines), "-o", str(out)]) != 0
    assert "no records to learn from." in capsys.readouterr().err
    assert not out.exists()
    (tmp_path / "sub").mkdir()
    assert "cannot be written" in train("-o", str(tmp_path / "absent" / "m.json"))
    assert "cannot be written" in train("-o", str(tmp_path / "sub"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["some.jsonl", "sub"]
    package = tmp_path / "sub" / "__init__.py"
    monkeypatch.setattr(training.pretrained, "__file__", str(package))
    for name in ("../evil.4c", f"{tmp_path}/evil.4c", ".4c", "a\nb.4c"):
        assert "names no file" in train(hardware=name)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["some.jsonl", "sub"]
