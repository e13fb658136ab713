"""Lets the tests of schedules write ``from harness import check``, ``from generic_cases import Case``."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "generic")]
