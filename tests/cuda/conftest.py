"""Tests of this folder that need a GPU find what they share with those of other folders."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("ops", "simt", "engine")]
