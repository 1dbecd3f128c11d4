"""What is installed with gradscope is enough for it; what needs more says which package."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OPTIONAL = {"accelerate", "lightning", "pytorch_lightning", "tensorboard", "timm", "torchvision", "transformers"}
ABSENT = sorted(OPTIONAL | {"IPython", "matplotlib", "opacus", "backpack", "torchjd", "pytest", "hypothesis"})
ALIAS = {"pillow": "PIL"}
BLOCK = f"""
import importlib, importlib.machinery, pkgutil, sys

class Present:
    find_distributions = staticmethod(importlib.machinery.PathFinder.find_distributions)

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] not in {ABSENT}:
            return importlib.machinery.PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Present
"""


def requirements(lines: list[str]) -> dict[str, str]:
    """The oldest version by package, of requirements with one."""
    pairs = (re.match(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", line) for line in lines)
    return {pair[1].lower(): pair[2] for pair in pairs if pair}


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", BLOCK + code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_every_module_imports_without_the_extras() -> None:
    run(
        "import gradscope, schedulers\n"
        "for package in (gradscope, schedulers):\n"
        "    for found in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        if not found.name.endswith('__main__'): importlib.import_module(found.name)"
    )


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("from gradscope.integrations.lightning import OnlineCallback as C; C(None)", "pip install lightning"),
        (
            "from gradscope.integrations.transformers import OnlineCallback as C; C(None)",
            "pip install transformers accelerate",
        ),
        (
            "from pathlib import Path; from gradscope.runlog import RunLog; RunLog(Path('.'), tensorboard=True)",
            "pip install tensorboard",
        ),
    ],
    ids=["lightning", "transformers", "tensorboard"],
)
def test_what_needs_a_package_names_it(code: str, names: str) -> None:
    told = run(f"try:\n    {code}\nexcept Exception as error:\n    print(type(error).__name__, error)")
    assert told.startswith("UsageError") and names in told


def test_no_other_package_is_imported_than_those_asked_for() -> None:
    asked = {ALIAS.get(name, name).replace("-", "_") for name in requirements(PROJECT["dependencies"])}
    known = asked | OPTIONAL | {"gradscope", "schedulers", "click"} | set(sys.stdlib_module_names)
    for path in sorted([*(ROOT / "gradscope").rglob("*.py"), *(ROOT / "schedulers").rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {name.partition(".")[0] for name in names} <= known, path.name


def test_the_oldest_pins_are_the_oldest_allowed() -> None:
    lines = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.lower().split("==") for line in lines if "==" in line)
    assert pins == requirements(PROJECT["dependencies"])
