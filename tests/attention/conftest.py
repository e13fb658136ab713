"""Lets the tests of attention write ``from contract import ...`` and ``from harness import ...``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).parents[1] / "schedules"))
