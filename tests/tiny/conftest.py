"""What tests of the built-in model share; they write ``from micro_models import MICRO``."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small models: splitting their operations between threads only costs."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The built-in model's own."""
    from micro_models import FOLDER

    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
