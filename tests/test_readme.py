"""What the README shows is what is there: its snippet, its commands, its pictures."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from gradscope.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLE = ROOT / "notebooks" / "own_model.py"


def test_the_example_stands_in_the_readme_word_for_word() -> None:
    code = EXAMPLE.read_text(encoding="utf-8").split('"""\n\n', 1)[1]
    assert code in README
    body = code[code.index("class MyTask") :]
    assert sum(bool(line.strip()) for line in body.splitlines()) <= 20


def test_the_example_profiles_and_optimizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run of the user's own loop, then the two commands that the README gives for it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_model.py").write_text(EXAMPLE.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    import own_model

    task = own_model.MyTask()
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 32, 5, 2),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(32, 10),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    (tmp_path / "ckpts").mkdir()
    for step, batch in zip(range(41), task.batches(64, 0), strict=False):
        if step % 20 == 0:
            torch.save(model.state_dict(), tmp_path / "ckpts" / f"step-{step}.pt")
        optimizer.zero_grad()
        task.loss(model, batch, task.grid.reference, torch.Generator()).backward()
        optimizer.step()
    commands = [
        line
        for line in README.splitlines()
        if "own_model:MyTask" in line or line.startswith("gradscope optimize --budget 1M")
    ]
    assert len(commands) == 2
    for command in commands:
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        main_exit_code = run_main()
        assert main_exit_code == 0
    out = capsys.readouterr().out
    assert "9 cells measured" in out and "resolution=" in out


def run_main() -> int:
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_every_gradscope_line_of_the_readme_is_a_command_with_known_options() -> None:
    import typer.main

    from gradscope.cli.app import app

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    blocks = [block for language, block in fenced if language == "bash"]
    lines = [
        line.split("#")[0].strip() for block in blocks for line in block.splitlines() if line.startswith("gradscope ")
    ]
    assert len(lines) >= 12
    for line in lines:
        name, *words = shlex.split(line)[1:]
        known = {
            option for parameter in commands[name].params for option in (*parameter.opts, *parameter.secondary_opts)
        }
        assert {word for word in words if word.startswith("-")} <= known, line


def test_pictures_and_links_exist() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r'src="([^"]+)"', README)
    local = [target for target in targets if "://" not in target]
    assert any(target.endswith(".png") for target in local)
    for target in local:
        assert (ROOT / target).exists(), target
