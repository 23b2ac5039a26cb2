"""Tests of data sets whose classes are some of another one's, such as ImageNet's shifts, from the data file on."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
import json
from pathlib import Path
from typing import Any

from greys import grey_encoders
import numpy as np
from PIL import Image
import pytest

from declip_jax.evals import catalogue, data_files, linear_probe, suites
from declip_jax.evals.catalogue import Suite
from declip_jax.evals.encoders import ModelClassifier
from declip_jax.evals.jobs import Job, run_jobs
from declip_jax.evals.results import Scores

# Greys of the images of each class; a night is a black or a dark grey, and no grey class is part of the shift.
GREYS = {"black": (0, 10, 20), "dark": (60, 70, 80), "grey": (120, 130, 140), "white": (200, 210, 220)}
SHIFT = {"night": (5, 90), "day": (190, 105)}
SUITE = Suite("toys", "", ("greys", "shift", "greys_on_shift"))


def make_folder(folder: Path, greys: Mapping[str, tuple[int, ...]]) -> str:
  for name, values in greys.items():
    (folder / name).mkdir(parents=True)
    for value in values:
      Image.new("RGB", (16, 16), (value,) * 3).save(folder / name / f"{value}.png")
  return f"folder:{folder}"


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mapping[str, data_files.Splits]]:
  """A catalogue of three: greys, two classes of three of them, and the images of these three."""
  common = {"task": "classification", "metric": "top1", "prompts": {"own": ["{}"]}}
  entries: dict[str, dict[str, Any]] = {
    "greys": {
      "title": "Greys",
      "classes": [*GREYS],
      "folders": ["n00000001", "n00000002", "n00000003", "n00000004"],
      "aliases": {"bright": "white"},
      "validation_per_class": 1,
      **common,
    },
    "shift": {"title": "Shift", "of": "greys", "ids": [[0, 1], [3]], "classes": ["night", "day"], **common},
    "greys_on_shift": {"title": "Greys, classes of Shift", "classes_of": "shift", "images": "greys"},
  }
  (tmp_path / "catalogue").mkdir()
  for key, about in entries.items():
    (tmp_path / "catalogue" / f"{key}.json").write_text(json.dumps(about))
  monkeypatch.setattr(catalogue, "_FOLDER", tmp_path / "catalogue")
  catalogue.keys.cache_clear()
  catalogue.data_set.cache_clear()
  test, train = (make_folder(tmp_path / split, GREYS) for split in ("test", "train"))
  shift = make_folder(tmp_path / "shift", SHIFT)
  yield data_files.parse_data(f"greys = {test} | {train}\nshift = {shift} | {train}\n", "sets.txt")
  catalogue.keys.cache_clear()
  catalogue.data_set.cache_clear()


def run(jobs: list[Job], events: list[str], classifier: ModelClassifier | None = None) -> dict[str, Scores]:
  encoders = replace(grey_encoders(16, events), classifier=classifier)
  found = {job.name: scores for job, scores in run_jobs(jobs, encoders, lambda job: None)}
  assert all(isinstance(scores, Scores) for scores in found.values()), found
  return found


def test_images_without_shift_are_those_of_the_same_classes(data: Mapping[str, data_files.Splits]) -> None:
  """The line of all images serves them; their classifier has the classes of the shift alone."""
  jobs, remarks = suites.make_jobs(data, [SUITE], ["zero_shot"])
  assert not remarks
  assert [(job.name, job.data["classnames"]) for job in jobs] == [
    ("greys/zero_shot", tuple(GREYS)),
    ("shift/zero_shot", ("night", "day")),
    ("greys_on_shift/zero_shot", ("night", "day")),
  ]
  assert jobs[0].splits["test"].source is jobs[2].splits["test"].source
  assert jobs[2].splits["test"].classes.tolist() == [0, 0, -1, 1]
  _, (remark,) = suites.make_jobs({"shift": data["shift"]}, [SUITE], ["zero_shot"])
  assert remark.endswith("greys, greys_on_shift")


def test_a_probe_under_shift_is_that_of_all_classes(
  data: Mapping[str, data_files.Splits], monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(linear_probe, "_COARSE", range(0, 32, 16))  # two strengths that take few passes
  monkeypatch.setattr(linear_probe, "_HALVINGS", ())
  jobs, _ = suites.make_jobs(data, [SUITE], ["linear_probe"])
  events: list[str] = []
  found = run(jobs, events)
  assert len(events) == 3  # each folder is encoded once
  assert found["greys/linear_probe"].metrics["images"] == 12
  for name, images in (("shift", 4), ("greys_on_shift", 9)):
    scores = found[f"{name}/linear_probe"]
    assert scores.details["fits"] == found["greys/linear_probe"].details["fits"]
    assert scores.details["validation"].startswith("per class, the last 1 images")
    assert scores.metrics["images"] == images
  np.testing.assert_array_equal(found["shift/linear_probe"].predictions["label"], [1, 1, 0, 0])  # by name of the folder


def test_a_fine_tuned_model_answers_the_classes_of_each_data_set(data: Mapping[str, data_files.Splits]) -> None:
  """Its classes are in another order, and have other names, than those of the catalogue, but for one."""
  centers = {"GREY": 125, "bright": 205, "black": 10, "n00000002": 70}
  logits = -np.abs(np.arange(256)[:, None] - np.array([*centers.values()])).astype(np.float32)
  classifier = ModelClassifier(lambda pooled: logits[pooled[:, 0].astype(int)], tuple(centers))
  jobs, _ = suites.make_jobs(data, [SUITE], ["classify"])
  found = run(jobs, [], classifier)
  assert [(scores.metrics["images"], scores.metrics["top1"]) for scores in found.values()] == [
    (12, 1),
    (4, 0.75),
    (9, 1),
  ]
  shift = found["shift/classify"].predictions  # day: 190 and, were grey an answer, 105; night: 5 and 90
  assert (shift["label"].tolist(), shift["predicted"].tolist()) == ([1, 1, 0, 0], [0, 1, 0, 0])
  few = classifier._replace(classnames=("GREY", "bright", "black", "blue"))
  with pytest.raises(AssertionError, match=r"only in the model: 'blue'; only in greys: 'dark'"):
    run(jobs, [], few)


OPTIONS: Mapping[str, dict[str, Any]] = {
  "knn": {"neighbours": (1,), "headline": 1},
  "few_shot": {"shots": (2,), "seeds": (0,), "method": "ridge"},
  "nearest_mean": {"features": "joint"},
  "sgd_probe": {"rates": (0.01,), "epochs": 1},
}


@pytest.mark.parametrize("task", OPTIONS)
def test_other_probes_know_all_classes_too(task: str, data: Mapping[str, data_files.Splits]) -> None:
  jobs, _ = suites.make_jobs(data, [SUITE], [task])
  found = run([replace(job, options=OPTIONS[task]) for job in jobs], [])
  assert [scores.metrics["images"] for scores in found.values()] == [12, 4, 9]
  if task == "few_shot":
    assert found["greys_on_shift/few_shot"].metrics["shots_2"] == 1
  if task == "nearest_mean":
    # Grey, the nearest class of 105, is not an answer here.
    assert found["shift/nearest_mean"].predictions["predicted"].tolist() == [1, 1, 0, 0]
