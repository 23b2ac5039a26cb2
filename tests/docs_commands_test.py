"""What the documentation tells a reader to type besides commands of the package: shell commands and Python.

`docs_test` parses the commands of the package, `image_search/server_test` sends the requests of curl. Nothing is
downloaded, installed or trained here: a command is parsed by the program itself or by a list of its flags.
"""

import argparse
import ast
from collections.abc import Iterator, Sequence
import csv
import gzip
import importlib.util
import json
from pathlib import Path
import re
import runpy
import shlex
import subprocess
import sys
from typing import Any
from unittest.mock import MagicMock

from clips import make_clip
from ml_collections import ConfigDict
from pages import DOCS, PAGES, ROOT, blocks, inline_commands, shell_commands
from PIL import Image
from pyarrow import parquet
import pytest

import declip_jax
from declip_jax.__main__ import COMMANDS

PROGRAMS = ("python", "make", "pip", "curl", "hf", "img2dataset", "sed", "wget", "ssh", "jupyter", "git")
# What no test checks, by the first words of a command, and why.
UNCHECKED = {
  "wget": "downloads from a server of others",
  "unzip": "unpacks what wget has downloaded",
  "mkdir": "makes a folder at the root of the reader's disk",
  "cd": "enters it",
  "git clone": "downloads a repository of others",
  "ssh": "needs a second machine",
  "jupyter": "is not among the tested packages",
  "pip install jupyterlab": "is a package of others",
  "pip install tensorflow": "is a package of others",
  "pip install img2dataset": "is a package of others",
  "python download_upstream.py": "is a script of DataComp",
  "python baselines.py": "is a script of DataComp",
  "python resharder.py": "is a script of DataComp",
  "clip_benchmark": "is installed by `make bench-clip-benchmark` only",
  "ruff": "is run by `make lint`",
}
# Flags of img2dataset 1.47.0 that the pages use, which are parameters of `download` in its img2dataset/main.py, and the
# legal values of those that have few, from reader.py, main.py and resizer.py.
IMG2DATASET = {
  "url_list": None,
  "input_format": [
    "txt",
    "txt.gz",
    "csv",
    "csv.gz",
    "tsv",
    "tsv.gz",
    "json",
    "json.gz",
    "jsonl",
    "jsonl.gz",
    "parquet",
  ],
  "url_col": None,
  "caption_col": None,
  "output_format": ["webdataset", "files", "parquet", "tfrecord", "dummy"],
  "output_folder": None,
  "processes_count": None,
  "thread_count": None,
  "image_size": None,
  "resize_mode": ["no", "keep_ratio", "center_crop", "border", "keep_ratio_largest"],
  "resize_only_if_bigger": ["True", "False"],
}
# The first line of each list that a page downloads, in the format in which its owner publishes it.
LISTS = {
  "Train_GCC-training.tsv": "a dog\thttp://host/0.jpg\n",
  "cc12m.tsv": "http://host/0.jpg\ta dog\n",
  "yfcc15m_clean_open_data.json": '{"caption": "a dog", "filename": "0.jpg", "url": "http://host/0.jpg"}\n',
}


def all_commands() -> Iterator[tuple[str, list[str]]]:
  """Yields the page and the words of each command that is neither one of the package nor fields of a config."""
  for page in PAGES:
    for words in [*shell_commands(page), *inline_commands(page, PROGRAMS)]:
      words[0] = words[0].removeprefix(".venv/bin/")
      if words[0].endswith(".py"):
        words.insert(0, "python")
      package = words[:2] == ["python", "-m"] and (len(words) == 2 or words[2].partition(".")[0] == "declip_jax")
      if not package and not words[0].startswith(("--config.", "launch/")):
        yield page.name, words


FOUND = [*all_commands()]


def unchecked(words: Sequence[str]) -> list[str]:
  """The entries of UNCHECKED that a command starts with."""
  return [start for start in UNCHECKED if words[: len(start.split())] == start.split()]


CHECKED = {shlex.join(words): (page, words) for page, words in FOUND if not unchecked(words)}


def test_what_is_not_checked_is_in_the_pages() -> None:
  used = {start for _, words in FOUND for start in unchecked(words)}
  assert used == {*UNCHECKED}


def test_shell_commands_are_in_blocks_without_a_language() -> None:
  for page in PAGES:
    assert not blocks(page, "bash", "shell", "console"), page
    assert page.parent.name == "launch" or not blocks(page, "sh"), page  # docs_test runs those of launch/


@pytest.mark.parametrize(("page", "words"), [*CHECKED.values()], ids=[*CHECKED])
def test_a_command_is_legal(page: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
  check(words, monkeypatch)


def check(words: list[str], patch: pytest.MonkeyPatch) -> None:
  """Fails if a command has flags or values that its program does not, or names a file that does not exist."""
  program, *rest = words
  if program == "python" and rest[0] == "-c":
    check_python(rest[1])
  elif program == "python" and rest[:2] == ["-m", "pytest"]:
    assert all((ROOT / path).exists() for path in rest[2:])
  elif program == "python":
    check_script(ROOT / rest[0], rest[1:], patch)
  elif program == "make":
    check_make(rest, patch)
  elif program == "pip":
    check_pip(rest)
  elif program == "hf":
    from huggingface_hub.cli.hf import app

    app.main([*rest, "--help"], "hf", standalone_mode=False)  # raises if an option does not exist
  elif program == "img2dataset":
    for flag, value in zip(rest[::2], rest[1::2], strict=True):
      assert value in (IMG2DATASET[flag.removeprefix("--")] or [value]), (flag, value)
  else:
    assert program in ("curl", "sed"), f"{words}: give it a check, or list it in UNCHECKED"


class Parsed(BaseException):
  """Ends a script that has parsed its command line."""


def check_script(path: Path, arguments: list[str], patch: pytest.MonkeyPatch) -> None:
  """Runs a script until it has parsed its arguments."""
  assert path.is_file(), path
  source = path.read_text()
  if "parse_args" not in source:
    assert not arguments, path
    return
  for name in re.findall(r"^import (timm|torch|transformers)\b", source, re.MULTILINE):
    if importlib.util.find_spec(name) is None:
      patch.setitem(sys.modules, name, MagicMock())
  parse = argparse.ArgumentParser.parse_args

  def parse_and_stop(self: argparse.ArgumentParser, *given: Any) -> None:
    parse(self, *given)
    raise Parsed

  patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
  patch.setattr("sys.argv", [str(path), *arguments])
  patch.syspath_prepend(str(path.parent))
  with pytest.raises(Parsed):
    runpy.run_path(str(path), run_name="__main__")


def check_make(arguments: list[str], patch: pytest.MonkeyPatch) -> None:
  """Lets make print what it would run, and checks the scripts in it."""
  done = subprocess.run(
    ["make", "--dry-run", "VENV=.venv-of-nobody", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  for command in re.findall(r"^\S+/bin/python ((?:benchmarks|tools)/\w+\.py.*)", done.stdout, re.MULTILINE):
    path, *rest = shlex.split(command)
    check_script(ROOT / path, rest, patch)


def check_pip(arguments: list[str]) -> None:
  """Checks the files and the extras of the package that a command of pip names."""
  assert arguments[0] == "install"
  setup = (ROOT / "setup.py").read_text()
  for flag, value in zip(arguments[1:], arguments[2:], strict=False):
    assert flag != "-c" or (ROOT / value).is_file()
  (extras,) = [found[1] for word in arguments if (found := re.fullmatch(r"(?:\.|declip_jax)\[(.+)\]", word))]
  assert all(f'"{extra}": [' in setup for extra in extras.split(",")), extras


def check_python(code: str) -> None:
  """Resolves the imports of a program, and the attributes of modules that it uses."""
  tree, modules = ast.parse(code), {}
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      modules |= {one.asname or one.name: importlib.import_module(one.name) for one in node.names}
    elif isinstance(node, ast.ImportFrom):
      module = importlib.import_module(node.module)
      modules |= {one.asname or one.name: getattr(module, one.name) for one in node.names}
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
      getattr(modules[node.value.id], node.attr)


@pytest.mark.parametrize(
  ("words", "problem"),
  [
    ("python benchmarks/methods.py --step 3 --chek", SystemExit),
    ("python benchmarks/nothing.py", AssertionError),
    ("python tools/notebooks.py --all", AssertionError),
    ("python -m pytest tests/nothing", AssertionError),
    ("python -c 'import json; json.lods(1)'", AttributeError),
    ("make dmo", AssertionError),
    ("make bench-input ARGS=--quik", SystemExit),
    ("pip install '.[trian]'", AssertionError),
    ("pip install -c constraint.txt '.[train]'", AssertionError),
    ("hf download A/B --repo-tipe dataset", Exception),
    ("hf downlod A/B", Exception),
    ("img2dataset --url_list a.tsv --input_format jsonlines", AssertionError),
    ("img2dataset --urls a.tsv", KeyError),
    ("gsutil cp a b", AssertionError),
  ],
)
def test_a_command_with_a_mistake_is_found(
  words: str, problem: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
  with pytest.raises(problem):
    check(shlex.split(words), monkeypatch)


def columns(path: Path, kind: str) -> set[str]:
  """The columns of a list for img2dataset."""
  if kind == "tsv":
    with path.open() as file:
      return {*next(csv.reader(file, delimiter="\t"))}
  if kind == "jsonl":
    return {*json.loads(path.read_text().splitlines()[0])}
  return {*parquet.read_schema(path).names}


@pytest.fixture
def lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
  """The folder in which a reader makes the lists, with what the pages download into it."""
  monkeypatch.chdir(tmp_path)
  for name, line in LISTS.items():
    Path(name).write_text(line)
  Path("metadata").mkdir()
  photo = {"title": "My+dog%21", "description": "by <b>me</b>, https://host/a", "downloadurl": "http://host/0.jpg"}
  with gzip.open("metadata/metadata_001.jsonl.gz", "wt") as file:
    file.write(json.dumps(photo) + "\n")
  return tmp_path


def test_the_lists_have_the_columns_that_img2dataset_reads(lists: Path) -> None:
  page = DOCS / "reproduce.md"
  (program,) = blocks(page, "python")
  exec(compile(program, page.name, "exec"), {})
  assert json.loads(Path("yfcc15m.jsonl").read_text()) == {
    "url": "http://host/0.jpg",
    "caption": ["My dog!", "by me, "],
  }
  read = []
  for words in shell_commands(page):
    if words[0] == "sed":
      subprocess.run(words, check=True)
    if words[0] == "img2dataset":
      flags = dict(zip(words[1::2], words[2::2], strict=True))
      path = Path(read.append(flags["--url_list"]) or flags["--url_list"])
      assert {flags["--url_col"], flags["--caption_col"]} <= columns(path, flags["--input_format"]), path
  assert sorted(read) == sorted([*LISTS, "yfcc15m.jsonl"])
  for name in ("Train_GCC-training.tsv", "cc12m.tsv"):
    (row,) = csv.DictReader(Path(name).read_text().splitlines(), delimiter="\t")
    assert row == {"url": "http://host/0.jpg", "caption": "a dog"}


def python_blocks() -> Iterator[Any]:
  """Yields each page and block of Python but those that other tests run."""
  for page in PAGES:
    if page.name not in ("data.md", "reproduce.md"):
      for number, block in enumerate(blocks(page, "python")):
        yield pytest.param(page, block, id=f"{page.name}-{number}")


@pytest.mark.parametrize(("page", "block"), [*python_blocks()])
def test_a_block_of_python_runs(page: Path, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """With small random weights in the place of trained ones, and grey images; a config that it defines is made."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(declip_jax, "load", lambda path: make_clip(0))
  for name in ("one.jpg", "two.jpg", "images/1.jpg", "images/2.jpg"):
    Path(name).parent.mkdir(exist_ok=True)
    Image.new("RGB", (20, 20), "grey").save(name)
  names: dict[str, Any] = {}
  exec(compile(block, page.name, "exec"), names)
  if "get_config" in names:
    assert isinstance(names["get_config"](), ConfigDict)


def test_the_modules_that_the_text_names_are_commands() -> None:
  modules = {module for module, _ in COMMANDS.values()}
  for page in PAGES:
    named = re.findall(r"`python -m (declip_jax\.[\w.]+)[` ]", page.read_text())
    assert {*named} <= modules, page.name
