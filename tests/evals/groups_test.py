"""Tests of the tables of groups in a report, from the scores of an evaluation on."""

import json
from pathlib import Path

from evals.scoring_test import make_data
import numpy as np
import pytest
from scipy import stats

from declip_jax.evals import intervals, results
from declip_jax.evals.comparison import read_methods
from declip_jax.evals.report import groups, scores
from declip_jax.evals.report.compared import Report
from declip_jax.evals.report.files import to_json
from declip_jax.evals.results import Result
from declip_jax.evals.scoring import score
from declip_jax.reporting.documents import Heading, Table

RIGHT = {"fair": (9, 8), "unfair": (11, 2)}  # of 12 images of each of two regions


def write(folder: Path, model: str, right: tuple[int, int], **details: object) -> None:
  """Writes the result of a classifier that is right on the first images of each group."""
  data = make_data("", 6)
  logits = np.eye(6, dtype=np.float32)[data.test.label]
  for group, number in enumerate(right):
    logits[12 * group + number : 12 * (group + 1)] *= -1
  found = score(data, logits)
  ours = {"kind": "zero_shot", "headline": found.headline, "metrics": found.metrics, "intervals": found.intervals}
  ours |= {"details": {**found.details, **details}, "about": {}, "options": {}, "data": {}, "weights": {"step": 1}}
  results.write(folder, Result("faces", model, "w", "zeroshot_classification", {}, ours), found.predictions)


def table_of(report: Report) -> Table:
  _, heading, table = groups.groups(report, "zero_shot")
  assert heading == Heading("Groups of faces by region", 3)
  return table


def test_each_group_has_its_accuracy_images_and_interval_and_the_gap_is_said(tmp_path: Path) -> None:
  for model, right in RIGHT.items():
    write(tmp_path, model, right)
  report = Report(read_methods([tmp_path]))
  table = table_of(report)
  assert [*table.header] == ["group", "images", "fair", "unfair"]
  assert [row[:2] for row in table.rows] == [["0", "12"], ["1", "12"], ["best minus worst", ""]]
  for column, right in enumerate(RIGHT.values(), 2):
    for group, number in enumerate(right):
      low, high = intervals.clopper_pearson(number, 12)
      expected = f"{100 * number / 12:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
      assert table.rows[group][column] == expected
  assert [*table.rows[2][2:]] == ["8.3 (0 minus 1)", "75.0\\* (0 minus 1)"]
  _, found = json.loads(to_json(report))["groups"]
  assert (found["method"], found["grouping"], found["groups"]["1"]["images"]) == ("unfair", "region", 12)
  gap = found["best_minus_worst"]
  assert gap["value"] == pytest.approx(0.75)
  assert gap["p"] == pytest.approx(stats.chi2_contingency([[11, 2], [1, 10]], correction=False).pvalue)
  assert table in scores.scores(report, "zero_shot", tmp_path)


def test_results_without_numbers_of_images_have_accuracies_alone(tmp_path: Path) -> None:
  write(tmp_path, "old", (11, 2), images_by_region={})
  table = table_of(Report(read_methods([tmp_path])))
  assert [*table.header] == ["group", "old"]
  assert [*map(list, table.rows)] == [["0", "91.7"], ["1", "16.7"], ["best minus worst", "75.0 (0 minus 1)"]]


def test_groups_over_seeds_have_means(tmp_path: Path) -> None:
  values = (12, 3), (10, 3), (11, 6)
  for seed, right in enumerate(values):
    write(tmp_path, f"a-{seed}", right)
  (own,) = groups.compared((report := Report(read_methods([tmp_path]))), report.tasks[0])
  for group, score_of in own.scores.items():
    expected = np.array([right[group] / 12 for right in values])
    assert score_of == (pytest.approx(expected.mean()), pytest.approx(intervals.student(expected)), 3)
  assert own.p is None
  assert own.difference == pytest.approx(7 / 12)


def test_frames_of_one_video_and_a_single_group_have_no_table(tmp_path: Path) -> None:
  write(tmp_path, "a", (9, 8), accuracy_by_video={"0": 0.5, "1": 0.5}, accuracy_by_region={"0": 0.5})
  assert not [*groups.groups(Report(read_methods([tmp_path])), "zero_shot")]


def test_of_many_groups_those_with_the_most_images_are_shown(tmp_path: Path) -> None:
  accuracy, images = ({str(group): of(group) for group in range(40)} for of in (lambda _: 1.0, lambda group: group + 1))
  write(tmp_path, "a", (9, 8), accuracy_by_region=accuracy, images_by_region=images)
  *_, text, table = groups.groups(Report(read_methods([tmp_path])), "zero_shot")
  assert text == "The 30 groups with the most images, of 40:"
  assert [row[0] for row in table.rows[:-1]] == [str(group) for group in range(10, 40)]
  assert table.rows[-1][2] == "0.0 (0 minus 0)"  # all answers are right
