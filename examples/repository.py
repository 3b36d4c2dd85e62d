"""Make examples/ and the repository importable, wherever a script is started from.

Python looks beside a script only, so each folder of scripts has this file.
"""

import sys
from pathlib import Path

ROOT = next(p for p in Path(__file__).resolve().parents if (p / "textinv.py").exists())
sys.path[:0] = [str(ROOT / "examples"), str(ROOT)]
