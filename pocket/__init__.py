"""The built-in world: a generated data set on databases of our own, and the small policy that is pretrained for it."""

from pathlib import Path

NANO_PATH = Path(__file__).parent / "assets" / "nano"
"""The checkpoint of the built-in policy."""
