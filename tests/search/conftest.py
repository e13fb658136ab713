import os
import sys
from pathlib import Path

import pytest

# Measuring children import schedules by module name, on the parent's path.
sys.path.insert(0, str(Path(__file__).parent / "zoo"))


@pytest.fixture(autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the user's records and calibration out of the tests."""
    base = tmp_path_factory.mktemp("xdg")
    monkeypatch.setenv("XDG_DATA_HOME", str(base / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(base / "cache"))
    os.makedirs(base, exist_ok=True)
