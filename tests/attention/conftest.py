"""Lets the tests of attention write ``from contract import ...``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
