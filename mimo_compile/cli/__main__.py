"""``python -m mimo_compile.cli`` is the same as ``mimo-compile``."""

import sys

from mimo_compile.cli import main

sys.exit(main())
