"""Pictures: which figures are drawn from which files; the browser itself is not run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import pictures
from gradscope.cube import save_cube
from schedulers.schedule import save_schedule
from tests.gradscope.cube_samples import sample_cube, sample_schedule


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    cube = sample_cube()
    save_cube(cube, None, tmp_path / "cube.nc")
    save_schedule(sample_schedule(cube), tmp_path / "schedule.json")
    return [tmp_path / "cube.nc", tmp_path / "schedule.json"]


def test_figures_of_a_cube_and_a_schedule(files: list[Path]) -> None:
    found = dict(pictures.figures(files, variables=["descent"], metric=None, progress=[0.3, 1.0]))
    assert list(found) == ["cube-descent-0.25", "cube-descent-1.00", "cube-bias-variance", "schedule"]
    assert found["cube-descent-0.25"].layout.sliders[0].active == 1
    assert "schedule" in [trace.name for trace in found["cube-descent-0.25"].data]


def test_no_browser_is_told_with_the_cure(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pictures.shutil, "which", lambda name: None)
    assert pictures.main([str(files[0]), "--out", str(tmp_path / "out")]) == 1
    assert "apt-get install chromium" in capsys.readouterr().err


def test_a_missing_file_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pictures.main([str(tmp_path / "cube.nc"), "--out", str(tmp_path)]) == 2
    assert "no such file" in capsys.readouterr().err


def test_a_browser_that_draws_nothing_is_an_error(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<p>", encoding="utf-8")
    with pytest.raises(pictures.PictureError, match="drew no picture"):
        pictures.screenshot(sys.executable, page, tmp_path / "page.png", width=10, height=10)
