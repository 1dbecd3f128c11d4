"""What the README shows is what is there: its snippet, its commands, its pictures."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from gradscope.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TRAINING = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
ONLINE = (ROOT / "docs" / "online.md").read_text(encoding="utf-8")
SCHEDULES = (ROOT / "docs" / "schedules.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
HEREDOC = re.compile(r"<<'EOF'\n.*?^EOF$", flags=re.DOTALL | re.MULTILINE)
EXAMPLE = ROOT / "notebooks" / "own_model.py"


def test_the_example_stands_in_the_readme_word_for_word() -> None:
    code = EXAMPLE.read_text(encoding="utf-8").split('"""\n\n', 1)[1]
    assert code in README
    body = code[code.index("class MyTask") : code.index("if __name__")]
    assert sum(bool(line.strip()) for line in body.splitlines()) <= 20


def test_the_example_profiles_and_optimizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run of the user's own loop, then the two commands that the README gives for it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_model.py").write_text(EXAMPLE.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.manual_seed(0)
    runpy.run_path("own_model.py", run_name="__main__")
    assert "python own_model.py" in README.splitlines()
    torch.save({}, tmp_path / "ckpts" / "last.pt")
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
    out, err = capsys.readouterr()
    assert "15 cells measured" in out and "resolution=" in out
    assert "left out, as there is no number in their names: last.pt" in err and "15 cells to measure for" in err


def run_main() -> int:
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.parametrize(
    "text", [README, TRAINING, ONLINE, SCHEDULES, GUIDE], ids=["README", "training", "online", "schedules", "guide"]
)
def test_every_gradscope_line_is_a_command_with_known_options(text: str) -> None:
    import typer.main

    from gradscope.cli.app import app

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    blocks = [HEREDOC.sub("", block).replace("\\\n", " ") for block in fenced(text, "bash")]
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    lines = [line[line.index("gradscope ") :] for line in lines if "gradscope " in line]
    assert len(lines) >= 4
    for line in lines:
        name, *words = shlex.split(line)[1:]
        known = {
            option for parameter in commands[name].params for option in (*parameter.opts, *parameter.secondary_opts)
        }
        assert {word for word in words if word.startswith("-")} <= known, line


def test_the_code_and_the_settings_of_the_training_page_work(tmp_path: Path) -> None:
    from gradscope.cli.run_settings import make_config

    (code,) = fenced(TRAINING, "python")
    names: dict[str, object] = {}
    exec(code, names)  # the page's own
    assert torch.isfinite(names["loss"])  # type: ignore[arg-type]
    (settings,) = fenced(TRAINING, "toml")
    config = make_config({"budget": 50e6}, None, [], stored=tomllib.loads(settings)["train"])
    assert (config.method, config.small_crops, config.crop_scale, config.clip) == ("dino", 6, (0.25, 1.0), 3.0)


def test_the_online_page_shows_the_example_and_every_setting_with_its_default() -> None:
    from dataclasses import asdict

    from schedulers import AdaptiveRule

    (code,) = fenced(ONLINE, "python")
    example = (ROOT / "notebooks" / "online_own_loop.py").read_text(encoding="utf-8")
    shown = [line.strip() for line in code.splitlines()]
    assert [line for line in map(str.strip, example.splitlines()) if line in shown] == shown
    assert sum("# +" in line for line in shown) == 5
    table = [line.split("|")[1:3] for line in ONLINE.splitlines() if line.startswith("| `")]
    told = {}
    for names, values in table[: 1 + next(i for i, row in enumerate(table) if "frozen" in row[0])]:
        told |= dict(zip(re.findall(r"`(\w+)`", names), (v.strip() for v in values.split(",")), strict=True))
    assert AdaptiveRule.parse(",".join(f"{name}={value}" for name, value in told.items())) == AdaptiveRule()
    assert set(told) == set(asdict(AdaptiveRule()))


def fenced(text: str, language: str) -> list[str]:
    """The code blocks of a page that are of one language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [block for name, block in found if name == language]


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pictures_and_links_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]*)(#[^)]*)?\)", text) + [(t, "") for t in re.findall(r'src="([^"]+)"', text)]
    for target, anchor in targets:
        if "://" in target:
            continue
        there = page.parent / target if target else page
        assert there.exists(), target
        if anchor and there.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor[1:] in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}, anchor


@pytest.mark.slow
def test_the_guide_runs_from_top_to_bottom_in_an_empty_folder(tmp_path: Path) -> None:
    """Every block as it stands: shell commands by bash, code by a fresh interpreter."""
    scripts = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    blocks = re.findall(r"^```(bash|python)\n(.*?)^```$", GUIDE, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 12
    for language, block in blocks:
        command = ["bash", "-euo", "pipefail", "-c", block] if language == "bash" else [sys.executable, "-c", block]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
