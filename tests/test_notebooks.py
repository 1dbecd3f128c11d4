"""The notebooks are committed clean and run from top to bottom; the pages of `make docs` fetch nothing."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The file that makes the documentation; kernels get one thread each and tiny values."""
    for package in ("nbclient", "ipykernel"):
        pytest.importorskip(package, reason=f"{package} is not installed (make test installs it)")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    spec = importlib.util.spec_from_file_location("pages", ROOT / "docs" / "pages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def texts(notebook: Any) -> str:
    """What the notebook's cells printed."""
    outputs = [output for cell in code_cells(notebook) for output in cell["outputs"]]
    return "".join(output["text"] for output in outputs if output["output_type"] == "stream")


def with_cells(path: Path, names: set[str], folder: Path, last: str) -> Path:
    """A copy of the notebook in `folder` that has only those cells, and one more with the code `last`."""
    notebook = read(path)
    cells = [cell for cell in notebook["cells"] if cell["id"] in names]
    assert {cell["id"] for cell in cells} == names
    notebook["cells"] = [*cells, {**cells[-1], "id": "last", "source": last}]
    copy = folder / path.name
    copy.write_text(json.dumps(notebook), encoding="utf-8")
    return copy


def test_there_are_four() -> None:
    assert [name[:2] for name in NAMES] == ["01", "02", "03", "04"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_a_notebook_is_committed_without_outputs(path: Path) -> None:
    notebook = read(path)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    for cell in code_cells(notebook):
        assert cell["outputs"] == [] and cell["execution_count"] is None and cell["metadata"] == {}
    names = [cell["id"] for cell in notebook["cells"]]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[a-z][a-z-]*", name) for name in names)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_numbers_of_units_and_samples_stand_in_the_first_cell_alone(path: Path) -> None:
    """So that short runs are short, and a user finds them all."""
    first, *others = ("".join(cell["source"]) for cell in code_cells(read(path)))
    assert 'SHORT = bool(os.environ.get("GRADSCOPE_SHORT"))' in first
    assert not re.search(r"\b(SHORT|GRADSCOPE_SHORT)\b", "".join(others))
    assert not re.search(r"\b(budget|samples|batch_size|draws)=\d", "".join(others))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_a_notebook_runs_to_its_end_and_its_page_fetches_nothing(path: Path, pages: ModuleType, tmp_path: Path) -> None:
    """In a folder of its own, so without the benchmark's results; `test_figure_8_...` reads these."""
    if path.stem.startswith("02"):
        pytest.importorskip("transformers", reason="transformers is not installed (make test installs it)")
    notebook = pages.execute(path, short=True, folder=tmp_path)
    assert list(tmp_path.iterdir()) == [], "a notebook works in a temporary folder"
    assert all(cell["execution_count"] for cell in code_cells(notebook))
    site = pages.Site(ROOT, tmp_path / "site")
    title, sentence = site.add_notebook(path, notebook)
    assert title and sentence.endswith(".")
    page = (tmp_path / "site" / "notebooks" / f"{path.stem}.html").read_text(encoding="utf-8")
    assert page.count("Plotly.newPlot(") >= 3 and "plotly.js v" in page
    assert not re.search(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//", page)


def test_without_transformers_the_second_says_so_and_does_nothing(
    pages: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "transformers.py").write_text("raise ImportError('not here')", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    notebook = pages.execute(NOTEBOOKS[1], short=True)
    assert "skipped, because transformers cannot be imported (not here): pip install transformers" in texts(notebook)
    library, *others = code_cells(notebook)[1:]
    assert library["outputs"] and not any(cell["outputs"] for cell in others)


def test_figure_8_is_drawn_from_the_results_that_are_there(pages: ModuleType, tmp_path: Path) -> None:
    """Found from a folder below the repository; an arm without runs is left out."""
    root = tmp_path / "repository"
    for part in (".", "acceleration"):
        source, copy = ROOT / "benchmarks" / part, root / "benchmarks" / part
        copy.mkdir(parents=True)
        for file in source.glob("*.py"):
            shutil.copyfile(file, copy / file.name)
    results = root / "benchmarks" / "acceleration" / "results"
    results.mkdir()
    accuracies = {"none 15K": 0.5, "none 30K": 0.6, "patch7 15K": 0.7, "patch7 30K": 0.725}
    for seed, more in enumerate((0.0, 0.02)):
        runs = {key: {"points": [{"accuracy": value + more}]} for key, value in accuracies.items()}
        found = {"case": "mocov3", "seed": seed, "grid": "", "runs": runs}
        (results / f"mocov3-{seed}.json").write_text(json.dumps(found), encoding="utf-8")
    (root / "notebooks").mkdir()
    show = "import json\nprint(json.dumps([curves, titles]))"
    names = {"settings", "imports", "results", "runs", "curves"}
    notebook = pages.execute(with_cells(NOTEBOOKS[3], names, root / "notebooks", show), short=True)
    source, found = texts(notebook).splitlines()
    assert source == "the benchmark's case mocov3, seeds: 2"
    curves, titles = json.loads(found)
    assert titles == {"none": "no acceleration", "patch7": "constant patch=7"}
    assert curves["none"] == {"15000.0": [0.5, 0.52], "30000.0": [0.6, 0.62]}
    assert curves["patch7"] == {"15000.0": [0.7, 0.72], "30000.0": [0.725, 0.745]}
    assert any("Plotly.newPlot(" in str(output) for output in code_cells(notebook)[-2]["outputs"])


def test_every_link_of_the_pages_leads_somewhere(pages: ModuleType, tmp_path: Path) -> None:
    site = pages.Site(ROOT, tmp_path)
    markdown, notebooks = pages.sources()
    assert markdown[0].name == "README.md" and notebooks == NOTEBOOKS
    titles = {path: site.add_markdown(path) for path in markdown}
    titles |= {path: site.add_notebook(path, pages.nbformat.read(path, as_version=4)) for path in notebooks}
    site.add_index({path: title for path, title in titles.items()})
    missing = [line for line in site.broken_links() if "api/" not in line]
    assert not missing, "\n".join(missing)
    assert (tmp_path / "docs" / "pictures" / "heatmap-early.png").is_file()
    index = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert {"README.html", "docs/schedules.html", "api/gradscope.html", f"notebooks/{NAMES[0]}.html"} <= set(
        re.findall(r"href='([^']+)'", index)
    )


def test_links_are_followed_and_broken_ones_are_named(pages: ModuleType, tmp_path: Path) -> None:
    root, out = tmp_path / "root", tmp_path / "out"
    (root / "docs" / "data").mkdir(parents=True)
    (root / "docs" / "b.md").write_text("# Two words, and more\n\nText.\n", encoding="utf-8")
    (root / "docs" / "code.py").write_text("x = 1 < 2\n", encoding="utf-8")
    (root / "docs" / "LICENSE").write_text("free", encoding="utf-8")
    text = "[1](docs/b.md#two-words-and-more) [2](docs/b.md#three) [3](docs/code.py) [4](docs/LICENSE) [5](docs/data)"
    (root / "README.md").write_text(f"{text} [6](https://example.org/) [7](docs/gone.md)\n", encoding="utf-8")
    site = pages.Site(root, out)
    site.add_markdown(root / "README.md")
    assert site.add_markdown(root / "docs" / "b.md") == ("Two words, and more", "Text.")
    site.add_index({})
    assert [line for line in site.broken_links() if "api/" not in line] == [
        "README.html: the link to 'docs/b.html#three' leads nowhere",
        "README.html: the link to 'docs/gone.md' leads nowhere",
    ]
    shown = (out / "README.html").read_text(encoding="utf-8")
    assert 'href="docs/code.py.html"' in shown and "<a>5</a>" in shown and 'href="https://example.org/"' in shown
    assert (out / "docs" / "LICENSE").read_text(encoding="utf-8") == "free"
    assert "&lt;" in (out / "docs" / "code.py.html").read_text(encoding="utf-8")


def test_scripts_from_a_network_are_left_out_of_a_page(pages: ModuleType) -> None:
    kept = '<div></div><script>draw("<a>")</script><script type="text/javascript" src="local.js"></script>'
    remote = (
        '<script src="https://cdn.example.org/MathJax.js?config=x"></script><script async src=//a.b/c.js> </script>'
    )
    shown = pages.output_html({"output_type": "display_data", "data": {"text/html": kept + remote, "text/plain": "x"}})
    assert shown == kept
    assert pages.output_html({"output_type": "stream", "text": "a < b"}) == "<pre>a &lt; b</pre>"
