"""Cost models: weights and gradients of the spec, learning, damage, and the rule for energy measurements."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile.cost_models.analytic import DeviceModel
from mimo_compile.cost_models.features import columns_of, extract, matrix
from mimo_compile.cost_models.learned import LatencyModel, Sample, sample_weights, weighted_squares
from mimo_compile.cost_models.updating import (
    CAP_DB,
    DynamicShare,
    centred_snr_db,
    pairwise_accuracy,
    raw_snr_db,
)
from mimo_compile.errors import InputError
from mimo_compile.ir.counts import Counts
from mimo_compile.ir.hardware import PRESETS
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
    assert row["trait.share"] == -1 and row["trait.sums"] == 3 and row["tile.l1d_bytes"] == 0
    assert not any(k.startswith("trait.") for k in extract(W, HW, Counts(), "s", {}, DEVICE))
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
    work = Counts({"fma_f32": 1e5 * t}, {"dram": 1e4 * t, "l1": 1e5 / knob})
    w = Workload.parse(f"swiglu:t={t},f=512")
    return extract(w, HW, work, "swiglu.x", {"tile": knob, "kind": kind, "on": True}, DEVICE)


def test_features_are_named_and_finite() -> None:
    row = features(4)
    assert row["swiglu.x.tile"] == math.log2(5) and row["swiglu.x.kind=a"] == 1.0
    assert row["w.t"] == math.log2(9) and row["swiglu.x.on"] == 1.0 and row["isa=avx512f"] == 1.0
    table = matrix([row, features(2, "b")], columns_of([row, features(2, "b")]))
    at = columns_of([row, features(2, "b")]).index("swiglu.x.kind=b")
    assert table.dtype == np.float32 and table[:, at].tolist() == [0.0, 1.0]
    assert (
        np.isnan(matrix([{}], ["swiglu.x.tile"])).all()
        and not np.isnan(matrix([{}], ["a=b"])).any()
    )
    with pytest.raises(ValueError, match="not finite"):
        extract(W, HW, Counts(), "s", {"bad": math.nan}, DEVICE)


def test_weighted_gradient_is_the_numeric_one() -> None:
    rng = np.random.default_rng(0)
    latency = rng.uniform(1, 9, 12)
    weights = sample_weights(latency, ["a"] * 6 + ["b"] * 6, alpha=1.5)
    assert weights[:6].max() == weights[6:].max() == 1.0 and weights.min() > 0
    labels, at = np.log(latency), rng.normal(size=12)
    gradient, hessian = weighted_squares(labels, weights)(at, None)

    def loss(p: np.ndarray) -> np.ndarray:
        return weights * (p - labels) ** 2 / 2

    h = 1e-4
    assert gradient == pytest.approx((loss(at + h) - loss(at - h)) / (2 * h), abs=1e-6)
    assert hessian == pytest.approx((loss(at + h) - 2 * loss(at) + loss(at - h)) / h**2, rel=1e-4)


def samples(count: int, seed: int = 0) -> list[Sample]:
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
        out.append(
            Sample(row, math.exp(row["analytic"]) * factor * rng.uniform(0.98, 1.02), f"t={t}")
        )
    return out


@pytest.mark.compile
def test_model_learns_ranks_and_ignores_the_order_of_samples(tmp_path: Path) -> None:
    model = LatencyModel()
    few = samples(8)
    model.fit(few)
    assert not model.trained  # too few: the roofline answers
    rows = [s.features for s in few]
    assert model.predict_us(rows) == pytest.approx([math.exp(r["analytic"]) for r in rows])
    train, test = samples(200), samples(80, seed=1)
    model.fit(train)
    assert model.trained
    got = model.predict_us([s.features for s in test])
    true = np.array([s.latency_us for s in test])
    assert np.median(np.abs(got / true - 1)) < 0.08
    accuracy = pairwise_accuracy(true, got)
    assert accuracy is not None and accuracy > 0.9
    shuffled = LatencyModel()
    shuffled.fit(train[::-1])
    assert (shuffled.predict_us([s.features for s in test]) == got).all()
    assert model.predict_us([]).shape == (0,)
    with pytest.raises(ValueError, match="positive"):
        model.fit([Sample(features(1), 0.0, "a")] * 20)

    path = tmp_path / "model.json"
    digest = model.save(path)
    again = LatencyModel.load(path, sha256=digest)
    assert (again.predict_us([s.features for s in test]) == got).all()
    with pytest.raises(InputError, match="SHA-256"):
        LatencyModel.load(path, sha256="0" * 64)
    with pytest.raises(ValueError, match="untrained"):
        LatencyModel().save(path)


@pytest.mark.compile
@pytest.mark.fuzz
def test_damaged_models_are_refused_before_they_are_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LatencyModel(rounds=3)
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


# -- when to measure energy --------------------------------------------------------------------


def test_signal_to_noise() -> None:
    e = [10.0, 11.0, 9.0, 10.5]
    assert centred_snr_db(e, e) == CAP_DB
    assert centred_snr_db(e, [float(np.mean(e))] * 4) == pytest.approx(0.0)
    assert raw_snr_db(e, [10.0] * 4) > 20  # what makes raw SNR useless
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


@given(st.lists(st.booleans(), max_size=40), st.sampled_from(["snr", "order"]))
@settings(max_examples=40)
def test_share_stays_in_range_and_follows_quality(history: list[bool], gate: str) -> None:
    share = DynamicShare(gate=gate, threshold=0.7 if gate == "order" else 1.0)
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
