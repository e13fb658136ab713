"""Keys and values that are read by lists alone, in a file of a folder."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mimo_compile.errors import UsageError
from mimo_compile.runtime import load
from mimo_compile.runtime.program import Layer, State
from mimo_compile.runtime.store import States, Stored, listed

PARTS = ("k_cache", "v_cache", "k_copy")


def manifest():
    """Of two layers, the second of which has an index of its keys."""
    states = {
        f"layers.{i}.{part}": State((100, 3), "float32") for i in (0, 1) for part in PARTS[: 2 + i]
    }
    layers = [
        Layer(f"layers.{i}", states=tuple(n for n in states if f".{i}." in n)) for i in (0, 1)
    ]
    return SimpleNamespace(name="m", states=states, decoder=SimpleNamespace(layers=layers))


def mapped(address: int) -> str:
    """Return the line of the process's map that an address lies in."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(x, 16) for x in line.split()[0].split("-"))
        if low <= address < high:
            return line
    raise AssertionError(f"{address:x} is not mapped")


def resident(data) -> int:
    """Return how many bytes of a mapping are in memory."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    at = lines.index(mapped(data.ctypes.data))
    return 1024 * next(int(x.split()[1]) for x in lines[at:] if x.startswith("Rss:"))


def test_what_is_listed_lies_in_a_file_without_a_name(tmp_path):
    states = States(manifest(), 1, (), tmp_path)
    assert listed(manifest()) == ["layers.1.k_cache", "layers.1.v_cache"]
    assert not os.listdir(tmp_path)
    for number, (name, data) in enumerate(states.bytes.items()):
        assert len(data) == 1200 and not data.any() and data.ctypes.data % 4096 == 0
        data[...] = number + 1
        in_file = f"{tmp_path}/" in mapped(data.ctypes.data)
        assert in_file == (name in listed(manifest())), name
    for number, data in enumerate(states.bytes.values()):
        assert (data == number + 1).all()  # none lies over another
    states.clear()
    assert not any(data.any() for data in states.bytes.values())
    states.bytes["layers.1.k_cache"][...] = 7  # and can be written again


def test_what_is_cleared_is_not_written(tmp_path):
    stored = Stored(1 << 24, tmp_path)
    stored.bytes[::4096] = 5
    before, peak = stored.bytes, resident(stored.bytes)
    stored.clear()
    assert peak >= 1 << 24 > 8 * resident(stored.bytes)
    assert stored.bytes is before and not stored.bytes.any()
    stored.bytes[-1] = 3
    assert stored.bytes[-1] == 3


def test_a_forked_process_may_not_use_the_file_of_another(tmp_path):
    states = States(manifest(), 1, (), tmp_path)
    keys = states.bytes["layers.1.k_cache"]
    keys[...] = 9
    in_child = multiprocessing.get_context("fork")
    for use in (states.check, states.clear):
        answers = in_child.SimpleQueue()
        child = in_child.Process(target=refusal, args=(use, answers))
        child.start()
        child.join(20)
        assert "belongs to process" in answers.get() and child.exitcode == 0
    assert (keys == 9).all()
    states.check()


def refusal(use, answers):
    try:
        use()
    except UsageError as error:
        answers.put(str(error))
    else:
        answers.put("it was allowed")


@pytest.mark.parametrize("folder", ["", b"", b"/tmp", 5, "a\0b", ["."], Path("x\0y")])
def test_what_names_no_folder_is_refused(folder):
    with pytest.raises(UsageError, match=r"--kv-store \(kv_store\): .* is not a path"):
        States(manifest(), 1, (), folder)


def test_all_is_in_memory_unless_a_folder_is_named():
    states = States(manifest(), 2, ("layers.0.k_cache",))
    assert all(mapped(d.ctypes.data).split()[4] == "0" for d in states.bytes.values())  # no inode
    assert {n: len(d) for n, d in states.bytes.items() if "layers.0" in n} == {
        "layers.0.k_cache": 1200, "layers.0.v_cache": 2400,
    }  # fmt: skip


def test_folders_that_cannot_hold_it_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no file can be made there: No such file"):
        Stored(4096, tmp_path / "nowhere")
    with pytest.raises(UsageError, match=f"{2**42} MiB do not fit: .*"):
        Stored(1 << 62, tmp_path)
    assert not os.listdir(tmp_path)
    assert np.array_equal(Stored(10, tmp_path).bytes, np.zeros(10, np.uint8))


def test_artifacts_that_list_nothing_are_refused(decoder_file, tmp_path):
    with pytest.raises(UsageError, match=r"no layer of .* by lists alone.*--attention tailorkv"):
        load(decoder_file, kv_store=tmp_path)
