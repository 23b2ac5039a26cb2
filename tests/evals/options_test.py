"""Tests of `declip_jax.evals.options`: what cannot run is rejected by name, before any source is opened."""

import math
from typing import Any

from greys import Greys, grey_encoders
from ml_collections import ConfigDict
import pytest

from declip_jax import build
from declip_jax.config import EVALUATIONS
from declip_jax.evals import EVALUATORS, check_options, defaults, suites
from declip_jax.evals.data_files import Splits
from declip_jax.evals.jobs import DataSource, Job, run_jobs

NAN, INF = math.nan, math.inf
WHOLE = [0, -1, 1.5, True, "7", None]  # that no number of something is
VALUES = [(), (1, 1), (1, 1.5), 3, "12", (True,)]  # that no list of different numbers is
WRONG = {
  ("zero_shot", "templates"): [(), "a {}", ("a",), 3],
  ("retrieval", "equal_texts"): ["no", 1],
  ("retrieval", "prefix"): [1, ("a ",)],
  ("retrieval", "folds"): WHOLE,
  ("linear_probe", "features"): ["text", 1, ("pooled",)],
  ("sgd_probe", "rates"): [*VALUES[:2], *VALUES[3:], (0.0,), (-0.1,), (NAN,), (0.1, INF)],
  ("sgd_probe", "epochs"): WHOLE,
  ("sgd_probe", "batch_size"): WHOLE,
  ("sgd_probe", "optimizer"): ["lars", ["sgd"]],
  ("few_shot", "shots"): [*VALUES, (0,), (2, 2), (-1,), (NAN,)],
  ("few_shot", "seeds"): [*VALUES, (-1,), (0, 0)],
  ("few_shot", "method"): ["lasso", ["ridge"]],
  ("few_shot", "strength"): [-1.0, NAN, INF, "1", True],
  ("knn", "neighbours"): [*VALUES, (0,), (5, 5), (-3,)],
  ("knn", "headline"): [*WHOLE, 5],  # of which there are no votes
  ("knn", "temperature"): [0, 0.0, -0.07, NAN, INF, "1", True],
}


@pytest.mark.parametrize(("kind", "name"), WRONG)
def test_each_wrong_value_of_an_option_is_named_with_the_legal_ones(kind: str, name: str) -> None:
  entry = {"kind": kind, "data": "folder:/is/never/opened", "train": "folder:/nor/this"}
  entry = entry if EVALUATORS[kind].needs_train else {**entry, "train": ""}
  for value in WRONG[kind, name]:
    with pytest.raises(ValueError, match=rf"^config\.evals\.mine\.{name}(=|: ).*(expected|needs one)"):
      build.make_jobs(ConfigDict({"mine": ConfigDict({**entry, name: value}, convert_dict=False)}))


def test_options_of_jobs_that_no_config_has_made_are_checked() -> None:
  test = DataSource(Greys([(1, 0)]))
  job = Job("a", "set/a", "knn", {"test": test, "train": test}, {"neighbours": (3, 5), "headline": 4})
  with pytest.raises(ValueError, match=r"^a\.headline=4: expected one of 3,5, the values of neighbours$"):
    next(run_jobs([job], grey_encoders(8), lambda job: None))


def test_every_option_has_legal_values() -> None:
  for kind, evaluator in EVALUATORS.items():
    if evaluator.function.__module__.startswith("declip_jax."):
      check_options(entry_of(kind), "mine")
      for name in defaults(kind):
        with pytest.raises(ValueError, match=rf"mine\.{name}=<object"):
          check_options({**entry_of(kind), name: object()}, "mine")


def entry_of(kind: str) -> dict[str, Any]:
  entry = EVALUATIONS[kind]("scenes:test").to_dict()
  return {**entry, "train": "scenes:train"} if EVALUATORS[kind].needs_train else entry


@pytest.mark.parametrize(
  ("task", "option", "message"),
  [
    ("sgd_probe", "epochs=0", r"--option=sgd_probe\.epochs=0: expected a whole number, at least 1"),
    ("knn", "neighbours=0", r"--option=knn\.neighbours=\(0,\): expected one or more different values, each a whole"),
    ("knn", "headline=5", r"--option=knn\.headline=5: expected one of 10,20,100,200, the values of neighbours$"),
    ("knn", "neighbours=3,5", r"--option=knn\.headline=20: expected one of 3,5, the values of neighbours$"),
    ("knn", "temperature=nan", r"--option=knn\.temperature=nan: expected a finite number, more than 0"),
    (
      "few_shot",
      "strength=5",
      r"--option=few_shot\.strength=5\.0 has an effect only with .*method=logistic, not with ridge",
    ),
    ("few_shot", "shots=2,2", r"--option=few_shot\.shots=\(2, 2\): expected one or more different values"),
  ],
)
def test_a_flag_with_a_wrong_value_is_named(task: str, option: str, message: str) -> None:
  options = [f"{task}.{option}", *(["few_shot.method=ridge"] if task == "few_shot" else [])]
  with pytest.raises(ValueError, match=message):
    suites.make_jobs({"own/mine": Splits("folder:/is/never/opened")}, tasks=[task], options=options)
