"""`tune` for GPUs where there is none: what it refuses, and what it says of device batches."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.compile

SPEC = "mpgemm:m=1,n=64,k=64,w=w4g64"


def test_without_a_gpu_it_names_the_way_that_there_is(cli, tmp_path) -> None:
    db = ("--db", tmp_path / "records.db")
    for source in (("tiny",), ("--op", SPEC)):
        done = cli("tune", *source, "--target", "cuda:sm_90a", "--trials", 1, *db)
        assert done.code == 3 and "no NVIDIA driver" in done.error
        assert "--device-batch DIR" in done.error and "Traceback" not in done.err


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("--op", SPEC, "--device-batch", "d"), 2, "--device-batch is for GPUs, and"),
        (
            ("--op", SPEC, "--target", "cuda:sm_80", "--device-batch", "d", "--time", "1m"),
            2,
            "a device batch has no limit of time or joules",
        ),
        (
            ("--op", SPEC, "--target", "cuda:sm_80", "--device-batch", "d", "--meter", "sundial"),
            2,
            "unknown meter 'sundial'",
        ),
        (
            ("--op", SPEC, "--target", "cuda:sm_80", "--device-batch", "d", "--on", "ray"),
            2,
            "not both",
        ),
        (("--run-batch", "d", "--op", SPEC), 2, "--run-batch takes all from its folder, and --op"),
        (("--run-batch", "d", "--trials", "3"), 2, "from its folder, and --trials"),
        (("--run-batch", "d", "--db", "x"), 2, "from its folder, and --db"),
        (("--run-batch", "d"), 1, "the folder of a device batch cannot be used: No such file"),
    ],
)
def test_what_does_not_go_together(cli, tmp_path, monkeypatch, arguments, code, text) -> None:
    monkeypatch.chdir(tmp_path)
    db = () if "--run-batch" in arguments else ("--db", tmp_path / "records.db")
    done = cli("tune", *arguments, *db)
    assert done.code == code and text in done.error, done.err
    assert len(done.error.strip().splitlines()) == 1 and not (tmp_path / "d").exists()


def test_a_folder_without_a_batch(cli, tmp_path) -> None:
    done = cli("tune", "--run-batch", tmp_path)
    assert done.code == 1 and "there is no device batch in this folder" in done.error
