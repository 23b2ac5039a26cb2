"""Tests of `declip_jax.evals.overlap` against scikit-learn and SciPy, loops, and synthetic images with known copies."""

import cv2
import numpy as np
import pytest
import references as reference

from declip_jax.data.images import decode, eval_view
from declip_jax.evals import overlap
from declip_jax.evals.intervals import bonferroni
from declip_jax.evals.overlap import Copies, Nearest, calibration, choose_threshold, clusters, dct_hash, effect, roc


@pytest.fixture(scope="module")
def golden():
  return reference.load("overlap")


@pytest.fixture(params=[(4096, 8192), (64, 300)], ids=["one block", "blocks"])
def blocks(request, monkeypatch):
  monkeypatch.setattr(overlap, "_QUERIES", request.param[0])
  monkeypatch.setattr(overlap, "_ROWS", request.param[1])


def test_nearest_equals_the_reference_for_any_blocks_and_shards(golden, blocks):
  train, query = golden["train"], golden["evaluation"]
  for shards in ([train], [train[:7].astype(np.float16), train[7:7], train[7:1000], 3 * train[1000:]]):
    found = overlap.nearest(query, shards)
    assert found.index.shape == found.cosine.shape == (270, 5)
    np.testing.assert_array_equal(found.index[:, 0], golden["nearest_index"])
    np.testing.assert_allclose(found.cosine[:, 0], golden["nearest_cosine"], atol=1e-6)
    np.testing.assert_allclose(found.cosine[:, 0] - found.cosine[:, 1], golden["gap_to_second"], atol=1e-6)
  cosine = query @ train.T / np.linalg.norm(query, axis=1)[:, None] / np.linalg.norm(train, axis=1)
  np.testing.assert_array_equal(found.index, np.argsort(-cosine, axis=1)[:, :5])


def test_searches_of_several_hosts_are_joined(golden):
  train, query = golden["train"], golden["evaluation"]
  parts = [overlap.nearest(query, [train[:700]]), overlap.nearest(query, [train[700:]], first=700)]
  found, expected = overlap.joined(parts), overlap.nearest(query, [train])
  np.testing.assert_array_equal(found.index, expected.index)
  np.testing.assert_array_equal(found.cosine, expected.cosine)


def test_ties_missing_rows_and_nans():
  rows = np.array([[1, 0], [2, 0], [0, 1], [np.nan, 1], [1, 0]], np.float32)
  found = overlap.nearest(rows, [rows], k=5, within=True)
  assert found.index.tolist()[:3] == [[1, 4, 2, -1, -1], [0, 4, 2, -1, -1], [0, 1, 4, -1, -1]]
  assert found.index[3].tolist() == [-1] * 5  # the query with NaN
  assert found.cosine[0].tolist() == [1, 1, 0, -np.inf, -np.inf]
  assert overlap.nearest(rows, [], k=2).index.tolist() == [[-1, -1]] * 5


def test_roc_and_threshold_equal_scikit_learn(golden):
  rates = roc(golden["is_duplicate"], golden["nearest_cosine"])
  # scikit-learn leaves out thresholds between two others on a line.
  place = [0, *np.searchsorted(-rates.threshold, -golden["roc/threshold"][1:])]
  np.testing.assert_allclose(rates.threshold[place][1:], golden["roc/threshold"][1:])
  np.testing.assert_allclose(rates.false_positive_rate[place], golden["roc/fpr"])
  np.testing.assert_allclose(rates.true_positive_rate[place], golden["roc/tpr"])
  chosen = choose_threshold(rates, float(golden["threshold/least_precision"]))
  np.testing.assert_allclose(chosen.cosine, golden["threshold/cosine"])
  np.testing.assert_allclose(chosen.recall, golden["threshold/recall"])
  assert chosen.precision >= golden["threshold/least_precision"]


def test_a_detector_that_cannot_tell_copies_has_no_threshold():
  with pytest.raises(ValueError, match=r"no threshold has a precision of 0.99: the largest is 0.5000"):
    choose_threshold(calibration(np.ones(5), np.ones(5)))
  with pytest.raises(ValueError, match="all 3 examples are positive"):
    roc(np.ones(3, bool), np.arange(3.0))
  chosen = choose_threshold(calibration(np.array([0.9, 0.8, 0.4]), np.array([0.5, 0.1])))
  assert (chosen.cosine, chosen.precision, chosen.recall) == (0.8, 1.0, 2 / 3)


def test_effect_equals_scipy(golden):
  overlaps = golden["nearest_cosine"] >= golden["threshold/cosine"]
  np.testing.assert_array_equal(overlaps, golden["report/overlap"])
  found = effect(overlaps, golden["correct"].astype(bool))
  names = ("contamination", "accuracy_all", "accuracy_clean", "accuracy_overlap", "all_minus_clean")
  for name in (*names, "overlap_minus_clean"):
    np.testing.assert_allclose(found[name], golden[f"report/{name}"], err_msg=name)
  np.testing.assert_allclose(found["p"], golden["report/p_one_sided_greater"])
  interval = [found["accuracy_overlap_lower"], found["accuracy_overlap_upper"]]
  np.testing.assert_allclose(interval, golden["report/overlap_clopper_pearson_99.5"], atol=1e-8)


def test_many_sets_equal_scipy(golden):
  sets = reference.below(golden, "sets/")
  found = []
  columns = [sets[name] for name in ("n", "n_overlap", "correct_clean", "correct_overlap")]
  for n, near, clean, right in np.stack(columns, axis=1):
    overlaps, correct = np.arange(n) < near, np.zeros(n, bool)
    correct[:right], correct[near : near + clean] = True, True
    found.append(effect(overlaps, correct))
  p = np.array([own["p"] for own in found])
  np.testing.assert_allclose(p, sets["p"], rtol=1e-9)
  np.testing.assert_array_equal(bonferroni(p) < 0.05, sets["significant_after_bonferroni_0.05"])
  np.testing.assert_allclose([own.get("all_minus_clean", 0) for own in found], sets["all_minus_clean"])
  shares = [own["contamination"] for own in found]
  np.testing.assert_allclose([np.median(shares), np.mean(shares)], sets["median_and_mean_contamination"])
  assert "all_minus_clean" not in found[0]  # this set has no overlap


def test_everything_overlaps_or_nothing():
  correct = np.array([True, False])
  assert effect(np.ones(2, bool), correct) == {
    "contamination": 1.0,
    "p": 1.0,
    "accuracy_all": 0.5,
    "accuracy_overlap": 0.5,
  }
  assert effect(np.zeros(2, bool), correct) == {
    "contamination": 0.0,
    "p": 1.0,
    "accuracy_all": 0.5,
    "accuracy_clean": 0.5,
  }
  with pytest.raises(ValueError, match="no image"):
    effect(np.zeros(0, bool), np.zeros(0, bool))


def test_clusters_are_chains_of_near_duplicates():
  index = np.array([[1], [2], [1], [4], [3], [0]])
  cosine = np.array([[0.9], [0.95], [0.95], [1.0], [1.0], [0.3]])
  cluster = clusters(Nearest(index, cosine), 0.9)
  assert [np.flatnonzero(cluster == number).tolist() for number in range(3)] == [[0, 1, 2], [3, 4], [5]]
  assert overlap.cluster_summary(cluster) == {"clusters": 2, "duplicate_share": 0.5}


def picture(seed):
  """Random colours of all scales, as in photographs."""
  rng, pixels = np.random.default_rng(seed), np.full((80, 60, 3), 128.0)
  for cells in (2, 4, 8, 16):
    coarse = rng.normal(scale=128 / cells**0.5, size=(cells, cells, 3))
    pixels += cv2.resize(coarse, (60, 80), interpolation=cv2.INTER_CUBIC)
  return np.clip(pixels, 0, 255).astype(np.uint8)


class Pictures(list):
  """Pictures by their seed."""

  name, classnames, skipped, left_out, stamp = "pictures", (), {}, {}, "1"

  def __getitem__(self, index):
    return {"image": picture(super().__getitem__(index)), "captions": (), "label": -1, "id": str(index)}


def hashes(images):
  return dct_hash(np.stack([eval_view(image, overlap.HASH_VIEW) for image in images]))


def test_the_hash_finds_images_that_were_resized_and_encoded_again():
  """Five of 40 test images are in the training set so."""
  test = [picture(seed) for seed in range(40)]
  smaller = [cv2.resize(image, (36, 48), interpolation=cv2.INTER_AREA) for image in test[:5]]
  again = [cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 50])[1], 1) for image in smaller]
  found = overlap.nearest(hashes(test), [hashes([picture(seed) for seed in range(100, 400)]), hashes(again)])
  np.testing.assert_array_equal(found.cosine[:, 0] >= overlap.HASH_THRESHOLD, np.arange(40) < 5)
  np.testing.assert_array_equal(found.index[:5, 0], 300 + np.arange(5))


def test_calibration_needs_no_labels():
  test = Pictures(range(40))
  query, copies = (hashes([source[index]["image"] for index in range(40)]) for source in (test, Copies(test)))
  strangers = overlap.nearest(query, [query], within=True).cosine[:, 0]
  rates = calibration((query * copies).sum(axis=1), strangers)
  chosen = choose_threshold(rates)
  assert chosen.precision >= 0.99
  assert 0.2 < chosen.recall < 0.9  # the hash does not recognise all crops
  assert (32 * chosen.cosine) % 1 == 0
  assert overlap.at(rates, chosen.cosine) == chosen
  assert overlap.at(rates, 0.999).recall < chosen.recall < overlap.at(rates, -1.0).recall == 1
  assert overlap.at(rates, 2.0) == overlap.Threshold(2.0, 1.0, 0.0)


def test_copies_depend_on_their_seed_and_index_only():
  source = Pictures([1, 2])
  first, again, other = Copies(source), Copies(source), Copies(source, seed=1)
  assert (len(first), first[1]["image"]) == (2, again[1]["image"])
  assert first[1]["image"] != other[1]["image"]
  assert first[1]["id"] == "1"
  assert first.stamp != other.stamp
  height, width, _ = decode(first[0]["image"]).shape
  assert height == width
  assert 30 <= height <= 60


def test_hashes_have_64_signs_and_known_distances():
  images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
  images[1] = 255 - images[0]
  found = dct_hash(images)
  assert found.shape == (3, 64)
  np.testing.assert_array_equal(np.abs(found), 1 / 8)
  distance = (np.sign(found[0]) != np.sign(found)).sum(axis=1)
  np.testing.assert_allclose(found[0] @ found.T, 1 - distance / 32)
  assert distance[1] > 58  # a negative has the opposite signs, except that of the mean and of the median
  flat = dct_hash(np.stack([np.full((32, 32, 3), grey, np.uint8) for grey in (3, 77, 250)]))
  np.testing.assert_array_equal(flat, flat[:1].repeat(3, axis=0))
