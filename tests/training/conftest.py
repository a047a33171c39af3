"""Makes the scripts beside the tests importable by name, in the tests and in the processes of a training."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
