"""Who may import whom, and how long a function may be."""

import ast
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
LIBRARY, APP, WAN = (sorted(REPO.glob(files)) for files in ("magcache/*.py", "magcache/app/**/*.py", "wan/**/*.py"))
SCRIPT = REPO / "magcache_generate.py"
WITHOUT_TORCH = {"__init__", "schedule", "threshold", "speedup", "ratios", "noise_levels", "files", "trials"}


def name_of(path):
    return str(path.relative_to(REPO))


def imports(path) -> set[str]:
    """Full names of all modules that a file imports anywhere; of names imported from a package, also those."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports are not followed"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def roots(path) -> set[str]:
    return {module.split(".")[0] for module in imports(path)}


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_the_library(path):
    allowed = sys.stdlib_module_names | {"magcache"} | (set() if path.stem in WITHOUT_TORCH else {"torch"})
    assert roots(path) <= allowed
    assert "magcache.app" not in {".".join(module.split(".")[:2]) for module in imports(path)}
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not [call for call in calls if isinstance(call, ast.Name) and call.id == "print"]
    assert "--" not in path.read_text(), "flags are the application's"


@pytest.mark.parametrize("path", WAN, ids=name_of)
def test_wan(path):
    assert "magcache" not in roots(path)
    private = {module for module in imports(path) if module.startswith("diffusers") and "._" in module}
    assert not private or path == REPO / "wan" / "utils" / "attention.py"


@pytest.mark.parametrize("path", [SCRIPT, *LIBRARY, *APP, *WAN], ids=name_of)
def test_functions_are_short(path):
    """ruff counts their branches."""
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert not [name for name, length in lengths.items() if length > 50]
