"""The page of a run: what it has, and that texts from outside cannot become HTML."""

from html.parser import HTMLParser
import math
import shlex

import numpy as np
from PIL import Image
import pytest

from declip_jax import ADDRESS
from declip_jax.reporting.run_page import RunPage, Uses, next_commands, write_page

HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=y>"
METRICS = [
  {"step": 10, "loss": 3.0, "eval/zero_shot/top1": 0.5, "warning/at_chance": 1.0, "bad/damaged": 2.0},
  {"step": 20, "loss": 2.5, "eval/zero_shot/top1": 0.75, "eval/zero_shot/images": 2000.0, "warning/at_chance": 1.0},
  {"step": 30, "loss": math.nan, "eval/zero_shot/top1": 0.625, "temperature": None},
]


class Parsed(HTMLParser):
  """The tags of a page, its pictures, and its text."""

  def __init__(self, page):
    super().__init__()
    self.tags, self.pictures, self.text = set(), [], ""
    self.feed(page)

  def handle_starttag(self, tag, attrs):
    self.tags.add(tag)
    self.pictures += [dict(attrs)["src"]] if tag == "img" else []

  def handle_data(self, data):
    self.text += f" {data}"


@pytest.fixture
def workdir(tmp_path):
  folder = tmp_path / "a run & more"
  folder.mkdir()
  for name in ("zero_shot", "curves", "50% off & #1", "views"):
    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(folder / f"{name}.png")
  return folder


USES = Uses(is_evaluated=True, export_format="open_clip", searched="scenes:test/4 5")


def written(workdir, metrics=METRICS, title=HOSTILE):
  command = ["/x/declip_jax/train.py", f"--config=demo:data={HOSTILE}", "--workdir", "a run & more"]
  changes = [f"config.data.train: () -> ({HOSTILE!r},)", *(f"config.field{number}: 0 -> 1" for number in range(24))]
  page = RunPage(title, 40, command, USES, "clip with ViT-B/32", changes, HOSTILE)
  write_page(workdir, page, metrics)
  return (workdir / "index.html").read_text(encoding="utf-8")


def test_the_page_has_all_pictures_those_of_the_run_first(workdir):
  shown = Parsed(written(workdir)).pictures
  assert shown == ["views.png", "curves.png", "50%25%20off%20%26%20%231.png", "zero_shot.png"]


def test_the_page_has_scores_warnings_and_commands(workdir):
  text = Parsed(written(workdir)).text
  assert "30 of 40 steps" in text
  assert "2 damaged" in text
  rows = [row for row in text.split("\n") if "top1" in row]
  assert rows[0].split() == ["zero_shot", "top1", "62.5%", "75.0%", "20"]
  assert "loss 2.5" in text
  assert "eval/zero_shot/images 2,000" in text
  assert f"at_chance , steps 10 to 20: see {ADDRESS}/blob/main/docs/when_it_does_not_learn.md#at-chance" in text
  assert f"--workdir '{workdir}'" in text
  assert "python -m declip_jax.train" in text
  assert f"python -m declip_jax.search --weights '{workdir}' --images 'scenes:test/4 5'" in text
  assert "config.field22: 0 -> 1\n... and 1 other field" in text
  assert "config.field23" not in text


def test_the_commands_are_those_that_fit_the_run_ready_for_a_shell(workdir):
  evaluate, export, search = (line for line in next_commands(workdir, USES) if not line.startswith("#"))
  assert shlex.split(evaluate)[1:] == ["-m", "declip_jax.evaluate", "--workdir", str(workdir)]
  assert shlex.split(export)[3:] == ["--workdir", str(workdir), "--format", "open_clip", "--output", "export"]
  assert shlex.split(search)[3:] == ["--weights", str(workdir), "--images", "scenes:test/4 5"]
  assert all(line in Parsed(written(workdir)).text for line in (evaluate, export, search))
  bare = next_commands(workdir, Uses(False, "open_clip", ""))
  assert bare == ["# export its weights", export]


def test_texts_from_outside_do_not_become_html(workdir):
  page = Parsed(written(workdir))
  assert "script" not in page.tags
  assert len(page.pictures) == 4
  assert page.text.count("alert(") == 4  # title, command, difference and config
  assert "half a pair ?" in written(workdir, title="half a pair \ud83d")


def test_the_page_is_the_same_for_the_same_run(workdir):
  assert written(workdir) == written(workdir)
  assert "0 of 40 steps" in written(workdir, [])
