"""Cost models: weights and gradients of the spec, learning, damage, and the rule for energy measurements."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.cost_models import stored
from mimo_compile.cost_models.analytic import DeviceModel
from mimo_compile.cost_models.features import (
    ANALYTIC,
    GROUPS,
    MODELLED,
    columns_of,
    extract,
    matrix,
    with_energy,
    without,
)
from mimo_compile.cost_models.learned import (
    EnergyModel,
    LatencyModel,
    Sample,
    sample_weights,
    summed_squares,
)
from mimo_compile.cost_models.updating import (
    CAP_DB,
    DynamicShare,
    centred_snr_db,
    pairwise_accuracy,
)
from mimo_compile.errors import InputError
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import PRESETS
from mimo_compile.ir.ops import get_op
from mimo_compile.ir.workload import Workload

HW = PRESETS["x86-64-v4"].with_threads(2)
DEVICE = DeviceModel.guess(HW)
W = Workload.parse("swiglu:t=8,f=512")


# -- analytic ----------------------------------------------------------------------------------


def test_roofline() -> None:
    memory = DEVICE.latency_us(Counts({}, {"dram": 3e9}), HW) - DEVICE.launch_us
    assert memory == pytest.approx(3e9 / DEVICE.bandwidth("dram", 2) * 1e6)
    work = Counts({"fma_f32": 1e9}, {"dram": 1e3})
    assert DEVICE.latency_us(work, HW) > DEVICE.latency_us(work, HW.with_threads(4))
    mixed = Counts({"fma_f32": 1e9, "dot_i8": 1e9}, {})
    assert DEVICE.latency_us(mixed, HW) > DEVICE.latency_us(Counts({"fma_f32": 1e9}), HW)
    assert DEVICE.bandwidth("dram", 999) == DEVICE.bytes_per_s["dram"][-1]


def test_traits_say_how_far_a_kernel_falls_short() -> None:
    full = {
        "tasks": 2.0, "share": 0.5, "useful": 1.0, "lanes": 16.0, "sums": 12.0, "loads": 0.5,
        "tile_bytes": 1e4,
    }  # fmt: skip
    for work in (({"fma_f32": 1e9}, {}), ({}, {"dram": 1e8})):
        best = DEVICE.latency_us(Counts(*work, full), HW)
        assert best == pytest.approx(DEVICE.latency_us(Counts(*work), HW))
        uneven = DEVICE.latency_us(Counts(*work, {**full, "share": 0.75}), HW)
        assert uneven - DEVICE.launch_us == pytest.approx(1.5 * (best - DEVICE.launch_us))
        serial = DEVICE.latency_us(Counts(*work, {**full, "tasks": 1.0, "share": 1.0}), HW)
        assert serial > 1.5 * best
    work = ({"dot_i8": 1e9}, {})
    best = DEVICE.latency_us(Counts(*work, full), HW)
    assert DEVICE.latency_us(Counts(*work, {**full, "lanes": 4.0}), HW) > 3 * best
    assert DEVICE.latency_us(Counts(*work, {**full, "sums": 1.0}), HW) > 3 * best
    tiny = Counts({"fma_f32": 1.0}, {}, {**full, "tasks": 1.0, "share": 1.0})
    assert DEVICE.latency_us(tiny, HW) < DEVICE.launch_us  # no threads to wake
    near = DEVICE.calibrated({"bytes_per_s": {"l2": [9e10], "dram": [1e10]}})
    assert near.bandwidth("l3", 1) == pytest.approx(3e10) and "l3" not in near.measured


def test_traits_are_features() -> None:
    traits = {"share": 0.5, "sums": 8.0, "tile_bytes": float(HW.l1d_bytes)}
    row = extract(W, HW, Counts({}, {}, traits), "s", {}, DEVICE)
    assert row["parallel.share"] == -1 and row["vector.sums"] == 3
    assert row["tiles.one.l1d_bytes"] == 0 and row["parallel.uneven"] == 0
    plain = extract(W, HW, Counts(), "s", {}, DEVICE)
    assert "parallel.share" not in plain and "vector.sums" not in plain
    with pytest.raises(ValueError, match="unknown counts"):
        Counts({}, {}, {"speed": 1.0})


def test_calibration_replaces_guesses_and_gives_a_floor() -> None:
    need = Counts({"fma_f32": 1e9}, {"dram": 1e6})
    assert DEVICE.floor_us(need, HW) is None
    fast = DEVICE.calibrated(
        {"ops_per_s": {"fma_f32": 1e13, "nonsense": 1}, "bytes_per_s": {"dram": [1e12], "x": [1]}}
    )
    assert fast.ops_per_s["fma_f32"] == 1e13 and fast.bandwidth("dram", 4) == 1e12
    assert fast.ops_per_s["exp_f32"] > DEVICE.ops_per_s["exp_f32"]  # scaled along
    assert fast.floor_us(need, HW) == pytest.approx(1e9 / 2e13 * 1e6)
    slow = DEVICE.calibrated({"ops_per_s": {"fma_f32": 1e9}})  # taken beside heavy load
    assert slow.floor_us(need, HW) < 1e9 / 2e9 * 1e6 / 10


# -- features and the learned model ------------------------------------------------------------


def features(knob: int, kind: str = "a", t: int = 8) -> dict[str, float]:
    traits = {"tasks": 4.0, "share": 0.5, "lanes": 16.0, "tile_bytes": 1e3 * knob}
    work = Counts({"fma_f32": 1e5 * t}, {"dram": 1e4 * t, "l1": 1e5 / knob}, traits)
    w = Workload.parse(f"swiglu:t={t},f=512")
    return extract(w, HW, work, "swiglu.x", {"tile": knob, "kind": kind, "on": True}, DEVICE)


def test_features_are_named_and_finite() -> None:
    row = features(4)
    assert row["knobs.swiglu.x.tile"] == math.log2(5) and row["knobs.swiglu.x.kind=a"] == 1.0
    assert row["workload.t"] == math.log2(9) and row["knobs.swiglu.x.on"] == 1.0
    assert row["hardware.isa=avx512f"] == 1.0
    table = matrix([row, features(2, "b")], columns_of([row, features(2, "b")]))
    at = columns_of([row, features(2, "b")]).index("knobs.swiglu.x.kind=b")
    assert table.dtype == np.float32 and table[:, at].tolist() == [0.0, 1.0]
    assert (
        np.isnan(matrix([{}], ["knobs.swiglu.x.tile"])).all()
        and not np.isnan(matrix([{}], ["a=b"])).any()
    )
    with pytest.raises(ValueError, match="not finite"):
        extract(W, HW, Counts(), "s", {"bad": math.nan}, DEVICE)


def test_weighted_gradient_is_the_numeric_one() -> None:
    """Blocks of one program share its error by their part of its cost."""
    rng = np.random.default_rng(0)
    values = rng.uniform(1, 9, 12)
    weights = sample_weights(values, ["a"] * 6 + ["b"] * 6, alpha=1.5)
    assert weights[:6].max() == weights[6:].max() == 1.0 and weights.min() > 0
    labels = np.log(values)
    for blocks in (1, 3):
        program = np.repeat(np.arange(12), blocks)
        base, at = rng.normal(size=len(program)), rng.normal(size=len(program))
        gradient, hessian = summed_squares(base, program, labels, weights)(at, None)

        def loss(f: np.ndarray, base=base, blocks=blocks) -> float:
            total = np.log(np.exp(base + f).reshape(12, blocks).sum(1))
            return float((weights * (total - labels) ** 2 / 2).sum())

        h = 1e-4
        for i in range(len(program)):
            step = np.zeros(len(program))
            step[i] = h
            numeric = (loss(at + step) - loss(at - step)) / (2 * h)
            assert gradient[i] == pytest.approx(numeric, abs=1e-6)
            if blocks == 1:
                curve = (loss(at + step) - 2 * loss(at) + loss(at - step)) / h**2
                assert hessian[i] == pytest.approx(curve, rel=1e-4)
        assert (hessian > 0).all()


def samples(count: int, seed: int = 0, source: str = "") -> list[Sample]:
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        knob, kind, t = (
            2 ** int(rng.integers(0, 7)),
            str(rng.choice(["a", "b"])),
            int(rng.choice([4, 8, 64])),
        )
        row = features(knob, kind, t)
        factor = 2.0 + abs(math.log2(knob) - 4) + (3.0 if kind == "a" else 0.0)
        us = math.exp(row[ANALYTIC]) * factor * rng.uniform(0.98, 1.02)
        out.append(Sample((row,), us, f"t={t}", source))
    return out


def rows_of(some: list[Sample]) -> list[tuple[dict[str, float], ...]]:
    return [s.blocks for s in some]


@pytest.mark.compile
def test_model_learns_ranks_and_ignores_the_order_of_samples(tmp_path: Path) -> None:
    model = LatencyModel()
    few = samples(8)
    model.fit(few)
    assert not model.trained  # too few: the roofline answers
    plain = model.predict(rows_of(few))
    assert plain.value == pytest.approx([math.exp(s.blocks[0][ANALYTIC]) for s in few])
    assert np.isnan(plain.spread).all()
    train, test = samples(200), samples(80, seed=1)
    model.fit(train)
    assert model.trained
    got = model.predict(rows_of(test))
    true = np.array([s.value for s in test])
    assert np.median(np.abs(got.value / true - 1)) < 0.08
    accuracy = pairwise_accuracy(true, got.value)
    assert accuracy is not None and accuracy > 0.9
    shuffled = LatencyModel()
    shuffled.fit(train[::-1])
    assert (shuffled.predict(rows_of(test)).value == got.value).all()
    assert model.predict([]).value.shape == (0,)
    with pytest.raises(ValueError, match="positive"):
        model.fit([Sample((features(1),), 0.0, "a")] * 20)

    path = tmp_path / "model.json"
    model.meta = {"hardware": ["here"]}
    digest = model.save(path)
    again = LatencyModel.load(path, sha256=digest)
    stored = again.predict(rows_of(test))
    assert (stored.value == got.value).all() and (stored.spread == got.spread).all()
    assert again.meta == model.meta
    with pytest.raises(InputError, match="SHA-256"):
        LatencyModel.load(path, sha256="0" * 64)
    with pytest.raises(ValueError, match="untrained"):
        LatencyModel().save(path)


@pytest.mark.compile
def test_members_disagree_where_nothing_was_measured() -> None:
    model = LatencyModel()
    train = [s for s in samples(200) if s.blocks[0]["knobs.swiglu.x.tile"] < 5]
    model.fit(train)
    known = model.predict(rows_of(train)).spread
    far = [s for s in samples(80, seed=1) if s.blocks[0]["knobs.swiglu.x.tile"] > 6]
    assert np.median(model.predict(rows_of(far)).spread) > np.median(known) > 0


@pytest.mark.compile
def test_a_program_costs_the_sum_of_its_blocks() -> None:
    """The parts are never measured alone, yet each part's cost is learned."""
    rng = np.random.default_rng(3)

    def true_us(s: Sample) -> float:
        return s.value

    parts = samples(300, seed=2)
    programs, singles = [], []
    for at in range(0, 300, 3):
        several = parts[at : at + int(rng.integers(1, 4))]
        blocks = tuple(s.blocks[0] for s in several)
        programs.append(Sample(blocks, sum(map(true_us, several)), "all"))
        singles += several
    model = LatencyModel(alpha=0.0)
    plain = model.predict(rows_of(programs)).value
    assert plain[0] == pytest.approx(sum(math.exp(b[ANALYTIC]) for b in programs[0].blocks))
    model.fit(programs)
    fresh = samples(60, seed=9)
    got = model.predict(rows_of(fresh)).value
    accuracy = pairwise_accuracy([s.value for s in fresh], got)
    assert accuracy is not None and accuracy > 0.85
    pairs = [Sample((a.blocks[0], b.blocks[0]), a.value + b.value, "") for a, b in
             zip(fresh[::2], fresh[1::2], strict=True)]  # fmt: skip
    both = model.predict(rows_of(pairs)).value
    alone = model.predict(rows_of(fresh)).value
    assert np.median(np.abs(both / np.array([p.value for p in pairs]) - 1)) < 0.2
    assert both == pytest.approx(alone[::2] + alone[1::2], rel=0.05)


@pytest.mark.compile
def test_a_single_block_trains_as_the_objective_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """XGBoost's own weighted squares stand in for `summed_squares` where programs have one block."""
    train = samples(60)
    fast, slow = LatencyModel(members=1, rounds=4), LatencyModel(members=1, rounds=4)
    fast.fit(train)
    monkeypatch.setattr("mimo_compile.cost_models.learned._Flat.single", False)
    slow.fit(train)
    got, want = fast.predict(rows_of(train)).value, slow.predict(rows_of(train)).value
    assert got == pytest.approx(want, rel=1e-3)


def joules(count: int, source: str, seed: int = 0) -> list[Sample]:
    """What a hidden machine needs: less than modelled for wide tiles, and twice that in all."""
    out = []
    for s in samples(count, seed):
        row = with_energy(s.blocks[0], Counts({"fma_f32": 1e5}, {"dram": 1e4}), DEVICE, s.value)
        modelled = math.exp(row[MODELLED])
        hidden = 2.0 * (1 + 0.1 * row["knobs.swiglu.x.tile"])
        out.append(Sample((row,), modelled * hidden, s.group, source))
    return out


@pytest.mark.compile
def test_energy_is_learned_from_one_meter(tmp_path: Path) -> None:
    model = EnergyModel("rapl")
    few = joules(6, "rapl")
    model.fit(few)
    assert not model.trained
    got = model.predict_mj(rows_of(few), few[0].group).value
    modelled = np.exp([s.blocks[0][MODELLED] for s in few])
    assert (got > 1.5 * modelled).all()  # scaled to the meter
    train, test = joules(120, "rapl"), joules(40, "rapl", 1)
    model.fit(train)
    found = model.predict_mj(rows_of(test), "t=4").value
    true = np.array([s.value for s in test])
    assert np.median(np.abs(found / true - 1)) < 0.05
    for strange in ("nvml", "", "modelled"):
        with pytest.raises(ValueError, match="in a model of 'rapl'"):
            model.fit([*train, *joules(1, strange)])
    path = tmp_path / "energy.json"
    model.save(path)
    assert EnergyModel.load(path).source == "rapl"
    assert (EnergyModel.load(path).predict_mj(rows_of(test), "t=4").value == found).all()
    with pytest.raises(InputError, match="a model of energy, not of latency"):
        LatencyModel.load(path)


@pytest.mark.compile
def test_older_models_are_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text('{"schema":1,"sha256":"0","content":{}}')
    with pytest.raises(InputError, match=r"schema 1, this version reads 2.*search\.train"):
        LatencyModel.load(path)
    path.write_text('{"schema":3,"sha256":"0","content":{}}')
    with pytest.raises(InputError, match="update mimo-compile"):
        LatencyModel.load(path)
    stored.write(path, {"kind": "latency", "features": -1})
    with pytest.raises(InputError, match="features of version -1"):
        LatencyModel.load(path)


@pytest.mark.compile
@pytest.mark.fuzz
def test_damaged_models_are_refused_before_they_are_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LatencyModel(rounds=3, members=2)
    model.fit(samples(40))
    path = tmp_path / "model.json"
    model.save(path)
    blob = path.read_bytes()

    def never() -> None:
        raise AssertionError("XGBoost must not see a damaged model")

    monkeypatch.setattr("mimo_compile.cost_models.learned._xgboost", never)
    rng = np.random.default_rng(0)
    for _ in range(60):
        bad = bytearray(blob)
        if rng.random() < 0.3:
            del bad[int(rng.integers(len(bad))) :]
        else:
            at = int(rng.integers(len(bad)))
            bad[at] ^= 1 << int(rng.integers(7))
        if json_equal(bad, blob):
            continue
        path.write_bytes(bad)
        with pytest.raises(InputError):
            LatencyModel.load(path)
    with pytest.raises(InputError):
        LatencyModel.load(tmp_path / "absent.json")


def json_equal(a: bytes, b: bytes) -> bool:
    """True when the damage does not change the content (a number's spelling, say)."""
    try:
        return bool(json.loads(bytes(a)) == json.loads(b))
    except ValueError:
        return False


def test_groups_of_features_can_be_left_out() -> None:
    w = Workload.parse("mpgemm:m=1,n=64,k=64,w=w4g32,a=a8")
    work = Counts({"fma_f32": 1.0}, {"dram": 1.0}, {"tasks": 4.0, "lanes": 16.0})
    row = extract(w, HW, work, "s", {"x": 1}, DEVICE)
    groups = set(GROUPS) - {"sm"}  # of GPUs
    assert {name.partition(".")[0] for name in row} == groups
    for group in groups:
        rest = without(row, [group])
        assert {name.partition(".")[0] for name in rest} >= groups - {group}
        assert ANALYTIC in rest and (group == "roof" or len(rest) < len(row))
    assert set(without(row, GROUPS)) == {ANALYTIC}


def test_features_compare_with_the_necessary_and_the_machine() -> None:
    w = Workload.parse("swiglu:t=8,f=512")
    need = get_op("swiglu").counts(w)
    twice = Counts(
        {k: 2 * v for k, v in need.ops.items()}, {k: 2 * v for k, v in need.bytes.items()}
    )
    row = extract(w, HW, twice, "s", {}, DEVICE)
    assert row["work.extra"] == pytest.approx(math.log(2))
    assert row["traffic.extra"] == pytest.approx(math.log(2))
    uneven = Counts({}, {}, {"tasks": 3.0, "share": 2 / 3, "lanes": 8.0})
    row = extract(w, HW, uneven, "s", {}, DEVICE)
    assert row["parallel.waves"] == 1 and row["parallel.tail"] == 0.25
    assert row["parallel.uneven"] == pytest.approx(math.log2(4 / 3))
    assert row["vector.filled"] == -1  # half of a 512-bit vector
    w = Workload.parse("mpgemm:m=1,n=64,k=64,w=w4zg32,a=a8")
    row = extract(w, HW, Counts(), "s", {}, DEVICE)
    assert row["format.w.bits"] == 4 and row["format.w.group"] == 5 and row["format.w.zero"] == 1
    assert row["format.act_bits"] == 8 and row["format.w.family=int"] == 1
    sums = DEVICE.units_us(twice, HW)
    assert DEVICE.latency_us(twice, HW) == sums.pop("launch") + max(sums.values())


# -- when to measure energy --------------------------------------------------------------------


def test_signal_to_noise() -> None:
    e = [10.0, 11.0, 9.0, 10.5]
    assert centred_snr_db(e, e) == CAP_DB
    assert centred_snr_db(e, [float(np.mean(e))] * 4) == pytest.approx(0.0)
    off = [x + 0.1 for x in e]
    assert centred_snr_db(e, off) == pytest.approx(10 * math.log10(np.var(e) * 4 / 0.04))
    assert centred_snr_db([5.0], [5.0]) is None and centred_snr_db([5.0, 5.0], [4.0, 6.0]) is None
    with pytest.raises(ValueError, match="finite"):
        centred_snr_db([1.0, math.nan], [1.0, 2.0])
    with pytest.raises(ValueError, match="against"):
        centred_snr_db([1.0], [1.0, 2.0])


def test_pairwise_accuracy() -> None:
    assert pairwise_accuracy([1, 2, 3], [10, 20, 30]) == 1.0
    assert pairwise_accuracy([1, 2, 3], [3, 2, 1]) == 0.0
    assert pairwise_accuracy([1, 2, 3], [7, 7, 7]) == 0.5
    assert pairwise_accuracy([1, 1], [1, 2]) is None and pairwise_accuracy([1], [1]) is None


@given(st.lists(st.booleans(), max_size=40))
@settings(max_examples=40)
def test_share_stays_in_range_and_follows_quality(history: list[bool]) -> None:
    share = DynamicShare()
    measured = [1.0, 2.0, 3.0, 4.0]
    for good in history:
        before = share.k
        retrain = share.update(measured, measured if good else measured[::-1])
        assert retrain is not good and share.least <= share.k <= 1.0
        assert share.k <= before if good else share.k >= before
    k = share.k
    assert share.update([2.0, 2.0], [1.0, 3.0]) is False and share.k == k  # quality is undefined


def test_share_chooses_best_and_some_at_random() -> None:
    share = DynamicShare(k=0.5, explore=0.2)
    predicted = [float(i) for i in range(20)][::-1]
    chosen = share.choose(predicted, np.random.default_rng(0))
    assert len(chosen) == len(set(chosen)) == 10
    assert set(range(12, 20)) <= set(chosen)  # the eight best predicted
    assert share.choose([], np.random.default_rng(0)) == [] and share.count(1) == 1
    assert DynamicShare(k=0.0).k == 0.05
    with pytest.raises(ValueError, match="least"):
        DynamicShare(least=0.0)
