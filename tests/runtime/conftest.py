"""Lets the tests of the runtime write ``from runtime_samples import plain``."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import runtime_samples


@pytest.fixture(scope="session")
def plain_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small artifact with the entries `main` and `accumulate`."""
    return runtime_samples.plain().save(tmp_path_factory.mktemp("plain") / "plain.mimo")


@pytest.fixture(scope="session")
def decoder_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small artifact that generates text."""
    return runtime_samples.decoder().save(tmp_path_factory.mktemp("decoder") / "decoder.mimo")
