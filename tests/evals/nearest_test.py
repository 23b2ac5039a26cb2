"""Tests of `declip_jax.evals.nearest` against DINO's classifier, on 8 devices."""

import numpy as np
import pytest
import references as reference

from declip_jax.evals import nearest
from declip_jax.evals.rows import Labelled
from declip_jax.sharding import make_mesh

GOLDEN = reference.below(reference.load("probes"), "few/")
TRAIN, TEST = (Labelled(GOLDEN[f"X_{name}"], GOLDEN[f"y_{name}"]) for name in ("train", "test"))


@pytest.fixture(scope="module")
def mesh():
  return make_mesh(4, 2)


def top(scores, label, count):
  return np.mean((np.argsort(-scores, axis=1, kind="stable")[:, :count] == label[:, None]).any(axis=1))


def test_votes_equal_dinos(mesh, monkeypatch):
  monkeypatch.setattr(nearest, "_SIMILARITIES", 8 * 7 * 128)  # several chunks of queries
  votes, label = nearest.knn(TRAIN, TEST, classes=8, mesh=mesh, neighbours=(5, 20, 1000))
  assert sorted(votes) == [5, 20]  # there are fewer than 1000 rows
  for count, vote in votes.items():
    weighted, golden = vote(), reference.below(GOLDEN, f"knn/k{count}/")
    np.testing.assert_array_equal(weighted.argmax(axis=1), golden["weighted_pred"])
    for size in (1, 5):
      assert top(weighted, label, size) == pytest.approx(golden[f"weighted_test_top{size}"])


def test_neighbours_are_those_of_a_full_search(mesh):
  unit = [x / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True) for x in (TEST.features, TRAIN.features)]
  cosine = unit[0] @ unit[1].T
  used = np.flatnonzero(TRAIN.label != 3)
  found = nearest.nearest(TEST.features, TRAIN.features, 20, mesh, used)
  order = used[np.argsort(-cosine[:, used], axis=1, kind="stable")[:, :20]]
  np.testing.assert_array_equal(found.index, order)
  np.testing.assert_allclose(found.cosine, np.take_along_axis(cosine, order, axis=1), atol=1e-6)


def test_votes_of_one_class_are_added():
  cosine, label = np.array([[0.9, 0.8, 0.7, 0.6, 0.5]], np.float32), np.array([[2, 1, 1, 0, 2]])
  votes = nearest._vote(cosine, label, 4, 0.07)
  np.testing.assert_allclose(votes[0, 1], np.exp(-0.1 / 0.07) + np.exp(-0.2 / 0.07), rtol=1e-6)
  assert np.argsort(-votes[0]).tolist() == [2, 1, 0, 3]
  assert votes[0, 3] == 0


def test_votes_are_finite_at_any_temperature():
  cosine, label = np.array([[0.99, 0.98, 0.97], [-0.9, -0.91, -0.92]], np.float32), np.array([[1, 0, 0], [0, 1, 1]])
  for temperature in (1e-6, 1e-3, 0.07, 1e6):
    votes = nearest._vote(cosine, label, 2, temperature)
    assert np.isfinite(votes).all()
    assert (votes.max(axis=1) > 0).all()
    assert votes.argmax(axis=1).tolist() == ([0, 1] if temperature > 0.05 else [1, 0])  # one vote or two


def test_nearest_means_of_few_shots_equal_the_reference():
  from declip_jax.evals.few_shot import draw

  for row, seed in enumerate((0, 1, 2)):
    drawn = draw(TRAIN.label, 8, 25, seed)
    for column, count in enumerate(GOLDEN["shots"]):
      index = drawn[:, :count].ravel()
      scores, label = nearest.nearest_mean(Labelled(TRAIN.features[index], TRAIN.label[index]), TEST, classes=8)
      expected = GOLDEN["nearest_mean_cosine/test_top1_seed_shots"][row, column]
      assert np.mean(scores.argmax(axis=1) == label) == pytest.approx(expected)


def test_a_class_without_training_data_has_no_mean():
  kept = TRAIN.label != 2
  scores, _ = nearest.nearest_mean(Labelled(TRAIN.features[kept], TRAIN.label[kept]), TEST, classes=8)
  assert (scores[:, 2] == -np.inf).all()
  assert np.isfinite(np.delete(scores, 2, axis=1)).all()


def test_unusable_splits_are_rejected(mesh):
  few = Labelled(TRAIN.features[:4], TRAIN.label[:4])
  with pytest.raises(ValueError, match="4 labelled rows; expected at least 10"):
    nearest.knn(few, TEST, classes=8, mesh=mesh)
  with pytest.raises(ValueError, match="several"):
    nearest.nearest_mean(TRAIN._replace(label=np.eye(8, dtype=int)[TRAIN.label]), TEST, classes=8)
