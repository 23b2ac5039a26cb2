"""Tests of the evaluations of a config: bad ones are rejected before anything runs."""

import inspect

from ml_collections import ConfigDict
import pytest
import references as reference

from declip_jax import config
from declip_jax.build import check_evals, make_evaluators
from declip_jax.evals import EVALUATORS, Evaluator


@pytest.mark.parametrize(
  ("weights", "legal"),
  [
    ({"clip": 1.0}, True),
    ({"filip": 1.0}, True),
    ({"sigmoid": 1.0, "simclr": 1.0}, True),
    ({"nns": 0.2}, True),
    ({"simclr": 1.0}, False),
    ({"simclr": 1.0, "clip": 0.0}, False),
    ({"simsiam": 1.0, "mlm": 1.0}, False),  # there is a joint space, but nothing is compared in it
  ],
)
def test_evaluations_of_a_run_without_image_text_comparison_are_rejected(weights, legal):
  objective = reference.objective(weights)
  check_evals(ConfigDict(), objective)
  evals = ConfigDict({"heldout": config.zero_shot("scenes:heldout")})
  if legal:
    check_evals(evals, objective)
    return
  with pytest.raises(
    ValueError, match=r"config.evals has \['heldout'\].*config.objective.*{'sim.*give one of \['clip'"
  ):
    check_evals(evals, objective)


def test_entries_of_configs_have_the_defaults_of_their_evaluators() -> None:
  for make in (config.zero_shot, config.retrieval):
    entry = make("scenes:heldout").to_dict()
    arguments = inspect.signature(EVALUATORS[entry.pop("kind")].function).parameters.values()
    options = {argument.name: argument.default for argument in arguments if argument.kind is argument.KEYWORD_ONLY}
    assert entry == {"data": "scenes:heldout", **options}


def test_a_run_without_texts_may_have_evaluations_that_need_none(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setitem(EVALUATORS, "knn", Evaluator(lambda features, pictures: iter(()), needs_text=False))
  evals = ConfigDict({"heldout": config.zero_shot("scenes:heldout"), "near": {"kind": "knn", "data": "scenes:heldout"}})
  objective = reference.objective({"simclr": 1.0})
  with pytest.raises(ValueError, match=r"config.evals has \['heldout'\]"):
    check_evals(evals, objective)
  del evals.heldout
  check_evals(evals, objective)
  evals.near.kind = "kmm"  # that it does not exist comes before what it needs
  with pytest.raises(ValueError, match=r"config.evals.near.kind='kmm'"):
    check_evals(evals, objective)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"kind": "kmm"}, r"config.evals.mine.kind='kmm'.*'retrieval'.*'zero_shot'"),
    ({"kind": "retrieval", "templates": ()}, r"config.evals.mine .*\['templates'\].*'retrieval'.*\['equal_texts'\]"),
  ],
)
def test_evaluations_that_do_not_exist_are_rejected(fields, message, tmp_path):
  evals = ConfigDict({"mine": {"data": "scenes:test/4/16", **fields}})
  with pytest.raises(ValueError, match=message):
    make_evaluators(evals, tmp_path)
