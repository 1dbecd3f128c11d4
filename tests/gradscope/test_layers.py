"""Arrows point downwards (design section 7), shown by importing each room in a clean process and by reading imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RANK = {
    "schedulers": 0, "errors": 1, "files": 1, "signals": 1, "progress": 1, "untouched": 1, "profile_options": 1,
    "locks": 2, "estimators": 2, "models": 2, "data": 2, "ranks": 2, "task": 3, "engines": 4, "methods": 4,
    "recipes": 4, "checks": 5, "setting_checks": 5, "checkpoints": 5, "config": 5, "runlog": 5, "pilot": 5,
    "influence": 5, "cube_costs": 5, "races": 5, "evaluation": 5, "cube": 6, "measuring": 6, "merge": 6, "stepper": 6,
    "profile_cube": 7, "adaptive": 8, "profile_plan": 8, "tasks": 8, "profiler": 8, "timing": 8, "plans": 9,
    "integrations": 9, "plots": 9, "report_facts": 9, "report_tables": 9, "report_words": 9, "trainer": 10,
    "foreign": 10, "report": 10, "demo": 11, "watch": 11, "cli": 12, "__main__": 13,
}  # fmt: skip


@pytest.mark.parametrize(
    "module", ["gradscope.estimators", "gradscope.engines", "gradscope.task", "gradscope.trainer", "gradscope.tasks"]
)
def test_measuring_and_training_need_neither_xarray_nor_plotly(module: str) -> None:
    code = f"import sys, {module}; assert not {{'xarray', 'plotly', 'pandas', 'typer'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_costs_nothing() -> None:
    subprocess.run(
        [sys.executable, "-c", "import sys, gradscope; assert not {'torch', 'xarray', 'numpy'} & set(sys.modules)"],
        check=True,
    )


def test_no_room_imports_a_higher_one() -> None:
    for path in sorted((ROOT / "gradscope").rglob("*.py")):
        room = path.relative_to(ROOT / "gradscope").parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        assert room in RANK, f"{room} is a new room: give it a place"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else []
            )
            for name in names:
                head, *rest = name.split(".")
                other = "schedulers" if head == "schedulers" else rest[0] if head == "gradscope" and rest else None
                if other is not None and other != room:
                    assert RANK[other] <= RANK[room], f"{path.name} ({room}) imports {name}: the arrow points upwards"


def test_schedulers_never_imports_gradscope() -> None:
    for path in (ROOT / "schedulers").glob("*.py"):
        assert "gradscope" not in {n.split(".")[0] for n in _imports(path)} and "torch" not in _imports(path)


def _imports(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    return {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names} | {
        n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)
    }
