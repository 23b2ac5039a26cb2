"""Tests of `declip_jax.evals.suites`: the jobs of data files and suites, with their classes, prompts and metrics."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
import pytest

from declip_jax.data.storage import layouts
from declip_jax.evals import catalogue, data_files, suites
from declip_jax.evals.catalogue import Suite
from declip_jax.evals.results import Result


def make_folder(folder: Path, names: tuple[str, ...]) -> str:
  for name in names:
    (folder / name).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / name / "a.png")
  return f"folder:{folder}"


@pytest.fixture
def data(tmp_path: Path) -> Mapping[str, data_files.Splits]:
  """Three of CIFAR-10's classes are not enough; a set of two classes, and pairs of images and captions."""
  test = make_folder(tmp_path / "mine" / "test", ("cats", "dogs"))
  train = make_folder(tmp_path / "mine" / "train", ("cats", "dogs"))
  cifar = make_folder(tmp_path / "cifar", tuple(reversed(catalogue.data_set("cifar10").classes)))
  Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
  (tmp_path / "pairs.tsv").write_text("filepath\ttitle\na.png\ta cat\n")
  lines = f"cifar10 = {cifar}\nown/mine = {test} | {train}\nown/pairs = table:{tmp_path}/pairs.tsv\n"
  return data_files.parse_data(lines, "sets.txt")


def test_tasks_fit_the_data_sets_and_need_their_splits(data: Mapping[str, data_files.Splits]) -> None:
  jobs, remarks = suites.make_jobs(data, tasks=["zero_shot", "retrieval", "knn"])
  assert [job.name for job in jobs] == [
    "cifar10/zero_shot",
    "own/mine/zero_shot",
    "own/mine/knn",
    "own/pairs/retrieval",
  ]
  assert remarks == ["cifar10: knn needs a split to train on: add | TRAIN to its line in the data file"]
  assert [*jobs[2].splits] == ["test", "train"]
  assert [*jobs[1].splits] == ["test"]
  assert jobs[1].splits["test"].source is jobs[2].splits["test"].source  # opened and encoded once
  assert [job.kind for job in suites.make_jobs(data)[0]] == ["zero_shot", "zero_shot", "retrieval"]


def test_classes_are_those_of_the_data_set_by_name(data: Mapping[str, data_files.Splits]) -> None:
  cifar, mine = suites.make_jobs(data, tasks=["zero_shot"])[0]
  entry = catalogue.data_set("cifar10")
  assert cifar.data["classnames"] == entry.classes
  names = cifar.splits["test"].source.classnames  # in alphabetical order
  assert [entry.classes[index] for index in cifar.splits["test"].classes] == [*names]
  assert cifar.dataset == "vtab/cifar10"
  assert len(cifar.data["prompts"][0]) == 18
  assert mine.data["prompts"] == (("a photo of a cats.",), ("a photo of a dogs.",))
  np.testing.assert_array_equal(mine.splits["test"].classes, [0, 1])


def test_prompts_may_lie_next_to_the_data(tmp_path: Path) -> None:
  spec = make_folder(tmp_path / "mine" / "test", ("cats", "dogs"))
  path = tmp_path / "mine" / layouts.TEMPLATES
  path.write_text("{c}\na photo of {c}\n")
  (job,) = suites.make_jobs({"own/mine": data_files.Splits(spec)}, tasks=["zero_shot"])[0]
  assert (job.data["prompts"][1], job.about["prompts"]) == (("dogs", "a photo of dogs"), "own")
  path.write_text("a photo\n")
  with pytest.raises(ValueError, match=rf"{layouts.TEMPLATES}: prompt template 'a photo' needs one {{}}"):
    suites.make_jobs({"own/mine": data_files.Splits(spec)}, tasks=["zero_shot"])


def test_a_suite_has_its_own_metric_and_prompts(data: Mapping[str, data_files.Splits]) -> None:
  suite = Suite("s", "", ("cifar10", "pets"), metrics={"cifar10": "mean_per_class"}, prompts={"*": "bare"})
  (job,), remarks = suites.make_jobs(data, [suite], ["zero_shot"])
  assert (job.data["metric"], job.variant, job.about["prompts"]) == ("mean_per_class", "", "bare")
  assert job.data["prompts"][0] == (catalogue.data_set("cifar10").classes[0],)
  assert remarks == ["s: the data file lacks 1 of 2 data sets (see --print_data): pets"]
  (other,), _ = suites.make_jobs(data, [suite], ["zero_shot"], "openai")
  assert (other.variant, len(other.data["prompts"][0])) == ("openai", 18)  # has a file of its own


def test_prompts_may_come_from_a_file(data: Mapping[str, data_files.Splits], tmp_path: Path) -> None:
  (tmp_path / "mine.txt").write_text("my {}\nyour {}\n")
  jobs, _ = suites.make_jobs(data, tasks=["zero_shot"], prompts=str(tmp_path / "mine.txt"))
  assert jobs[1].data["prompts"] == (("my cats", "your cats"), ("my dogs", "your dogs"))
  assert {job.variant for job in jobs} == {"mine"}


@pytest.mark.parametrize(
  ("line", "tasks", "message"),
  [
    ("own/x = scenes:test/4/16", ["zeroshot"], r"--tasks=zeroshot: choose some of .*did you mean zero_shot"),
    ("own/x = folder:/nowhere", ["zero_shot"], "own/x: test: .*nowhere"),
    ("cifar10 = scenes:heldout/4/16", ["zero_shot"], "do not map one to one onto the 10 of cifar10"),
    ("own/x = scenes:heldout/4/16", ["retrieval"], "nothing to evaluate"),
  ],
)
def test_what_cannot_be_evaluated_is_named(line: str, tasks: list[str], message: str) -> None:
  with pytest.raises(ValueError, match=message):
    suites.make_jobs(data_files.parse_data(line, "sets.txt"), tasks=tasks)


def test_a_mean_needs_all_data_sets_of_its_suite() -> None:
  def result(key: str, value: float) -> Result:
    ours = {"kind": "knn", "headline": "top1", "metrics": {"top1": value}, "about": {"key": key}}
    return Result(key, "m", "p", "knn", {}, ours)

  suite = Suite("s", "", ("a", "b"), means={"mean": ("a", "b")})
  found = {"a/knn": result("a", 0.5), "b/knn": result("b", 0.25), "c/knn": result("c", 1.0)}
  assert suites.means(found, [suite]) == {"s/knn/mean": 0.375}
  del found["b/knn"]
  assert suites.means(found, [suite]) == {}
