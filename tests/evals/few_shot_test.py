"""Tests of `declip_jax.evals.few_shot` against big_vision's formula in float64 and scikit-learn's optima."""

import numpy as np
import pytest
import references as reference

from declip_jax.evals import few_shot
from declip_jax.evals.rows import Labelled, ProbeData
from declip_jax.sharding import make_mesh

GOLDEN = reference.below(reference.load("probes"), "few/")
TRAIN, TEST = (Labelled(GOLDEN[f"X_{name}"], GOLDEN[f"y_{name}"]) for name in ("train", "test"))
SHOTS = GOLDEN["shots"].tolist()


def top1(scores, label):
  return float((scores.argmax(axis=1) == label).mean())


@pytest.fixture(scope="module")
def data():
  return ProbeData(TRAIN, TEST, top1, 8, make_mesh(4, 2))


@pytest.mark.parametrize("column", range(4))
def test_ridge_regression_equals_big_visions_in_float64(data, column):
  expected, l2 = GOLDEN["lsr/test_top1_seed_shots_l2"][:, :, column], GOLDEN["l2"][column].item()
  found = few_shot.ridge(data, shots=SHOTS, l2=l2)
  np.testing.assert_allclose(found.scores, expected, atol=1e-9)
  np.testing.assert_allclose(found.mean, expected.mean(axis=0))
  np.testing.assert_allclose(found.std, expected.std(axis=0) * np.sqrt(3 / 2))


def test_ridge_scores_are_the_same_from_either_gram_matrix():
  for count in SHOTS:
    rows = few_shot.draw(TRAIN.label, 8, count, 0).ravel()
    scores = few_shot.ridge_scores(TRAIN.features[rows], TRAIN.label[rows], TEST.features[:20], 8, (1.0, few_shot.L2))
    np.testing.assert_allclose(scores[1], GOLDEN[f"seed0/scores_{count}shot_first20"], atol=1e-9)
  assert 8 * SHOTS[0] < 49 < 8 * SHOTS[-1]  # fewer rows than columns, and more


@pytest.mark.slow
def test_logistic_regression_equals_scikit_learns_optimum(data):
  found = few_shot.logistic(data, shots=SHOTS)
  golden = reference.below(GOLDEN, "logistic_C0.316/")
  assert (golden["smallest_margin"] > 1e-4).all()
  np.testing.assert_allclose(found.scores, golden["test_top1_seed_shots"], atol=1e-9)


@pytest.mark.slow
def test_the_strength_is_chosen_on_as_many_further_rows(data, monkeypatch):
  seen = []
  sweep = few_shot.linear_probe.sweep

  def spy(data, **options):
    seen.append((data.train, data.val))
    return sweep(data, **options)

  monkeypatch.setattr(few_shot.linear_probe, "sweep", spy)
  found = few_shot.logistic(data, shots=(2, 5), seeds=(0,), strength=None)
  drawn = few_shot.draw(TRAIN.label, 8, 10, 0)
  for (train, val), count in zip(seen, (2, 5), strict=True):
    for rows, expected in ((train, drawn[:, :count]), (val, drawn[:, count : 2 * count])):
      used = rows.label >= 0
      np.testing.assert_array_equal(rows.features[used], TRAIN.features[expected.ravel()])
  assert (found.strengths > 0).all()
  assert (found.scores > 0.3).all()


def test_draws_are_those_of_the_reference():
  for seed in (0, 1, 2):
    np.testing.assert_array_equal(few_shot.draw(TRAIN.label, 8, 25, seed), GOLDEN[f"seed{seed}/index_of_most_shots"])
  with pytest.raises(ValueError, match="class 1 has 50 training rows; expected at least 60"):
    few_shot.draw(TRAIN.label, 8, 60, 0)


def test_the_crossing_is_linear_in_the_logarithm_of_shots():
  shots, scores = (1, 2, 4, 8), np.array([0.2, 0.3, 0.5, 0.7])
  assert few_shot.crossing(shots, scores, 0.4) == pytest.approx(2**1.5)
  assert few_shot.crossing(shots, scores, 0.5) == pytest.approx(4)
  assert few_shot.crossing(shots, scores, 0.1) == 1
  assert few_shot.crossing(shots, scores, 0.71) is None
