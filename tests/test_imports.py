"""The levels of the library: models/ knows neither textinv.py nor examples/, and no import goes
round in a circle."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def imports(path: Path) -> set[str]:
    """The names of the modules that a file of models/ or textinv.py imports from the library."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            module = (node.module or "").removeprefix("models").lstrip(".")
            names = [module] if module else [alias.name for alias in node.names]
            found |= set(names)
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("models.") for alias in node.names}
    return found


def test_models_import_only_what_stands_below_them():
    files = {path.stem: path for path in [ROOT / "textinv.py", *(ROOT / "models").glob("*.py")]}
    below = {name: imports(path) for name, path in files.items()}
    for name in files.keys() - {"textinv"}:
        assert not below[name] & {"textinv", "examples", "common"}, name
    below = {name: found & files.keys() for name, found in below.items()}
    while leaves := [name for name, found in below.items() if not found]:
        below = {name: found - set(leaves) for name, found in below.items() if found}
    assert not below, f"an import circle among {sorted(below)}"


def test_importing_prints_nothing_and_the_script_is_executed_once():
    code = "import sys, textinv; sys.exit(int('models.command_line' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    code = "import runpy, sys; sys.argv = ['textinv.py', 'show']; runpy.run_path('textinv.py', "
    code = f"{code}run_name='main'); sys.exit(int('textinv' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
