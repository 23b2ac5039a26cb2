"""What `mkdocs.yml` needs besides MkDocs: pages from outside docs/, links to them, and formulas.

Pages are written for GitHub, where a link leads to a file of the repository. In the site, each section of the README is
a page; so are the changelog, the launch scripts, the notebooks and, with its source, every other file to which a page
links. Links are changed accordingly. A link to a file that does not exist stays as it is, and the strict build rejects
it. Formulas, which are ```math blocks and $...$, become MathML, which browsers draw without a script.
"""

from collections.abc import Iterable, Iterator
from html import unescape
import json
from pathlib import Path
import posixpath
import re
from typing import Any, NamedTuple

from griffe import Extension, Object
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

from tools.notebooks import repository

ROOT = Path(__file__).parents[1]
# The page of each section of the README, which begins with "## "; the text before the first is on the start page, too.
SECTIONS = {
  "Start": "index.md",
  "Train": "guide/train.md",
  "Evaluate": "guide/evaluate.md",
  "Compare": "guide/compare.md",
  "Use": "guide/use.md",
  "Search": "guide/search.md",
  "Export": "guide/export.md",
  "How it is built": "guide/how_it_is_built.md",
}
# Files outside docs/ that are pages.
PAGES = {
  "CHANGELOG.md": "changelog.md",
  "CONTRIBUTING.md": "contributing.md",
  "SECURITY.md": "security.md",
  "launch": "launch.md",
  "launch/README.md": "launch.md",
  "colabs/data_efficiency.ipynb": "notebooks/data_efficiency.md",
  "colabs/demo.ipynb": "notebooks/demo.md",
  "colabs/evaluate.ipynb": "notebooks/evaluate.md",
  "colabs/finetune_pairs.ipynb": "notebooks/finetune_pairs.md",
  "colabs/methods.ipynb": "notebooks/methods.md",
  "colabs/own_captions.ipynb": "notebooks/own_captions.md",
  "colabs/plan_pod.ipynb": "notebooks/plan_pod.md",
  "colabs/released_weights.ipynb": "notebooks/released_weights.md",
}
_FILES = f"{repository()}/blob/main/"  # with which links of notebooks to files start
_SLUG = slugify(case="lower")  # as GitHub makes anchors
_FENCE = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<=\]\()[^)\s]+(?=\))|(?<=\]: )\S+$", re.MULTILINE)
_FORMULA = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_REDRAWN = re.compile(r"\x1b\[[\d;?]*[A-Za-z]|[^\n]*\r(?!\n)")  # codes of terminals, and what was drawn over
_TOGETHER = re.compile(r"^( {2,})(\w+(?:, \w+)+): (.+(?:\n\1 +.+)*)$", re.MULTILINE)
_NOT_EXECUTED = "*This page has no outputs: the notebook was not executed before the site was built.*"
_LANGUAGES = {".py": "python", ".sh": "bash", ".json": "json", "": "dockerfile"}


class SeparateArguments(Extension):
  """Separates arguments that a docstring describes together, as "x, y: rows and columns" does."""

  def on_object(self, *, obj: Object, **_: Any) -> None:
    """Changes a docstring before it is parsed."""
    if obj.docstring:
      obj.docstring.value = _TOGETHER.sub(self._separated, obj.docstring.value)

  @staticmethod
  def _separated(found: re.Match) -> str:
    indent, names, text = found.groups()
    return "\n".join(f"{indent}{name}: {text}" for name in names.split(", "))


class Text(NamedTuple):
  """A page in Markdown.

  Attributes:
    origin: the file of the repository, from which its links start.
    markdown: the text.
  """

  origin: str
  markdown: str


class Site:
  """The pages of the site, by their paths in it.

  Attributes:
    texts: all pages.
    anchors: the page of each heading of the README.
  """

  def __init__(self, docs: Files) -> None:
    self.texts = {
      file.src_uri: Text(f"docs/{file.src_uri}", file.content_string) for file in docs.documentation_pages()
    }
    readme = dict(_sections((ROOT / "README.md").read_text()))
    self.texts |= {page: Text("README.md", text) for page, text in readme.items()}
    self.anchors = {anchor: page for page, text in readme.items() for anchor in _anchors(text)}
    for origin, page in PAGES.items():
      path = ROOT / origin
      if path.is_file():
        markdown = notebook(path) if path.suffix == ".ipynb" else path.read_text()
        self.texts[page] = Text(origin, markdown)
    for page, text in [*self.texts.items()]:
      for _, target in _links(text.markdown):
        self._add_source(page, target)

  def _add_source(self, page: str, target: str) -> None:
    """Adds the page of a file or folder of the repository to which another page links."""
    name = self._file(page, target)
    if not name or not (uri := self._uri(name, "")).startswith("source/") or uri in self.texts:
      return
    path = ROOT / name
    hidden = "---\nhide: [toc]\nsearch: {exclude: true}\n---\n"
    if path.is_dir():
      files = sorted(file.relative_to(path).as_posix() for file in path.rglob("*.py"))
      self.texts[uri] = Text(f"{name}/", f"{hidden}# {name}\n\n" + "\n".join(f"* [{file}]({file})" for file in files))
      for file in files:
        self._add_source(uri, file)
    else:
      fence = "`" * 8
      code = f"{fence}{_LANGUAGES.get(path.suffix, 'text')}\n{path.read_text()}\n{fence}\n"
      self.texts[uri] = Text(name, f"{hidden}# {name}\n\n{code}")

  def _file(self, page: str, target: str) -> str:
    """The file of the repository to which a link leads; empty for an anchor of the page, another URL, or no file."""
    path = target.partition("#")[0]
    if path.startswith(_FILES):
      return path.removeprefix(_FILES) if (ROOT / path.removeprefix(_FILES)).exists() else ""
    if not path or "://" in path or path.startswith(("mailto:", "/")):
      return ""
    name = posixpath.normpath(posixpath.join(posixpath.dirname(self.texts[page].origin), path))
    return name if not name.startswith("..") and (ROOT / name).exists() else ""

  def _uri(self, name: str, anchor: str) -> str:
    """The path in the site of a file of the repository."""
    if name == "README.md":
      return self.anchors.get(anchor, "index.md")
    if name.startswith("docs/"):
      return name.removeprefix("docs/")
    return PAGES.get(name, f"source/{name}/index.md" if (ROOT / name).is_dir() else f"source/{name}.md")

  def link(self, page: str, target: str) -> str:
    """A link of a page, as it has to be in the site."""
    path, hash_, anchor = target.partition("#")
    name = self._file(page, target) if path else "README.md" * (self.texts[page].origin == "README.md")
    if not name:
      return target
    return posixpath.relpath(self._uri(name, anchor), posixpath.dirname(page) or ".") + hash_ + anchor


def on_config(config: MkDocsConfig) -> None:
  """Sets the options of Markdown that are functions."""
  formulas = {"name": "math", "class": "math", "format": lambda source, *_, **__: convert(source, display="block")}
  config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [formulas]}
  config.mdx_configs["toc"] = {**config.mdx_configs.get("toc", {}), "slugify": _SLUG}


def on_files(files: Files, config: MkDocsConfig) -> None:
  """Adds the pages from outside docs/."""
  global site
  site = Site(files)
  for uri, text in site.texts.items():
    if not text.origin.startswith("docs/"):
      files.append(File.generated(config, uri, content=text.markdown))


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
  """Changes the links of a page."""
  parts, end = [], 0
  for start, target in _links(markdown):
    parts += [markdown[end:start], site.link(page.file.src_uri, target)]
    end = start + len(target)
  return "".join([*parts, markdown[end:]])


def on_page_content(html: str, **_: Any) -> str:
  """Draws the formulas within the text of a page."""
  return _FORMULA.sub(lambda found: convert(unescape(found[1])), html)


def notebook(path: Path) -> str:
  """A notebook as Markdown: its texts, its code, and its outputs or, if it was not executed, a note after the title.

  Raises:
    ValueError: the executed notebook has other cells.
  """
  cells = json.loads(path.read_text())["cells"]
  executed = ROOT / "docs" / "notebooks" / path.name
  if executed.exists():
    own, cells = cells, json.loads(executed.read_text())["cells"]
    if [cell["source"] for cell in own] != [cell["source"] for cell in cells]:
      raise ValueError(f"{executed} is of another state of {path}: execute it again by `make docs-notebooks`")
  parts = []
  for number, cell in enumerate(cells):
    source = "".join(cell["source"])
    parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    parts += [_output(output) for output in _joined(cell.get("outputs", ()))]
    if number == 0 and not executed.exists():
      parts.append(_NOT_EXECUTED)
  return "\n\n".join(parts) + f"\n\nThis page is the notebook `{path.relative_to(ROOT)}`.\n"


def _joined(outputs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
  """The outputs of a cell, with each series of pieces of one stream as a single output."""
  joined: list[dict[str, Any]] = []
  for output in outputs:
    if joined and "name" in output and output["name"] == joined[-1].get("name"):
      joined[-1] = {**output, "text": [*joined[-1]["text"], *output["text"]]}
    else:
      joined.append(output)
  return joined


def _output(output: dict[str, Any]) -> str:
  data = output.get("data", {})
  if output.get("name") == "stderr":  # where the progress is shown
    return ""
  if "image/png" in data:
    return f'<img alt="output" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">'
  if "text/html" in data:
    return "".join(data["text/html"])
  text = _REDRAWN.sub("", "".join(output.get("text", data.get("text/plain", ""))))
  return f"```text\n{text.rstrip()}\n```" if text.strip() else ""


def _sections(readme: str) -> Iterator[tuple[str, str]]:
  """Yields the page and the text of each section of the README, with headings as on a page of its own.

  Raises:
    ValueError: a section has no page.
  """
  lead, *sections = re.split(r"^## (?=\S)", readme, flags=re.MULTILINE)
  for section in sections:
    title = section.partition("\n")[0]
    if title not in SECTIONS:
      raise ValueError(f"README.md has a section {title!r}: give it a page in SECTIONS of tools/docs_site.py")
    if SECTIONS[title] == "index.md":
      yield "index.md", f"{lead}## {section}"
    else:
      yield SECTIONS[title], "# " + re.sub(r"^##(?=#* \S)", "#", section, flags=re.MULTILINE)


def _anchors(markdown: str) -> Iterator[str]:
  for heading in re.findall(r"^#+ (.+)$", _FENCE.sub("", markdown), re.MULTILINE):
    yield _SLUG(heading.replace("`", ""), "-")


def _links(markdown: str) -> Iterator[tuple[int, str]]:
  """Yields the place and the target of each link outside blocks of code."""
  code = [found.span() for found in _FENCE.finditer(markdown)]
  for found in _LINK.finditer(markdown):
    if not any(start <= found.start() < end for start, end in code):
      yield found.start(), found[0]
