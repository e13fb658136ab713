import sys
from pathlib import Path

# Measuring children, and the workers of a cluster, import schedules by module name.
sys.path.insert(0, str(Path(__file__).parents[1] / "zoo"))
sys.path.insert(0, str(Path(__file__).parent))
