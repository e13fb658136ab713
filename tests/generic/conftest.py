"""Lets the tests of generic functions write ``from generic_cases import CASES``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
