"""docs/own_captions.md: its commands are legal, and they do what the page says, from the first to the last."""

import csv
import os
from pathlib import Path
import re
import shlex
import subprocess
import sys

from PIL import Image
import pytest
from runs import environment

from declip_jax import config_files
from declip_jax.__main__ import COMMANDS
from declip_jax.command_line import check_field
from declip_jax.config import EVALUATIONS
from declip_jax.data.sources.scenes import open_scenes
from declip_jax.planning.architecture import FOR_CPUS
from declip_jax.reporting.metrics import read_metrics

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "own_captions.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
LINES = [line for _, block in BLOCKS for line in block.replace("\\\n", "").splitlines()]
SHELL = [shlex.split(line) for line in LINES if line.startswith("python -m ")]
TRAIN = [words for words in SHELL if words[2] == "declip_jax.train"]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
  """The working folder of the page: tables of scenes with two captions each, and a folder of classes."""
  monkeypatch.chdir(tmp_path)
  source = open_scenes("train/60/32")
  with open("pairs.csv", "w") as pairs, open("test.csv", "w") as test:
    tables = [csv.writer(pairs), csv.writer(test)]
    for table in tables:
      table.writerow(("image", "caption"))
    for index in range(len(source)):
      example = source[index]
      name = source.classnames[example["label"]]
      for path in (f"images/{index:04}.jpg", f"classes/{name}/{index}.jpg"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(example["image"]).save(path)
      for caption in (example["captions"][0], f"a photo of {name}"):
        tables[index % 5 == 0].writerow((f"images/{index:04}.jpg", caption))
  return tmp_path


def flag(words: list[str], name: str) -> str:
  """The value of a flag, which follows a = or is the next word."""
  for word, following in zip(words, [*words[1:], ""], strict=True):
    if word == f"--{name}":
      return following
    if word.startswith(f"--{name}="):
      return word.partition("=")[2]
  raise AssertionError(f"{shlex.join(words)} has no --{name}")


def test_the_configs_and_links_of_the_page_exist(data: Path) -> None:
  assert {words[2] for words in SHELL} <= {module for module, _ in COMMANDS.values()}
  assert len(TRAIN) == 4
  for words in TRAIN:
    if flag(words, "config") == "my_config.py":  # which another command of the page writes
      assert any(other[2:4] == ["declip_jax.new", "my_config.py"] for other in SHELL)
      continue
    config = config_files.load(flag(words, "config"))
    assert config.data.train == ("kept:10%,5000:table:pairs.csv",)
    for field, value in re.findall(r"--config\.(\S+?)=(\S+)", shlex.join(words)):
      if field == "evals.mine.kind":
        config.evals.mine = EVALUATIONS[value]("")
      check_field(config, field, value)
  for path in re.findall(r"\]\((?!https?:|#)([^)#]+)", PAGE):
    assert (ROOT / "docs" / path).exists(), path


@pytest.mark.slow
def test_the_page_goes_from_a_table_to_an_exported_model(data: Path, capsys: pytest.CaptureFixture) -> None:
  environ = environment() | {"PYTHONPATH": os.pathsep.join(sys.path)}
  printed = ""
  for language, block in BLOCKS:
    if language == "python":
      exec(compile(block.replace("\\\n", ""), "own_captions.md", "exec"), {})
      assert re.fullmatch(r"(-?\d\.\d{3}  images/\d{4}\.jpg\n){3}", capsys.readouterr().out)
    for line in block.replace("\\\n", "").splitlines():
      if not line.startswith("python -m "):
        continue
      words = [sys.executable, *shlex.split(line.replace("--steps 100", "--steps 2"))[1:]]
      if "ViT-B/32" in line:  # too large for a test
        words.append("--print_config")
      done = subprocess.run(words, env=environ, capture_output=True, text=True, check=False)
      assert done.returncode == 0, (line, done.stderr)
      if words[2] == "declip_jax.data.inspect":
        assert done.stdout.splitlines()[-1].endswith(shlex.join(TRAIN[0]).replace("ViT-B/32", FOR_CPUS))
        assert Path(flag(words, "sheet")).is_file()
      printed += done.stderr
  assert printed.count("chosen for 43 samples and 1 x cpu: model.dtype=float32, ") == 3
  for run, evaluated in {"try": ["retrieval"], "clip": ["mine", "retrieval"], "my_config": ["retrieval"]}.items():
    last = read_metrics(Path("runs") / run)[-1]
    names = {metric.split("/")[1] for metric in last if metric.startswith("eval/")}
    assert (last["step"], sorted(names)) == (2, evaluated)
  assert len([*Path("runs/try/results").glob("*.json")]) == 3
  assert "retrieval" in Path("report/report.md").read_text()
  assert Path("export/open_clip_config.json").is_file()
