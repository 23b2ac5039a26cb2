"""The documentation: its commands are legal, its pages are in the site, and its API reference names what exists.

Commands of other programs than the package are checked by `docs_commands_test`. `make docs` itself, which also checks
every link, needs packages that the tests do not.
"""

import ast
from collections.abc import Callable, Iterator
import importlib
import json
import os
from pathlib import Path
import pkgutil
import re
import shlex
import subprocess
import sys

from absl import flags
from clips import describe_any
from ml_collections import ConfigDict
import notebook_code
from pages import DOCS, PAGES, ROOT, blocks, inline_commands, shell_commands
import pytest
import yaml

from declip_jax import command_line, config_files
from declip_jax.__main__ import COMMANDS
from declip_jax.data import sources
from declip_jax.weights import describe

MODULES = {module for module, _ in COMMANDS.values()}
TRAIN = ["declip_jax.train", "--config=mine.py", "--workdir=runs/mine"]


def commands(page: Path) -> Iterator[list[str]]:
  """Yields the words of each command of the package, and of `train` for fields of a config that a page sets.

  Fields with a name in capitals stand for others.
  """
  for words in [*shell_commands(page), *inline_commands(page, ("python -m declip_jax",))]:
    if words[:2] == ["python", "-m"] and words[2:] != ["declip_jax"] and len(words) > 3 and "..." not in words:
      yield words[2:]
    elif words[0].startswith("--config."):
      yield [*TRAIN, *words]
  for field in re.findall(r"`(?:--)?(config\.[\w.]+=[^`]+)`", page.read_text()):
    if not re.search(r"\.[A-Z]+\.", field):
      yield [*TRAIN, *re.sub("['\"]", "", f"--{field}").replace(" --", "\n--").splitlines()]


NOTEBOOKS = [path.stem for path in notebook_code.COLABS.glob("*.ipynb")]
FOUND = [(page.name, words) for page in PAGES for words in commands(page)]
FOUND += [(f"{name}.ipynb", words) for name in sorted(NOTEBOOKS) for words in notebook_code.commands(name)]
COMMAND_LINES = [pytest.param(words, id=f"{name}: {shlex.join(words)}") for name, words in FOUND]


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[list[str]], int]]:
  """A function that parses a command line as the command does, does not run it, and returns the exit code."""
  monkeypatch.chdir(tmp_path)
  own_term = next(block for block in blocks(ROOT / "CONTRIBUTING.md", "python") if "def hinge" in block)
  for name in ("my_config.py", "mine.py"):
    Path(name).write_text(own_term)
  monkeypatch.setattr(describe, "describe", describe_any)
  monkeypatch.setattr(command_line.app, "run", lambda main, flags_parser: flags_parser(sys.argv))
  mains = {name: importlib.import_module(name).main for name in MODULES}  # imports define flags, too
  before = {*flags.FLAGS}

  def call(words: list[str]) -> int:
    monkeypatch.setattr("sys.argv", words)
    try:
      mains[words[0]]()
    except SystemExit as end:
      return end.code
    return 0

  yield call
  for name in {*flags.FLAGS} - before:
    delattr(flags.FLAGS, name)
  flags.FLAGS.unparse_flags()


def test_the_demo_is_exported_to_formats_that_represent_it() -> None:
  exports = [words for _, words in FOUND if words[0] == "declip_jax.export" and "runs/demo" in words]
  formats = {words[words.index("--format") + 1] for words in exports}
  assert config_files.load("demo").model.image.kind == "resnet"
  assert formats == {"open_clip"}


@pytest.mark.parametrize("words", COMMAND_LINES)
def test_every_command_parses(
  words: list[str], parse: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
  assert parse(words) == 0, capsys.readouterr().err


# What the blocks of launch/README.md call besides the scripts: nothing is built, and a job runs at once.
STUBS = """set -eu
docker() { :; }
sbatch() { while [[ $1 == --* ]]; do shift; done; "$@"; }
"""


def test_every_launch_command_runs_dry() -> None:
  found = blocks(ROOT / "launch" / "README.md", "sh")
  assert len(found) == 4
  for block in found:
    environ = os.environ | {"DRY_RUN": "1"}
    done = subprocess.run(
      ["bash", "-c", STUBS + block], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 0, (block, done.stderr)
    assert "demo" in done.stdout, block


def test_the_data_page_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """Its blocks of Python run, and its sources are legal; the other programs that it names are not here."""
  monkeypatch.chdir(tmp_path)
  page = DOCS / "data.md"
  for block in blocks(page, ""):
    subprocess.run(["bash", "-n"], input=block, text=True, check=True)
  redcaps, mixture = blocks(page, "python")
  Path("annotations").mkdir()
  post = {"image_id": "a", "url": "https://i.redd.it/a.jpg", "raw_caption": "A Dog", "caption": "a dog"}
  Path("annotations/dogpictures_2019.json").write_text(json.dumps({"info": {}, "annotations": [post, post]}))
  exec(compile(redcaps, page.name, "exec"), {})
  written = [json.loads(line) for line in Path("redcaps.jsonl").read_text().splitlines()]
  assert written == [{"url": post["url"], "caption": post["caption"]}] * 2
  names: dict[str, Callable[[], ConfigDict]] = {}
  exec(compile(mixture, page.name, "exec"), names)
  config = names["get_config"]()
  assert len(config.data.train) == len(config.data.mixture) == 2
  specs = [*config.data.train, *re.findall(r"`((?:coco|tfds):[^`]+)`", page.read_text())]
  assert len(specs) == 6
  assert {spec.partition(":")[0] for spec in specs} <= {*sources.SOURCES}


def navigation(entries: list) -> Iterator[str]:
  for entry in entries:
    target = entry if isinstance(entry, str) else next(iter(entry.values()))
    yield from [target] if isinstance(target, str) else navigation(target)


def test_every_page_is_in_the_navigation_of_the_site() -> None:
  pages = [*navigation(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])]
  tree = ast.parse((ROOT / "tools" / "docs_site.py").read_text())
  assigned = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
  sections, others = (ast.literal_eval(assigned[name]) for name in ("SECTIONS", "PAGES"))
  assert list(sections) == re.findall(r"^## (.+)$", (ROOT / "README.md").read_text(), re.MULTILINE)
  assert all((ROOT / path).exists() for path in others)
  own = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
  assert sorted(pages) == sorted({*own, *sections.values(), *others.values()})


def test_the_api_reference_names_what_exists() -> None:
  named = [name for page in (DOCS / "api").glob("*.md") for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)]
  assert len(named) == len({*named})
  for name in named:
    assert pkgutil.resolve_name(name).__doc__, name
