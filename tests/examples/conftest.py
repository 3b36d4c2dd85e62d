"""Make the scripts importable, as they are for each other, and helpers.py of the tests."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("applications", "experiments", "bundled")
sys.path[:0] = [str(ROOT / "tests"), *(str(ROOT / "examples" / name) for name in FOLDERS)]

import repository  # noqa: E402, F401
