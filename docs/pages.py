"""The documentation as HTML: README and pages, the notebooks with what they show, an API reference from the docstrings.

    make docs             # sets everything up and runs this file; SHORT=1: the notebooks with tiny values

It lies in build/docs, in the repository's layout, so that links between pages stay what they are. Nothing is fetched
from a network: pages tell the browser so.
"""

from __future__ import annotations

import html
import importlib
import itertools
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from markdown_it import MarkdownIt
from markdown_it.token import Token
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound
from traitlets.config import Config

ROOT = Path(__file__).parents[1]
OUT = ROOT / "build" / "docs"
START_SECONDS = 600  # for a kernel on a busy machine
API = (
    "gradscope", "schedulers", "gradscope.adaptive", "gradscope.config", "gradscope.cube", "gradscope.data",
    "gradscope.engines", "gradscope.errors", "gradscope.estimators", "gradscope.evaluation", "gradscope.foreign",
    "gradscope.integrations", "gradscope.integrations.lightning", "gradscope.integrations.timm",
    "gradscope.integrations.transformers", "gradscope.methods", "gradscope.models", "gradscope.plots",
    "gradscope.profile_options", "gradscope.report", "gradscope.runlog", "gradscope.task", "gradscope.tasks",
    "gradscope.trainer",
)  # fmt: skip
"""The modules that a user of the library imports from."""

_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src 'self' file: data: blob:; "
    "font-src data:"
)
_REMOTE_SCRIPT = re.compile(r"<script\b[^>]*\bsrc=[\"']?(?:https?:)?//[^>]*>\s*</script>")
_SCRIPT = re.compile(r"<script\b.*?</script>", re.DOTALL)
_CODE = HtmlFormatter(nowrap=True)
_STYLE = """
:root { color-scheme: light; }
body { margin: 0; color: #1f2430; font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
nav, main { max-width: 62rem; margin: 0 auto; padding: .8rem 1.2rem; }
main { padding-bottom: 4rem; }
nav { border-bottom: 1px solid #d9dce1; }
h1, h2, h3 { line-height: 1.25; }
h2 { margin-top: 2.2em; }
a { color: #2a5d92; }
img { max-width: 100%; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; margin: 1em 0; }
table, th, td { border: 0; }
th, td { text-align: left; vertical-align: top; padding: .35em .9em .35em 0; }
tr { border-bottom: 1px solid #d9dce1; }
pre { overflow-x: auto; padding: .7em .9em; background: #f5f6f8; border-radius: 4px; font-size: .85rem; }
pre, code { font-family: ui-monospace, "SF Mono", Consolas, "DejaVu Sans Mono", monospace; }
:not(pre) > code { font-size: .88em; background: #f5f6f8; padding: .1em .25em; border-radius: 3px; }
.output { margin: .4em 0 1.2em; overflow-x: auto; }
.output > pre { background: none; border-left: 3px solid #d9dce1; border-radius: 0; }
"""


class DocsError(Exception):
    """The documentation cannot be built."""


def sources(root: Path = ROOT) -> tuple[list[Path], list[Path]]:
    """Markdown pages in the order in which they are to be read, and notebooks."""
    first = [root / "README.md", root / "docs" / "guide.md"]
    last = [root / "benchmarks" / "RESULTS.md", root / "CONTRIBUTING.md", root / "CHANGELOG.md"]
    pages = [*first, *(path for path in sorted((root / "docs").glob("*.md")) if path not in first), *last]
    return [path for path in pages if path.is_file()], sorted((root / "notebooks").glob("*.ipynb"))


def build(out: Path, *, short: bool = False, root: Path = ROOT) -> None:
    """Write everything to `out`, which is replaced. Raises DocsError, after writing what can be written."""
    pages, notebooks = sources(root)
    shutil.rmtree(out, ignore_errors=True)
    site, failed = Site(root, out), []
    titles = {path: site.add_markdown(path) for path in pages}
    write_api(out / "api")
    for path in notebooks:
        print(f"running {path.relative_to(root)}", flush=True)
        try:
            titles[path] = site.add_notebook(path, execute(path, short=short))
        except CellExecutionError as error:
            failed.append(f"{path.relative_to(root)}: {error.ename}: {error.evalue}")
    site.add_index(titles)
    failed += site.broken_links()
    if failed:
        raise DocsError("\n".join(failed))


def execute(path: Path, *, short: bool, folder: Path | None = None) -> nbformat.NotebookNode:
    """The notebook with its outputs, run in `folder`, by default its own. Raises CellExecutionError for a cell's error.

    It talks with its kernel through files where the system can: two that run side by side cannot take the same port.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as sockets:
        files = {"transport": "ipc", "ip": f"{sockets}/kernel"} if os.name != "nt" else {}
        client = NotebookClient(
            notebook, timeout=None, startup_timeout=START_SECONDS, kernel_name="python3",
            resources={"metadata": {"path": str(folder or path.parent)}}, config=Config({"KernelManager": files}),
        )  # fmt: skip
        client.execute(env={**os.environ, "GRADSCOPE_SHORT": "1" if short else ""})
    return notebook


def write_api(out: Path) -> None:
    """The reference of the modules in API, made by pdoc; what it cannot do with a docstring is told as a warning."""
    from pdoc import doc, render

    render.configure(docformat="google")
    found = {name: importlib.import_module(name) for name in API}
    for module in found.values():  # names that a module imports on first use
        vars(module).update({name: getattr(module, name) for name in getattr(module, "__all__", ())})
    modules = {name: doc.Module(module) for name, module in found.items()}
    for name, module in modules.items():
        home = "../" * (name.count(".") + 1) + "index.html"
        link = f'<a class="pdoc-button module-list-button" href="{home}">All pages</a>'
        head, opened, rest = render.html_module(module, modules).partition('<nav class="pdoc">')
        _write(out / f"{name.replace('.', '/')}.html", head + opened + rest.replace("<div>", f"<div>{link}", 1))
    _write(out / "index.html", render.html_index(modules))
    _write(out / "search.js", render.search_index(modules))


class Site:
    """The pages that are made of the files of `root`, below `out` with the same folders."""

    def __init__(self, root: Path, out: Path) -> None:
        self.root, self.out = root, out
        self.pages: list[Path] = []

    def add_markdown(self, path: Path) -> tuple[str, str]:
        """Add the page of a Markdown file: its title, and its first sentence."""
        body, title, lead = self.markdown(path.read_text(encoding="utf-8"), path)
        self._add(path, title, body)
        return title, lead

    def add_notebook(self, path: Path, notebook: nbformat.NotebookNode) -> tuple[str, str]:
        """Add the page of a notebook as it is, outputs included: its title, and its first sentence."""
        title, lead, parts = "", "", []
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                body, heading, sentence = self.markdown(cell.source, path)
                title, lead = title or heading, lead or sentence
                parts.append(body)
            elif cell.cell_type == "code":
                parts.append(coloured(cell.source, "python"))
                parts += [f'<div class="output">{shown}</div>' for shown in map(output_html, cell.outputs) if shown]
        self._add(path, title, "\n".join(parts))
        return title, lead

    def add_index(self, titles: Mapping[Path, tuple[str, str]]) -> None:
        """Add the first page, which leads to all others."""
        links = {}
        for path, (title, lead) in titles.items():
            name = "README" if path.stem == "README" else title  # whose title is the project's name
            links[path] = f"<li><a href='{self._home(path)}'>{html.escape(name)}</a><br>{html.escape(lead)}</li>"
        pages = "".join(link for path, link in links.items() if path.suffix == ".md")
        notebooks = "".join(link for path, link in links.items() if path.suffix == ".ipynb")
        api = "".join(f"<li><a href='api/{n.replace('.', '/')}.html'><code>{n}</code></a></li>" for n in API)
        body = (
            f"<h1>gradscope</h1><ul>{pages}</ul><h2>Notebooks</h2><ul>{notebooks}</ul>"
            f"<h2><a href='api/index.html'>API reference</a></h2><ul>{api}</ul>"
        )
        self._write_page(self.out / "index.html", "gradscope: documentation", body)

    def markdown(self, text: str, path: Path) -> tuple[str, str, str]:
        """HTML of a Markdown text that stands in the file `path`, its first heading, and its first sentence."""
        parser = MarkdownIt("commonmark", {"html": True, "highlight": _fenced}).enable("table")
        tokens = parser.parse(text)
        title, lead, names = "", "", set[str]()
        for token, content in itertools.pairwise(tokens):
            words = "".join(part.content or " " * (part.type == "softbreak") for part in content.children or ())
            if token.type == "heading_open":
                title = title or words
                token.attrSet("id", _anchor(words, names))
            elif token.type == "paragraph_open" and not lead and token.level == 0:
                lead = re.split(r"(?<=[.!?])\s", words, maxsplit=1)[0]
        for token in (part for block in tokens for part in block.children or ()):
            self._relink(token, path)
        body = parser.renderer.render(tokens, parser.options, {})
        return body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>"), title, lead

    def broken_links(self) -> list[str]:
        """What a link between pages or to a picture does not reach, one line each."""
        texts = {page: _SCRIPT.sub("", page.read_text(encoding="utf-8")) for page in self.pages}
        ids = {page: set(re.findall(r'\sid="([^"]+)"', text)) for page, text in texts.items()}
        found = []
        for page, text in texts.items():
            for link in re.findall(r"""<(?:a|img)\b[^>]*?\s(?:href|src)=["']([^"']*)["']""", text):
                file, _, anchor = html.unescape(link).partition("#")
                target = page if not file else Path(os.path.normpath(page.parent / file))
                if _is_remote(link):
                    continue
                if not target.exists() or (anchor and target in ids and anchor not in ids[target]):
                    found.append(f"{page.relative_to(self.out)}: the link to {link!r} leads nowhere")
        return found

    def _relink(self, token: Token, path: Path) -> None:
        """Turn a link to a file of the repository into one to its page, or to a copy of it."""
        name = {"link_open": "href", "image": "src"}.get(token.type)
        link = str(token.attrs.get(name, "")) if name else ""
        if name is None or not link or link.startswith("#") or _is_remote(link):
            return
        file, _, anchor = link.partition("#")
        target = Path(os.path.normpath(path.parent / file))
        if target.is_dir():
            del token.attrs[name]  # a folder has no page: its name stays
        elif target.is_file() and target.is_relative_to(self.root):
            if target.suffix == ".py":
                self._add(target, target.name, f"<h1>{target.name}</h1>{coloured(target.read_text('utf-8'), 'python')}")
            elif target.suffix not in (".md", ".ipynb"):
                copy = self.out / target.relative_to(self.root)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(target, copy)
            home = os.path.relpath(self._page(target), self._page(path).parent)
            token.attrSet(name, Path(home).as_posix() + (f"#{anchor}" if anchor else ""))

    def _page(self, path: Path) -> Path:
        """Where the page of a file lies, or the copy of one that has none."""
        endings = {".md": ".html", ".ipynb": ".html", ".py": ".py.html"}
        inside = path.relative_to(self.root)
        return self.out / inside.with_suffix(endings.get(path.suffix, path.suffix))

    def _home(self, path: Path) -> str:
        return self._page(path).relative_to(self.out).as_posix()

    def _add(self, path: Path, title: str, body: str) -> None:
        self._write_page(self._page(path), title or path.stem, body)

    def _write_page(self, page: Path, title: str, body: str) -> None:
        home = Path(os.path.relpath(self.out / "index.html", page.parent)).as_posix()
        _write(
            page,
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n<title>{html.escape(title)}</title>\n'
            f"<style>{_STYLE}{_CODE.get_style_defs('.code')}</style>\n</head>\n<body>\n"
            f'<nav><a href="{home}">All pages</a></nav>\n<main>\n{body}\n</main>\n</body>\n</html>\n',
        )
        if page not in self.pages:
            self.pages.append(page)


def output_html(output: Mapping[str, Any]) -> str:
    """One output of a cell; scripts that would come from a network (plotly asks for MathJax) are left out."""
    if output["output_type"] == "stream":
        return f"<pre>{html.escape(output['text'])}</pre>"
    data = output.get("data", {})
    if "text/html" in data:
        return _REMOTE_SCRIPT.sub("", data["text/html"])
    return f"<pre>{html.escape(data['text/plain'])}</pre>" if "text/plain" in data else ""


def coloured(code: str, language: str) -> str:
    """HTML of a piece of code; as it is where the language is not known."""
    try:
        return f'<pre class="code">{highlight(code, get_lexer_by_name(language), _CODE)}</pre>'
    except ClassNotFound:
        return f'<pre class="code">{html.escape(code)}</pre>'


def _fenced(code: str, language: str, attributes: str) -> str:
    return coloured(code, language or "text")


def _anchor(words: str, taken: set[str]) -> str:
    """The name under which a heading can be linked to, as GitHub makes it; the second of the same gets a number."""
    name = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
    name = next(tried for tried in (name, *(f"{name}-{i}" for i in range(1, 1000))) if tried not in taken)
    taken.add(name)
    return name


def _is_remote(link: str) -> bool:
    return bool(re.match(r"[a-z][a-z0-9+.-]*:", link))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def main() -> int:
    try:
        build(OUT, short=bool(os.environ.get("GRADSCOPE_SHORT")))
    except DocsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(OUT / "index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
