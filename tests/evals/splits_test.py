"""Tests of the carved validation split."""

import numpy as np

from declip_jax.evals.splits import carve


def test_last_fifth_of_each_class():
  label = np.array([1, 0, 0, 1, 1, -1, 1, 0, 1, 1, 1, 1, 1, 1, 2, 0])
  train, val = carve(label)
  rng = np.random.default_rng(0)
  zero, one = np.flatnonzero(label == 0), np.flatnonzero(label == 1)
  expected = [zero[rng.permutation(4)][-1], *one[rng.permutation(10)][-2:]]  # 20 % of 4, but at least one; of 10
  assert val.tolist() == sorted(expected)
  assert sorted([*train, *val]) == np.flatnonzero(label >= 0).tolist()  # without the image that has no class
  assert 14 in train  # the only image of class 2


def test_split_is_fixed():
  train, val = carve(np.repeat(np.arange(3), 10))
  assert val.tolist() == [1, 8, 11, 15, 23, 27]
  again = carve(np.repeat(np.arange(3), 10))
  assert (again[0] == train).all()
  assert (again[1] == val).all()


def test_frames_of_a_track_stay_together():
  label, track = np.repeat([0, 1], 30), np.repeat(np.arange(10), 6)  # five tracks per class
  train, val = carve(label, track)
  assert len(val) == 12  # one track of each class
  assert not set(track[train]) & set(track[val])
  assert sorted(label[val]) == [0] * 6 + [1] * 6
  rng = np.random.default_rng(0)
  assert sorted(set(track[val])) == [rng.permutation(5)[-1], 5 + rng.permutation(5)[-1]]


def test_number_per_class():
  train, val = carve(np.repeat(np.arange(3), [100, 10, 2]), per_class=5)
  assert np.bincount(np.repeat(np.arange(3), [100, 10, 2])[val]).tolist() == [5, 5, 1]  # one image remains to train on
  assert len(train) == 112 - 11


def test_without_images():
  train, val = carve(np.zeros(0, np.int64))
  assert len(train) == len(val) == 0
