"""Tests of `declip_jax.evals.results`: files that CLIP_benchmark merges, without NaN, equal for equal results."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from declip_jax.evals import results
from declip_jax.evals.results import Result, Scores


def make_result(**ours: object) -> Result:
  return Result(
    dataset="vtab/pets",
    model="ViT-B-32",
    pretrained="openai",
    task="zeroshot_classification",
    metrics={"acc1": np.float64(0.5), "acc5": 1.0},
    ours={"key": "0", "headline": "top1", "metrics": {"top1": 0.5}, "intervals": {"top1": (0.4, 0.6)}, **ours},
  )


def test_a_file_has_the_keys_of_clip_benchmark_first_and_reads_back(tmp_path: Path) -> None:
  path = results.write(tmp_path, make_result(), {"predicted": np.array([3, -1], np.int16)})
  assert path.name == "vtab_pets_openai_ViT-B-32_en_zeroshot_classification.json"
  fields = json.loads(path.read_text())
  assert [*fields] == ["dataset", "model", "pretrained", "task", "metrics", "language", "declip_jax"]
  assert fields["metrics"] == {"acc1": 0.5, "acc5": 1.0}
  assert fields["declip_jax"]["intervals"] == {"top1": [0.4, 0.6]}
  ((found, read),) = results.read_all([tmp_path])
  assert (found, read.dataset, read.ours["headline"], read.stem) == (path, "vtab/pets", "top1", path.stem)
  np.testing.assert_array_equal(np.load(results.predictions_path(path))["predicted"], [3, -1])


def test_a_variant_has_a_file_of_its_own() -> None:
  assert make_result(variant="openai7").stem == f"{make_result().stem}_openai7"


def test_equal_results_are_equal_files(tmp_path: Path) -> None:
  files = []
  for folder in (tmp_path / "a", tmp_path / "b"):
    path = results.write(folder, make_result(), {"predicted": np.arange(5)})
    files.append((path.read_bytes(), results.predictions_path(path).read_bytes()))
  assert files[0] == files[1]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_never_written(value: float, tmp_path: Path) -> None:
  with pytest.raises(ValueError, match="top1"):
    Scores({"top1": value})
  with pytest.raises(ValueError, match="top1"):
    Scores({"top1": 0.5}, intervals={"top1": (0.0, value)})
  with pytest.raises(ValueError, match="JSON compliant"):
    results.write(tmp_path, make_result(details={"x": [value]}), {})
  assert not [*tmp_path.rglob("*.*")]


def test_files_of_others_are_skipped_but_named_if_they_are_asked_for(tmp_path: Path) -> None:
  path = tmp_path / "theirs.json"
  path.write_text('{"dataset": "x"}')
  assert results.read_all([tmp_path]) == []
  with pytest.raises(ValueError, match=r"theirs.json: not a result"):
    results.read(path)
